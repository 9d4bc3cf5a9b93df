"""What the package says about itself, held together: setup.cfg, environment.yml, the code and the CI script."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from dependencies import on_conda_forge, read_setup, requirements

import openmm_cgflow

# Where the module to import has another name than the package.
_MODULES = {"pyyaml": "yaml"}
_OPTIONAL = {"openmmtorch", "openmmml"}  # imported where they are asked for, or by themselves
_CONDA_ONLY = {"python", "pip", "openmm-torch"}


@pytest.fixture(scope="module")
def setup(root):
    return read_setup(root)


@pytest.fixture(scope="module")
def environment(root):
    return yaml.safe_load((root / "environment.yml").read_text())


def test_environment_follows_setup(setup, environment):
    conda = requirements("\n".join(environment["dependencies"]))
    wanted = requirements(setup["options"]["install_requires"])
    for extra in ("test", "notebooks"):
        wanted |= requirements(setup["options.extras_require"][extra])
    assert {name: version for name, version in conda.items() if name not in _CONDA_ONLY} == on_conda_forge(wanted)
    assert conda["python"] == setup["options"]["python_requires"]
    assert "openmm-torch" in conda


def test_environment_is_conda_forge_only(environment):
    assert environment["name"] == "openmm-cgflow"
    assert [channel for channel in environment["channels"] if channel != "nodefaults"] == ["conda-forge"]
    assert all(isinstance(item, str) for item in environment["dependencies"]), "a pip section"


def test_imports_are_declared(setup, root):
    used = set()
    for path in (root / "openmm_cgflow").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used.add(node.module.split(".")[0])
    used -= set(sys.stdlib_module_names) | {"openmm_cgflow"}
    declared = requirements(setup["options"]["install_requires"])
    used -= _OPTIONAL
    assert used == {_MODULES.get(name, name) for name in declared}


def test_minimum_versions(setup):
    declared = requirements(setup["options"]["install_requires"])
    # 8.5.2 is the first with a PythonForce that works with torch on CUDA.
    assert {name: declared[name] for name in ("openmm", "torch", "zuko")} == {
        "openmm": ">=8.5.2",
        "torch": ">=2.4",
        "zuko": ">=1.4",
    }
    extras = setup["options.extras_require"]
    # Before it, a PythonForce was called by another thread on CUDA, and torch then gave nan (openmm/openmm#5412).
    assert [requirements(extras[f"cuda{k}"]) for k in (12, 13)] == [{f"OpenMM-CUDA-{k}": ">=8.6.1"} for k in (12, 13)]
    assert requirements(extras["torchforce"])["torch"] == "==2.9.*"
    assert {"test", "notebooks", "torchforce", "cuda12", "cuda13"} <= set(extras)


def test_metadata(setup, root):
    metadata = setup["metadata"]
    assert metadata["license"] == "MIT"
    assert "openmm_cgflow developers" in (root / "LICENSE").read_text()
    assert metadata["version"] == "attr: openmm_cgflow._version.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", openmm_cgflow.__version__)
    assert "## [Unreleased]" in (root / "CHANGELOG.md").read_text()


def test_pyproject_holds_build_system_and_linters_only(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert set(project) == {"build-system", "tool"}
    assert set(project["tool"]) == {"ruff", "mypy"}


def test_warnings_are_errors(pytestconfig):
    assert pytestconfig.getini("filterwarnings")[0] == "error"


def test_installed_metadata():
    try:
        installed = importlib.metadata.distribution("openmm_cgflow")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert installed.version == openmm_cgflow.__version__
    commands = {entry.name: entry.value for entry in installed.entry_points if entry.group == "console_scripts"}
    assert commands == {"openmm-cgflow": "openmm_cgflow.cli:main"}


def test_the_wheel_holds_every_module_and_runs_away_from_the_tree(root, tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(root / "openmm_cgflow", source / "openmm_cgflow", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("openmm_cgflow/")}
        archive.extractall(tmp_path / "installed")
    files = {path.relative_to(source).as_posix() for path in (source / "openmm_cgflow").rglob("*") if path.is_file()}
    assert packed == files
    code = "import sys, openmm_cgflow.cli as cli; print(cli.__file__, file=sys.stderr); sys.exit(cli.main())"
    command = [sys.executable, "-c", code, "train", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert str(tmp_path / "installed") in ran.stderr and "--resume" in ran.stdout


def test_importing_is_light():
    code = "import sys, openmm_cgflow, openmm_cgflow.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "openmm", "mdtraj", "matplotlib", "numpy", "yaml", "pint"} & set(loaded)


def test_ci_script(root):
    script = root / ".ci" / "run"
    text = script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in text
    assert "mktemp -d" in text
    assert "trap" in text
    assert "pytest --cov --cov-report" in text
    assert "sphinx-build -W" in text
    # No machine's own paths or hosts.
    assert not re.search(r"https?:|(?<![\w\"}./])/(?!usr/bin/env)[a-z]+", text)
    # Settings in the smoke run exist.
    from openmm_cgflow.config import apply_overrides, validate

    settings = re.findall(r"\b(?:[a-z]+\.)[a-z_]+=\S+", text[text.index("tiny=(") : text.index("\n)")])
    assert len(settings) > 8
    tree = {"system": {"structure": "a", "forcefield": ["b"]}}
    validate(apply_overrides(tree, [item.replace("'", "") for item in settings]))

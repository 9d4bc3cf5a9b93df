"""The recipe for conda-forge, held against setup.cfg, pyproject.toml, environment.yml and the package."""

import importlib
import re
import tomllib

import pytest
import yaml
from dependencies import on_conda_forge, read_setup, requirements

import openmm_cgflow


@pytest.fixture(scope="module")
def setup(root):
    return read_setup(root)


@pytest.fixture(scope="module")
def recipe(root):
    """The recipe with its variables put in, as rattler-build does."""
    text = (root / "recipe" / "recipe.yaml").read_text()
    for name, value in yaml.safe_load(text)["context"].items():
        text = text.replace(f"${{{{ {name} }}}}", value)
    return yaml.safe_load(text)


def test_version_and_descriptions(recipe, setup):
    assert recipe["schema_version"] == 1
    assert recipe["package"] == {"name": "openmm-cgflow", "version": openmm_cgflow.__version__}
    assert recipe["about"]["summary"] == setup["metadata"]["description"]
    assert recipe["about"]["license"] == setup["metadata"]["license"]


def test_recipe_follows_setup(recipe, setup):
    run = requirements("\n".join(recipe["requirements"]["run"]))
    assert run.pop("python") == setup["options"]["python_requires"]
    assert run == on_conda_forge(requirements(setup["options"]["install_requires"]))


def test_built_with_the_oldest_python(recipe, root):
    oldest = recipe["context"]["python_min"]
    host = list(recipe["requirements"]["host"])
    host.remove(f"python {oldest}.*")
    host.remove("pip")
    build = tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]
    assert requirements("\n".join(host)) == requirements("\n".join(build))
    imports, _ = recipe["tests"]
    assert imports["python"]["python_version"] == [f"{oldest}.*", "*"]


def test_optional_packages_are_those_of_the_environment(recipe, root):
    environment = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    optional = requirements("\n".join(recipe["requirements"]["run_constraints"]))
    assert optional.items() <= requirements("\n".join(environment)).items()


def test_commands_are_those_of_setup(recipe, setup):
    wanted = setup["options.entry_points"]["console_scripts"].split("\n")
    assert recipe["build"]["noarch"] == "python"
    assert recipe["build"]["python"]["entry_points"] == [line.strip() for line in wanted if line.strip()]


def test_what_the_recipe_tests_exists(recipe):
    imports, script = recipe["tests"]
    for name in imports["python"]["imports"]:
        importlib.import_module(name)
    (names,) = re.findall(r"from openmm_cgflow import ([\w, ]+)", "\n".join(script["script"]))
    assert set(names.split(", ")) <= set(openmm_cgflow.__all__)


def test_no_folder_of_the_package_is_ignored(root):
    """Git would leave its new files out of a commit, and rattler-build all of it out of the source."""
    anywhere = re.findall(r"^([^/\n]+)/$", (root / ".gitignore").read_text(), re.MULTILINE)
    folders = {path.parent.name for folder in ("openmm_cgflow", "tests") for path in (root / folder).rglob("*.py")}
    assert {"openmm_cgflow", "tests"} <= folders
    assert not folders & set(anywhere)

"""Citation, changelog, guide for contributors and workflows, held against the package and the other files they name."""

import re
import shlex
import subprocess
import sys

import pytest
import yaml
from dependencies import read_setup, requirements

import openmm_cgflow

_PROVIDED_BY = {"sphinx-build": "sphinx"}


@pytest.fixture(scope="module")
def setup(root):
    return read_setup(root)


@pytest.fixture(scope="module")
def workflows(root):
    return {path.name: yaml.safe_load(path.read_text()) for path in (root / ".github" / "workflows").glob("*.yml")}


@pytest.fixture(scope="module")
def jobs(workflows):
    """Every job by its name."""
    return {name: job for workflow in workflows.values() for name, job in workflow["jobs"].items()}


def _runs(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_citation(root):
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == openmm_cgflow.__version__
    assert f"## [{citation['version']}] - {citation['date-released']}\n" in (root / "CHANGELOG.md").read_text()
    assert citation["authors"] == [{"name": "openmm_cgflow developers"}]
    assert citation["license"] == "MIT"
    readme = " ".join((root / "README.md").read_text().split())
    paper = citation["preferred-citation"]
    assert paper["title"] in readme and paper["url"] in readme
    assert all(author["family-names"] in readme for author in paper["authors"])


def test_changelog_has_versions_in_order(root):
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert [name for name, _ in headings[:2]] == ["Unreleased", openmm_cgflow.__version__]
    dates = [date for _, date in headings[1:]]
    assert all(dates) and dates == sorted(dates, reverse=True)


def test_contributing_names_what_exists(root):
    text = (root / "CONTRIBUTING.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    paths = re.findall(r"(?<!\S)(?:tests|benchmarks|\.ci|recipe|openmm_cgflow)/[\w./]+", text.replace("`", " "))
    assert links and paths
    assert [path for path in links + paths if not (root / path).exists()] == []


def test_workflows_ask_for_little(workflows):
    assert set(workflows) == {"checks.yml", "conda.yml", "nightly.yml"}
    for name, workflow in workflows.items():
        assert workflow["permissions"] == {"contents": "read"}, name
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] <= 180, name
            actions = [step["uses"] for step in job["steps"] if "uses" in step]
            assert all(re.fullmatch(r"(actions|mamba-org)/[a-z-]+@v\d+", action) for action in actions), actions


def test_workflows_run_what_they_install(jobs, setup, root):
    extras = setup["options.extras_require"]
    conda = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    for name, job in jobs.items():
        available = {"pip"}
        for step in job["steps"]:
            inputs = step.get("with", {})
            available |= set(inputs.get("create-args", "").split())
            if inputs.get("environment-file") == "environment.yml":
                available |= set(requirements("\n".join(conda)))
            if "run" not in step:
                continue
            assert "http" not in step["run"]
            command, *arguments = shlex.split(step["run"])
            assert _PROVIDED_BY.get(command, command) in available, (name, command)
            if command == "pip":
                for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
                    for part in extra.split(","):
                        available |= {package.lower() for package in requirements(extras[part])}


def test_workflows_run_what_the_ci_script_runs(jobs, root):
    script = (root / ".ci" / "run").read_text()
    lines = re.sub(r"^COVERAGE_FILE=\S+ | --cov\S*", "", script, flags=re.M).splitlines()  # it measures coverage, too
    for name in ("lint", "tests"):
        install, *checks = _runs(jobs[name])
        assert install == "pip install '.[test]'"
        assert checks and set(checks) <= set(lines), name
    assert _runs(jobs["slow"])[-1] == "pytest -m slow"


def test_workflows_test_every_declared_python(jobs, setup):
    declared = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    matrix = jobs["tests"]["strategy"]["matrix"]
    assert matrix["python"] == declared
    assert matrix["os"] == ["ubuntu-latest", "macos-latest"]
    for job in jobs.values():
        for step in job["steps"]:
            assert step.get("with", {}).get("python-version", declared[-1]) in (declared[-1], "${{ matrix.python }}")


def test_issue_forms(root):
    for path in (root / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert form["name"] and form["description"]
        names = [field["id"] for field in form["body"]]
        assert len(names) == len(set(names)) and all(field["attributes"]["label"] for field in form["body"])


def test_commands_named_for_contributors_exist(root):
    options = [sys.executable, "-m", "openmm_cgflow", "--help"]
    known = subprocess.run(options, capture_output=True, text=True, check=True).stdout
    files = [*(root / ".github").rglob("*.yml"), *(root / ".github").rglob("*.md"), root / "CONTRIBUTING.md"]
    named = {word for path in files for word in re.findall(r"openmm-cgflow ([a-z-]+)", path.read_text())}
    assert named
    assert [word for word in named if not re.search(rf"(?<![\w-]){word}(?![\w-])", known)] == []

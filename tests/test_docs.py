"""README and documentation: what they show runs, what they name exists. Sphinx itself runs in CI."""

import ast
import csv
import importlib
import importlib.util
import re
import shlex
import shutil

import pytest
from settings import TINY

import openmm_cgflow
from openmm_cgflow import cli
from openmm_cgflow.config import Config, apply_overrides
from openmm_cgflow.settings import Section

_FILES = {"dcd", "colvar", "xml"}  # samples.dcd is a file, samples.n_samples a setting


@pytest.fixture(scope="module")
def pages(root):
    """Text of the README and of every page, by name."""
    paths = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return {path.relative_to(root).as_posix(): path.read_text() for path in paths}


@pytest.fixture(scope="module")
def shown(tmp_path_factory, systems):
    """A folder where the README's Python blocks have run as they stand, with the smallest settings as defaults.

    Afterwards it has what the other pages name: a run ``runs/ala2`` and a trajectory ``md.dcd``.
    """
    folder = tmp_path_factory.mktemp("shown")
    shutil.copy(systems / "alanine_dipeptide/alanine_dipeptide.pdb", folder / "molecule.pdb")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(openmm_cgflow, "Config", lambda **sections: Config(**apply_overrides(sections, TINY)))
        run_blocks((systems.parent / "README.md").read_text())
    shutil.copytree(folder / "runs/python", folder / "runs/ala2")
    shutil.copy(folder / "runs/python/samples.dcd", folder / "md.dcd")
    return folder


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_blocks(text):
    names = {}
    for block in blocks(text, "python"):
        exec(compile(block, "<page>", "exec"), names)
    return names


def test_readme_is_short(pages):
    assert len(pages["README.md"].splitlines()) <= 130


def test_links_lead_to_files(root, pages):
    for name, text in pages.items():
        links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"|^```\{image\} (\S+)", text, re.MULTILINE)
        local = {link for found in links for link in found if link and ":" not in link and not link.startswith("#")}
        assert name != "README.md" or len(local) > 10
        for link in local:
            assert ((root / name).parent / link.partition("#")[0]).is_file(), f"{name}: {link}"


def test_public_names_are_in_the_api(pages):
    for name in openmm_cgflow.__all__:
        assert re.search(rf"(:: |openmm_cgflow\.){name}\b", pages["docs/api.md"]), name


def settings_of(model, prefix=""):
    for name, field in model.model_fields.items():
        path = prefix + name
        yield path
        for item in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(item, type) and issubclass(item, Section):
                yield from settings_of(item, path + ".")


def test_settings_that_are_named_exist(pages):
    known = set(settings_of(Config))
    sections = {name.partition(".")[0] for name in known if "." in name}
    assert {"chains.n_replicas", "system.potential.options"} <= known
    count = 0
    for name, text in pages.items():
        quoted = re.findall(r"[`'\"\s<](\w+(?:\.\w+)+)(?=[`=>: ])", text)
        named = {path for path in quoted if path.split(".")[0] in sections and path.split(".")[-1] not in _FILES}
        in_python = "\n".join(blocks(text, "python"))
        named = {path for path in named if path not in in_python}  # attributes of a variable of that name
        count += len(named)
        assert named <= known, f"{name}: {sorted(named - known)}"
        assert not re.search(r"\b(sampler|sampling)\.\w+|coordinates\.box\b", text), f"{name}: an old name"
    assert count > 40


def test_modules_that_are_named_exist(pages):
    for name, text in pages.items():
        for path in set(re.findall(r"`(openmm_cgflow(?:\.\w+)+)`", text)):
            assert exists(path), f"{name}: {path}"


def exists(path):
    """Whether a module has that name, or something in a module."""
    module, names = path, []
    while not is_module(module):
        module, _, last = module.rpartition(".")
        names.insert(0, last)
    found = importlib.import_module(module)
    for name in names:
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


def is_module(path):
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:
        return False


def commands(text):
    """Words of every ``openmm-cgflow`` command that stands in a block of its own, its comment left out."""
    lines = "\n".join([*blocks(text, "bash"), *re.findall(r"^    (.+)$", text, re.MULTILINE)])
    for line in lines.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words[:1] == ["openmm-cgflow"]:
                yield words[1:]


def test_commands_have_the_options_that_are_shown(pages, capsys):
    helps = {}
    count = 0
    for name, text in pages.items():
        for verb, *words in commands(text):
            if verb not in helps:
                with pytest.raises(SystemExit) as end:
                    cli.main([verb, "--help"])
                assert end.value.code == 0, f"{name}: {verb}"
                helps[verb] = capsys.readouterr().out
            for option in (word for word in words if word.startswith("-")):
                count += 1
                assert re.search(rf"(?<![\w-]){option}\b", helps[verb]), f"{name}: {verb} {option}"
    assert count > 10 and {"init", "check", "train", "sample", "evaluate", "export", "info"} <= helps.keys()


def test_python_blocks_are_valid(pages):
    found = {name: blocks(text, "python") for name, text in pages.items()}
    assert found["README.md"] and found["docs/python.md"] and found["docs/openmm.md"]
    for name, sources in found.items():
        for source in sources:
            compile(source, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_readme_runs(shown):
    assert (shown / "runs/python/samples.dcd").is_file()


@pytest.mark.parametrize("page", ["docs/python.md", "docs/openmm.md"])
def test_blocks_of_a_page_run(page, pages, shown, monkeypatch):
    monkeypatch.chdir(shown)
    monkeypatch.setattr(openmm_cgflow, "train", lambda *_, **__: None)  # once is enough
    names = run_blocks(pages[page])
    assert "model" in names


def test_potential_of_the_page(pages, shown):
    names = {}
    exec(compile(blocks(pages["docs/potentials.md"], "python")[0], "<page>", "exec"), names)
    torch = names["torch"]
    xyz = torch.zeros((5, 3), dtype=torch.float64)
    xyz[:, 0] = 0.15 * torch.arange(5)
    xyz[4] += 0.01
    module = names["factory"](constant=200.0)
    assert module(xyz).shape == () and module(xyz.expand(2, -1, -1)).shape == (2,)
    assert float(module(xyz[:4])) == pytest.approx(0) and float(module(xyz)) > 0


def test_files_of_a_run_are_described(pages, shown):
    page = pages["docs/run_directory.md"]
    for path in (shown / "runs/python").iterdir():
        assert f"`{path.name}" in page, path.name


def test_columns_of_metrics_are_described(pages, shown):
    with (shown / "runs/python/metrics.csv").open(newline="") as file:
        columns = next(csv.reader(file))
    for column in columns:
        assert f"`{column}`" in pages["docs/judging.md"], column


def rows(text, heading):
    """Cells of the table whose first line begins with the heading."""
    table = re.search(rf"^\| ?{heading} .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def test_folders_are_those_of_the_house(root, pages):
    from house_rules import MAY_IMPORT

    package, page = root / "openmm_cgflow", pages["docs/developing.md"]
    told = {folder.strip("`"): purpose for folder, purpose in rows(page, r"folder \| what")}
    assert set(told) == {path.parent.relative_to(package).as_posix() for path in package.rglob("*/__init__.py")}
    for folder, purpose in told.items():
        docstring = ast.get_docstring(ast.parse((package / folder / "__init__.py").read_text()))
        assert purpose == docstring.split("\n\n")[0]
    allowed = {folder.strip("`"): names for folder, names in rows(page, r"folder \| may import")}
    assert set(allowed) == {folder for folder in told if "/" not in folder}
    for folder, names in allowed.items():
        assert set(names.replace("nothing but the root", "").split(", ")) - {""} == set(MAY_IMPORT[folder].split())


def test_import_graph_is_the_one_that_was_printed(root, pages):
    printed = (root / "benchmarks/results/import_graph.txt").read_text().split("import_graph.py\n")
    for label, *numbers in rows(pages["docs/developing.md"], r"\| before"):
        name = label.partition(",")[0] if "climbs" in label else label
        for number, part in zip(numbers, printed, strict=True):
            line = re.search(rf"^ *{re.escape(name)}  +(.*)$", part, re.MULTILINE)[1]
            told, there = re.findall(r"\d+", number), re.findall(r"\d+", line)
            there = there[:3] if "folders:" in label else there  # beside them stand the modules
            assert there[-len(told) :] == told, label

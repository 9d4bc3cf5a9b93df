import math
import re
from pathlib import Path

import pytest
import yaml
from openmm import unit

from openmm_cgflow.config import Config, apply_overrides, dump_config, free_settings, load_config, template, validate
from openmm_cgflow.describe import describe, find_setting
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.settings import Mark, Section
from openmm_cgflow.units import parse_quantity

_MINIMAL = {"system": {"structure": "m.pdb", "forcefield": ["amber99sbildn.xml"]}}


def _with(**sections):
    return {**_MINIMAL, **sections}


@pytest.mark.parametrize(
    ("value", "target", "expected"),
    [
        (300, "K", 300.0),
        ("300 K", "K", 300.0),
        ("27 degC", "K", 300.15),
        ("1 fs", "ps", 0.001),
        ("0.5", "ps", 0.5),
        ("10 /ps", "1/ps", 10.0),
        ("10/ps", "1/ps", 10.0),
        ("0.05 1/fs", "1/ps", 50.0),
        ("4 amu", "Da", 4.0),
        ("2 min", "s", 120.0),
        (2 * unit.femtosecond, "ps", 0.002),
        (1 / unit.femtosecond, "1/ps", 1000.0),
        (310 * unit.kelvin, "K", 310.0),
        ("6 angstrom", "nm", 0.6),
        (6 * unit.angstrom, "nm", 0.6),
        ("1e4 kJ/mol/nm", "kJ/mol/nm", 1e4),
        ("0.05 kT", "kT", 0.05),
    ],
)
def test_quantities(value, target, expected):
    assert math.isclose(parse_quantity(value, target), expected, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("value", "target"),
    [
        ("300 ps", "K"),
        ("1 fs", "K"),
        ("fast", "ps"),
        ("", "ps"),
        (True, "K"),
        (1 * unit.nanometer, "ps"),
        (None, "K"),
        ("0.1 kJ/mol", "kT"),
        (1 * unit.kilojoule_per_mole, "kT"),
    ],
)
def test_wrong_quantities(value, target):
    with pytest.raises(ValueError, match="expected"):
        parse_quantity(value, target)


def test_units_reach_the_settings():
    config = validate(
        _with(
            temperature="350 K",
            chains={"timestep": "0.5 fs", "friction": 20 / unit.picosecond, "hydrogen_mass": "3 Da"},
            training={"checkpoint_interval": "2 min"},
            tempering={"schedule": "list", "temperatures": ["1000 K", 500]},
        )
    )
    assert config.temperature == 350
    assert math.isclose(config.chains.timestep, 0.0005)
    assert config.chains.friction == 20
    assert config.chains.hydrogen_mass == 3
    assert config.training.checkpoint_interval == 120
    assert config.tempering.temperatures == [1000, 500]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (_with(chains={"n_replica": 4}), ["chains.n_replica", "did you mean 'n_replicas'?"]),
        (_with(temprature=300), ["temprature", "did you mean 'temperature'?"]),
        (_with(flow={"zzz": 1}), ["flow.zzz", "known keys: n_layers"]),
        (_with(chains={"timestep": "1 K"}), ["chains.timestep", "quantity in ps", "1 K"]),
        (_with(chains={"timestep": -1}), ["chains.timestep", "greater than 0"]),
        (_with(temperature="nan"), ["temperature"]),
        (_with(tempering={"schedule": "fast"}), ["tempering.schedule", "adaptive"]),
        (_with(training={"method": "forward_kl"}), ["training.method", "'pmf', 'reverse_kl' or 'joint'"]),
        (_with(coordinates={"peptide_bonds": "cis"}), ["coordinates.peptide_bonds", "'keep' or 'sample'"]),
        (_with(coordinates="cartesian"), ["coordinates: cartesian", "training.method", "reverse_kl"]),
        (_with(chains={"n_frames": 1}), ["chains.n_frames", "training.method pmf", "at least 2"]),
        (_with(flow={"hidden_features": [64, 0]}), ["flow.hidden_features", "greater than 0"]),
        (_with(pmf={"n_members": 1}), ["pmf.n_members", "greater than or equal to 2"]),
        (_with(pmf={"n_updtaes": 1}), ["pmf.n_updtaes", "did you mean 'n_updates'?"]),
        (_with(stopping={"ess": 1.0}), ["stopping.ess", "less than 1"]),
        (_with(stopping={"max_round": 3}), ["stopping.max_round", "did you mean 'max_rounds'?"]),
        ({"system": {"forcefield": ["a.xml"]}}, ["system.structure", "required"]),
        ({"system": {"structure": "m.pdb"}}, ["system", "exactly one of forcefield"]),
        (_with(partition={"slow": 3.5}), ["partition.slow: got 3.5, expected text or list of whole numbers"]),
        (_with(stopping={"free_energy_error": "0.1 kJ/mol"}), ["stopping.free_energy_error", "quantity in kT"]),
        (
            {"system": {"structure": "m.pdb", "potential": {"python": "a"}}},
            ["system.potential.python", "written as module:function"],
        ),
        ({"system": {"structure": "m.pdb", "potential": {"pyton": "a:b"}}}, ["system.potential.pyton", "'python'"]),
        ({"system": {"structure": "m.pdb", "forcefield": ["a"], "system_xml": "b"}}, ["exactly one of forcefield"]),
        (
            {"system": {"structure": "m.pdb", "forcefield": ["a"], "implicit_solvent": "obc2"}},
            ["implicit_solvent goes with topology"],
        ),
    ],
)
def test_wrong_settings_are_named(tree, words):
    with pytest.raises(CGFlowError) as error:
        validate(tree, source="x.yaml")
    message = str(error.value)
    assert message.startswith("x.yaml: ")
    for word in words:
        assert word in message


def test_all_problems_in_one_message():
    with pytest.raises(CGFlowError, match=r"2 problem\(s\)") as error:
        validate(_with(chains={"n_replica": 4, "stride": 0}))
    assert "n_replica" in str(error.value)
    assert "stride" in str(error.value)


def test_a_wrong_value_comes_with_what_its_setting_is():
    with pytest.raises(CGFlowError) as error:
        validate(_with(chains={"timestep": "-1 fs", "n_frames": "many"}, flow={"n_bins": None}))
    lines = str(error.value).splitlines()
    assert len(lines) == 4  # each problem in one
    for path, line in zip(("flow.n_bins", "chains.timestep", "chains.n_frames"), lines[1:], strict=True):
        summary = find_setting(Config, path.split(".")).summary
        assert line.startswith(f"  {path}: got ")
        assert line.endswith(f"({summary[0].lower()}{summary[1:-1]})")
    assert "got -0.001, expected greater than 0 ps" in lines[2]


_RENAMED = [
    ("sampler", {"n_replicas": 8}, "chains"),
    ("sampling", {"n_samples": 8}, "samples"),
    ("coordinates", {"kind": "box", "box": 6}, "coordinates.half_edge"),
]


@pytest.mark.parametrize(("section", "settings", "now"), _RENAMED)
def test_names_of_version_0_1_are_refused_with_the_new_ones(tmp_path, section, settings, now):
    old = section if section != "coordinates" else "coordinates.box"
    says = re.escape(f"{old}: written for version 0.1; the name is now {now}")
    run = tmp_path / "config.yaml"
    run.write_text("# A run directory of openmm_cgflow.\n" + yaml.safe_dump(_with(**{section: settings})))
    with pytest.raises(CGFlowError, match=f"config.yaml: 1 problem.*\n  {says}$"):
        load_config(run)
    with pytest.raises(ValueError, match=says):
        Config(**{section: settings})
    key, value = list(settings.items())[-1]
    with pytest.raises(CGFlowError, match=f"--set {section}.{key}={value}: {says}"):
        apply_overrides(_MINIMAL, [f"{section}.{key}={value}"])


def test_all_old_names_at_once_and_nothing_else_by_mistake():
    with pytest.raises(CGFlowError, match=r"2 problem\(s\)") as error:
        validate(_with(sampler={}, sampling={}, coordinates="box"))
    assert len(str(error.value).splitlines()) == 3
    apply_overrides(_MINIMAL, ["coordinates=box", "coordinates.kind=box"])  # the word is no setting


def test_overrides():
    changes = ["chains.n_replicas=8", "coordinates.bound=4", "seed=7", "training.method=reverse_kl"]
    tree = apply_overrides(_with(coordinates="cartesian"), changes)
    config = validate(apply_overrides(tree, ["flow.hidden_features=[8, 8]", "chains.timestep=2 fs"]))
    assert (config.chains.n_replicas, config.seed, config.flow.hidden_features) == (8, 7, [8, 8])
    assert (config.coordinates.kind, config.coordinates.bound) == ("cartesian", 4)
    assert math.isclose(config.chains.timestep, 0.002)
    assert "chains" not in _MINIMAL, "the caller's tree was changed"


@pytest.mark.parametrize("item", ["chains.n_replicas", "=3", "temperature.x=3", "chains.stride=[1"])
def test_wrong_overrides(item):
    with pytest.raises(CGFlowError, match=r"--set"):
        apply_overrides({**_MINIMAL, "temperature": 300}, [item])


def test_coordinates_shorthand():
    config = validate(_with(coordinates="cartesian", training={"method": "reverse_kl"}))
    assert config.coordinates.kind == "cartesian"


def test_what_a_new_user_gets():
    """Learned potential of mean force, held peptide bonds, internal coordinates."""
    config = validate(_MINIMAL)
    assert (config.training.method, config.coordinates.kind, config.coordinates.peptide_bonds) == (
        "pmf", "internal", "keep",
    )  # fmt: skip
    assert validate(_with(coordinates={"peptide_bonds": "sample"})).coordinates.peptide_bonds == "sample"


def test_resolved_configuration_round_trips(tmp_path):
    atoms = [0, 1, 2]
    tree = _with(chains={"timestep": "1.5 fs"}, partition={"slow": atoms}, coordinates={"reference_atoms": atoms})
    (tmp_path / "m.pdb").touch()
    source = tmp_path / "a.yaml"
    source.write_text(yaml.safe_dump(tree))
    config = load_config(source)
    # Anywhere else: the resolved paths are absolute.
    resolved = tmp_path / "elsewhere" / "config.yaml"
    resolved.parent.mkdir()
    resolved.write_text(dump_config(config))
    assert load_config(resolved) == config
    assert dump_config(load_config(resolved)) == dump_config(config)


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "own.xml").touch()
    source = folder / "a.yaml"
    source.write_text("system:\n  structure: ../m.pdb\n  forcefield: [own.xml, amber99sbildn.xml]\n")
    monkeypatch.chdir(tmp_path)
    system = load_config("inputs/a.yaml").system
    assert system.structure.is_absolute()
    assert system.structure.resolve() == tmp_path / "m.pdb"
    assert system.forcefield == [str(folder / "own.xml"), "amber99sbildn.xml"]


def test_unreadable_files(tmp_path):
    with pytest.raises(CGFlowError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    for text, word in (("a: [1", "not valid YAML"), ("- 1", "expected a mapping")):
        bad.write_text(text)
        with pytest.raises(CGFlowError, match=word):
            load_config(bad)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        validate(_MINIMAL).temperature = 1.0


def test_template_says_what_the_defaults_are():
    system = {"structure": "my molecule.pdb", "forcefield": ["amber99sbildn.xml"], "topology": None}
    given = {"system": system, "temperature": 310.5, "seed": 3, "partition": {"slow": "name N CA C"}}
    tree = yaml.safe_load(template(given, command="init"))
    shown = validate(tree)
    assert shown == Config(
        system={"structure": "my molecule.pdb", "forcefield": ["amber99sbildn.xml"]},
        temperature=310.5,
        seed=3,
        partition={"slow": "name N CA C"},
    )
    # And everything that is marked, each of it explained.
    marked = [setting for setting in describe(Config) if Mark.SHOWN in setting.marks]
    optional = {setting.path for setting in marked if not setting.default}
    assert optional == {"chains.platform"}
    for setting in marked:
        section, _, name = setting.path.rpartition(".")
        assert setting.path in optional or name in (tree[section] if section else tree)
    lines = template(given).splitlines()
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 120
    assert "  # platform: CUDA " in template(given)
    assert not any(line.rstrip().endswith(",") or "``" in line for line in lines)


def test_template_shows_what_is_given_besides():
    text = template({"system": {"structure": "a", "system_xml": "b"}, "tempering": {"start": 900.0, "max_kl": 0.1}})
    config = validate(yaml.safe_load(text))
    assert (config.tempering.start, config.tempering.max_kl) == (900, 0.1)
    assert "  start: 900 K " in text
    potential = {"openmmml": "mace", "files": {"modelPath": "m"}, "options": {"charge": 0}}
    text = template(
        {"system": {"structure": "a", "potential": potential}, "chains": {"n_pool_steps": 0, "adaptive": False}}
    )
    config = validate(yaml.safe_load(text))
    assert config.system.potential.model_dump(exclude_defaults=True) == potential | {"files": {"modelPath": Path("m")}}
    assert (config.chains.n_pool_steps, config.chains.adaptive) == (0, False)


def test_every_setting_is_described():
    settings = list(describe(Config))
    assert len(settings) > 80
    assert len({setting.path for setting in settings}) == len(settings)
    for setting in settings:
        assert setting.summary, f"{setting.path} has no docstring"
        assert setting.summary.endswith("."), f"{setting.path}: {setting.summary}"
        assert len(setting.summary) <= 120, f"{setting.path}: {setting.summary}"
        assert setting.summary[0].isupper(), f"{setting.path}: {setting.summary}"
        assert not setting.summary.startswith("Of "), f"{setting.path}: a sentence that needs its name"
        assert not setting.details or setting.details.endswith("."), f"{setting.path}: {setting.details}"
        for word in setting.allowed if setting.type == "word" and setting.path != "chains.precision" else ():
            if setting.path not in ("system.implicit_solvent", "system.target.name"):
                assert f"{word}:" in setting.details, f"{setting.path}: {word} is not explained"


def test_a_setting_without_docstring_is_noticed():
    class Bare(Section):
        known: int = 1
        """Something."""
        unknown: int = 2

    assert [setting.summary for setting in describe(Bare)] == ["Something.", ""]


def test_descriptions_for_the_documentation():
    found = {setting.path: setting for setting in describe(Config)}
    timestep = found["chains.timestep"]
    assert (timestep.type, timestep.default, timestep.unit, timestep.allowed) == ("number", "2 fs", "ps", ("> 0",))
    assert found["training.method"].allowed == ("pmf", "reverse_kl", "joint")
    assert found["stopping.ess"].allowed == ("> 0 and < 1",)
    assert found["flow.hidden_features"].type == "list of whole numbers"
    assert found["flow.hidden_features"].allowed == ("> 0",)
    assert found["tempering.temperatures"].unit == "K"
    assert found["coordinates.reference_atoms"].type == "list of 3 whole numbers"
    assert found["system.structure"].default == ""
    assert found["system.potential.files"].type == "mapping of names to paths"
    assert found["chains"].is_section
    assert found["chains"].summary.startswith("Langevin dynamics")


def test_what_may_differ_when_a_run_is_continued():
    assert set(free_settings()) == {"system", "samples", "training.checkpoint_interval", "chains.n_workers"}


@pytest.mark.parametrize("name", ["alanine_dipeptide", "butane"])
def test_example_configurations(systems, name):
    config = load_config(systems / name / f"{name}.yaml")
    assert config.system.structure.is_file()

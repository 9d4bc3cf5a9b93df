"""The command: what it does with good input, and that bad input ends in one clear message and exit code 2."""

import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import mdtraj
import numpy as np
import openmm
import pytest
import torch
import yaml
from molecules import ALANINE, AMBER_IN_WATER
from openmm import app, unit
from settings import TINY_WITHOUT_SWITCHING, TWO_STAGES, TWO_STAGES_JOINT

from openmm_cgflow import __version__, load
from openmm_cgflow.cli import main
from openmm_cgflow.config import load_config
from openmm_cgflow.engines import platforms
from openmm_cgflow.files.trajectory import read_colvar
from openmm_cgflow.runs import loop as session
from openmm_cgflow.runs import train as runner

HYDROGENS = ("H", "HA", "H1", "H2", "H3", "HB1", "HB2", "HB3")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def butane(systems, folder):
    """A configuration written by ``init``, with the tiny settings in the file."""
    file = folder / "butane.yaml"
    structure, forcefield = systems / "butane" / "butane.pdb", systems / "butane" / "butane.xml"
    assert main(["init", str(structure), "--forcefield", str(forcefield), "-o", str(file)]) == 0
    tree = yaml.safe_load(file.read_text())
    for item in TINY_WITHOUT_SWITCHING:
        name, value = item.split("=")
        section, key = name.split(".")
        tree.setdefault(section, {})[key] = yaml.safe_load(value)
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture(scope="module")
def finished(butane, folder):
    """A run that must not be changed."""
    output = folder / "finished"
    assert main(["train", str(butane), "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def ladder(butane, folder):
    """A run down a ladder of temperatures that must not be changed."""
    output = folder / "ladder"
    assert main(["train", str(butane), "-o", str(output), "--set", *TWO_STAGES]) == 0
    return output


@pytest.fixture(scope="module")
def joint(butane, folder):
    """A run of the joint density that must not be changed."""
    output = folder / "joint"
    assert main(["train", str(butane), "-o", str(output), "--set", *TWO_STAGES_JOINT]) == 0
    return output


@pytest.fixture(params=["pmf", "reverse_kl", "joint"])
def each_method(request):
    """Options and finished run of every method."""
    options, run = {
        "pmf": ((), "finished"),
        "reverse_kl": (("--set", *TWO_STAGES), "ladder"),
        "joint": (("--set", *TWO_STAGES_JOINT), "joint"),
    }[request.param]
    return options, request.getfixturevalue(run)


@pytest.fixture
def run(finished, tmp_path):
    """A run to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def alanine():
    return ALANINE.read_text()


def output_of(capsys, *arguments):
    capsys.readouterr()
    assert main([str(item) for item in arguments]) == 0
    return capsys.readouterr().out


@contextmanager
def half_a_minute_each(monkeypatch):
    """Every look at the clock takes 30 s, so a step does."""
    ticks = itertools.count(0.0, 30.0)
    clock = SimpleNamespace(monotonic=lambda: next(ticks))
    with monkeypatch.context() as patch:
        for module in (runner, session):
            patch.setattr(module, "time", clock)
        yield


def configuration(folder, name="molecule.yaml", **settings):
    """A file with these settings over tiny ones for the sampler."""
    tree = {"partition": {"slow": "heavy"}, "chains": {"platform": "Reference", "n_workers": 1}, **settings}
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return path


def peptide(folder, text, forcefield=AMBER_IN_WATER, **settings):
    (folder / "molecule.pdb").write_text(text)
    return configuration(folder, system={"structure": "molecule.pdb", "forcefield": list(forcefield)}, **settings)


def without(text, *names):
    lines = [line for line in text.splitlines() if line[12:16].strip() not in names]
    return "\n".join(line for line in lines if not line.startswith("CONECT")) + "\n"


def with_system(folder, systems, change):
    """Butane with its System as XML after ``change``, which gets the System or makes another from the PDB file."""
    source = systems / "butane"
    pdb = app.PDBFile(str(source / "butane.pdb"))
    system = change(app.ForceField(str(source / "butane.xml")), pdb.topology)
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    shutil.copy(source / "butane.pdb", folder)
    return configuration(folder, system={"structure": "butane.pdb", "system_xml": "system.xml"})


# --- what it does -------------------------------------------------------------------------------------------------


def test_init_writes_a_commented_configuration_that_loads(systems, tmp_path, monkeypatch, capsys):
    source = systems / "alanine_dipeptide"
    shutil.copy(source / "alanine_dipeptide.pdb", tmp_path / "my molecule.pdb")
    monkeypatch.chdir(tmp_path)
    text = output_of(
        capsys, "init", "my molecule.pdb", "--forcefield", "amber99sbildn.xml", "--forcefield", "amber99_obc.xml",
        "--temperature", "310 K", "-o", "inputs/ala.yaml",
    )  # fmt: skip
    config = load_config("inputs/ala.yaml")
    assert config.temperature == 310.0
    assert config.partition.slow == "backbone"
    assert config.system.structure.samefile("my molecule.pdb")
    assert config.system.forcefield == ["amber99sbildn.xml", "amber99_obc.xml"]
    written = Path("inputs/ala.yaml").read_text()
    assert written.count("#") > 20
    assert "openmm-cgflow init" in written.splitlines()[0]
    assert "7 slow and 15 fast" in text
    assert "openmm-cgflow check inputs/ala.yaml" in text


def test_init_refuses_to_overwrite(butane, systems, tmp_path, refused, capsys):
    file = tmp_path / "butane.yaml"
    file.write_text("mine")
    arguments = ("init", systems / "butane/butane.pdb", "--forcefield", systems / "butane/butane.xml", "-o", file)
    refused(*arguments, says=[str(file), "exists", "--overwrite"])
    assert file.read_text() == "mine"
    output_of(capsys, *arguments, "--overwrite")
    assert load_config(file).partition.slow == "heavy"


def test_check_reports_and_leaves_nothing_behind(butane, folder, capsys):
    before = sorted(folder.iterdir())
    text = output_of(capsys, "check", butane)
    assert "4 slow and 10 fast atoms" in text
    assert "dihedral" in text
    assert "platform Reference" in text
    assert re.search(r"estimated wall time: at most \d", text)
    assert f"openmm-cgflow train {butane}" in text
    assert sorted(folder.iterdir()) == before


def test_check_names_what_ends_the_training(butane, capsys):
    text = output_of(capsys, "check", butane)
    assert re.search(r"training: at most \d+ steps .* energy evaluations at .* per second", text)
    assert "it ends once the criteria of the stopping section are met" in text
    text = output_of(capsys, "check", butane, "--set", *TWO_STAGES)
    assert f"openmm-cgflow train {butane} --set {TWO_STAGES[0]} " in text  # what was checked
    assert "training: 2 stages from 600 K to 300 K, 6 steps" in text
    assert re.search(r"estimated wall time: \d", text)


def test_export(finished, tmp_path, capsys):
    """Each format, read as its users read it; the numbers are those of the model."""
    files = {
        "python-force": tmp_path / "force.xml",
        "torchscript": tmp_path / "model.pt",
        "openmmml": tmp_path / "copy",
    }
    for name, path in files.items():
        options = [] if name == "openmmml" else ["--scale", "-0.5", "--beads", "--ceiling", "1"]
        assert main(["export", str(finished), "--format", name, "-o", str(path), *options]) == 0
        assert str(path) in capsys.readouterr().out
        assert main(["export", str(finished), "--format", name, "-o", str(path), *options]) == 2
        assert "exists already" in capsys.readouterr().err
    model = load(files["openmmml"])
    assert {path.name for path in files["openmmml"].iterdir()} == {
        "config.yaml", "models", "provenance.json", "slow_atoms.json", "system.xml", "topology.pdb",
    }  # fmt: skip
    xyz = torch.tensor(model.molecular_system.positions[list(model.partition.slow)])
    expected = model.energy_of_positions(-0.5, ceiling=1.0)(xyz).item()
    assert expected == load(finished).energy_of_positions(-0.5, ceiling=1.0)(xyz).item()
    assert expected != model.energy_of_positions(-0.5)(xyz).item()
    assert torch.jit.load(files["torchscript"])(xyz).item() == pytest.approx(expected, rel=1e-9)
    system = openmm.System()
    for _ in range(4):
        system.addParticle(1.0)
    system.addForce(openmm.XmlSerializer.deserialize(files["python-force"].read_text()))
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(xyz.numpy())
    energy = context.getState(energy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    assert energy == pytest.approx(expected, rel=1e-9)


def test_export_for_openmmml_takes_no_options(finished, tmp_path, capsys):
    command = ["export", str(finished), "--format", "openmmml", "-o", str(tmp_path / "copy"), "--scale", "2"]
    assert main(command) == 2
    assert "give scale, energy and ceiling to MLPotential" in capsys.readouterr().err


def test_info(finished, capsys):
    text = output_of(capsys, "info", finished)
    assert "finished" in text.splitlines()[0]
    for words in ("seed: 2025", "energy evaluations: ", "openmm ", "stage 0: 300.0 K", "step 7"):
        assert words in text, text
    assert str(finished / "samples.dcd") in text
    assert f"openmm-cgflow sample {finished}" in text


def test_info_of_a_ladder(ladder, capsys):
    text = output_of(capsys, "info", ladder)
    for words in ("stage 0: 600.0 K", "stage 1: 300.0 K", "step 6"):
        assert words in text, text


def test_a_run_directory_holds_what_is_promised(finished):
    for name in (
        "config.yaml", "run.log", "metrics.csv", "topology.pdb", "checkpoints", "models", "samples.dcd",
        "samples.colvar", "plots/convergence.png", "plots/torsions.png", "provenance.json",
    ):  # fmt: skip
        assert (finished / name).exists(), name
    record = json.loads((finished / "provenance.json").read_text())
    assert {"versions", "seed", "engine", "energy_evaluations", "wall_time_s"} <= set(record)


def test_same_seed_same_files(finished, tmp_path, capsys):
    def sample(name, seed):
        output = tmp_path / name / "frames.dcd"
        text = output_of(capsys, "sample", finished, "-n", 12, "-o", output, "--seed", seed)
        assert str(output) in text
        return [path.read_bytes() for path in sorted(output.parent.iterdir())]

    first, again, other = sample("a", 3), sample("b", 3), sample("c", 4)
    assert len(first) == 3
    assert first == again
    assert first != other


def test_another_stage_has_another_temperature(ladder, tmp_path, capsys):
    energies = []
    for stage, temperature in ((0, "600 K"), (1, "300 K")):
        output = tmp_path / f"{stage}.dcd"
        text = output_of(capsys, "sample", ladder, "-n", 64, "-o", output, "--stage", stage, "--n-equilibration", 60)
        assert temperature in text
        energies.append(np.median(read_colvar(output.with_suffix(".colvar"))["energy"]))
        text = output_of(capsys, "evaluate", ladder, "--samples", output, "-o", tmp_path / f"evaluation{stage}")
        assert f"64 samples at {temperature}" in text
    # 36 vibrations gain kT/2 each from the higher temperature, 45 kJ/mol; half of it is far above the noise.
    assert energies[0] > energies[1] + 20


def test_xtc_is_written_too(finished, tmp_path, capsys):
    for suffix in (".dcd", ".xtc"):
        output_of(capsys, "sample", finished, "-n", 5, "-o", tmp_path / f"few{suffix}")
        shutil.move(tmp_path / "few.topology.pdb", tmp_path / "top.pdb")
    first, second = (mdtraj.load(str(tmp_path / f"few{s}"), top=str(tmp_path / "top.pdb")) for s in (".dcd", ".xtc"))
    assert first.n_frames == second.n_frames == 5
    np.testing.assert_allclose(first.xyz, second.xyz, atol=1e-3)  # xtc rounds


def test_max_time_stops_and_the_printed_command_finishes(butane, each_method, tmp_path, monkeypatch, capsys):
    options, finished = each_method
    output = tmp_path / "my run"
    with half_a_minute_each(monkeypatch):
        text = output_of(capsys, "train", butane, "-o", output, "--max-time", "3m", *options)
    assert "finished" not in text
    n_rows = len((output / "metrics.csv").read_text().splitlines())
    assert 3 <= n_rows < 7
    assert (output / "checkpoints" / "last.pt").exists()
    command = shlex.split(text.splitlines()[-1])
    assert command == [
        "openmm-cgflow",
        "train",
        str(butane),
        "-o",
        str(output),
        "--max-time",
        "3m",
        *options,
        "--resume",
    ]
    assert "stopped" in output_of(capsys, "info", output)
    assert "finished" in output_of(capsys, *command[1:])
    for name in ("metrics.csv", "samples.colvar"):
        assert (output / name).read_text() == (finished / name).read_text()
    # Resuming a finished run is harmless.
    before = (output / "metrics.csv").read_bytes()
    assert "finished" in output_of(capsys, *command[1:])
    assert (output / "metrics.csv").read_bytes() == before


def test_resume_starts_a_run_if_there_is_none(butane, finished, tmp_path, capsys):
    assert "finished" in output_of(capsys, "train", butane, "-o", tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()


def test_seed_and_settings_and_overwrite(butane, finished, run, capsys):
    (run / "mine.txt").write_text("kept")
    output_of(
        capsys, "train", butane, "-o", run, "--overwrite", "--seed", 1,
        "--set", "samples.n_samples=3", "temperature=310 K",
    )  # fmt: skip
    config = load_config(run / "config.yaml")
    assert (config.seed, config.samples.n_samples, config.temperature) == (1, 3, 310.0)
    assert len(read_colvar(run / "samples.colvar")["time"]) == 3
    assert (run / "metrics.csv").read_text() != (finished / "metrics.csv").read_text()
    assert (run / "mine.txt").read_text() == "kept"
    assert json.loads((run / "provenance.json").read_text())["seed"] == 1


# --- bad input: configuration and molecule, refused by check and by train ------------------------------------------


def missing_structure(folder, systems, alanine):
    return configuration(folder, system={"structure": "nowhere.pdb", "forcefield": ["amber99sbildn.xml"]})


def missing_configuration(folder, systems, alanine):
    return folder / "nowhere.yaml"


def directory_as_configuration(folder, systems, alanine):
    return folder


def text_as_configuration(folder, systems, alanine):
    (folder / "broken.yaml").write_text("system: [unclosed\n")
    return folder / "broken.yaml"


def pdb_as_configuration(folder, systems, alanine):
    (folder / "molecule.pdb").write_text(alanine)
    return folder / "molecule.pdb"


def empty_configuration(folder, systems, alanine):
    (folder / "empty.yaml").write_text("# nothing yet\n")
    return folder / "empty.yaml"


def no_system_section(folder, systems, alanine):
    return configuration(folder)


def unknown_force_field(folder, systems, alanine):
    return peptide(folder, alanine, ["amber99sb-ildn.xml", "amber99_obc.xml"])


def missing_hydrogens(folder, systems, alanine):
    return peptide(folder, without(alanine, *HYDROGENS))


def residue_without_template(folder, systems, alanine):
    return peptide(folder, alanine.replace(" ALA ", " LIG "))


def implicit_solvent_alone(folder, systems, alanine):
    return peptide(folder, alanine, ["implicit/obc2.xml"])


def explicit_water(folder, systems, alanine):
    water = (
        "HETATM   30  O   HOH A   9      20.000  20.000  20.000  1.00  0.00           O\n"
        "HETATM   31  H1  HOH A   9      20.957  20.000  20.000  1.00  0.00           H\n"
        "HETATM   32  H2  HOH A   9      19.760  20.927  20.000  1.00  0.00           H\nEND\n"
    )
    return peptide(folder, alanine.replace("END\n", water), ["amber99sbildn.xml", "tip3p.xml"])


def periodic_box(folder, systems, alanine):
    def change(force_field, topology):
        topology.setUnitCellDimensions(openmm.Vec3(3, 3, 3) * unit.nanometer)
        return force_field.createSystem(topology, nonbondedMethod=app.PME)

    return with_system(folder, systems, change)


def stubborn_constraints(folder, systems, alanine):
    def change(force_field, topology):
        system = force_field.createSystem(topology, constraints=app.HBonds)
        assert system.getNumConstraints() == 10
        return system

    return with_system(folder, systems, change)


def empty_selection(folder, systems, alanine):
    return peptide(folder, alanine, partition={"slow": "name XX"})


def senseless_selection(folder, systems, alanine):
    return peptide(folder, alanine, partition={"slow": "backbones and"})


def disconnected_selection(folder, systems, alanine):
    return peptide(folder, alanine, partition={"slow": "name CA O CH3"})


def everything_selected(folder, systems, alanine):
    return peptide(folder, alanine, partition={"slow": "all"})


def index_out_of_range(folder, systems, alanine):
    return peptide(folder, alanine, partition={"slow": [0, 1, 400]})


def slow_ring(folder, systems, alanine):
    """Four carbons in a square, a hydrogen on each, held by springs."""
    square = np.array([[1, 1, 0], [-1, 1, 0], [-1, -1, 0], [1, -1, 0]], dtype=float)
    bonds = [(0, 1), (1, 2), (2, 3), (3, 0), *((i, i + 4) for i in range(4))]
    system, springs = openmm.System(), openmm.HarmonicBondForce()
    for mass in [12.0] * 4 + [1.0] * 4:
        system.addParticle(mass)
    for first, second in bonds:
        springs.addBond(first, second, 0.15, 1e5)
    system.addForce(springs)
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    lines = [
        f"HETATM{i + 1:5d}  {name}{i % 4}  RNG A   1    {x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           {name}"
        for i, (name, (x, y, z)) in enumerate(
            zip("CCCCHHHH", np.concatenate([0.75 * square, 1.5 * square]), strict=True)
        )
    ]
    lines += [f"CONECT{first + 1:5d}{second + 1:5d}" for first, second in bonds]
    (folder / "ring.pdb").write_text("\n".join([*lines, "END\n"]))
    return configuration(folder, system={"structure": "ring.pdb", "system_xml": "system.xml"})


def unknown_key(folder, systems, alanine):
    return peptide(folder, alanine, chains={"n_replica": 16})


def unknown_section(folder, systems, alanine):
    return peptide(folder, alanine, chain={"n_replicas": 16})


def wrong_unit(folder, systems, alanine):
    return peptide(folder, alanine, chains={"timestep": "1 K"})


def unknown_unit(folder, systems, alanine):
    return peptide(folder, alanine, temperature="300 Kelvins")


def out_of_range(folder, systems, alanine):
    return peptide(folder, alanine, temperature="-3 K")


def nan_coordinates(folder, systems, alanine):
    line = next(line for line in alanine.splitlines() if line[12:16].strip() == "CA")
    return peptide(folder, alanine.replace(line, line[:30] + "     nan" + line[38:]))


def overlapping_atoms(folder, systems, alanine):
    lines = alanine.splitlines()
    first, second = (next(line for line in lines if line[12:16].strip() == name) for name in ("HB1", "HB2"))
    return peptide(folder, alanine.replace(second, second[:30] + first[30:54] + second[54:]))


def absent_platform(folder, systems, alanine):
    return peptide(folder, alanine, chains={"platform": "Cudo", "n_workers": 1})


BAD_INPUT = [
    (missing_structure, ["nowhere.pdb", "no such file"]),
    (missing_configuration, ["nowhere.yaml", "cannot read", "No such file"]),
    (directory_as_configuration, ["cannot read the configuration", "directory"]),
    (text_as_configuration, ["broken.yaml", "not valid YAML", "line 2"]),
    (pdb_as_configuration, ["molecule.pdb", "expected a mapping of settings"]),
    (empty_configuration, ["empty.yaml", "expected a mapping"]),
    (no_system_section, ["molecule.yaml", "no section 'system'", "openmm-cgflow init"]),
    (unknown_force_field, ["'amber99sb-ildn.xml'", "did you mean amber99sbildn.xml"]),
    (missing_hydrogens, ["molecule.pdb", "hydrogens are missing", "ALA2", "pdbfixer", "addHydrogens"]),
    (residue_without_template, ["molecule.pdb", "no template for LIG2", "system_xml"]),
    (implicit_solvent_alone, ["implicit/obc2.xml", "no residue templates", "add a protein force field"]),
    (explicit_water, ["molecule.pdb", "1 HOH", "not supported yet", "implicit"]),
    (periodic_box, ["butane.pdb", "NonbondedForce", "not supported yet", "NoCutoff"]),
    (stubborn_constraints, ["constraints that cannot be removed", "BUT1:C1-BUT1:H11", "constraints=None"]),
    (empty_selection, ["slow atoms 'name XX'", "no atom is selected", "backbone or heavy"]),
    (senseless_selection, ["slow atoms 'backbones and'", "MDTraj", "backbone, heavy", "unexpected end of text"]),
    (disconnected_selection, ["'name CA O CH3'", "not bonded", "ALA2:CA", "add the atoms between"]),
    (everything_selected, ["'all'", "all 22 atoms", "at least one must stay fast"]),
    (index_out_of_range, ["400", "0 to 21"]),
    (slow_ring, ["ring", "[0, 1, 2, 3]", "leave at least one atom"]),
    (unknown_key, ["molecule.yaml", "chains.n_replica: unknown key", "did you mean 'n_replicas'?"]),
    (unknown_section, ["chain: unknown key", "did you mean 'chains'?"]),
    (wrong_unit, ["chains.timestep", "'1 K'", "quantity in ps"]),
    (unknown_unit, ["temperature", "'300 Kelvins'", "quantity in K"]),
    (out_of_range, ["temperature", "greater than 0"]),
    (nan_coordinates, ["molecule.pdb", "ALA2:CA", "not finite", "rebuild"]),
    (overlapping_atoms, ["molecule.pdb", "ALA2:HB1", "ALA2:HB2", "overlap", "minimise"]),
    (absent_platform, ["chains.platform", "'Cudo'", "available: Reference", "'CUDA'"]),
]


@pytest.mark.parametrize(("make", "words"), BAD_INPUT, ids=[make.__name__ for make, _ in BAD_INPUT])
def test_bad_input(make, words, tmp_path, systems, alanine, refused):
    file = make(tmp_path, systems, alanine)
    output = tmp_path / "run"
    refused("train", file, "-o", output, says=words)
    assert not output.exists()
    refused("check", file, says=words)


def test_init_refuses_bad_molecules(tmp_path, alanine, refused):
    (tmp_path / "bare.pdb").write_text(without(alanine, *HYDROGENS))
    (tmp_path / "good.pdb").write_text(alanine)
    output = ("-o", tmp_path / "new.yaml")
    fields = ("--forcefield", "amber99sbildn.xml", "amber99_obc.xml")
    refused("init", tmp_path / "bare.pdb", *fields, *output, says=["bare.pdb", "hydrogens are missing", "pdbfixer"])
    refused("init", tmp_path / "nowhere.pdb", *fields, *output, says=["nowhere.pdb", "no such file"])
    refused("init", tmp_path / "good.pdb", *output, says=["--forcefield --topology --system-xml is required"])
    refused("init", tmp_path / "good.pdb", "--forcefield", "amber14-al.xml", *output, says=["amber14-all.xml"])
    refused("init", tmp_path / "good.pdb", *fields, *output, "--slow", "name XX", says=["name XX", "no atom"])
    refused("init", tmp_path / "good.pdb", *fields, *output, "--temperature", "hot", says=["--temperature", "'hot'"])
    assert not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize("where", ["environment", "setting"])
def test_cuda_asked_for_and_absent(where, butane, tmp_path, monkeypatch, refused):
    settings = ["--set", f"chains.platform={'CUDA' if where == 'setting' else 'null'}"]
    source = "chains.platform" if where == "setting" else "OPENMM_DEFAULT_PLATFORM"
    if where == "environment":
        monkeypatch.setenv("OPENMM_DEFAULT_PLATFORM", "CUDA")
    monkeypatch.setattr(platforms, "available_platforms", lambda: ["Reference", "CPU"])
    monkeypatch.setattr(openmm.Platform, "getPluginLoadFailures", staticmethod(lambda: ()))
    words = [source, "no platform 'CUDA'", "available: Reference, CPU", "No CUDA plugin is installed", "cuda12"]
    refused("check", butane, *settings, says=words)
    failure = "Error loading library libOpenMMCUDA.so: libcuda.so.1: cannot open shared object file"
    monkeypatch.setattr(openmm.Platform, "getPluginLoadFailures", staticmethod(lambda: (failure,)))
    refused("train", butane, "-o", tmp_path / "run", *settings, says=[source, failure])
    assert not (tmp_path / "run").exists()


# --- bad input: options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed", ["--set seed", "section.key=value"]),
        ("=3", ["--set =3", "section.key=value"]),
        ("chains.n_replica=3", ["chains.n_replica", "did you mean 'n_replicas'"]),
        ("chains.n_replicas=many", ["chains.n_replicas", "integer"]),
        ("temperature=1 fs", ["temperature", "'1 fs'", "in K"]),
        ("temperature.start=3", ["temperature is not a section"]),
        ("partition.slow=[0, 1", ["partition.slow", "not valid YAML"]),
        ("samples=3", ["samples", "SampleSettings"]),
    ],
)
def test_bad_settings(setting, words, butane, tmp_path, refused):
    refused("train", butane, "-o", tmp_path / "run", "--set", setting, says=words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["COMMAND"]),
        (("trian",), ["trian", "train"]),
        (("train", "a.yaml"), ["-o/--output"]),
        (("train", "a.yaml", "-o", "run", "--max-time", "soon"), ["--max-time", "'soon'", "30m"]),
        (("train", "a.yaml", "-o", "run", "--max-time", "90"), ["--max-time", "'90'", "90s"]),
        (("train", "a.yaml", "-o", "run", "--seed", "-1"), ["--seed"]),
        (("train", "a.yaml", "-o", "run", "--resume", "--overwrite"), ["--overwrite", "not allowed with"]),
        (("sample", "run", "-n", "ten"), ["-n", "'ten'", "whole number"]),
        (("sample", "run", "--stage", "last"), ["--stage", "'last'", "whole number"]),
    ],
)
def test_bad_options(arguments, words, refused):
    refused(*arguments, says=words)


def test_a_seed_that_is_too_large(butane, tmp_path, refused):
    refused("train", butane, "-o", tmp_path / "run", "--seed", 2**40, says=["seed", "less than 2147483648"])


# --- bad input: run directories -------------------------------------------------------------------------------------


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_used_run_directory_is_refused(butane, finished, refused):
    before = files_of(finished)
    again = f"openmm-cgflow train {butane} -o {finished}"
    refused("train", butane, "-o", finished, says=["already holds a run", f"{again} --resume", f"{again} --overwrite"])
    assert files_of(finished) == before


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--overwrite",)])
def test_a_directory_of_something_else_is_never_touched(flags, butane, tmp_path, refused):
    (tmp_path / "config.yaml").write_text("thesis: true\n")
    before = files_of(tmp_path)
    refused("train", butane, "-o", tmp_path, *flags, says=[str(tmp_path), "not a run directory", "choose another"])
    assert files_of(tmp_path) == before


def test_resume_with_another_configuration(butane, run, refused):
    before = files_of(run)
    words = [str(run), "another configuration", "flow.n_bins: 12 -> 9", "seed: 2025 -> 7", "original settings"]
    refused("train", butane, "-o", run, "--resume", "--seed", 7, "--set", "flow.n_bins=9", says=words)
    assert files_of(run) == before


def test_resume_with_another_molecule_in_the_same_files(butane, run, systems, tmp_path, refused):
    shutil.copy(systems / "butane" / "butane.pdb", tmp_path)
    text = (systems / "butane" / "butane.xml").read_text()
    (tmp_path / "butane.xml").write_text(text)
    tree = yaml.safe_load(butane.read_text())
    tree["system"] = {"structure": "butane.pdb", "forcefield": ["butane.xml"]}
    file = configuration(tmp_path, "butane.yaml", **tree)
    output = tmp_path / "new"
    assert main(["train", str(file), "-o", str(output), "--set", "samples.n_samples=0"]) == 0
    strength = re.search(r'<Bond [^>]*k="([^"]*)"', text).group(1)
    (tmp_path / "butane.xml").write_text(text.replace(f'k="{strength}"', f'k="{0.9 * float(strength)}"'))
    words = ["last.pt", "another molecule or force field", "original input files"]
    refused("train", file, "-o", output, "--resume", says=words)


def test_resume_with_atoms_elsewhere(butane, systems, tmp_path, refused):
    lines = (systems / "butane" / "butane.pdb").read_text().splitlines(keepends=True)
    (tmp_path / "butane.pdb").write_text("".join(lines))
    tree = yaml.safe_load(butane.read_text())
    tree["system"] = {"structure": "butane.pdb", "forcefield": [str(systems / "butane" / "butane.xml")]}
    file = configuration(tmp_path, "butane.yaml", **tree)
    output = tmp_path / "new"
    assert main(["train", str(file), "-o", str(output), "--set", "samples.n_samples=0"]) == 0
    first = next(k for k, line in enumerate(lines) if line.startswith(("ATOM", "HETATM")))
    x = float(lines[first][30:38])
    lines[first] = f"{lines[first][:30]}{x + 0.01:8.3f}{lines[first][38:]}"
    (tmp_path / "butane.pdb").write_text("".join(lines))
    words = ["last.pt", "other positions of the atoms", "original input files"]
    refused("train", file, "-o", output, "--resume", says=words)


def test_damaged_checkpoints(butane, finished, tmp_path, monkeypatch, refused, capsys):
    output = tmp_path / "run"
    for _ in range(2):
        with half_a_minute_each(monkeypatch):
            output_of(capsys, "train", butane, "-o", output, "--resume", "--max-time", "1m")
    last, previous = (output / "checkpoints" / name for name in ("last.pt", "previous.pt"))
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    both = tmp_path / "both"
    shutil.copytree(output, both)
    capsys.readouterr()
    assert main(["train", str(butane), "-o", str(output), "--resume"]) == 0
    told = capsys.readouterr().err
    assert re.search(r"checkpoint is damaged.*last\.pt", told)
    assert re.search(r"continuing from .*previous\.pt", told)
    assert (output / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()

    damaged = both / "checkpoints" / "previous.pt"
    content = bytearray(previous.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    refused(
        "train", butane, "-o", both, "--resume",
        says=["no checkpoint can be read", "last.pt", "previous.pt", "--overwrite"],
    )  # fmt: skip


@pytest.mark.parametrize("place", ["below a file", "device", "kernel"])
def test_output_that_cannot_be_written(place, butane, finished, tmp_path, refused):
    # Permissions would not do: they do not bind the superuser.
    (tmp_path / "file").write_text("")
    root = {"below a file": tmp_path / "file", "device": Path("/dev/null"), "kernel": Path("/proc")}[place]
    if not root.exists():
        pytest.skip(f"no {root} here")
    refused("train", butane, "-o", root / "run", says=[str(root / "run"), "cannot write"])
    refused("sample", finished, "-n", 1, "-o", root / "new" / "a.dcd", says=[str(root / "new"), "cannot write"])
    source = load_config(butane).system
    refused(
        "init", source.structure, "--forcefield", source.forcefield[0], "-o", root / "new" / "a.yaml",
        says=[str(root / "new"), "cannot write"],
    )  # fmt: skip


def test_output_that_is_a_file(butane, tmp_path, refused):
    (tmp_path / "run").write_text("")
    refused("train", butane, "-o", tmp_path / "run", says=["is a file, expected a directory"])
    refused("train", butane, "-o", tmp_path / "run", "--overwrite", says=["is a file, expected a directory"])


@contextmanager
def small_files(n_bytes):
    """Lets files grow to so many bytes only: what a full disk or a quota does, as far as a program can tell.

    Not a fixture: pytest reports a test before it ends its fixtures, to what may be a longer file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Between the sizes of the files: every limit stops another writer.
@pytest.mark.parametrize(("limit", "name"), [(5_000, "system.xml"), (20_000, "stage_00.pt"), (100_000, "last.pt")])
def test_a_full_disk_while_training(limit, name, butane, tmp_path, refused):
    with small_files(limit):
        refused("train", butane, "-o", tmp_path / "run", says=[name, "cannot write"])


@pytest.mark.parametrize("suffix", ["dcd", "xtc"])
def test_a_full_disk_while_sampling(suffix, finished, tmp_path, refused):
    with small_files(4_000):
        refused("sample", finished, "-n", 100, "-o", tmp_path / f"a.{suffix}", says=[f"a.{suffix}", "cannot write"])
    assert not list(tmp_path.glob(f"*.{suffix}"))


# --- bad input: sampling and telling -------------------------------------------------------------------------------


def test_what_is_no_run_cannot_be_sampled(tmp_path, refused):
    for command in ("sample", "info"):
        refused(command, tmp_path / "nowhere", says=["nowhere", "no such run directory"])
        refused(command, tmp_path, says=[str(tmp_path), "not a run directory"])
        (tmp_path / "file").write_text("")
        refused(command, tmp_path / "file", says=["file", "no such run directory"])


def test_a_run_without_models(run, refused, capsys):
    shutil.rmtree(run / "models")
    refused("sample", run, "-o", run / "a.dcd", says=["no tempering stage was finished", "--resume"])
    assert "sample it" not in output_of(capsys, "info", run)


def test_wrong_sampling_options(finished, ladder, tmp_path, refused):
    refused("sample", finished, "--stage", 9, "-o", tmp_path / "a.dcd", says=["no stage 9", "there are 0"])
    refused("sample", ladder, "--stage", 9, "-o", tmp_path / "a.dcd", says=["no stage 9", "there are 0, 1"])
    refused("sample", finished, "-n", 0, "-o", tmp_path / "a.dcd", says=["got 0", "at least 1"])
    refused("sample", finished, "-o", tmp_path / "a.pdb", says=["a.pdb", "'.pdb'", ".dcd or .xtc"])
    refused("sample", finished, "-o", tmp_path, says=[str(tmp_path)])
    (tmp_path / "a.dcd").write_text("mine")
    refused("sample", finished, "-o", tmp_path / "a.dcd", says=["a.dcd", "exists", "--overwrite"])
    assert (tmp_path / "a.dcd").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.dcd"]


@pytest.mark.parametrize(
    "name", ["models/stage_00.pt", "config.yaml", "system.xml", "slow_atoms.json", "provenance.json"]
)
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_run(name, damage, run, refused):
    path = run / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    if name == "provenance.json":
        if damage == "cut":
            refused("info", run, says=["provenance.json", "not valid JSON"])
    else:
        gone = (name, damage) == ("models/stage_00.pt", "gone")
        refused("sample", run, "-n", 1, "-o", run / "new.dcd", says=["no tempering stage" if gone else path.name])
        assert not (run / "new.dcd").exists()


def test_a_run_of_version_0_1(butane, run, tmp_path, refused):
    now = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(now.replace("\nchains:", "\nsampler:").replace("\n  half_edge:", "\n  box:"))
    renamed = ["config.yaml", "sampler: written for version 0.1; the name is now chains", "now coordinates.half_edge"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused("train", butane, "-o", run, "--resume", says=renamed)
    refused("sample", run, "-n", 1, "-o", tmp_path / "new.dcd", says=renamed)
    refused("evaluate", run, "-o", tmp_path / "evaluation", says=renamed)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    for item in ("sampler.n_replicas=8", "sampling.n_samples=3", "coordinates.box=6"):
        refused("check", butane, "--set", item, says=[f"--set {item}", "the name is now"])


def test_a_run_of_an_older_format(tmp_path, root, refused):
    """What version 0.1 wrote is refused for its names and, with these mended, for its format; nothing is touched."""
    run = tmp_path / "run"
    with zipfile.ZipFile(root / "tests" / "data" / "run_of_version_0.1.zip") as archive:
        archive.extractall(run)
    sample = ("sample", run, "-n", 1, "-o", tmp_path / "new.dcd")
    export = ("export", run, "--format", "torchscript", "-o", tmp_path / "model.pt")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    renamed = [
        "config.yaml",
        *(f"{old}: written for version 0.1" for old in ("sampler", "sampling", "coordinates.box")),
    ]
    refused("evaluate", run, "-o", tmp_path / "evaluation", says=["config.yaml", *renamed])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    text = (run / "config.yaml").read_text()
    for old, new in (("\nsampler:", "\nchains:"), ("\nsampling:", "\nsamples:"), ("\n  box:", "\n  half_edge:")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (run / "config.yaml").write_text(text)
    for command in (sample, export):
        refused(*command, says=["stage_00.pt", "another version", "format 5"])
    assert sorted(tmp_path.iterdir()) == [run]


def test_the_stage_before_a_lost_one_is_sampled(ladder, tmp_path, capsys):
    run = Path(shutil.copytree(ladder, tmp_path / "run"))
    (run / "models" / "stage_01.pt").unlink()
    assert "600 K" in output_of(capsys, "sample", run, "-n", 1, "-o", run / "new.dcd")


# --- processes -----------------------------------------------------------------------------------------------------


def command(*arguments, **settings):
    """Runs ``python -m openmm_cgflow`` to its end."""
    words = [sys.executable, "-m", "openmm_cgflow", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, **settings)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "--help"], ["sample", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    heavy = ("torch", "openmm", "mdtraj", "numpy", "pydantic", "yaml", "matplotlib")
    code = (
        "import sys; from openmm_cgflow.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code\n"
        f"loaded = set(sys.modules) & set({heavy}); assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("openmm-cgflow " if "--version" in arguments else "usage: openmm-cgflow ")


def test_exit_codes_of_the_process(tmp_path):
    done = command("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"openmm-cgflow {__version__}")
    done = command("check", tmp_path / "nowhere.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("openmm-cgflow: error: ")
    assert "nowhere.yaml" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_installed_command(tmp_path):
    script = Path(sysconfig.get_path("scripts")) / "openmm-cgflow"
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run([script, "info", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "not a run directory" in done.stderr


def test_an_unexpected_error_keeps_its_traceback(tmp_path):
    code = (
        "import runpy, sys, openmm_cgflow.cli as cli\n"
        "def fail(options): return 1 // 0\n"
        "cli._RUN['info'] = fail\n"
        "runpy.run_module('openmm_cgflow', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "info", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("number", "n_workers"),
    [
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow, id="SIGTERM"),
        pytest.param(signal.SIGINT, 2, id="SIGINT"),
    ],
)
def test_a_signal_stops_and_the_printed_command_finishes(number, n_workers, butane, tmp_path, capsys):
    """SIGINT reaches the worker processes too, as Ctrl-C on a terminal does."""
    output = tmp_path / "run"
    words = ["train", str(butane), "-o", str(output), "--set", "stopping.max_rounds=10", "samples.n_samples=5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "openmm_cgflow", *words, f"chains.n_workers={n_workers}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        metrics = output / "metrics.csv"
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.005)
        assert process.poll() is None, process.communicate()
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, error
    assert "Traceback" not in error
    assert f"{signal.Signals(number).name}: stopping" in error
    printed = shlex.split(out.splitlines()[-1])
    assert printed == ["openmm-cgflow", *words, f"chains.n_workers={n_workers}", "--resume"]
    assert json.loads((output / "provenance.json").read_text())["status"] == "stopped"
    n_rows = len(metrics.read_text().splitlines()) - 1
    assert 1 <= n_rows < 10
    assert (output / "checkpoints" / "last.pt").exists()
    # One process from here on: the number of workers does not change the run.
    assert "finished" in output_of(capsys, *printed[1:-2], "chains.n_workers=1", "--resume")
    assert f"continuing from {output / 'checkpoints' / 'last.pt'}" in (output / "run.log").read_text()
    assert len(metrics.read_text().splitlines()) == 1 + 10 + 1 + 2

"""Whole runs on n-butane with tiny settings: restart, protection, files, and the model that comes back."""

import json
import shutil

import mdtraj
import numpy as np
import pytest
import torch

from openmm_cgflow import CGFlowError, MolecularSystem, Partition, ReplicaError, load, load_config, train
from openmm_cgflow.export import read_colvar
from openmm_cgflow.rundir import RunDirectory
from openmm_cgflow.sanitize import energy_and_forces
from openmm_cgflow.scaffold import Scaffold

TINY = (
    "sampler.n_replicas=16",
    "sampler.n_pool_steps=50",
    "sampler.n_workers=1",
    "sampler.platform=Reference",
    "tempering.schedule=adaptive",
    "tempering.start=600",
    "training.n_steps_first=4",
    "training.n_steps=3",
    "training.n_steps_last=4",
    "flow.n_layers=2",
    "flow.hidden_features=[16]",
    "sampling.n_samples=24",
    "sampling.n_equilibration=10",
    "training.checkpoint_interval=1000",
)


@pytest.fixture(scope="module")
def tiny(systems):
    return load_config(systems / "butane" / "butane.yaml", TINY)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny, output, progress=False)
    return output


def test_run_directory_holds_everything(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.yaml",
        "run.log",
        "metrics.csv",
        "topology.pdb",
        "system.xml",
        "slow_atoms.json",
        "checkpoints",
        "models",
        "samples.dcd",
        "samples.colvar",
        "plots",
        "provenance.json",
    }
    record = json.loads((finished / "provenance.json").read_text())
    assert record["status"] == "finished"
    rows = RunDirectory(finished).read_metrics()
    assert record["energy_evaluations"] > rows[-1]["evaluations"] > 0
    assert len(list((finished / "models").iterdir())) == len(record["temperatures_K"])
    assert record["temperatures_K"][0] == 600.0
    assert record["temperatures_K"][-1] == 300.0


def test_resumed_equals_uninterrupted(tiny, finished, tmp_path):
    output = tmp_path / "stopped"
    n_sessions = 0
    # Every session makes at least one step; the last one reaches the end.
    while RunDirectory(output).read_provenance().get("status") != "finished":
        train(tiny, output, resume=True, progress=False, max_time=0.0 if n_sessions < 6 else None)
        n_sessions += 1
    assert n_sessions == 7
    assert (output / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()
    for path in sorted((finished / "models").iterdir()):
        a, b = (torch.load(folder / "models" / path.name, weights_only=True) for folder in (finished, output))
        assert all(torch.equal(a["flow"][name], b["flow"][name]) for name in a["flow"])
    assert (output / "samples.dcd").read_bytes() == (finished / "samples.dcd").read_bytes()
    assert (output / "samples.colvar").read_text() == (finished / "samples.colvar").read_text()


def test_the_time_is_up_while_sampling_too(tiny, finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "samples.dcd").unlink()
    train(tiny, output, resume=True, progress=False, max_time=0.0)
    assert RunDirectory(output).read_provenance()["status"] == "stopped"
    assert not (output / "samples.dcd").exists()
    train(tiny, output, resume=True, progress=False)
    assert (output / "samples.dcd").read_bytes() == (finished / "samples.dcd").read_bytes()


def test_a_failed_run_says_so(tiny, tmp_path):
    sampler = tiny.sampler.model_copy(update={"timestep": 0.05})
    with pytest.raises(ReplicaError):
        train(tiny.model_copy(update={"sampler": sampler}), tmp_path / "run", progress=False)
    run = RunDirectory(tmp_path / "run")
    assert run.read_provenance()["status"] == "failed"
    assert "ERROR   ReplicaError: " in run.log.read_text().splitlines()[-1]


def test_another_seed_gives_another_run(tiny, finished, tmp_path):
    train(tiny.model_copy(update={"seed": 1}), tmp_path / "other", progress=False)
    assert (tmp_path / "other" / "metrics.csv").read_text() != (finished / "metrics.csv").read_text()


def test_used_directory_is_refused(tiny, finished):
    before = sorted(finished.rglob("*"))
    with pytest.raises(CGFlowError, match="--resume"):
        train(tiny, finished, progress=False)
    assert sorted(finished.rglob("*")) == before


def test_resume_refuses_another_configuration(tiny, finished):
    other = tiny.model_copy(update={"temperature": 310.0})
    with pytest.raises(CGFlowError, match="temperature"):
        train(other, finished, resume=True, progress=False)


def test_damaged_checkpoint_falls_back(tiny, finished, tmp_path):
    output = tmp_path / "run"
    for _ in range(2):
        train(tiny, output, resume=True, progress=False, max_time=0.0)
    last = output / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    train(tiny, output, resume=True, progress=False)
    assert "damaged" in (output / "run.log").read_text()
    assert (output / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()


def test_model_from_disk(finished):
    model = load(finished)
    assert model.temperature == 300.0
    first, again, other = model.sample(20, seed=3), model.sample(20, seed=3), model.sample(20, seed=4)
    assert np.array_equal(first.trajectory.xyz, again.trajectory.xyz)
    assert not np.array_equal(first.z, other.z)
    np.testing.assert_allclose(model.log_prob(first.z), first.log_q, atol=1e-9)
    np.testing.assert_allclose(model.read(first.trajectory.xyz), first.z, atol=2e-3)  # float32 positions
    # free_energy = -kT (log q - log J)
    kt = 8.31446261815324e-3 * model.temperature
    log_volume = model.coordinates.log_volume(torch.as_tensor(first.z)).numpy()
    np.testing.assert_allclose(model.free_energy(first.z), -kt * (first.log_q - log_volume), atol=1e-9)
    # The energies in the table are those of the frames.
    assert load(finished, stage=0).temperature == 600.0
    with pytest.raises(CGFlowError, match="no stage 99"):
        load(finished, stage=99)


def test_trajectory_and_table_agree(finished):
    trajectory = mdtraj.load(str(finished / "samples.dcd"), top=str(finished / "topology.pdb"))
    table = read_colvar(finished / "samples.colvar")
    assert trajectory.n_frames == len(table["time"]) == 24
    carbons = [[int(i) for i in trajectory.topology.select("element C")]]
    torsion = mdtraj.compute_dihedrals(trajectory, carbons)[:, 0]
    name = next(name for name in table if name.startswith("z.dihedral"))
    difference = np.angle(np.exp(1j * (torsion - table[name])))
    assert np.abs(difference).max() < 1e-3


def test_python_objects_need_no_files(tiny, tmp_path):
    molecule = MolecularSystem.from_files(tiny.system)
    config = tiny.model_copy(update={"system": None})
    model = train(config, tmp_path / "run", molecular_system=molecule, progress=False)
    assert load(tmp_path / "run").sample(5).trajectory.n_frames == 5
    assert model.stage > 0
    with pytest.raises(CGFlowError, match="system"):
        train(config, tmp_path / "another", progress=False)
    assert not (tmp_path / "another").exists()


def test_atoms_with_equal_names_can_be_loaded_again(tiny, tmp_path):
    molecule = MolecularSystem.from_files(tiny.system)
    for atom in molecule.topology.atoms():
        atom.name = atom.element.symbol
    molecule = MolecularSystem.from_openmm(molecule.topology, molecule.system, molecule.positions)
    train(tiny, tmp_path / "run", molecular_system=molecule, progress=False)
    model = load(tmp_path / "run")
    assert np.array_equal(model.molecular_system.bonds, molecule.bonds)
    assert model.sample(3).trajectory.n_atoms == 14


def test_resumed_after_the_files_have_moved(tiny, finished, systems, tmp_path):
    for name in ("butane.pdb", "butane.xml", "butane.yaml"):
        (tmp_path / name).write_bytes((systems / "butane" / name).read_bytes())
    output = tmp_path / "run"
    train(tiny, output, progress=False, max_time=0.0)
    train(load_config(tmp_path / "butane.yaml", TINY), output, resume=True, progress=False)
    assert (output / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()


def test_what_is_logged_before_there_is_a_directory_is_in_the_log(finished):
    log = (finished / "run.log").read_text()
    assert "harmonic reference" in log
    assert "in vacuum" in log


def test_fast_rotamers_are_named(tiny):
    molecule = MolecularSystem.from_files(tiny.system)

    def evaluate(xyz):
        results = [energy_and_forces(molecule.system, frame) for frame in xyz]
        return np.array([energy for energy, _ in results]), np.array([forces for _, forces in results])

    for slow, expected in (("name C1 C2 C3", ["BUT1:C1-BUT1:C2-BUT1:C3-BUT1:C4"]), ("element C", [])):
        partition = Partition.resolve(molecule, slow)
        assert Scaffold.build(tiny, molecule, partition, evaluate).fast_rotamers() == expected


def test_torch_threads_are_left_as_they_were(tiny, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(tiny, tmp_path / "run", progress=False, max_time=0.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

"""Whole runs on n-butane with tiny settings: restart, protection, files, and the model that comes back."""

import json
import shutil

import mdtraj
import numpy as np
import openmm
import pytest
import torch
from settings import TINY, TINY_JOINT, TINY_LADDER

from openmm_cgflow import (
    CGFlowError,
    MolecularSystem,
    Partition,
    ReplicaError,
    evaluate_exactly,
    load,
    load_config,
    train,
)
from openmm_cgflow.files.log import read_rows
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.files.trajectory import read_colvar
from openmm_cgflow.molecule.sanitize import energy_and_forces
from openmm_cgflow.runs import train as runner
from openmm_cgflow.runs.build import build_geometry
from openmm_cgflow.runs.loop import hottest_temperature
from openmm_cgflow.runs.verify import Verification
from openmm_cgflow.training.pmf.method import PMFTraining

OMEGAS = ("ACE:CH3 ACE:C ALA:N ALA:CA", "ALA:CA ALA:C NME:N NME:C")


@pytest.fixture(scope="module")
def tiny(systems):
    return load_config(systems / "butane" / "butane.yaml", TINY)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny, output, progress=False)
    return output


@pytest.fixture(scope="module")
def tiny_ladder(systems):
    return load_config(systems / "butane" / "butane.yaml", TINY_LADDER)


@pytest.fixture(scope="module")
def finished_ladder(tiny_ladder, tmp_path_factory):
    output = tmp_path_factory.mktemp("ladders") / "whole"
    train(tiny_ladder, output, progress=False)
    return output


@pytest.fixture(scope="module")
def tiny_joint(systems):
    return load_config(systems / "butane" / "butane.yaml", TINY_JOINT)


@pytest.fixture(scope="module")
def finished_joint(tiny_joint, tmp_path_factory):
    output = tmp_path_factory.mktemp("joint") / "whole"
    train(tiny_joint, output, progress=False)
    return output


@pytest.fixture(params=["pmf", "reverse_kl", "joint"])
def each_method(request):
    """Configuration and finished run of every method."""
    suffix = {"pmf": "", "reverse_kl": "_ladder", "joint": "_joint"}[request.param]
    return request.getfixturevalue("tiny" + suffix), request.getfixturevalue("finished" + suffix)


def test_run_directory_holds_everything(each_method):
    config, finished = each_method
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
    assert record["method"] == config.training.method
    rows = read_rows(RunDirectory(finished).metrics)
    assert record["n_steps"] == len(rows)
    assert record["energy_evaluations"] > rows[-1]["evaluations"] > 0
    assert len(list((finished / "models").iterdir())) == len(record["temperatures_K"])
    assert record["temperatures_K"][-1] == 300.0


def test_the_log_begins_with_versions_and_says_nothing_twice(each_method):
    lines = [line[20:] for line in (each_method[1] / "run.log").read_text().splitlines()]
    assert lines[0].startswith("INFO    openmm_cgflow ")
    before = lines[: next(i for i, line in enumerate(lines) if line.startswith(("INFO    step ", "INFO    stage ")))]
    assert any("harmonic reference" in line for line in before)
    assert len(set(before)) == len(before)


def test_the_pmf_is_learned_at_the_target_temperature_and_the_end_is_named(finished):
    record = json.loads((finished / "provenance.json").read_text())
    assert record["temperatures_K"] == [300.0]
    assert record["ended_by"].startswith("not converged: stopping.max_rounds is reached")
    log = (finished / "run.log").read_text()
    assert record["ended_by"] in log
    assert any("effective sample size" in text for text in record["unmet"])
    assert "not met: " + "; ".join(record["unmet"]) in log
    rows = read_rows(RunDirectory(finished).metrics)
    assert len(rows) == 3 + 1 + 1 + 2
    assert [np.isfinite(row["held_out"]) for row in rows] == [True] * 3 + [False] * 4
    assert [np.isfinite(row["anchor_misfit"]) for row in rows] == [False] * 3 + [True] * 4


def test_the_check_by_switching_is_on_disk(finished, finished_ladder):
    found = json.loads((finished / "verification.json").read_text())
    assert len(found["pmf"]) == len(found["switching"]) == len(found["error"]) == 2
    assert found["n_evaluations"] > 0 and found["unit"] == "kT"
    assert "nonequilibrium switching" in (finished / "run.log").read_text()
    assert not (finished_ladder / "verification.json").exists()  # there is no PMF to check


@pytest.mark.parametrize(
    ("differences", "warned"),
    [([0.15] * 8, None), ([0.3] * 8, "off by 0.30 kT, 2.7 times"), ([0.0] * 7 + [-0.5], "off by 0.50 kT, 4.5 times")],
)
def test_a_check_that_fails_says_so(differences, warned, tiny, tmp_path, monkeypatch, caplog):
    """Errors of 0.1 kT of the switching and 0.05 kT of the PMF add up to 0.11."""
    found = Verification([[0.0]] * 8, differences, [0.0] * 8, [0.1] * 8, [1.0] * 8, 7)
    monkeypatch.setattr(runner, "verify", lambda *_: found)
    config = tiny.model_copy(update={"stopping": tiny.stopping.model_copy(update={"free_energy_error": 0.05})})
    caplog.set_level("INFO")
    runner._verify(RunDirectory(tmp_path), None, None, config)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [warned in text for text in warnings] == [True] if warned else warnings == []


def test_the_ladder_starts_hot(finished_ladder):
    record = json.loads((finished_ladder / "provenance.json").read_text())
    assert record["temperatures_K"][0] == 600.0
    assert len(record["temperatures_K"]) > 1
    assert record["ended_by"] == "the last stage's steps are done"


def test_resumed_equals_uninterrupted(each_method, tmp_path):
    """Stopped after every step: in the rounds, after the last one, in the training of the flow alone; every stage."""
    config, finished = each_method
    output = tmp_path / "stopped"
    n_sessions = 0
    # Every session makes at least one step; the last one reaches the end.
    while RunDirectory(output).read_provenance().get("status") != "finished":
        train(config, output, resume=True, progress=False, max_time=0.0 if n_sessions < 6 else None)
        n_sessions += 1
    assert n_sessions == 7
    assert (output / "run.log").read_text().count("harmonic reference") == 1
    assert (output / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()
    for path in sorted((finished / "models").iterdir()):
        a, b = (torch.load(folder / "models" / path.name, weights_only=True) for folder in (finished, output))
        a, b = a["density"], b["density"]
        parts = {"pmf": ["flow", "pmf", "response"], "reverse_kl": ["flow"], "joint": ["joint"]}
        assert list(a) == list(b) == parts[config.training.method]
        for part in a:
            assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
    assert (output / "samples.dcd").read_bytes() == (finished / "samples.dcd").read_bytes()
    assert (output / "samples.colvar").read_text() == (finished / "samples.colvar").read_text()


def test_same_seed_same_files(each_method, tmp_path):
    config, finished = each_method
    train(config, tmp_path / "again", progress=False)
    for name in ("metrics.csv", "samples.colvar", "samples.dcd", "config.yaml", "slow_atoms.json"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name
    verification = finished / "verification.json"
    if verification.exists():
        assert (tmp_path / "again" / "verification.json").read_text() == verification.read_text()


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
    chains = tiny.chains.model_copy(update={"timestep": 0.05})
    with pytest.raises(ReplicaError):
        train(tiny.model_copy(update={"chains": chains}), tmp_path / "run", progress=False)
    run = RunDirectory(tmp_path / "run")
    assert run.read_provenance()["status"] == "failed"
    assert "ERROR   ReplicaError: " in run.log.read_text().splitlines()[-1]


def test_a_lost_gpu_ends_in_one_message(tiny, tmp_path, monkeypatch):
    def lost(*_, **__):
        raise openmm.OpenMMException("Error downloading array posq: CUDA_ERROR_ILLEGAL_ADDRESS (700)")

    monkeypatch.setattr(PMFTraining, "step", lost)
    with pytest.raises(CGFlowError, match=r"OpenMM stopped with: .*\(700\)\. The last checkpoint is kept; continue"):
        train(tiny, tmp_path / "run", progress=False)
    assert RunDirectory(tmp_path / "run").read_provenance()["status"] == "failed"


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


def test_damaged_checkpoint_falls_back(each_method, tmp_path):
    config, finished = each_method
    output = tmp_path / "run"
    for _ in range(2):
        train(config, output, resume=True, progress=False, max_time=0.0)
    last = output / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    train(config, output, resume=True, progress=False)
    assert "damaged" in (output / "run.log").read_text()
    assert (output / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()


def test_model_from_disk(each_method):
    config, finished = each_method
    model = load(finished)
    assert model.temperature == 300.0
    first, again, other = model.sample(20, seed=3), model.sample(20, seed=3), model.sample(20, seed=4)
    assert np.array_equal(first.trajectory.xyz, again.trajectory.xyz)
    assert not np.array_equal(first.z, other.z)
    if config.training.method != "joint":  # whose log_q is that of the fast coordinates, too
        np.testing.assert_allclose(model.log_prob(first.z), first.log_q, atol=1e-9)
    np.testing.assert_allclose(model.read(first.trajectory.xyz), first.z, atol=2e-3)  # float32 positions
    with pytest.raises(CGFlowError, match="no stage 99"):
        load(finished, stage=99)
    with pytest.raises(CGFlowError, match="not a run on a synthetic target"):
        evaluate_exactly(finished)


def test_a_copy_beside_the_models_is_none_of_them(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.copy(run / "models" / "stage_00.pt", run / "models" / "stage_00_old.pt")
    assert list(RunDirectory(run).stages()) == [0]
    assert load(run).stage == 0


def test_importance_weights_of_a_learned_pmf(finished):
    """exp(-beta A) J / q, with the A that free_energy gives; all draws carry it where all become samples."""
    model = load(finished)
    samples = model.sample(20, seed=3, acceptance=1)
    np.testing.assert_allclose(samples.log_weight, model.log_weights(samples.z), atol=1e-9)
    kt = 8.31446261815324e-3 * model.temperature
    log_volume = model.coordinates.log_volume(torch.as_tensor(samples.z)).numpy()
    expected = -model.free_energy(samples.z) / kt + log_volume - model.log_prob(samples.z)
    np.testing.assert_allclose(model.log_weights(samples.z), expected, atol=1e-9)
    assert samples.log_weight.std() > 1e-3
    assert np.array_equal(model.log_weights(torch.as_tensor(samples.z)), model.log_weights(samples.z))


def test_samples_have_the_weights_that_are_left(finished):
    """None is heavier than a common c, and what is missing beyond it they carry."""
    model = load(finished)
    z, _ = model.flow.sample(4000, torch.Generator().manual_seed(0))
    drawn, samples = model.log_weights(z), model.sample(300, seed=3, acceptance=0.8)
    weights, heavy = model.log_weights(samples.z), samples.log_weight > 0
    assert 5 < heavy.sum() < 150
    log_c = weights[heavy] - samples.log_weight[heavy]
    np.testing.assert_allclose(log_c, log_c[0], atol=1e-9)
    assert (weights[~heavy] < log_c[0]).all()
    assert np.exp(np.minimum(0, drawn - log_c[0])).mean() == pytest.approx(0.8, abs=0.05)
    with pytest.raises(CGFlowError, match="acceptance: got 0, expected above 0 and at most 1"):
        model.sample(5, acceptance=0)


def test_more_samples_are_others_than_those_of_the_run(finished):
    model, table = load(finished), read_colvar(finished / "samples.colvar")
    more, again = model.sample(5), model.sample(5)
    np.testing.assert_array_equal(more.z, again.z)
    assert not np.isin(
        more.z[:, 0].round(6), table[next(name for name in table if name.startswith("z."))].round(6)
    ).any()


def test_the_table_of_samples_says_what_they_are(finished):
    model, table = load(finished), read_colvar(finished / "samples.colvar")
    again = model.sample(len(table["time"]), seed=model.defaults.seed)
    z = np.column_stack([table[name] for name in table if name.startswith("z.")])
    np.testing.assert_allclose(again.z, z, atol=1e-8)  # ten digits
    np.testing.assert_allclose(again.log_weight, table["log_weight"], atol=1e-8)
    np.testing.assert_allclose(again.log_q, table["log_q"], atol=1e-7)


def test_without_a_pmf_the_flow_is_the_free_energy_and_there_are_no_weights(finished_ladder):
    model = load(finished_ladder)
    samples = model.sample(20, seed=3)
    # free_energy = -kT (log q - log J)
    kt = 8.31446261815324e-3 * model.temperature
    log_volume = model.coordinates.log_volume(torch.as_tensor(samples.z)).numpy()
    np.testing.assert_allclose(model.free_energy(samples.z), -kt * (samples.log_q - log_volume), atol=1e-9)
    assert samples.log_weight is None
    with pytest.raises(CGFlowError, match="no potential of mean force to weigh with"):
        model.log_weights(samples.z)
    assert "log_weight" not in read_colvar(finished_ladder / "samples.colvar")
    assert load(finished_ladder, stage=0).temperature == 600.0


def test_amide_bonds_can_be_sampled_or_kept(systems, tmp_path):
    """Through a whole run: the names of what is sampled, and the peptide bonds of what comes out."""
    settings = (*TINY, "stopping.max_rounds=1", "samples.n_verified=0", "samples.plots=false")
    path = systems / "alanine_dipeptide" / "alanine_dipeptide.yaml"
    atoms = mdtraj.load_topology(str(path.with_suffix(".pdb"))).atoms
    at = {f"{atom.residue.name}:{atom.name}": atom.index for atom in atoms}
    for kind, n_torsions in (("keep", 2), ("sample", 4)):
        config = load_config(path, (*settings, f"coordinates.peptide_bonds={kind}"))
        model = train(config, tmp_path / kind, progress=False)
        assert model.coordinates.n_circular == n_torsions
        trajectory = mdtraj.load(str(tmp_path / kind / "samples.dcd"), top=str(tmp_path / kind / "topology.pdb"))
        omega = mdtraj.compute_dihedrals(trajectory, [[at[name] for name in row.split()] for row in OMEGAS])
        assert (np.abs(omega) > np.pi / 2).all() == (kind == "keep")  # almost untrained, the others are everywhere


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
    assert model.stage == 0 and model.density.weighted
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
        assert (
            build_geometry(tiny, molecule, partition, hottest_temperature(tiny), evaluate).fast_rotamers() == expected
        )


def test_torch_threads_are_left_as_they_were(tiny, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(tiny, tmp_path / "run", progress=False, max_time=0.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

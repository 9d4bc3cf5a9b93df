"""Chains in small Contexts: closed-form statistics, reproducibility, quarantine, counting, worker processes."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import openmm
import pytest
from openmm import unit
from toys import HarmonicBath, make_toy

from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.context import ReplicaContext, is_divergence
from openmm_cgflow.engines.engine import Dynamics, Schedule
from openmm_cgflow.engines.frozen import frozen_system
from openmm_cgflow.engines.platforms import platform_choice
from openmm_cgflow.engines.workers import ContextsEngine
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.seeds import derive_seed
from openmm_cgflow.settings import ChainSettings

LONG = Schedule(300.0, n_relax=5, n_equilibration=150, n_frames=8, stride=40)
SHORT = Schedule(300.0, n_relax=3, n_equilibration=5, n_frames=2, stride=4)


def settings(**changes):
    return ChainSettings(
        **({"engine": "contexts", "platform": "Reference", "n_workers": 1, "timestep": 0.002} | changes)
    )


@pytest.fixture(scope="module")
def bath():
    return HarmonicBath()


def starts(bath, n):
    return np.repeat(bath.toy.positions[None], n, axis=0)


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("platform", "temperature", "n_replicas"),
    [("Reference", 300.0, 200), ("Reference", 900.0, 200), ("CPU", 300.0, 50)],
)
def test_samples_the_closed_form(bath, platform, temperature, n_replicas):
    with create_engine(bath.toy, bath.slow, settings(platform=platform)) as engine:
        frames = engine.run(starts(bath, n_replicas), replace(LONG, temperature=temperature), seed=1)
    deviations = bath.deviations(frames, temperature)
    assert max(deviations.values()) < 4.5, deviations
    wrong = bath.deviations(frames, temperature * 4 / 3)
    assert wrong["covariance"] > 5 and wrong["energy"] > 5


def test_center_of_mass_remover_would_bias(bath):
    """The reason why frozen_system refuses it: with it left in, the same comparison fails."""
    system = frozen_system(bath.toy, bath.slow, 4.0)
    system.addForce(openmm.CMMotionRemover())
    dynamics = Dynamics(timestep=0.002, friction=50.0, force_cap=1e4)
    with ContextsEngine(system, bath.toy.positions, platform_choice("Reference"), dynamics, 1) as engine:
        frames = engine.run(starts(bath, 200), LONG, seed=1)
    assert bath.deviations(frames, 300.0)["covariance"] > 20


def test_masses_do_not_matter(bath):
    with create_engine(bath.toy, bath.slow, settings(hydrogen_mass=12.0)) as engine:
        frames = engine.run(starts(bath, 200), LONG, seed=1)
    assert max(bath.deviations(frames, 300.0).values()) < 4.5


@pytest.fixture(scope="module")
def peptide(systems):
    folder = systems / "alanine_dipeptide"
    return MolecularSystem.from_files(folder / "alanine_dipeptide.pdb", ["amber99sbildn.xml", "amber99_obc.xml"])


# ---------------------------------------------------------------- what must not change


def test_slow_atoms_do_not_move_by_one_bit(peptide):
    slow = list(Partition.resolve(peptide, "backbone").slow)
    start = np.repeat(peptide.positions[None], 3, axis=0) + np.array([0.1, -0.2, 0.3])
    with create_engine(peptide, slow, settings(timestep=0.001)) as engine:
        frames = engine.run(start, SHORT, seed=1)
    assert np.array_equal(frames.xyz[:, :, slow], np.repeat(start[:, None, slow], 2, axis=1))
    fast = [i for i in range(peptide.n_atoms) if i not in slow]
    assert (frames.xyz[:, :, fast] != start[:, None, fast]).all()


def test_input_is_not_changed(peptide):
    before = openmm.XmlSerializer.serialize(peptide.system)
    start = np.repeat(peptide.positions[None], 2, axis=0)
    kept = start.copy()
    for engine_name in ("contexts", "lattice"):
        with create_engine(peptide, [4, 6, 8], settings(engine=engine_name, n_replicas=2)) as engine:
            engine.run(start, SHORT, seed=1)
            engine.evaluate(start)
    assert openmm.XmlSerializer.serialize(peptide.system) == before
    assert np.array_equal(start, kept)


def test_descent_leaves_thermal_structures_alone(bath):
    system = frozen_system(bath.toy, bath.slow, 4.0)
    chain = ReplicaContext(system, platform_choice("Reference"), Dynamics(0.002, 50.0, force_cap=1e4))
    state = chain.run(bath.toy.positions, Schedule(300.0, 10, 0, 1, 0), 1, evaluate=False)[0]
    assert np.array_equal(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer), bath.toy.positions)


def test_descent_brings_large_forces_down_to_the_cap(bath):
    system = frozen_system(bath.toy, bath.slow, 4.0)
    start = bath.toy.positions.copy()
    start[2] += 3.0
    chain = ReplicaContext(system, platform_choice("Reference"), Dynamics(0.002, 50.0, force_cap=2000.0))
    chain.run(start, Schedule(300.0, 2000, 0, 1, 0), 1, evaluate=False)
    state = chain.evaluate(chain.positions())
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    assert 1900.0 < np.abs(forces[2:]).max() < 2100.0
    assert np.array_equal(chain.positions()[:2], start[:2])


# ---------------------------------------------------------------- reproducibility


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_same_seed_gives_the_same_bits(bath, platform):
    start = starts(bath, 40)
    with create_engine(bath.toy, bath.slow, settings(platform=platform)) as engine:
        first, other, again = (engine.run(start, SHORT, seed=seed) for seed in (1, 2, 1))
    assert same(first, again) and not np.array_equal(first.xyz, other.xyz)
    assert len(np.unique(first.xyz[:, 0, 2:].reshape(40, -1), axis=0)) == 40, "two replicas had the same noise"


def test_number_of_workers_does_not_matter(bath):
    start = starts(bath, 70)
    results = []
    for n_workers in (1, 2):
        with create_engine(bath.toy, bath.slow, settings(n_workers=n_workers)) as engine:
            assert f"{n_workers} worker" in engine.description
            results.append((engine.run(start, SHORT, seed=1), engine.evaluate(start)))
            assert engine.n_energy_evaluations == 70 * (3 + 5 + 2 * 4 + 2) + 70
    assert same(results[0][0], results[1][0]) and same(results[0][1], results[1][1])


def test_batch_size_does_not_matter_to_those_before(bath):
    with create_engine(bath.toy, bath.slow, settings()) as engine:
        few = engine.run(starts(bath, 16), SHORT, seed=1)
        many = engine.run(starts(bath, 33), SHORT, seed=1)
    assert np.array_equal(few.xyz, many.xyz[:16])


def test_seeds_are_never_zero_and_differ():
    seeds = {derive_seed(i, j) for i in range(50) for j in range(50)}
    assert len(seeds) == 2500 and min(seeds) >= 1 and max(seeds) < 2**31


# ---------------------------------------------------------------- quarantine


def clashing():
    """A bath whose fast atoms must not coincide: there the forces are not finite."""
    bath = HarmonicBath()
    force = openmm.NonbondedForce()
    for i in range(4):
        force.addParticle(0.0, 0.05, 0.1 if i > 1 else 0.0)
    bath.toy.system.addForce(force)
    start = starts(bath, 40)
    start[5, 3] = start[5, 2]
    start[20, 2] = np.nan
    return bath, start


@pytest.mark.parametrize(("platform", "n_workers"), [("Reference", 1), ("Reference", 2), ("CPU", 1)])
def test_diverged_replicas_are_quarantined(platform, n_workers):
    bath, start = clashing()
    with create_engine(bath.toy, bath.slow, settings(platform=platform, n_workers=n_workers)) as engine:
        frames = engine.run(start, SHORT, seed=1)
        clean = engine.run(starts(bath, 40), SHORT, seed=1)
    assert clean.valid.all()
    assert np.flatnonzero(~frames.valid).tolist() == [5, 20]
    for part in frames[:3]:
        assert np.isfinite(part).all() and not part[[5, 20]].any()
    # OpenMM's CPU platform stops in the middle of a chain; what follows in that chunk has other noise.
    unharmed = frames.valid if platform == "Reference" else frames.valid & ~np.isin(np.arange(40), np.arange(5, 16))
    assert np.array_equal(frames.xyz[unharmed], clean.xyz[unharmed])
    assert np.array_equal(frames.energy[unharmed], clean.energy[unharmed])


def test_other_errors_of_openmm_are_not_hidden(bath, monkeypatch):
    def broken(*_, **__):
        raise openmm.OpenMMException("out of memory")

    with create_engine(bath.toy, bath.slow, settings()) as engine:
        monkeypatch.setattr(ReplicaContext, "run", broken)
        with pytest.raises(openmm.OpenMMException, match="out of memory"):
            engine.run(starts(bath, 2), SHORT, seed=1)


def test_energies_that_are_not_finite_are_returned_so(bath):
    for platform in ("Reference", "CPU"):
        with create_engine(bath.toy, bath.slow, settings(platform=platform)) as engine:
            start = starts(bath, 3)
            start[1, 2] = np.nan
            energy, forces = engine.evaluate(start)
        assert np.isfinite(energy).tolist() == [True, False, True]
        assert not np.isfinite(forces[1]).all() and np.isfinite(forces[[0, 2]]).all()


# ---------------------------------------------------------------- evaluate and counting


def test_evaluate_gives_energy_and_forces(bath):
    with create_engine(bath.toy, bath.slow, settings()) as engine:
        energy, forces = engine.evaluate(starts(bath, 2))
    x = bath.toy.positions
    assert np.allclose(energy, 0.5 * sum(k * np.sum((x[i] - x[j]) ** 2) for i, j, k in bath.springs))
    expected = np.zeros_like(x)
    for i, j, k in bath.springs:
        expected[i] -= k * (x[i] - x[j])
        expected[j] += k * (x[i] - x[j])
    assert np.allclose(forces, expected)


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_evaluations_are_counted(bath, platform):
    with create_engine(bath.toy, bath.slow, settings(platform=platform)) as engine:
        assert engine.n_energy_evaluations == 0
        engine.run(starts(bath, 20), Schedule(300.0, 3, 5, 2, 4), seed=1)
        assert engine.n_energy_evaluations == 20 * (3 + 5 + 2 * 4 + 2)
        engine.evaluate(starts(bath, 7))
        assert engine.n_energy_evaluations == 20 * (3 + 5 + 2 * 4 + 2) + 7


def test_one_step_is_one_evaluation():
    """The convention of the count, checked on a force that counts its own calls."""
    calls = []

    def compute(state):
        calls.append(state)
        return 0.0 * unit.kilojoule_per_mole, np.zeros((2, 3)) * unit.kilojoule_per_mole / unit.nanometer

    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    system.addForce(openmm.PythonForce(compute))
    chain = ReplicaContext(system, platform_choice("Reference"), Dynamics(0.001, 50.0, 1e4))
    chain.reseed(1, 300.0)
    chain.run(np.zeros((2, 3)), Schedule(300.0, 3, 5, 2, 4), 1, evaluate=True)
    assert len(calls) == chain.n_evaluations == 3 + 5 + 2 * 4 + 2


def test_empty_batches(bath):
    for engine_name in ("contexts", "lattice"):
        with create_engine(bath.toy, bath.slow, settings(engine=engine_name)) as engine:
            frames = engine.run(np.zeros((0, 4, 3)), SHORT, seed=1)
            energy, forces = engine.evaluate(np.zeros((0, 4, 3)))
        assert frames.xyz.shape == (0, 2, 4, 3) and frames.valid.shape == (0,)
        assert energy.shape == (0,) and forces.shape == (0, 4, 3)


def test_wrong_shapes_are_refused(bath):
    with create_engine(bath.toy, bath.slow, settings()) as engine:
        with pytest.raises(ValueError, match=r"\(4, 3\).*expected \(n_replicas, 4, 3\)"):
            engine.run(bath.toy.positions, SHORT, seed=1)
        with pytest.raises(ValueError, match="expected"):
            engine.evaluate(np.zeros((2, 5, 3)))


# ---------------------------------------------------------------- the frozen System


def test_frozen_system(peptide):
    slow = Partition.resolve(peptide, "backbone").slow
    system = frozen_system(peptide, slow, 4.0)
    masses = [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(peptide.n_atoms)]
    for i, (mass, element) in enumerate(zip(masses, peptide.elements, strict=True)):
        original = peptide.system.getParticleMass(i).value_in_unit(unit.dalton)
        assert mass == (0.0 if i in slow else 4.0 if element == "H" else original)


@pytest.mark.parametrize("force", [openmm.CMMotionRemover(), openmm.AndersenThermostat(300.0, 1.0)])
def test_forces_that_act_on_velocities_are_refused(bath, force):
    toy = HarmonicBath().toy
    toy.system.addForce(openmm.XmlSerializer.clone(force))
    with pytest.raises(ValueError, match=type(force).__name__):
        create_engine(toy, bath.slow, settings())


def test_constraints_are_refused(bath):
    toy = HarmonicBath().toy
    toy.system.addConstraint(2, 3, 0.1)
    with pytest.raises(ValueError, match="constraints"):
        create_engine(toy, bath.slow, settings())


def test_fast_atoms_without_mass_are_refused():
    toy = HarmonicBath().toy
    toy.system.setParticleMass(3, 0.0)
    with pytest.raises(CGFlowError, match=r"atom 3 \(H\).*mass"):
        create_engine(toy, (0, 1), settings())


def test_centroids_keep_their_weights():
    force = openmm.CustomCentroidBondForce(2, "10*distance(g1,g2)^2")
    force.addGroup([0, 2])
    force.addGroup([1, 3])
    force.addBond([0, 1], [])
    positions = np.random.default_rng(0).normal(size=(4, 3))
    toy = make_toy("CCHC", [(0, 2), (1, 2), (2, 3)], positions, force)
    with create_engine(toy, [0, 1], settings()) as engine:
        energy, _ = engine.evaluate(positions[None])
    first = (12 * positions[0] + positions[2]) / 13
    second = (positions[1] + positions[3]) / 2
    assert np.allclose(energy, 10 * np.sum((first - second) ** 2))


# ---------------------------------------------------------------- choice and processes


def test_engine_follows_the_platform_and_the_setting(bath):
    for engine_name, expected in (("auto", "contexts"), ("contexts", "contexts"), ("lattice", "lattice")):
        with create_engine(bath.toy, bath.slow, settings(engine=engine_name)) as engine:
            assert engine.description.startswith(f"{expected} engine") and "Reference" in engine.description


def test_probe_chooses_and_says_so(bath, monkeypatch):
    monkeypatch.delenv("OPENMM_DEFAULT_PLATFORM", raising=False)
    with create_engine(bath.toy, bath.slow, settings(platform=None, engine="auto")) as engine:
        assert "timed" in engine.description and "Reference" in engine.description


def test_default_is_one_worker_per_core(bath, monkeypatch):
    monkeypatch.setattr("openmm_cgflow.engines.workers.default_workers", lambda: 3)
    with create_engine(bath.toy, bath.slow, settings(n_workers=0)) as engine:
        assert "3 worker" in engine.description


def test_dead_worker_is_an_error(bath):
    with create_engine(bath.toy, bath.slow, settings(n_workers=2)) as engine:
        engine.run(starts(bath, 2), SHORT, seed=1)
        for process in engine._executor._processes.values():
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(CGFlowError, match="worker process of the sampler ended unexpectedly"):
            engine.run(starts(bath, 40), SHORT, seed=1)


def test_closed_engine_says_so(bath):
    for options in ({"n_workers": 1}, {"n_workers": 2}, {"engine": "lattice"}):
        engine = create_engine(bath.toy, bath.slow, settings(**options))
        engine.close()
        engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            engine.run(starts(bath, 2), SHORT, seed=1)


PREAMBLE = """
import os, signal, sys, threading
sys.path.insert(0, {tests!r})
from toys import HarmonicBath
import numpy as np
from openmm_cgflow.settings import ChainSettings
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.engine import Schedule
print("main module", flush=True)
bath = HarmonicBath()
start = np.repeat(bath.toy.positions[None], 40, axis=0)
"""
INTERRUPTED = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have their background jobs ignore it
with create_engine(bath.toy, bath.slow, ChainSettings(platform="Reference", n_workers=2)) as engine:
    engine.run(start, Schedule(300.0, n_equilibration=1), seed=1)
    threading.Timer(1.0, os.killpg, (os.getpgrp(), signal.SIGINT)).start()  # work is in progress, on busy cores, too
    try:
        engine.run(start, Schedule(300.0, n_equilibration=50_000_000), seed=1)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    workers = engine._executor._processes.values()
    print("alive", all(process.is_alive() for process in workers), flush=True)
"""
KILLED = """
engine = create_engine(bath.toy, bath.slow, ChainSettings(platform="Reference", n_workers=2))
engine.run(start, Schedule(300.0, n_equilibration=1), seed=1)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
engine.run(start, Schedule(300.0, n_equilibration=2_000_000), seed=1)
"""


def run_script(root, folder, text):
    script = folder / "script.py"
    script.write_text(PREAMBLE.format(tests=str(root / "tests")) + text)
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        start_new_session=True,
        check=False,
        env=environment,
    )


def test_workers_end_with_a_killed_parent(root, tmp_path):
    # The workers hold the pipe of the script's output open: run_script returns before its timeout only if they end.
    assert run_script(root, tmp_path, KILLED).returncode == -signal.SIGKILL


def test_interrupt_reaches_the_parent_only(root, tmp_path):
    """Also: a script needs no guard around its main part, and closing does not wait for work in progress."""
    done = run_script(root, tmp_path, INTERRUPTED)
    assert done.stdout.split("\n")[:-1] == ["main module", "interrupted", "alive True"]
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("message", "diverged"),
    [
        ("Particle coordinate is NaN.  For more information, see https://...", True),
        ("Energy or force at minimum is nan", True),
        ("Error launching CUDA compiler: /home/fernando/maintenance/nvcc", False),
    ],
)
def test_divergence_is_told_from_other_errors(message, diverged):
    assert is_divergence(openmm.OpenMMException(message)) is diverged


# ---------------------------------------------------------------- on GPUs, of which there is none here


@pytest.fixture
def gpu(monkeypatch):
    """OpenMM's CPU platform counts as that of a GPU."""
    monkeypatch.setattr("openmm_cgflow.engines.platforms.GPU_PLATFORMS", ("CPU",))
    return settings(engine="auto", platform="CPU", n_replicas=8)


@pytest.mark.parametrize("fastest", ["Reference", "CPU"])
def test_frames_of_a_gpu_are_evaluated_where_that_is_fastest(gpu, fastest, monkeypatch):
    def seconds(chain, _):
        return 1e-6 if chain._context.getPlatform().getName() == fastest else 1e-3

    monkeypatch.setattr(ReplicaContext, "seconds_per_evaluation", seconds)
    bath = HarmonicBath()
    with create_engine(bath.toy, bath.slow, gpu) as engine:
        assert engine.description.startswith("lattice engine, 8 replicas at once, platform CPU")
        assert f"frames evaluated by: contexts engine, 1 worker(s), platform {fastest}" in engine.description
        assert "µs per evaluation" in engine.description


def test_evaluations_are_timed():
    bath = HarmonicBath()
    chain = ReplicaContext(bath.toy.system, platform_choice("Reference"), Dynamics(0.002, 50.0, 1e4))
    assert 0 < chain.seconds_per_evaluation(bath.toy.positions) < 0.1


@pytest.mark.parametrize(("initialised", "n_workers"), [(True, 1), (False, 3)])
def test_one_process_holds_the_network_on_a_gpu(initialised, n_workers, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: initialised)
    monkeypatch.setattr("openmm_cgflow.engines.workers.default_workers", lambda: 3)
    toy = HarmonicBath().toy
    toy.system.addForce(openmm.PythonForce(_nothing))
    with create_engine(toy, (0, 1), settings(platform="Reference", n_workers=0)) as engine:
        assert f"contexts engine, {n_workers} worker(s)" in engine.description


def _nothing(state):
    return 0.0, np.zeros(state.getPositions(asNumpy=True).shape)

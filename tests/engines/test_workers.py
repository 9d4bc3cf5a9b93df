"""Replicas in small Contexts: closed-form statistics, reproducibility, quarantine, counting, worker processes."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import openmm
import pytest
from toys import HarmonicBath, reference_settings

from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.context import ReplicaContext
from openmm_cgflow.engines.engine import Schedule
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.seeds import derive_seed

LONG = Schedule(300.0, n_relax=5, n_equilibration=150, n_frames=8, stride=40)
SHORT = Schedule(300.0, n_relax=3, n_equilibration=5, n_frames=2, stride=4)


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("platform", "temperature", "n_replicas"),
    [("Reference", 300.0, 200), ("Reference", 900.0, 200), ("CPU", 300.0, 50)],
)
def test_samples_the_closed_form(bath, platform, temperature, n_replicas):
    with create_engine(bath.toy, bath.slow, reference_settings(platform=platform)) as engine:
        frames = engine.run(bath.starts(n_replicas), replace(LONG, temperature=temperature), seed=1)
    deviations = bath.deviations(frames, temperature)
    assert max(deviations.values()) < 4.5, deviations
    wrong = bath.deviations(frames, temperature * 4 / 3)
    assert wrong["covariance"] > 5 and wrong["energy"] > 5


# ---------------------------------------------------------------- what must not change


def test_slow_atoms_do_not_move_by_one_bit(peptide):
    slow = list(Partition.resolve(peptide, "backbone").slow)
    start = np.repeat(peptide.positions[None], 3, axis=0) + np.array([0.1, -0.2, 0.3])
    with create_engine(peptide, slow, reference_settings(timestep=0.001)) as engine:
        frames = engine.run(start, SHORT, seed=1)
    assert np.array_equal(frames.xyz[:, :, slow], np.repeat(start[:, None, slow], 2, axis=1))
    fast = [i for i in range(peptide.n_atoms) if i not in slow]
    assert (frames.xyz[:, :, fast] != start[:, None, fast]).all()


def test_input_is_not_changed(peptide):
    before = openmm.XmlSerializer.serialize(peptide.system)
    start = np.repeat(peptide.positions[None], 2, axis=0)
    kept = start.copy()
    for engine_name in ("contexts", "lattice"):
        with create_engine(peptide, [4, 6, 8], reference_settings(engine=engine_name, n_replicas=2)) as engine:
            engine.run(start, SHORT, seed=1)
            engine.evaluate(start)
    assert openmm.XmlSerializer.serialize(peptide.system) == before
    assert np.array_equal(start, kept)


# ---------------------------------------------------------------- reproducibility


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_same_seed_gives_the_same_bits(bath, platform):
    start = bath.starts(40)
    with create_engine(bath.toy, bath.slow, reference_settings(platform=platform)) as engine:
        first, other, again = (engine.run(start, SHORT, seed=seed) for seed in (1, 2, 1))
    assert same(first, again) and not np.array_equal(first.xyz, other.xyz)
    assert len(np.unique(first.xyz[:, 0, 2:].reshape(40, -1), axis=0)) == 40, "two replicas had the same noise"


def test_number_of_workers_does_not_matter(bath):
    start = bath.starts(70)
    results = []
    for n_workers in (1, 2):
        with create_engine(bath.toy, bath.slow, reference_settings(n_workers=n_workers)) as engine:
            assert f"{n_workers} worker" in engine.description
            results.append((engine.run(start, SHORT, seed=1), engine.evaluate(start)))
            assert engine.n_energy_evaluations == 70 * (3 + 5 + 2 * 4 + 2) + 70
    assert same(results[0][0], results[1][0]) and same(results[0][1], results[1][1])


def test_batch_size_does_not_matter_to_those_before(bath):
    with create_engine(bath.toy, bath.slow, reference_settings()) as engine:
        few = engine.run(bath.starts(16), SHORT, seed=1)
        many = engine.run(bath.starts(33), SHORT, seed=1)
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
    start = bath.starts(40)
    start[5, 3] = start[5, 2]
    start[20, 2] = np.nan
    return bath, start


@pytest.mark.parametrize(("platform", "n_workers"), [("Reference", 1), ("Reference", 2), ("CPU", 1)])
def test_diverged_replicas_are_quarantined(platform, n_workers):
    bath, start = clashing()
    with create_engine(bath.toy, bath.slow, reference_settings(platform=platform, n_workers=n_workers)) as engine:
        frames = engine.run(start, SHORT, seed=1)
        clean = engine.run(bath.starts(40), SHORT, seed=1)
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

    with create_engine(bath.toy, bath.slow, reference_settings()) as engine:
        monkeypatch.setattr(ReplicaContext, "run", broken)
        with pytest.raises(openmm.OpenMMException, match="out of memory"):
            engine.run(bath.starts(2), SHORT, seed=1)


def test_energies_that_are_not_finite_are_returned_so(bath):
    for platform in ("Reference", "CPU"):
        with create_engine(bath.toy, bath.slow, reference_settings(platform=platform)) as engine:
            start = bath.starts(3)
            start[1, 2] = np.nan
            energy, forces = engine.evaluate(start)
        assert np.isfinite(energy).tolist() == [True, False, True]
        assert not np.isfinite(forces[1]).all() and np.isfinite(forces[[0, 2]]).all()


# ---------------------------------------------------------------- evaluate and counting


def test_evaluate_gives_energy_and_forces(bath):
    with create_engine(bath.toy, bath.slow, reference_settings()) as engine:
        energy, forces = engine.evaluate(bath.starts(2))
    x = bath.toy.positions
    assert np.allclose(energy, 0.5 * sum(k * np.sum((x[i] - x[j]) ** 2) for i, j, k in bath.springs))
    expected = np.zeros_like(x)
    for i, j, k in bath.springs:
        expected[i] -= k * (x[i] - x[j])
        expected[j] += k * (x[i] - x[j])
    assert np.allclose(forces, expected)


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_evaluations_are_counted(bath, platform):
    with create_engine(bath.toy, bath.slow, reference_settings(platform=platform)) as engine:
        assert engine.n_energy_evaluations == 0
        engine.run(bath.starts(20), Schedule(300.0, 3, 5, 2, 4), seed=1)
        assert engine.n_energy_evaluations == 20 * (3 + 5 + 2 * 4 + 2)
        engine.evaluate(bath.starts(7))
        assert engine.n_energy_evaluations == 20 * (3 + 5 + 2 * 4 + 2) + 7


def test_empty_batches(bath):
    for engine_name in ("contexts", "lattice"):
        with create_engine(bath.toy, bath.slow, reference_settings(engine=engine_name)) as engine:
            frames = engine.run(np.zeros((0, 4, 3)), SHORT, seed=1)
            energy, forces = engine.evaluate(np.zeros((0, 4, 3)))
        assert frames.xyz.shape == (0, 2, 4, 3) and frames.valid.shape == (0,)
        assert energy.shape == (0,) and forces.shape == (0, 4, 3)


def test_wrong_shapes_are_refused(bath):
    with create_engine(bath.toy, bath.slow, reference_settings()) as engine:
        with pytest.raises(ValueError, match=r"\(4, 3\).*expected \(n_replicas, 4, 3\)"):
            engine.run(bath.toy.positions, SHORT, seed=1)
        with pytest.raises(ValueError, match="expected"):
            engine.evaluate(np.zeros((2, 5, 3)))


# ---------------------------------------------------------------- processes


def test_dead_worker_is_an_error(bath):
    with create_engine(bath.toy, bath.slow, reference_settings(n_workers=2)) as engine:
        engine.run(bath.starts(2), SHORT, seed=1)
        for process in engine._executor._processes.values():
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(CGFlowError, match="worker process of the engine ended unexpectedly"):
            engine.run(bath.starts(40), SHORT, seed=1)


def test_closed_engine_says_so(bath):
    for options in ({"n_workers": 1}, {"n_workers": 2}, {"engine": "lattice"}):
        engine = create_engine(bath.toy, bath.slow, reference_settings(**options))
        engine.close()
        engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            engine.run(bath.starts(2), SHORT, seed=1)


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
start = bath.starts(40)
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

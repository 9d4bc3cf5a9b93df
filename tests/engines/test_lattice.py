"""The engine of one giant System: closed-form statistics, rounds, counting and quarantine."""

import numpy as np
import openmm
import pytest
from molecules import alanine_in_water
from toys import HarmonicBath, reference_settings

from openmm_cgflow.engines import lattice as lattice_module
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.engine import Schedule
from openmm_cgflow.engines.lattice import LatticeEngine
from openmm_cgflow.engines.workers import ContextsEngine
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.settings import ChainSettings

SCHEDULE = Schedule(300.0, n_relax=3, n_equilibration=5, n_frames=2, stride=4)


def lattice_settings(**changes):
    return reference_settings(engine="lattice", **changes)


def test_engine_samples_the_closed_form():
    bath = HarmonicBath()
    with create_engine(bath.toy, bath.slow, lattice_settings(n_replicas=100)) as engine:
        assert "lattice engine, 100 replicas" in engine.description
        start = bath.starts(200)
        start += np.random.default_rng(0).normal(0.0, 2.0, (200, 1, 3))  # engines do not care where a molecule is
        frames = engine.run(start, Schedule(300.0, 5, 150, 8, 40), seed=1)
    assert frames.valid.all()
    assert np.array_equal(frames.xyz[:, :, :2], np.repeat(start[:, None, :2], 8, axis=1))
    shift = (start - bath.toy.positions)[:, None]
    deviations = bath.deviations(frames._replace(xyz=frames.xyz - shift), 300.0)
    assert max(deviations.values()) < 4.5, deviations
    wrong = bath.deviations(frames._replace(xyz=frames.xyz - shift), 400.0)
    assert wrong["covariance"] > 8 and wrong["energy"] > 8


def test_engine_repeats_itself():
    bath = HarmonicBath()
    start = bath.starts(20)
    with create_engine(bath.toy, bath.slow, lattice_settings(n_replicas=8)) as engine:
        first, other, again = (engine.run(start, SCHEDULE, seed=seed) for seed in (1, 2, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.xyz, other.xyz)
    fast = first.xyz[:, 0, 2:].reshape(20, -1)
    assert len(np.unique(fast, axis=0)) == 20, "two replicas had the same noise"


def test_forces_and_energies_belong_to_the_frames():
    bath = HarmonicBath()
    start = bath.starts(5)
    with create_engine(bath.toy, bath.slow, lattice_settings(n_replicas=3)) as engine:
        frames = engine.run(start, SCHEDULE, seed=1)
        energy, forces = engine.evaluate(frames.xyz.reshape(-1, 4, 3))
    assert np.array_equal(energy, frames.energy.ravel())
    assert np.array_equal(forces.reshape(frames.forces.shape), frames.forces)


def test_evaluations_are_counted_with_padding():
    """Eleven replicas on eight sites: a full round, and one of three on half of the sites."""
    bath = HarmonicBath()
    start = bath.starts(11)
    with create_engine(bath.toy, bath.slow, lattice_settings(n_replicas=8)) as engine:
        engine.run(start, SCHEDULE, seed=1)
        assert engine.n_energy_evaluations == (8 + 4) * (3 + 5 + 2 * 4) + 11 * 2
        engine.evaluate(start)
        assert engine.n_energy_evaluations == (8 + 4) * (3 + 5 + 2 * 4) + 11 * 2 + 11


def clashing():
    """A molecule whose fast atoms 2 and 3 must not coincide."""
    force = openmm.NonbondedForce()
    for i in range(4):
        force.addParticle(0.0, 0.05, 0.1 if i > 1 else 0.0)
    bath = HarmonicBath()
    bath.toy.system.addForce(force)
    start = bath.starts(12)
    start[5, 3] = start[5, 2]
    start[7, 2] = np.nan
    return bath, start


def test_diverged_copies_are_quarantined(every_platform):
    bath, start = clashing()
    options = lattice_settings(n_replicas=4).model_copy(update={"platform": every_platform.name})
    with create_engine(bath.toy, bath.slow, options) as engine:
        frames = engine.run(start, SCHEDULE, seed=1)
        energy, _ = engine.evaluate(frames.xyz[frames.valid][:, 0])
    assert np.flatnonzero(~frames.valid).tolist() == [5, 7]
    for part in frames[:3]:
        assert np.isfinite(part).all() and not part[[5, 7]].any()
    assert np.allclose(energy, frames.energy[frames.valid][:, 0])
    assert np.abs(frames.xyz[frames.valid]).max() < 1.0


def test_molecules_too_large_for_their_place_run_alone(monkeypatch):
    bath = HarmonicBath()
    start = bath.starts(6)
    start[2, 1] += 1.5  # slow atoms torn apart
    asked = []
    run = ContextsEngine.run

    def spy(self, xyz, *arguments, **keywords):
        asked.append(len(xyz))
        return run(self, xyz, *arguments, **keywords)

    monkeypatch.setattr(ContextsEngine, "run", spy)
    with create_engine(bath.toy, bath.slow, lattice_settings(n_replicas=6)) as engine:
        frames = engine.run(start, SCHEDULE, seed=1)
    assert asked == [1] and frames.valid.all()
    assert np.array_equal(frames.xyz[2, :, :2], np.repeat(start[2][None, :2], 2, axis=0))


def test_rounds_that_keep_failing_end_in_single_contexts(monkeypatch):
    bath = HarmonicBath()
    start = bath.starts(10)
    rounds = []
    original = LatticeEngine._round

    def failing(self, local, schedule, entropy):
        frames, good = original(self, local, schedule, entropy)
        rounds.append(len(local))
        good[0] = False
        return frames, good

    monkeypatch.setattr(LatticeEngine, "_round", failing)
    with create_engine(bath.toy, bath.slow, lattice_settings(n_replicas=10)) as engine:
        frames = engine.run(start, SCHEDULE, seed=1)
    assert rounds == [10, 9, 8, 7, 6, 5, 4, 3] and len(rounds) == lattice_module._MAX_ATTEMPTS
    assert frames.valid.all()


@pytest.mark.gpu
def test_engine_on_a_gpu(gpu_platform):

    peptide = alanine_in_water()
    slow = Partition.resolve(peptide, "backbone").slow
    start = np.repeat(peptide.positions[None], 64, axis=0)
    schedule = Schedule(300.0, n_relax=20, n_equilibration=1000, n_frames=5, stride=100)
    energies = []
    for engine_name, platform in (("lattice", gpu_platform), ("contexts", "Reference")):
        options = ChainSettings(engine=engine_name, platform=platform, n_replicas=64, n_workers=1)
        with create_engine(peptide, slow, options) as engine:
            assert engine_name in engine.description
            frames = engine.run(start, schedule, seed=1)
        assert frames.valid.all()
        assert np.array_equal(frames.xyz[:, :, slow], np.repeat(start[:, None, slow], 5, axis=1))
        energies.append(frames.energy.mean(axis=1))
    error = np.sqrt(sum(energy.var(ddof=1) / len(energy) for energy in energies))
    assert abs(energies[0].mean() - energies[1].mean()) < 4 * error

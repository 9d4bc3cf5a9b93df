"""One Context: capped descent, what counts as an evaluation, timing, and divergence told from other errors."""

import numpy as np
import openmm
import pytest
from openmm import unit
from toys import HarmonicBath

from openmm_cgflow.engines.context import ReplicaContext, frozen_system, is_divergence
from openmm_cgflow.engines.engine import Dynamics, Schedule
from openmm_cgflow.engines.platforms import platform_choice


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


def test_evaluations_are_timed():
    bath = HarmonicBath()
    chain = ReplicaContext(bath.toy.system, platform_choice("Reference"), Dynamics(0.002, 50.0, 1e4))
    assert 0 < chain.seconds_per_evaluation(bath.toy.positions) < 0.1


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

"""The System with frozen slow atoms: its masses, why they do not matter, and what it refuses."""

import numpy as np
import openmm
import pytest
from openmm import unit
from toys import HarmonicBath, make_toy, reference_settings

from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.context import frozen_system
from openmm_cgflow.engines.engine import Dynamics, Schedule
from openmm_cgflow.engines.platforms import platform_choice
from openmm_cgflow.engines.workers import ContextsEngine
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.partition import Partition

LONG = Schedule(300.0, n_relax=5, n_equilibration=150, n_frames=8, stride=40)


def test_frozen_system(peptide):
    slow = Partition.resolve(peptide, "backbone").slow
    system = frozen_system(peptide, slow, 4.0)
    masses = [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(peptide.n_atoms)]
    for i, (mass, element) in enumerate(zip(masses, peptide.elements, strict=True)):
        original = peptide.system.getParticleMass(i).value_in_unit(unit.dalton)
        assert mass == (0.0 if i in slow else 4.0 if element == "H" else original)


def test_center_of_mass_remover_would_bias(bath):
    """The reason why frozen_system refuses it: with it left in, the same comparison fails."""
    system = frozen_system(bath.toy, bath.slow, 4.0)
    system.addForce(openmm.CMMotionRemover())
    dynamics = Dynamics(timestep=0.002, friction=50.0, force_cap=1e4)
    with ContextsEngine(system, bath.toy.positions, platform_choice("Reference"), dynamics, 1) as engine:
        frames = engine.run(bath.starts(200), LONG, seed=1)
    assert bath.deviations(frames, 300.0)["covariance"] > 20


def test_masses_do_not_matter(bath):
    with create_engine(bath.toy, bath.slow, reference_settings(hydrogen_mass=12.0)) as engine:
        frames = engine.run(bath.starts(200), LONG, seed=1)
    assert max(bath.deviations(frames, 300.0).values()) < 4.5


@pytest.mark.parametrize("force", [openmm.CMMotionRemover(), openmm.AndersenThermostat(300.0, 1.0)])
def test_forces_that_act_on_velocities_are_refused(bath, force):
    toy = HarmonicBath().toy
    toy.system.addForce(openmm.XmlSerializer.clone(force))
    with pytest.raises(ValueError, match=type(force).__name__):
        create_engine(toy, bath.slow, reference_settings())


def test_constraints_are_refused(bath):
    toy = HarmonicBath().toy
    toy.system.addConstraint(2, 3, 0.1)
    with pytest.raises(ValueError, match="constraints"):
        create_engine(toy, bath.slow, reference_settings())


def test_fast_atoms_without_mass_are_refused():
    toy = HarmonicBath().toy
    toy.system.setParticleMass(3, 0.0)
    with pytest.raises(CGFlowError, match=r"atom 3 \(H\).*mass"):
        create_engine(toy, (0, 1), reference_settings())


def test_centroids_keep_their_weights():
    force = openmm.CustomCentroidBondForce(2, "10*distance(g1,g2)^2")
    force.addGroup([0, 2])
    force.addGroup([1, 3])
    force.addBond([0, 1], [])
    positions = np.random.default_rng(0).normal(size=(4, 3))
    toy = make_toy("CCHC", [(0, 2), (1, 2), (2, 3)], positions, force)
    with create_engine(toy, [0, 1], reference_settings()) as engine:
        energy, _ = engine.evaluate(positions[None])
    first = (12 * positions[0] + positions[2]) / 13
    second = (positions[1] + positions[3]) / 2
    assert np.allclose(energy, 10 * np.sum((first - second) ** 2))

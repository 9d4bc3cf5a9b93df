"""A molecule whose slow atoms are frozen: what every engine is built from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openmm
from openmm import unit

from openmm_cgflow.engines.engine import Dynamics, Molecule
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.python_forces import network_on_gpu, split_batched
from openmm_cgflow.settings import ChainSettings

__all__ = ["FrozenMolecule", "frozen_system"]


class FrozenMolecule:
    """A molecule with frozen slow atoms, and how its chains are to run.

    Arguments:
        molecular_system: The molecule (a ``MolecularSystem``); it is not changed.
        slow: Indices of the atoms to freeze.
        settings: The ``chains`` section of the configuration.

    Attributes:
        system: A copy of the System, the slow atoms of mass 0.
        positions: The input structure, ``(n_atoms, 3)`` in nm.
        bonds: Pairs of bonded atoms.
        dynamics: Settings of the integrators.
        batched: Those of its energies that take all replicas in one call.
        rest: The System without these.
        in_one_process: Whether only one process may hold its energy, a network on a GPU.

    Raises:
        CGFlowError: If a fast atom has no mass.
        ValueError: If the System was not sanitised; see :func:`frozen_system`.
    """

    def __init__(self, molecular_system: Molecule, slow: Sequence[int], settings: ChainSettings) -> None:
        self.slow, self.settings = list(slow), settings
        self.system = frozen_system(molecular_system, slow, settings.hydrogen_mass)
        self.positions = np.array(molecular_system.positions, dtype=np.float64)
        self.bonds = [(bond[0].index, bond[1].index) for bond in molecular_system.topology.bonds()]
        self.dynamics = Dynamics(settings.timestep, settings.friction, settings.force_cap)
        self.batched, self.rest = split_batched(self.system)
        self.in_one_process = network_on_gpu(self.system)


def frozen_system(molecular_system: Molecule, slow: Sequence[int], hydrogen_mass: float) -> openmm.System:
    """A copy of the System with the slow atoms frozen (mass 0) and the fast hydrogens made heavier.

    Configurational averages do not depend on masses.

    Arguments:
        molecular_system: The molecule; it is not changed.
        slow: Indices of the atoms to freeze.
        hydrogen_mass: Mass of the other hydrogens in Da.

    Raises:
        CGFlowError: If a fast atom has no mass.
        ValueError: If the System was not sanitised: constraints, or a Force that acts on velocities or the box.
    """
    system = openmm.XmlSerializer.clone(molecular_system.system)
    if system.getNumConstraints():
        raise ValueError("got a System with constraints, expected none")
    for force in system.getForces():
        # With frozen atoms CMMotionRemover silently biases the fast ones: 2 to 4 kT of mean energy in a peptide.
        kind = type(force).__name__
        if kind == "CMMotionRemover" or "Thermostat" in kind or "Barostat" in kind:
            raise ValueError(f"got a System with a {kind}, expected none")
        if isinstance(force, openmm.CustomCentroidBondForce):
            _keep_weights(force, system)
    frozen = set(slow)
    for i, element in enumerate(molecular_system.elements):
        if i in frozen:
            system.setParticleMass(i, 0.0)
        elif system.getParticleMass(i).value_in_unit(unit.dalton) <= 0.0:
            raise CGFlowError(f"atom {i} ({element}): fast atoms must have a mass; virtual sites are not supported")
        elif element == "H":
            system.setParticleMass(i, hydrogen_mass)
    return system


def _keep_weights(force: openmm.CustomCentroidBondForce, system: openmm.System) -> None:
    """Writes out a force's default weights, the masses, as these are about to change."""
    for i in range(force.getNumGroups()):
        particles, weights = force.getGroupParameters(i)
        if not weights:
            masses = [system.getParticleMass(particle).value_in_unit(unit.dalton) for particle in particles]
            force.setGroupParameters(i, particles, masses)

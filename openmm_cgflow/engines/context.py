"""A molecule whose slow atoms are frozen, and the OpenMM Contexts that its replicas run in, one after another."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import numpy as np
import openmm
from openmm import unit

from openmm_cgflow.engines.engine import Dynamics, Frames, Molecule, Schedule
from openmm_cgflow.engines.platforms import PlatformChoice
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.python_forces import network_on_gpu, split_batched
from openmm_cgflow.settings import ChainSettings

__all__ = ["FrozenMolecule", "ReplicaContext", "clear", "frozen_system", "is_divergence", "state_arrays"]

_DESCENT, _LANGEVIN = 0, 1
_PROBE_SECONDS = 0.02
_FORCE_UNIT = unit.kilojoule_per_mole / unit.nanometer


class ReplicaContext:
    """One Context that runs one structure after another: capped descent, then ``LangevinMiddleIntegrator``.

    Atoms of mass zero stay where they are. The two integrators are parts of one ``openmm.CompoundIntegrator``.

    Arguments:
        system: The System; its masses must be final.
        platform: Where to run it.
        dynamics: Settings of the integrators.

    Attributes:
        n_evaluations: Force evaluations so far. Every integration step counts 1 and every state with forces or energy
            counts 1 (OpenMM recomputes there). A block of steps in which OpenMM raised counts whole.
    """

    def __init__(self, system: openmm.System, platform: PlatformChoice, dynamics: Dynamics) -> None:
        self.n_evaluations = 0
        self._gpu = platform.is_gpu
        self._seeded = False
        # Descent acts only on force components above the cap, which thermal configurations do not reach: ordinary
        # minimisation would cool the chains and so bias the mean force. One evaluation a step; 2e-6 nm^2 mol/kJ is
        # stable for bonds (k < 5e5), 0.005 nm keeps a step well below a bond length.
        descent = openmm.CustomIntegrator(dynamics.timestep)
        for name, value in (("scale", 2e-6), ("limit", 0.005), ("cap", dynamics.force_cap)):
            descent.addGlobalVariable(name, value)
        descent.addComputePerDof("x", "x + max(-limit, min(limit, scale*(max(f - cap, 0) + min(f + cap, 0))))")
        self._langevin = openmm.LangevinMiddleIntegrator(300.0, dynamics.friction, dynamics.timestep)
        self._integrator = openmm.CompoundIntegrator()
        # On Reference the integrator initialised last seeds the shared generator: the Langevin one comes last.
        self._integrator.addIntegrator(descent)
        self._integrator.addIntegrator(self._langevin)
        self._context = platform.context(system, self._integrator)

    def reseed(self, seed: int, temperature: float, *, force: bool = False) -> None:
        """Restarts the random numbers from ``seed`` and sets the ``temperature`` in K.

        On a GPU the Context would have to be built anew (a good part of a second), so there only the first call, or one
        with ``force``, restarts them: results then depend on the calls made before.
        """
        self._langevin.setTemperature(temperature)
        if self._gpu and self._seeded and not force:
            return
        for i in range(self._integrator.getNumIntegrators()):  # GPU platforms demand the same seed of all
            self._integrator.getIntegrator(i).setRandomNumberSeed(seed)
        self._context.reinitialize()
        self._seeded = True

    def run(self, xyz: np.ndarray, schedule: Schedule, velocity_seed: int, *, evaluate: bool) -> list[openmm.State]:
        """The frames of one chain that starts at ``xyz``, ``(n_atoms, 3)`` in nm.

        Arguments:
            xyz: Starting positions.
            schedule: How many steps of what; its temperature is used for the velocities only (see ``reseed``).
            velocity_seed: Seed of the starting velocities.
            evaluate: Whether the frames carry forces and energy besides positions.

        Raises:
            openmm.OpenMMException: On platforms that check, if the chain diverged; see ``is_divergence``.
        """
        self._context.setPositions(xyz)
        self._integrator.setCurrentIntegrator(_DESCENT)
        self.step(schedule.n_relax)
        self._integrator.setCurrentIntegrator(_LANGEVIN)
        self._context.setVelocitiesToTemperature(schedule.temperature, velocity_seed)
        self.step(schedule.n_equilibration)
        frames = []
        for _ in range(schedule.n_frames):
            self.step(schedule.stride)
            frames.append(self._state(evaluate))
        return frames

    def step(self, n_steps: int) -> None:
        """Takes ``n_steps`` steps of the current integrator."""
        self.n_evaluations += n_steps
        self._integrator.step(n_steps)

    def evaluate(self, xyz: np.ndarray) -> openmm.State:
        """Positions, energy and forces at ``xyz``, ``(n_atoms, 3)`` in nm."""
        self._context.setPositions(xyz)
        return self._state(True)

    def positions(self) -> np.ndarray:
        """Where the atoms are now, ``(n_atoms, 3)`` in nm."""
        return state_arrays(self._context.getState(positions=True))[0]

    def seconds_per_step(self, xyz: np.ndarray) -> float:
        """Time of a Langevin step: the fastest of three runs of at least ``_PROBE_SECONDS``, or one if that is long."""
        self.reseed(1, 300.0)
        self.run(xyz, Schedule(300.0, 1, 1, 1, 1), 1, evaluate=False)
        n_steps, elapsed = 1, 0.0
        while elapsed < _PROBE_SECONDS:
            n_steps *= 2
            elapsed = self._seconds(n_steps)
        if elapsed < 10 * _PROBE_SECONDS:
            elapsed = min(elapsed, self._seconds(n_steps), self._seconds(n_steps))
        return elapsed / n_steps

    def seconds_per_evaluation(self, xyz: np.ndarray) -> float:
        """Time of an energy with its forces, of as many as take ``_PROBE_SECONDS``, at least two."""
        self.evaluate(xyz)
        n, begin = 0, time.perf_counter()
        while n < 2 or time.perf_counter() - begin < _PROBE_SECONDS:
            self.evaluate(xyz)
            n += 1
        return (time.perf_counter() - begin) / n

    def _seconds(self, n_steps: int) -> float:
        begin = time.perf_counter()
        self.step(n_steps)
        self.positions()  # GPU platforms run behind; this waits for them
        return time.perf_counter() - begin

    def _state(self, evaluate: bool) -> openmm.State:
        self.n_evaluations += evaluate
        return self._context.getState(positions=True, forces=evaluate, energy=evaluate)


def is_divergence(error: openmm.OpenMMException) -> bool:
    """Whether OpenMM stopped because of non-finite numbers (Reference never does: it goes on with them)."""
    return re.search(r"\bnan\b", str(error), re.IGNORECASE) is not None


def state_arrays(state: openmm.State) -> tuple[np.ndarray, np.ndarray | None, float | None]:
    """Positions in nm, forces in kJ/mol/nm and energy in kJ/mol of a State, None for what it does not hold."""
    types = state.getDataTypes()
    xyz = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    forces = state.getForces(asNumpy=True).value_in_unit(_FORCE_UNIT) if types & openmm.State.Forces else None
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) if types & openmm.State.Energy else None
    return xyz, forces, energy


def clear(frames: Frames[np.ndarray], replicas: int | np.ndarray) -> None:
    """Quarantines replicas in place, by index or mask: zeros, and not valid."""
    for part in frames:
        part[replicas] = 0


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

"""Replicas of the fast atoms at frozen slow atoms: the contract of the engines, and the choice of one."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, Self

import numpy as np
import openmm
from openmm import app, unit

from openmm_cgflow.engines.context import Dynamics, Frames, ReplicaContext, Schedule
from openmm_cgflow.engines.copies import NotReplicableError
from openmm_cgflow.engines.lattice import Lattice, LatticeEngine, plan_lattice
from openmm_cgflow.engines.platforms import PlatformChoice, choose_platform, fastest_platform, platform_choice
from openmm_cgflow.engines.workers import ContextsEngine, default_workers
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.python_forces import BatchEvaluator, network_on_gpu, split_batched
from openmm_cgflow.settings import ChainSettings

__all__ = ["Engine", "Frames", "Molecule", "create_engine", "frozen_system"]

logger = logging.getLogger(__name__)

_PROBE_SECONDS = 0.02


class Molecule(Protocol):
    """What the engines need of a ``MolecularSystem``."""

    @property
    def topology(self) -> app.Topology: ...
    @property
    def system(self) -> openmm.System: ...
    @property
    def positions(self) -> np.ndarray: ...
    @property
    def elements(self) -> Sequence[str]: ...


class Engine(Protocol):
    """Samples the fast atoms of many replicas by Langevin dynamics while the slow atoms stand still.

    Attributes:
        n_energy_evaluations: Force and energy evaluations of one molecule since the engine was created. An
            integration step (descent or Langevin) is 1, the forces and energy of a frame are 1, an ``evaluate`` of a
            structure is 1.
        description: One line for the log: engine, platform and how it was chosen, workers or replicas.
        platform: Where the chains run.
    """

    @property
    def n_energy_evaluations(self) -> int: ...
    @property
    def description(self) -> str: ...
    @property
    def platform(self) -> PlatformChoice: ...

    def run(
        self,
        xyz: np.ndarray,
        temperature: float,
        *,
        n_relax: int,
        n_equilibration: int,
        n_frames: int,
        stride: int,
        seed: int,
    ) -> Frames:
        """Runs one chain from each structure; velocities are drawn at the temperature.

        Arguments:
            xyz: All-atom starting structures, ``(n_replicas, n_atoms, 3)`` in nm; the slow atoms stay exactly there.
            temperature: In K.
            n_relax: Capped descent steps at the start, which act on force components above ``force_cap`` only.
            n_equilibration: Langevin steps before the frames.
            n_frames: Frames of each replica, at least 1.
            stride: Langevin steps before each frame, at least 1.
            seed: The result is a function of it and of the arguments (on GPUs also of the calls made before).

        Raises:
            ValueError: If ``xyz`` has the wrong shape.
            CGFlowError: If a worker process dies.
        """
        ...

    def evaluate(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies ``(n,)`` in kJ/mol and forces ``(n, n_atoms, 3)`` in kJ/mol/nm of structures.

        They are not finite where the structure's energy is not.

        Arguments:
            xyz: Structures, ``(n, n_atoms, 3)`` in nm.

        Raises:
            ValueError: If ``xyz`` has the wrong shape.
            CGFlowError: If a worker process dies.
        """
        ...

    def close(self) -> None:
        """Frees Contexts and worker processes; the engine is of no use afterwards."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


def create_engine(molecular_system: Molecule, slow: Sequence[int], settings: ChainSettings) -> Engine:
    """The engine that suits platform and energy: small Contexts on the CPU, one giant System on a GPU.

    A potential that takes all replicas in one call gets the giant System everywhere.

    Arguments:
        molecular_system: The molecule (a ``MolecularSystem``); it is not changed.
        slow: Indices of the atoms to freeze.
        settings: Platform, precision, engine, workers and integrator settings.

    Raises:
        CGFlowError: If the platform asked for is not available, or a fast atom has no mass.
    """
    system = frozen_system(molecular_system, slow, settings.hydrogen_mass)
    template = np.array(molecular_system.positions, dtype=np.float64)
    dynamics = Dynamics(settings.timestep, settings.friction, settings.force_cap)
    batched, rest = split_batched(system)
    bonds = [(bond[0].index, bond[1].index) for bond in molecular_system.topology.bonds()]
    plans: list[Lattice | NotReplicableError] = []  # made at most once, and only if some platform asks for it

    def lattice() -> Lattice | NotReplicableError:
        if not plans:
            try:
                plans.append(plan_lattice(system, template, bonds, list(slow), settings.n_replicas))
            except NotReplicableError as error:
                plans.append(error)
        return plans[0]

    def plan_for(platform: PlatformChoice) -> Lattice | NotReplicableError | None:
        wanted = settings.engine == "lattice" or (settings.engine == "auto" and (platform.is_gpu or bool(batched)))
        return lattice() if wanted else None

    in_one_process = network_on_gpu(system)

    def n_workers(platform: PlatformChoice) -> int:
        return settings.n_workers or (1 if platform.is_gpu or in_one_process else default_workers())

    def seconds_per_step(platform: PlatformChoice) -> float:
        tiny = replace(dynamics, timestep=1e-6)  # a bad input structure must not explode here
        plan = plan_for(platform)
        if isinstance(plan, Lattice):
            start = np.concatenate([template - template.mean(axis=0) + site for site in plan.sites])
            return _time_step(ReplicaContext(plan.system(len(plan.sites)), platform, tiny), start) / len(plan.sites)
        return _time_step(ReplicaContext(system, platform, tiny), template) / n_workers(platform)

    platform = choose_platform(settings.platform, settings.precision, seconds_per_step)
    plan = plan_for(platform)
    if isinstance(plan, Lattice):
        single = platform
        if platform.is_gpu:
            # The energy of one small molecule is cheaper on a core than the launches of a GPU's kernels.
            choices = [platform_choice("Reference"), platform_choice("CPU"), platform]
            apart = system if not batched or not rest.getNumForces() else rest

            def seconds_per_evaluation(choice: PlatformChoice) -> float:
                return _time_evaluation(ReplicaContext(apart, choice, dynamics), template) / n_workers(choice)

            single = fastest_platform(choices, seconds_per_evaluation, "evaluation")
        if not batched:
            contexts = ContextsEngine(system, template, single, dynamics, n_workers(single))
            return LatticeEngine(plan, slow, template, platform, dynamics, contexts)
        contexts = ContextsEngine(system, template, single, dynamics, n_workers=1)  # for the few that leave the lattice
        others = ContextsEngine(rest, template, single, dynamics, n_workers(single)) if rest.getNumForces() else None
        return LatticeEngine(plan, slow, template, platform, dynamics, contexts, BatchEvaluator(batched, others))
    engine = ContextsEngine(system, template, platform, dynamics, n_workers(platform))
    if plan is not None:
        engine.description += f"; no lattice engine, because the System cannot be copied: {plan}"
        logger.warning("The lattice engine is not possible, each replica gets its own Context: %s", plan)
    return engine


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


def _time_step(chain: ReplicaContext, start: np.ndarray) -> float:
    """Seconds per Langevin step: the fastest of three runs of at least ``_PROBE_SECONDS``, or one if that is long."""
    chain.reseed(1, 300.0)
    chain.run(start, Schedule(300.0, 1, 1, 1, 1), 1, evaluate=False)
    n_steps, elapsed = 1, 0.0
    while elapsed < _PROBE_SECONDS:
        n_steps *= 2
        elapsed = _seconds(chain, n_steps)
    if elapsed < 10 * _PROBE_SECONDS:
        elapsed = min(elapsed, _seconds(chain, n_steps), _seconds(chain, n_steps))
    return elapsed / n_steps


def _time_evaluation(chain: ReplicaContext, xyz: np.ndarray) -> float:
    """Seconds for the energy and forces of a structure, of as many as take ``_PROBE_SECONDS``, at least two."""
    chain.evaluate(xyz)
    n, begin = 0, time.perf_counter()
    while n < 2 or time.perf_counter() - begin < _PROBE_SECONDS:
        chain.evaluate(xyz)
        n += 1
    return (time.perf_counter() - begin) / n


def _seconds(chain: ReplicaContext, n_steps: int) -> float:
    begin = time.perf_counter()
    chain.step(n_steps)
    chain.positions()  # GPU platforms run behind; this waits for them
    return time.perf_counter() - begin

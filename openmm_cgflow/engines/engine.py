"""The contract of the engines: what one is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np

if TYPE_CHECKING:
    import openmm
    from openmm import app

    from openmm_cgflow.engines.platforms import PlatformChoice

__all__ = ["Dynamics", "Engine", "Evaluator", "Frames", "Molecule", "Schedule"]

Array = TypeVar("Array")


class Frames(NamedTuple, Generic[Array]):
    """What the replicas of one call produced: NumPy arrays from an engine, the same as tensors above it.

    Attributes:
        xyz: Positions, ``(n_replicas, n_frames, n_atoms, 3)`` in nm.
        forces: Forces on all atoms, the frozen ones included, ``(n_replicas, n_frames, n_atoms, 3)`` in kJ/mol/nm.
        energy: Potential energies, ``(n_replicas, n_frames)`` in kJ/mol.
        valid: Whether everything about the replica is finite, ``(n_replicas,)`` bool. Where it is not, an engine
            returns positions, forces and energies that are all zero.
    """

    xyz: Array
    forces: Array
    energy: Array
    valid: Array


@dataclass(frozen=True)
class Schedule:
    """The steps of a chain: descent, equilibration, then ``stride`` steps before each frame.

    Attributes:
        temperature: In K; velocities are drawn at it.
        n_relax: Capped descent steps at the start, which act on force components above ``Dynamics.force_cap`` only.
        n_equilibration: Langevin steps before the frames.
        n_frames: Frames of each replica, at least 1.
        stride: Langevin steps before each frame, at least 1.
    """

    temperature: float
    n_relax: int = 0
    n_equilibration: int = 0
    n_frames: int = 1
    stride: int = 1


@dataclass(frozen=True)
class Dynamics:
    """Settings of the integrators.

    Attributes:
        timestep: In ps, of ``openmm.LangevinMiddleIntegrator``.
        friction: In 1/ps.
        force_cap: In kJ/mol/nm; descent acts on force components above it.
    """

    timestep: float
    friction: float
    force_cap: float

    @property
    def tiny(self) -> Dynamics:
        """The same with steps so small that a bad structure does not explode, for timing."""
        return replace(self, timestep=1e-6)


class Molecule(Protocol):
    """What the engines need of a ``MolecularSystem``; positions ``(n_atoms, 3)`` in nm."""

    @property
    def topology(self) -> app.Topology: ...
    @property
    def system(self) -> openmm.System: ...
    @property
    def positions(self) -> np.ndarray: ...
    @property
    def elements(self) -> Sequence[str]: ...


class Evaluator(Protocol):
    """Gives energies and forces of structures.

    Attributes:
        n_energy_evaluations: Force and energy evaluations of one molecule since the evaluator was created.
        description: One line for the log.
    """

    @property
    def n_energy_evaluations(self) -> int: ...
    @property
    def description(self) -> str: ...

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
        """Frees Contexts and worker processes; the evaluator is of no use afterwards."""
        ...


class Engine(Evaluator, Protocol):
    """Samples the fast atoms of many replicas by Langevin dynamics while the slow atoms stand still.

    An integration step (descent or Langevin) counts as 1 in ``n_energy_evaluations``, the forces and energy of a frame
    as 1, an ``evaluate`` of a structure as 1.

    Attributes:
        description: One line for the log: engine, platform and how it was chosen, workers or replicas.
        platform: Where the chains run.
        n_at_once: Replicas that one step of its integrator moves, so that fewer of them would hardly take less time.
    """

    @property
    def platform(self) -> PlatformChoice: ...
    @property
    def n_at_once(self) -> int: ...

    def run(self, xyz: np.ndarray, schedule: Schedule, seed: int) -> Frames[np.ndarray]:
        """Runs one chain from each structure; velocities are drawn at the schedule's temperature.

        Arguments:
            xyz: All-atom starting structures, ``(n_replicas, n_atoms, 3)`` in nm; the slow atoms stay exactly there.
            schedule: Temperature and numbers of steps.
            seed: The result is a function of it and of the arguments (on GPUs also of the calls made before).

        Raises:
            ValueError: If ``xyz`` has the wrong shape.
            CGFlowError: If a worker process dies.
        """
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

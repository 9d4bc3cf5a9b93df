"""Frozen-slow Langevin dynamics, one replica at a time in small Contexts, spread over worker processes.

Why processes, measured with OpenMM 8.6.1: the Reference platform's random generator is one static object of the
process. Two Contexts stepping in two threads race on it, so no seed makes their results reproducible. In one process,
seeding the integrators and ``Context.reinitialize()`` (0.6 ms for 22 atoms) gives bitwise equal runs. So the work is cut
in chunks of fixed size, each with its own seed derived from the call's seed, and a worker process runs whole
chunks: the result does not depend on the number of workers. ``loky`` starts the workers without importing the user's
main module again, so scripts need no ``if __name__ == "__main__"`` guard.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import loky
import numpy as np
import openmm
from openmm import unit

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.platforms import PlatformChoice

__all__ = ["Chain", "ContextsEngine", "Dynamics", "Frames", "Schedule", "derive_seed"]

_CHUNK = 16  # replicas with one seed; a change of it changes every result
_EVALUATION_CHUNK = 64
_DESCENT, _LANGEVIN = 0, 1
_FORCE_UNIT = unit.kilojoule_per_mole / unit.nanometer


class Frames(NamedTuple):
    """What the replicas of one call produced.

    Attributes:
        xyz: Positions, ``(n_replicas, n_frames, n_atoms, 3)`` in nm.
        forces: Forces on all atoms, the frozen ones included, ``(n_replicas, n_frames, n_atoms, 3)`` in kJ/mol/nm.
        energy: Potential energies, ``(n_replicas, n_frames)`` in kJ/mol.
        valid: Whether everything about the replica is finite, ``(n_replicas,)``. Where it is not, the
            replica's positions, forces and energies are all zero.
    """

    xyz: np.ndarray
    forces: np.ndarray
    energy: np.ndarray
    valid: np.ndarray


class Schedule(NamedTuple):
    """One chain: ``n_relax`` descent steps, ``n_equilibration`` Langevin steps, ``n_frames`` frames each after ``stride``."""

    temperature: float
    n_relax: int
    n_equilibration: int
    n_frames: int
    stride: int


@dataclass(frozen=True)
class Dynamics:
    """Settings of the integrators: ``timestep`` in ps, ``friction`` in 1/ps, ``force_cap`` in kJ/mol/nm."""

    timestep: float
    friction: float
    force_cap: float


def derive_seed(*entropy: int) -> int:
    """A seed for OpenMM from a tuple of integers; never 0, which OpenMM replaces by a seed of its own."""
    return 1 + int(np.random.SeedSequence(entropy).generate_state(1)[0]) % (2**31 - 2)


class Chain:
    """One Context that runs one structure after another: capped descent, then ``LangevinMiddleIntegrator``.

    Atoms of mass zero stay where they are.

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
        """Takes ``n_steps`` of the current integrator."""
        self.n_evaluations += n_steps
        self._integrator.step(n_steps)

    def evaluate(self, xyz: np.ndarray) -> openmm.State:
        """Positions, energy and forces at ``xyz``, ``(n_atoms, 3)`` in nm."""
        self._context.setPositions(xyz)
        return self._state(True)

    def positions(self) -> np.ndarray:
        """Where the atoms are now, ``(n_atoms, 3)`` in nm."""
        return state_arrays(self._context.getState(positions=True))[0]

    def _state(self, evaluate: bool) -> openmm.State:
        self.n_evaluations += evaluate
        return self._context.getState(positions=True, forces=evaluate, energy=evaluate)


def is_divergence(error: openmm.OpenMMException) -> bool:
    """Whether OpenMM stopped because of non-finite numbers (Reference never does: it goes on with them)."""
    return "nan" in str(error).lower()


def state_arrays(state: openmm.State) -> tuple[np.ndarray, np.ndarray | None, float | None]:
    """Positions in nm, forces in kJ/mol/nm and energy in kJ/mol of a State, None for what it does not hold."""
    types = state.getDataTypes()
    xyz = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    forces = state.getForces(asNumpy=True).value_in_unit(_FORCE_UNIT) if types & openmm.State.Forces else None
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) if types & openmm.State.Energy else None
    return xyz, forces, energy


def _run_chunk(chain: Chain, xyz: np.ndarray, schedule: Schedule, entropy: tuple[int, int]) -> tuple[Frames, int]:
    n_replicas, n_atoms, _ = xyz.shape
    shape = (n_replicas, schedule.n_frames, n_atoms, 3)
    frames = Frames(np.zeros(shape), np.zeros(shape), np.zeros(shape[:2]), np.zeros(n_replicas, dtype=bool))
    before = chain.n_evaluations
    chain.reseed(derive_seed(*entropy), schedule.temperature)
    for i in range(n_replicas):
        try:
            states = chain.run(xyz[i], schedule, derive_seed(*entropy, 1, i), evaluate=True)
        except openmm.OpenMMException as error:
            if not is_divergence(error):
                raise
            chain.reseed(derive_seed(*entropy, 2, i), schedule.temperature, force=True)
            continue
        parts = [np.stack([np.asarray(part) for part in parts]) for parts in zip(*map(state_arrays, states), strict=True)]
        if all(np.isfinite(part).all() for part in parts):
            frames.xyz[i], frames.forces[i], frames.energy[i] = parts
            frames.valid[i] = True
    return frames, chain.n_evaluations - before


def _evaluate_chunk(chain: Chain, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    before = chain.n_evaluations
    energy = np.full(len(xyz), np.nan)
    forces = np.full(xyz.shape, np.nan)
    for i in range(len(xyz)):
        try:
            _, forces[i], energy[i] = state_arrays(chain.evaluate(xyz[i]))
        except openmm.OpenMMException as error:
            if not is_divergence(error):
                raise
    return energy, forces, chain.n_evaluations - before


# The one Context of a worker process. A pool's initializer has nowhere else to leave it; it stays None in the parent.
_worker_chain: Chain | None = None


def _start_worker(system_xml: str, platform: PlatformChoice, dynamics: Dynamics) -> None:
    global _worker_chain
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _worker_chain = Chain(openmm.XmlSerializer.deserialize(system_xml), platform, dynamics)


def _in_worker(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    assert _worker_chain is not None
    return function(_worker_chain, *arguments)


class ContextsEngine:
    """Runs replicas one at a time in a Context per worker process, or in this process if there is one worker.

    The same seed gives bitwise the same result for any number of workers (not on GPU platforms). In one process,
    stepping another Reference Context in another thread at the same time would spoil that.

    Arguments:
        system: The System with its slow atoms frozen; see ``replicas.frozen_system``.
        template: Finite positions, ``(n_atoms, 3)`` in nm, that stand in for input that is not finite.
        platform: Where to run.
        dynamics: Settings of the integrators.
        n_workers: Worker processes, at least 1.
    """

    def __init__(
        self,
        system: openmm.System,
        template: np.ndarray,
        platform: PlatformChoice,
        dynamics: Dynamics,
        n_workers: int,
    ) -> None:
        self.n_energy_evaluations = 0
        self.description = f"contexts engine, {n_workers} worker(s), platform {platform}"
        self._template = template
        self._chain: Chain | None = None
        self._executor: loky.ProcessPoolExecutor | None = None
        if n_workers == 1:
            self._chain = Chain(system, platform, dynamics)
            return
        threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENMM_CPU_THREADS")
        self._executor = loky.ProcessPoolExecutor(
            max_workers=n_workers,
            initializer=_start_worker,
            initargs=(openmm.XmlSerializer.serialize(system), platform, dynamics),
            env=dict.fromkeys(threads, "1"),
        )

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
        """Runs one chain from each structure; see ``ReplicaEngine.run``."""
        finite = check_structures(xyz, self._template)
        start = np.where(finite[:, None, None], xyz, self._template)
        schedule = Schedule(temperature, n_relax, n_equilibration, n_frames, stride)
        tasks = [
            (start[i : i + _CHUNK], schedule, (seed, number)) for number, i in enumerate(range(0, len(start), _CHUNK))
        ]
        results = self._map(_run_chunk, tasks or [(start, schedule, (seed, 0))])
        self.n_energy_evaluations += sum(count for _, count in results)
        frames = Frames(*(np.concatenate(parts) for parts in zip(*(part for part, _ in results), strict=True)))
        for part in (frames.xyz, frames.forces, frames.energy):
            part[~finite] = 0.0
        return frames._replace(valid=frames.valid & finite)

    def evaluate(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies and forces; see ``ReplicaEngine.evaluate``."""
        check_structures(xyz, self._template)
        tasks = [(xyz[i : i + _EVALUATION_CHUNK],) for i in range(0, len(xyz), _EVALUATION_CHUNK)]
        results = self._map(_evaluate_chunk, tasks or [(xyz,)])
        self.n_energy_evaluations += sum(count for _, _, count in results)
        return np.concatenate([part for part, _, _ in results]), np.concatenate([part for _, part, _ in results])

    def close(self) -> None:
        """Ends the worker processes."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, kill_workers=True)
            self._executor = None
        self._chain = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _map(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
        if self._chain is not None:
            return [function(self._chain, *task) for task in tasks]
        if self._executor is None:
            raise RuntimeError("the engine is closed")
        try:
            futures = [self._executor.submit(_in_worker, function, task) for task in tasks]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        except (loky.BrokenProcessPool, loky.process_executor.TerminatedWorkerError) as error:
            raise CGFlowError(
                "A worker process of the sampler ended unexpectedly (killed, or out of memory). Nothing finished before "
                "is lost: resume the run, with a smaller sampler.n_workers if memory was short. "
                f"The pool said: {str(error).splitlines()[0]}"
            ) from None


def check_structures(xyz: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Which of the structures are finite, ``(n,)`` bool.

    Raises:
        ValueError: If ``xyz`` is not ``(n, n_atoms, 3)``.
    """
    if xyz.ndim != 3 or xyz.shape[1:] != template.shape:
        raise ValueError(f"got xyz of shape {xyz.shape}, expected (n_replicas, {template.shape[0]}, 3)")
    return np.isfinite(xyz).all(axis=(1, 2))


def default_workers() -> int:
    """One worker per core that this process may use."""
    return loky.cpu_count() or os.cpu_count() or 1

"""Frozen-slow Langevin dynamics, one replica at a time in small Contexts, spread over worker processes.

Why processes, measured with OpenMM 8.6.1: the Reference platform's random generator is one static object of the
process. Two Contexts stepping in two threads race on it, so no seed makes their results reproducible. In one process,
seeding the integrators and ``Context.reinitialize()`` (0.6 ms for 22 atoms) gives bitwise equal runs. So the work is
cut in chunks of fixed size, each with its own seed derived from the call's seed, and a worker process runs whole
chunks: the result does not depend on the number of workers. ``loky`` starts the workers without importing the user's
main module again, so scripts need no ``if __name__ == "__main__"`` guard.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import loky
import numpy as np
import openmm

from openmm_cgflow.engines.context import FrozenMolecule, ReplicaContext, clear, is_divergence, state_arrays
from openmm_cgflow.engines.engine import Dynamics, Frames, Schedule
from openmm_cgflow.engines.platforms import PlatformChoice
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.seeds import derive_seed

__all__ = ["ContextsBuilder", "ContextsEngine", "check_structures", "default_workers", "number_of_workers"]

logger = logging.getLogger(__name__)

_CHUNK = 16  # replicas with one seed; a change of it changes every result
_EVALUATION_CHUNK = 64
_PARENT_CHECK = 2.0  # s


def _run_chunk(
    context: ReplicaContext, xyz: np.ndarray, schedule: Schedule, entropy: tuple[int, int]
) -> tuple[Frames[np.ndarray], int]:
    n_replicas, n_atoms, _ = xyz.shape
    shape = (n_replicas, schedule.n_frames, n_atoms, 3)
    frames = Frames(np.zeros(shape), np.zeros(shape), np.zeros(shape[:2]), np.zeros(n_replicas, dtype=bool))
    before = context.n_evaluations
    context.reseed(derive_seed(*entropy), schedule.temperature)
    for i in range(n_replicas):
        try:
            states = context.run(xyz[i], schedule, derive_seed(*entropy, 1, i), evaluate=True)
        except openmm.OpenMMException as error:
            if not is_divergence(error):
                raise
            context.reseed(derive_seed(*entropy, 2, i), schedule.temperature, force=True)
            continue
        for f, state in enumerate(states):
            frames.xyz[i, f], frames.forces[i, f], frames.energy[i, f] = state_arrays(state)
        frames.valid[i] = all(np.isfinite(part[i]).all() for part in frames[:3])
        if not frames.valid[i]:
            clear(frames, i)
    return frames, context.n_evaluations - before


def _evaluate_chunk(context: ReplicaContext, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    before = context.n_evaluations
    energy = np.full(len(xyz), np.nan)
    forces = np.full(xyz.shape, np.nan)
    for i in range(len(xyz)):
        try:
            _, forces[i], energy[i] = state_arrays(context.evaluate(xyz[i]))
        except openmm.OpenMMException as error:
            if not is_divergence(error):
                raise
    return energy, forces, context.n_evaluations - before


# The one Context of a worker process. A pool's initializer has nowhere else to leave it; it stays None in the parent.
_worker_context: ReplicaContext | None = None


def _start_worker(system_xml: str, platform: PlatformChoice, dynamics: Dynamics) -> None:
    global _worker_context
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _worker_context = ReplicaContext(openmm.XmlSerializer.deserialize(system_xml), platform, dynamics)


def _end_with_parent(parent: int) -> None:
    """Ends this worker when the parent was killed: loky's workers would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK)
    os._exit(1)


def _in_worker(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    assert _worker_context is not None
    return function(_worker_context, *arguments)


class ContextsEngine:
    """Runs replicas one at a time in a Context per worker process, or in this process if there is one worker.

    The same seed gives bitwise the same result for any number of workers (not on GPU platforms). In one process,
    stepping another Reference Context in another thread at the same time would spoil that.

    Arguments:
        system: The System with its slow atoms frozen; see :class:`openmm_cgflow.engines.context.FrozenMolecule`.
        template: Finite positions, ``(n_atoms, 3)`` in nm, that stand in for input that is not finite.
        platform: Where to run.
        dynamics: Settings of the integrators.
        n_workers: Worker processes, at least 1.
    """

    n_at_once = 1

    def __init__(
        self,
        system: openmm.System,
        template: np.ndarray,
        platform: PlatformChoice,
        dynamics: Dynamics,
        n_workers: int,
    ) -> None:
        self.n_energy_evaluations = 0
        self.platform = platform
        self.description = f"contexts engine, {n_workers} worker(s), platform {platform}"
        self._template = template
        self._context: ReplicaContext | None = None
        self._executor: loky.ProcessPoolExecutor | None = None
        if n_workers == 1:
            self._context = ReplicaContext(system, platform, dynamics)
            return
        threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENMM_CPU_THREADS")
        self._executor = loky.ProcessPoolExecutor(
            max_workers=n_workers,
            initializer=_start_worker,
            initargs=(openmm.XmlSerializer.serialize(system), platform, dynamics),
            env=dict.fromkeys(threads, "1"),
        )

    def run(self, xyz: np.ndarray, schedule: Schedule, seed: int) -> Frames[np.ndarray]:
        """Runs one chain from each structure; see ``Engine.run``."""
        finite = check_structures(xyz, self._template)
        start = np.where(finite[:, None, None], xyz, self._template)
        tasks = [
            (start[i : i + _CHUNK], schedule, (seed, number)) for number, i in enumerate(range(0, len(start), _CHUNK))
        ]
        results = self._map(_run_chunk, tasks or [(start, schedule, (seed, 0))])
        self.n_energy_evaluations += sum(count for _, count in results)
        frames = Frames(*(np.concatenate(parts) for parts in zip(*(part for part, _ in results), strict=True)))
        clear(frames, ~finite)
        return frames

    def evaluate(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies and forces; see ``Engine.evaluate``."""
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
        self._context = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _map(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
        if self._context is not None:
            return [function(self._context, *task) for task in tasks]
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
                "A worker process of the engine ended unexpectedly: killed, or out of memory. Resume the run, with a "
                f"smaller chains.n_workers if memory was short. The pool said: {str(error).splitlines()[0]}"
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


def number_of_workers(molecule: FrozenMolecule, platform: PlatformChoice) -> int:
    """Worker processes for a molecule: what the settings say, otherwise one a core where processes help."""
    alone = platform.is_gpu or molecule.in_one_process
    return molecule.settings.n_workers or (1 if alone else default_workers())


class ContextsBuilder:
    """Builds a :class:`ContextsEngine`; see :class:`openmm_cgflow.engines.choose.Builder`.

    Arguments:
        molecule: What it will run.
        why: Why it takes the place of the engine that was wanted, for the log; empty where it does not.
    """

    def __init__(self, molecule: FrozenMolecule, why: str = "") -> None:
        self._molecule, self._why = molecule, why

    def seconds_per_step(self, platform: PlatformChoice) -> float:
        """Time of a step of one replica, all workers at it."""
        molecule = self._molecule
        context = ReplicaContext(molecule.system, platform, molecule.dynamics.tiny)
        return context.seconds_per_step(molecule.positions) / number_of_workers(molecule, platform)

    def build(self, platform: PlatformChoice) -> ContextsEngine:
        """Creates the engine on a platform."""
        molecule = self._molecule
        n_workers = number_of_workers(molecule, platform)
        engine = ContextsEngine(molecule.system, molecule.positions, platform, molecule.dynamics, n_workers)
        if self._why:
            engine.description += f"; {self._why}"
            logger.warning("Each replica gets its own Context: %s", self._why)
        return engine

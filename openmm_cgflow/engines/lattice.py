"""Frozen-slow Langevin dynamics of many replicas at once: one giant System with the copies on a lattice, for GPUs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Self

import numpy as np
import openmm

from openmm_cgflow.engines.context import FrozenMolecule, ReplicaContext, clear, is_divergence, state_arrays
from openmm_cgflow.engines.copies import Lattice, plan_lattice
from openmm_cgflow.engines.engine import Dynamics, Evaluator, Frames, Schedule
from openmm_cgflow.engines.platforms import PlatformChoice, fastest_platform, platform_choice
from openmm_cgflow.engines.workers import ContextsEngine, check_structures, number_of_workers
from openmm_cgflow.molecule.python_forces import BatchedEnergy
from openmm_cgflow.seeds import derive_seed

__all__ = ["BatchEvaluator", "LatticeBuilder", "LatticeEngine"]

logger = logging.getLogger(__name__)

# Where one replica in a thousand diverges, two rounds of three of a thousand copies have one that does.
_MAX_ATTEMPTS = 8
_CHUNK = 1024  # structures of one call of a batched energy; more would only take more memory


class LatticeEngine:
    """Steps all replicas together in one giant System, which has no energy of a single copy.

    So each frame is evaluated apart, in a single-copy Context or with all frames at once, which gives its forces too;
    these evaluations are counted. Batches larger than the lattice are cut in rounds, smaller ones padded; the padding
    is computed, so it is counted. To have little of it, a lattice of half, a quarter, ... of the sites takes batches
    that fit it.

    A copy that becomes non-finite or outgrows its place may have disturbed its neighbours' pair lists. Such a
    round is repeated without it, eight times at most, and the copies taken out are run one at a time by the contexts
    engine, which has the last word on ``valid``.

    Arguments:
        lattice: The copies.
        slow: The slow atoms.
        template: Finite positions, ``(n_atoms, 3)`` in nm.
        platform: Where the giant System runs.
        dynamics: Settings of the integrators.
        contexts: The engine for single copies; it is closed together with this one.
        evaluator: Of frames; ``contexts`` by default. It is closed as well.
    """

    def __init__(
        self,
        lattice: Lattice,
        slow: Sequence[int],
        template: np.ndarray,
        platform: PlatformChoice,
        dynamics: Dynamics,
        contexts: ContextsEngine,
        evaluator: Evaluator | None = None,
    ) -> None:
        self._lattice = lattice
        self._slow = list(slow)
        self._template = template
        self._contexts, self._evaluator = contexts, evaluator or contexts
        self._dynamics = dynamics
        self._giants: dict[int, ReplicaContext] | None = {}
        self._n_copy_steps = 0
        self.platform = platform
        self.n_at_once = len(lattice.sites)
        self.description = (
            f"lattice engine, {len(lattice.sites)} replicas at once, platform {platform}; "
            f"frames evaluated by: {self._evaluator.description}"
        )

    @property
    def n_energy_evaluations(self) -> int:
        """Evaluations of one molecule since the engine was created: steps of all copies, and the frames' own."""
        by_evaluator = 0 if self._evaluator is self._contexts else self._evaluator.n_energy_evaluations
        return self._n_copy_steps + self._contexts.n_energy_evaluations + by_evaluator

    def run(self, xyz: np.ndarray, schedule: Schedule, seed: int) -> Frames[np.ndarray]:
        """Runs one chain from each structure; see ``Engine.run``."""
        finite = check_structures(xyz, self._template)
        centres = self._centres(np.where(finite[:, None, None], xyz, self._template))
        fits = finite & self._fits((xyz - centres)[:, None])
        positions = np.zeros((len(xyz), schedule.n_frames, *self._template.shape))
        settled = np.zeros(len(xyz), dtype=bool)
        capacity = len(self._lattice.sites)
        pending = np.flatnonzero(fits)
        for number, first in enumerate(range(0, len(pending), capacity)):
            members = pending[first : first + capacity]
            for attempt in range(_MAX_ATTEMPTS):
                if not len(members):
                    break
                entropy = (seed, number, attempt)
                frames, good = self._round(xyz[members] - centres[members], schedule, entropy)
                if good.all():
                    positions[members] = frames + centres[members][:, None]
                    settled[members] = True
                    break
                members = members[good]
        # Adding and removing an offset rounds; the slow atoms are where they were put.
        positions[:, :, self._slow] = np.where(settled[:, None, None, None], xyz[:, None, self._slow], 0.0)
        result = self._evaluated(positions, settled)
        rest = np.flatnonzero(~settled)
        if len(rest):
            logger.debug("%d of %d replicas left the lattice and run one at a time", len(rest), len(xyz))
            single = self._contexts.run(xyz[rest], schedule, derive_seed(seed, _MAX_ATTEMPTS))
            for whole, part in zip(result, single, strict=True):
                whole[rest] = part
        return result

    def evaluate(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies and forces; see ``Engine.evaluate``."""
        check_structures(xyz, self._template)
        return self._evaluator.evaluate(xyz)

    def close(self) -> None:
        """Frees the giant Contexts and closes the engines of single copies."""
        self._giants = None
        self._evaluator.close()
        self._contexts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _centres(self, xyz: np.ndarray) -> np.ndarray:
        slow = xyz[:, self._slow]
        return (slow.max(axis=1, keepdims=True) + slow.min(axis=1, keepdims=True)) / 2

    def _fits(self, local: np.ndarray) -> np.ndarray:
        """Whether centred frames ``(n, n_frames, n_atoms, 3)`` are finite and keep within their places, ``(n,)``."""
        with np.errstate(invalid="ignore"):
            middle = (local.max(axis=2, keepdims=True) + local.min(axis=2, keepdims=True)) / 2
            span = 2 * np.linalg.norm(local - middle, axis=-1).max(axis=(1, 2))  # at least the molecule's diameter
            return (np.abs(local).max(axis=(1, 2, 3)) < self._lattice.radius) & (span < self._lattice.cutoff)

    def _round(
        self, local: np.ndarray, schedule: Schedule, entropy: tuple[int, int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Frames of at most one lattice of replicas about their centres, and which of the replicas did well."""
        n_copies, n_atoms = self._n_copies(len(local)), len(self._template)
        context, sites = self._giant(n_copies), self._lattice.sites[:n_copies, None]
        padded = local[np.arange(n_copies) % len(local)]
        before = context.n_evaluations
        context.reseed(derive_seed(*entropy), schedule.temperature, force=entropy[-1] > 0)
        giant = (padded + sites).reshape(-1, 3)
        try:
            states = context.run(giant, schedule, derive_seed(*entropy, 1), evaluate=False)
            raw = [state_arrays(state)[0] for state in states]
        except openmm.OpenMMException as error:
            if not is_divergence(error):
                raise
            raw = [_last_positions(context, giant)]
        self._n_copy_steps += n_copies * (context.n_evaluations - before)
        frames = np.stack([np.asarray(x).reshape(n_copies, n_atoms, 3) for x in raw], axis=1) - sites[:, None]
        good = self._fits(frames)
        if len(raw) < schedule.n_frames and good.all():
            good[:] = False  # OpenMM stopped, but it does not show which copy was to blame
        return frames[: len(local)], self._blame(good, len(local))

    def _n_copies(self, n_replicas: int) -> int:
        """Copies of the lattice that takes so many replicas."""
        n_copies = len(self._lattice.sites)
        while (n_copies + 1) // 2 >= n_replicas and n_copies > 1:
            n_copies = (n_copies + 1) // 2
        return n_copies

    def _giant(self, n_copies: int) -> ReplicaContext:
        if self._giants is None:
            raise RuntimeError("the engine is closed")
        if n_copies not in self._giants:
            self._giants[n_copies] = ReplicaContext(self._lattice.system(n_copies), self.platform, self._dynamics)
        return self._giants[n_copies]

    @staticmethod
    def _blame(good: np.ndarray, n_replicas: int) -> np.ndarray:
        """Which replicas did well in all their copies, the padding included."""
        result = np.ones(n_replicas, dtype=bool)
        np.logical_and.at(result, np.arange(len(good)) % n_replicas, good)
        return result

    def _evaluated(self, positions: np.ndarray, settled: np.ndarray) -> Frames[np.ndarray]:
        n_replicas, n_frames, n_atoms, _ = positions.shape
        energy = np.zeros((n_replicas, n_frames))
        forces = np.zeros(positions.shape)
        members = np.flatnonzero(settled)
        flat_energy, flat_forces = self._evaluator.evaluate(positions[members].reshape(-1, n_atoms, 3))
        energy[members] = flat_energy.reshape(-1, n_frames)
        forces[members] = flat_forces.reshape(-1, n_frames, n_atoms, 3)
        valid = settled & np.isfinite(energy).all(axis=1) & np.isfinite(forces).all(axis=(1, 2, 3))
        frames = Frames(positions, forces, energy, valid)
        clear(frames, ~valid)
        return frames


def _last_positions(context: ReplicaContext, giant: np.ndarray) -> np.ndarray:
    """Positions after OpenMM stopped; all NaN if it does not even give those."""
    try:
        return context.positions()
    except openmm.OpenMMException:
        return np.full(giant.shape, np.nan)


class BatchEvaluator:
    """Energies and forces of many structures, those of batched energies in one call: an :class:`Evaluator`.

    Arguments:
        energies: Their sum counts.
        rest: Evaluates all other forces, structure by structure; None where there are none.
    """

    def __init__(self, energies: Sequence[BatchedEnergy], rest: Evaluator | None) -> None:
        self._energies, self._rest = energies, rest
        self.n_energy_evaluations = 0
        self.description = "one call for all" + (f", other forces by {rest.description}" if rest else "")

    def evaluate(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies and forces; see ``Engine.evaluate``."""
        if self._rest is None:
            energy, forces = np.zeros(len(xyz)), np.zeros(xyz.shape)
        else:
            energy, forces = self._rest.evaluate(xyz)
        for batched in self._energies:
            for first in range(0, len(xyz), _CHUNK):
                part = slice(first, first + _CHUNK)
                more_energy, more_forces = batched.evaluate(xyz[part])
                energy[part] += more_energy
                forces[part] += more_forces
        self.n_energy_evaluations += len(xyz)
        return energy, forces

    def close(self) -> None:
        """Closes the evaluator of the other forces."""
        if self._rest is not None:
            self._rest.close()


class LatticeBuilder:
    """Builds a :class:`LatticeEngine`; see :class:`openmm_cgflow.engines.choose.Builder`.

    Arguments:
        molecule: What it will run.

    Raises:
        NotReplicableError: If its System cannot be copied, or there is no room for copies.
    """

    def __init__(self, molecule: FrozenMolecule) -> None:
        n_copies = molecule.settings.n_replicas
        self._molecule = molecule
        self._lattice = plan_lattice(molecule.system, molecule.positions, molecule.bonds, molecule.slow, n_copies)

    def seconds_per_step(self, platform: PlatformChoice) -> float:
        """Time of a step of the full lattice, over its replicas."""
        sites, positions = self._lattice.sites, self._molecule.positions
        start = np.concatenate([positions - positions.mean(axis=0) + site for site in sites])
        context = ReplicaContext(self._lattice.system(len(sites)), platform, self._molecule.dynamics.tiny)
        return context.seconds_per_step(start) / len(sites)

    def build(self, platform: PlatformChoice) -> LatticeEngine:
        """Creates the engine on a platform."""
        molecule = self._molecule
        single = self._platform_of_evaluations(platform) if platform.is_gpu else platform
        n_workers = number_of_workers(molecule, single)
        evaluator: BatchEvaluator | None = None
        if molecule.batched:
            others = self._contexts(molecule.rest, single, n_workers) if molecule.rest.getNumForces() else None
            evaluator = BatchEvaluator(molecule.batched, others)
            n_workers = 1  # for the few that leave the lattice
        contexts = self._contexts(molecule.system, single, n_workers)
        return LatticeEngine(
            self._lattice, molecule.slow, molecule.positions, platform, molecule.dynamics, contexts, evaluator
        )

    def _contexts(self, system: openmm.System, platform: PlatformChoice, n_workers: int) -> ContextsEngine:
        return ContextsEngine(system, self._molecule.positions, platform, self._molecule.dynamics, n_workers)

    def _platform_of_evaluations(self, platform: PlatformChoice) -> PlatformChoice:
        """Where frames are evaluated: one small molecule is cheaper on a core than the launches of a GPU's kernels."""
        molecule = self._molecule
        apart = molecule.system if not molecule.batched or not molecule.rest.getNumForces() else molecule.rest

        def seconds(choice: PlatformChoice) -> float:
            context = ReplicaContext(apart, choice, molecule.dynamics)
            return context.seconds_per_evaluation(molecule.positions) / number_of_workers(molecule, choice)

        choices = [platform_choice("Reference"), platform_choice("CPU"), platform]
        return fastest_platform(choices, seconds, "evaluation")

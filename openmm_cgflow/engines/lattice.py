"""Frozen-slow Langevin dynamics of many replicas at once: one giant System with the copies on a lattice, for GPUs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import networkx as nx
import numpy as np
import openmm

from openmm_cgflow.engines.context import (
    Dynamics,
    Frames,
    ReplicaContext,
    Schedule,
    clear,
    is_divergence,
    state_arrays,
)
from openmm_cgflow.engines.copies import NotReplicableError, check_copies, replicate_system
from openmm_cgflow.engines.platforms import PlatformChoice
from openmm_cgflow.engines.workers import ContextsEngine, check_structures
from openmm_cgflow.molecule.python_forces import Evaluator
from openmm_cgflow.seeds import derive_seed

__all__ = ["Lattice", "LatticeEngine", "plan_lattice"]

logger = logging.getLogger(__name__)

_HALF_WIDTH = 20.0  # nm; beyond it float32 positions are coarser than 2e-6 nm
_STRETCH = 1.25  # no bond is expected to be longer than this times its length in the input structure
# Where one replica in a thousand diverges, two rounds of three of a thousand copies have one that does.
_MAX_ATTEMPTS = 8


@dataclass(frozen=True)
class Lattice:
    """Where the copies sit.

    Attributes:
        molecule: The System of one copy.
        sites: Centres of the copies, ``(n_copies, 3)`` in nm, those nearest to the origin first.
        cutoff: Cutoff of the nonbonded forces in nm, larger than the molecule can be.
        radius: No atom may be farther than this from its copy's centre along any axis, in nm.
    """

    molecule: openmm.System
    sites: np.ndarray
    cutoff: float
    radius: float

    def system(self, n_copies: int) -> openmm.System:
        """The giant System of the first so many sites."""
        return replicate_system(self.molecule, n_copies, self.cutoff)


def plan_lattice(
    system: openmm.System, positions: np.ndarray, bonds: Sequence[tuple[int, int]], slow: Sequence[int], n_copies: int
) -> Lattice:
    """Lays out copies of a molecule so that no two of them interact.

    Distances along bonds bound distances in space: with every bond at most 1.25 times as long as in ``positions``, the
    longest shortest path through the bonds is an upper bound D of the molecule's diameter, whatever its torsions do.
    The cutoff is larger than D. A copy is centred on the middle of its slow atoms' bounding box, which is at most
    the slow atoms' own bound wide, and no fast atom is farther from its nearest slow atom than the path to it.
    That bounds each copy's half width, and sites are one cutoff and two half widths apart.

    Arguments:
        system: The System of one molecule, its slow atoms frozen.
        positions: Its input structure, ``(n_atoms, 3)`` in nm.
        bonds: Pairs of bonded atoms.
        slow: The slow atoms.
        n_copies: Copies wanted; fewer are laid out if they do not fit within 20 nm of the origin.

    Raises:
        NotReplicableError: If the System cannot be copied, the bonds do not connect all atoms, or there is no room.
    """
    paths = _path_lengths(positions, bonds)
    if not np.isfinite(paths).all():
        raise NotReplicableError("its bonds do not connect all atoms, so that its size has no bound")
    cutoff = 1.05 * paths.max() + 0.05
    between_slow = paths[np.ix_(slow, slow)]
    radius = between_slow.max() / 2 + paths[:, slow].min(axis=1).max() + 0.02
    spacing = cutoff + 2 * radius + 0.02
    per_axis = int((2 * (_HALF_WIDTH - radius)) // spacing) + 1
    if radius > _HALF_WIDTH or per_axis < 2:
        raise NotReplicableError(f"it can be {paths.max():.1f} nm long, too large for a lattice")
    per_axis = min(per_axis, int(np.ceil(n_copies ** (1 / 3) - 1e-9)))
    axis = (np.arange(per_axis) - (per_axis - 1) / 2) * spacing
    sites = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    sites = sites[np.argsort((sites**2).sum(axis=1), kind="stable")][:n_copies]
    check_copies(system, positions, np.array([spacing, 0.0, 0.0]), cutoff)
    return Lattice(system, sites, cutoff, radius)


def _path_lengths(positions: np.ndarray, bonds: Sequence[tuple[int, int]]) -> np.ndarray:
    """Upper bounds of all distances in nm, ``(n_atoms, n_atoms)``, infinite where no path connects."""
    graph = nx.Graph()
    graph.add_nodes_from(range(len(positions)))
    graph.add_weighted_edges_from((i, j, _STRETCH * np.linalg.norm(positions[i] - positions[j])) for i, j in bonds)
    lengths = np.full((len(positions), len(positions)), np.inf)
    for source, reached in nx.all_pairs_dijkstra_path_length(graph):
        lengths[source, list(reached)] = list(reached.values())
    return lengths


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
        self._chains: dict[int, ReplicaContext] | None = {}
        self._n_copy_steps = 0
        self.platform = platform
        self.description = (
            f"lattice engine, {len(lattice.sites)} replicas at once, platform {platform}; "
            f"frames evaluated by: {self._evaluator.description}"
        )

    @property
    def n_energy_evaluations(self) -> int:
        by_evaluator = 0 if self._evaluator is self._contexts else self._evaluator.n_energy_evaluations
        return self._n_copy_steps + self._contexts.n_energy_evaluations + by_evaluator

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
        """Runs one chain from each structure; see ``Engine.run``."""
        schedule = Schedule(temperature, n_relax, n_equilibration, n_frames, stride)
        finite = check_structures(xyz, self._template)
        centres = self._centres(np.where(finite[:, None, None], xyz, self._template))
        fits = finite & self._fits((xyz - centres)[:, None])
        positions = np.zeros((len(xyz), n_frames, *self._template.shape))
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
            single = self._contexts.run(
                xyz[rest],
                temperature,
                n_relax=n_relax,
                n_equilibration=n_equilibration,
                n_frames=n_frames,
                stride=stride,
                seed=derive_seed(seed, _MAX_ATTEMPTS),
            )
            for whole, part in zip(result, single, strict=True):
                whole[rest] = part
        return result

    def evaluate(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies and forces; see ``Engine.evaluate``."""
        check_structures(xyz, self._template)
        return self._evaluator.evaluate(xyz)

    def close(self) -> None:
        """Frees the giant Contexts and closes the engines of single copies."""
        self._chains = None
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
        chain, sites = self._chain(n_copies), self._lattice.sites[:n_copies, None]
        padded = local[np.arange(n_copies) % len(local)]
        before = chain.n_evaluations
        chain.reseed(derive_seed(*entropy), schedule.temperature, force=entropy[-1] > 0)
        giant = (padded + sites).reshape(-1, 3)
        try:
            states = chain.run(giant, schedule, derive_seed(*entropy, 1), evaluate=False)
            raw = [state_arrays(state)[0] for state in states]
        except openmm.OpenMMException as error:
            if not is_divergence(error):
                raise
            raw = [_last_positions(chain, giant)]
        self._n_copy_steps += n_copies * (chain.n_evaluations - before)
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

    def _chain(self, n_copies: int) -> ReplicaContext:
        if self._chains is None:
            raise RuntimeError("the engine is closed")
        if n_copies not in self._chains:
            self._chains[n_copies] = ReplicaContext(self._lattice.system(n_copies), self.platform, self._dynamics)
        return self._chains[n_copies]

    @staticmethod
    def _blame(good: np.ndarray, n_replicas: int) -> np.ndarray:
        """Which replicas did well in all their copies, the padding included."""
        result = np.ones(n_replicas, dtype=bool)
        np.logical_and.at(result, np.arange(len(good)) % n_replicas, good)
        return result

    def _evaluated(self, positions: np.ndarray, settled: np.ndarray) -> Frames:
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


def _last_positions(chain: ReplicaContext, giant: np.ndarray) -> np.ndarray:
    """Positions after OpenMM stopped; all NaN if it does not even give those."""
    try:
        return chain.positions()
    except openmm.OpenMMException:
        return np.full(giant.shape, np.nan)

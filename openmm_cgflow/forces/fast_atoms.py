"""Chains of the fast atoms at given slow coordinates: their warm start, and which of them may be used.

OpenMM itself is not here: the engine that runs the chains is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from openmm_cgflow.coordinates.all_atom import AllAtomMap
from openmm_cgflow.errors import ReplicaError
from openmm_cgflow.seeds import derive_seed
from openmm_cgflow.settings import ChainSettings

__all__ = ["Engine", "FastAtoms", "Frames", "Quarantine"]

_N_POOLS = 16  # calls whose end states stay in the pool


class Engine(Protocol):
    """What runs the frozen-slow chains: see :class:`openmm_cgflow.engines.choose.Engine`."""

    @property
    def n_energy_evaluations(self) -> int: ...

    def evaluate(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

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
    ) -> Any: ...


class Frames(NamedTuple):
    """Frames of the chains, shapes (B, n_frames, n_atoms, 3), the same, (B, n_frames) and (B,); nm and kJ/mol."""

    xyz: Tensor
    forces: Tensor
    energy: Tensor
    valid: Tensor


@dataclass
class Quarantine:
    """How many replicas were set aside, and why."""

    total: int = 0
    not_finite: int = 0
    flipped: int = 0


class FastAtoms:
    """Short chains of the fast atoms at given z, warm-started from a pool.

    The pool holds the fast internal coordinates where earlier chains ended, with their z; a new z starts from its
    nearest neighbour's. Chains are short, lineages are long, so the fast atoms stay equilibrated. The first pool is a
    thermal draw, relaxed and run for ``n_pool_steps``.

    Arguments:
        engine: Runs the chains.
        assembly: Builds structures.
        draw_fast: Thermal draw of y: (z, temperature, generator) -> y.
        settings: The ``chains`` section of the configuration.
        seed: The configuration's seed.
    """

    def __init__(
        self,
        engine: Engine,
        all_atom: AllAtomMap,
        draw_fast: Callable[[Tensor, float, torch.Generator], Tensor],
        settings: ChainSettings,
        seed: int,
    ) -> None:
        self.engine, self.all_atom, self.settings, self.seed = engine, all_atom, settings, seed
        self._draw_fast = draw_fast
        self.follow: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        """Moves y along with z, (y, z before, z after) -> y; without it, fast atoms start as their neighbour's are."""
        self.quarantine = Quarantine()
        self.n_calls = 0
        self.pool: list[tuple[Tensor, Tensor]] = []

    def run(
        self,
        z: Tensor,
        temperature: float,
        n_equilibration: int,
        n_frames: int,
        stride: int,
        seed: int | None = None,
        keep: bool = True,
    ) -> Frames:
        """Runs one chain at each z.

        Arguments:
            z: Slow coordinates, shape (B, n_features).
            temperature: K.
            n_equilibration: Steps before the first stride.
            n_frames: Frames of each chain.
            stride: Steps between frames.
            seed: Overrides the seed derived from the number of calls.
            keep: Puts where they end into the pool.

        Raises:
            ReplicaError: If more than ``max_invalid`` of the replicas are quarantined.
        """
        z = z.detach()
        if not self.pool:
            self._fill_pool(z, temperature)
        xyz = self.all_atom.build(z, self._nearest(z))
        frames = self._run(z, xyz, temperature, self.settings.n_relax, n_equilibration, n_frames, stride, seed)
        if keep:
            self._keep(z, frames)
        return frames

    def propagate(self, z: Tensor, xyz: Tensor, temperature: float, n_steps: int, seed: int) -> Frames:
        """Runs given structures at z on for some steps: one frame each."""
        return self._run(z, xyz, temperature, 0, 0, 1, n_steps, seed)

    def _fill_pool(self, z: Tensor, temperature: float) -> None:
        z = z[:: max(1, len(z) // self.settings.n_pool)]  # evenly: a batch may be sorted
        generator = torch.Generator().manual_seed(derive_seed(self.seed, 1))
        xyz = self.all_atom.build(z, self._draw_fast(z, temperature, generator))
        self._keep(z, self._run(z, xyz, temperature, 100, self.settings.n_pool_steps, 1, 1, derive_seed(self.seed, 2)))

    def _keep(self, z: Tensor, frames: Frames) -> None:
        self.pool.append((z[frames.valid], self.all_atom.read_fast(frames.xyz[frames.valid, -1])))
        del self.pool[:-_N_POOLS]

    def _nearest(self, z: Tensor) -> Tensor:
        pool_z = torch.cat([entry[0] for entry in self.pool])
        pool_y = torch.cat([entry[1] for entry in self.pool])
        distance = torch.cdist(self._embed(z), self._embed(pool_z))
        # Equal z, as in a test at one z, must not all descend from one ancestor: ties are broken at random.
        generator = torch.Generator().manual_seed(derive_seed(self.seed, 4, self.n_calls))
        ties = 1e-6 * torch.rand(distance.shape, generator=generator, dtype=distance.dtype)
        nearest = (distance + ties).argmin(dim=-1)
        y = pool_y[nearest]
        return y if self.follow is None else self.follow(y, pool_z[nearest], z)

    def _embed(self, z: Tensor) -> Tensor:
        n = self.all_atom.coordinates.n_circular
        # Torsions decide which fast atoms fit. Mean forces just after the start were off by 0.7 kT/rad in a first pool
        # of 256 with a weight of 0.2, by 0.4 with 0.05, and by nothing that could be measured in a pool of 16,000.
        scale = 0.05 if n else 1.0
        return torch.cat((torch.cos(z[:, :n]), torch.sin(z[:, :n]), scale * z[:, n:]), dim=-1)

    def _run(
        self,
        z: Tensor,
        xyz: Tensor,
        temperature: float,
        n_relax: int,
        n_equilibration: int,
        n_frames: int,
        stride: int,
        seed: int | None,
    ) -> Frames:
        self.n_calls += 1
        raw = self.engine.run(
            xyz.numpy(),
            temperature,
            n_relax=n_relax,
            n_equilibration=n_equilibration,
            n_frames=n_frames,
            stride=stride,
            seed=derive_seed(self.seed, 3, self.n_calls) if seed is None else seed,
        )
        frames = Frames(*(torch.as_tensor(array) for array in raw))
        same = self.all_atom.same_handedness(frames.xyz).all(-1)
        valid = frames.valid & same if self.settings.keep_chirality else frames.valid
        self.quarantine.total += len(z)
        self.quarantine.not_finite += int((~frames.valid).sum())
        self.quarantine.flipped += int((frames.valid & ~same).sum())
        n_invalid = int((~valid).sum())
        if n_invalid > self.settings.max_invalid * len(z) or n_invalid == len(z):
            n_flipped = int((frames.valid & ~same).sum())
            raise ReplicaError(
                f"{n_invalid} of {len(z)} replicas failed at {temperature:.0f} K ({n_flipped} changed their "
                f"handedness, {n_invalid - n_flipped} diverged), more than chains.max_invalid = "
                f"{self.settings.max_invalid}. Try a shorter chains.timestep or, in a reverse_kl training, a lower "
                "tempering.start"
            )
        return frames._replace(valid=valid)

    def state_dict(self) -> dict[str, Any]:
        """Everything a later run continues from, as tensors and numbers."""
        return {"n_calls": self.n_calls, "pool": list(self.pool), "quarantine": vars(self.quarantine).copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.n_calls = state["n_calls"]
        self.pool = [tuple(entry) for entry in state["pool"]]
        self.quarantine = Quarantine(**state["quarantine"])

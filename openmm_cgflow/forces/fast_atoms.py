"""Chains of the fast atoms at given slow coordinates: their warm start, and which of them may be used.

OpenMM itself is not here: the engine that runs the chains is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_cgflow.coordinates.all_atom import AllAtomMap
from openmm_cgflow.engines.engine import Engine, Frames, Schedule
from openmm_cgflow.errors import ReplicaError
from openmm_cgflow.seeds import Stream, derive_seed
from openmm_cgflow.settings import ChainSettings

__all__ = ["FastAtoms", "Follow", "Quarantine"]

Follow = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Fast coordinates, shape (B, n_fast, 3), moved along with slow ones, (B, n_features): (y, z before, z after) -> y."""

_N_POOLS = 16  # calls whose end states stay in the pool
_N_RELAX_DRAWN = 100  # descent steps of the thermal draws that the first pool starts from


@dataclass
class Quarantine:
    """How many replicas were set aside, and why.

    Attributes:
        total: Replicas of all calls.
        not_finite: Those with positions, forces or energies that are not finite.
        flipped: Finite ones whose handedness differs from the input structure's, also where that is allowed.
    """

    total: int = 0
    not_finite: int = 0
    flipped: int = 0


class FastAtoms:
    """Short chains of the fast atoms at given z, warm-started from a pool.

    The pool holds the fast internal coordinates where earlier chains ended, with their z; a new z starts from its
    nearest neighbour's. Chains are short, lineages are long, so the fast atoms stay equilibrated. The first pool is a
    thermal draw, relaxed and run for ``chains.n_pool_steps``.

    Arguments:
        engine: Runs the chains.
        all_atom: Builds structures.
        draw_fast: Thermal draw of y: (z, temperature, generator) -> y, shape (B, n_fast, 3).
        settings: The ``chains`` section of the configuration.
        seed: The configuration's seed.
        follow: Moves y along with z, such as the learned response; without it, the fast atoms start as their nearest
            neighbour's are.

    Attributes:
        pool: z, shape (n, n_features), and y, shape (n, n_fast, 3), where the chains of each of the last calls ended.
        quarantine: Replicas that were set aside so far.
        n_calls: Calls of the engine so far; seeds are derived from it.
    """

    def __init__(
        self,
        engine: Engine,
        all_atom: AllAtomMap,
        draw_fast: Callable[[Tensor, float, torch.Generator], Tensor],
        settings: ChainSettings,
        seed: int,
        follow: Follow | None = None,
    ) -> None:
        self.engine, self.all_atom, self.settings, self.seed = engine, all_atom, settings, seed
        self._draw_fast, self._follow = draw_fast, follow
        self.quarantine = Quarantine()
        self.n_calls = 0
        self.pool: list[tuple[Tensor, Tensor]] = []

    def run(self, z: Tensor, schedule: Schedule, seed: int | None = None, keep: bool = True) -> Frames[Tensor]:
        """Runs one chain at each z, from the pool.

        Arguments:
            z: Slow coordinates, shape (B, n_features).
            schedule: Temperature and numbers of steps.
            seed: Overrides the seed derived from the number of calls.
            keep: Puts where they end into the pool.

        Returns:
            Frames; ``valid`` is also False where the handedness changed.

        Raises:
            ReplicaError: If more than ``max_invalid`` of the replicas are quarantined.
            CGFlowError: If a worker process dies.
        """
        z = z.detach()
        if not self.pool:
            self._fill_pool(z, schedule.temperature)
        y, start = self.nearest(z)
        frames = self.propagate(self.all_atom.build(z, self.moved(y, start, z)), schedule, seed)
        if keep:
            self._keep(z, frames)
        return frames

    def propagate(self, xyz: Tensor, schedule: Schedule, seed: int | None = None) -> Frames[Tensor]:
        """Runs chains from given structures, nm, shape (B, n_atoms, 3); otherwise as :meth:`run`."""
        self.n_calls += 1
        raw = self.engine.run(
            xyz.numpy(), schedule, derive_seed(self.seed, Stream.CHAINS, self.n_calls) if seed is None else seed
        )
        frames = Frames(*(torch.as_tensor(array) for array in raw))
        same = self.all_atom.same_handedness(frames.xyz).all(-1)
        valid = frames.valid & same if self.settings.keep_chirality else frames.valid
        n, n_flipped = len(xyz), int((frames.valid & ~same).sum())
        self.quarantine.total += n
        self.quarantine.not_finite += int((~frames.valid).sum())
        self.quarantine.flipped += n_flipped
        n_invalid = int((~valid).sum())
        if n_invalid > self.settings.max_invalid * n or n_invalid == n:
            raise ReplicaError(
                f"{n_invalid} of {n} replicas failed at {schedule.temperature:.0f} K ({n_flipped} changed their "
                f"handedness, {n_invalid - n_flipped} diverged), more than chains.max_invalid = "
                f"{self.settings.max_invalid}. Try a shorter chains.timestep or, in a reverse_kl training, a lower "
                "tempering.start"
            )
        return frames._replace(valid=valid)

    def nearest(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Fast coordinates of the pool at the slow ones nearest to z, and these.

        Returns:
            Shapes (B, n_fast, 3) and (B, n_features), as z.
        """
        pool_z = torch.cat([entry[0] for entry in self.pool])
        pool_y = torch.cat([entry[1] for entry in self.pool])
        embed = self.all_atom.coordinates.features.embed
        distance = torch.cdist(embed(z), embed(pool_z))
        # Equal z, as in a test at one z, must not all descend from one ancestor: ties are broken at random.
        generator = torch.Generator().manual_seed(derive_seed(self.seed, Stream.TIES, self.n_calls))
        ties = 1e-6 * torch.rand(distance.shape, generator=generator, dtype=distance.dtype)
        nearest = (distance + ties).argmin(dim=-1)
        return pool_y[nearest], pool_z[nearest]

    def moved(self, y: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Fast coordinates taken along from one z to another by the response; as they were where there is none.

        Arguments:
            y: Shape (B, n_fast, 3).
            start: z where they are, shape (B, n_features).
            end: z where they go, of the same shape.
        """
        return y if self._follow is None else self._follow(y, start, end)

    def _fill_pool(self, z: Tensor, temperature: float) -> None:
        z = z[:: max(1, len(z) // self.settings.n_pool)]  # evenly: a batch may be sorted
        generator = torch.Generator().manual_seed(derive_seed(self.seed, Stream.FIRST_FAST_ATOMS))
        xyz = self.all_atom.build(z, self._draw_fast(z, temperature, generator))
        schedule = Schedule(temperature, _N_RELAX_DRAWN, self.settings.n_pool_steps)
        self._keep(z, self.propagate(xyz, schedule, derive_seed(self.seed, Stream.FIRST_POOL)))

    def _keep(self, z: Tensor, frames: Frames[Tensor]) -> None:
        self.pool.append((z[frames.valid], self.all_atom.read_fast(frames.xyz[frames.valid, -1])))
        del self.pool[:-_N_POOLS]

    def state_dict(self) -> dict[str, Any]:
        """Everything a later run continues from, as tensors and numbers."""
        return {"n_calls": self.n_calls, "pool": list(self.pool), "quarantine": vars(self.quarantine).copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.n_calls = state["n_calls"]
        self.pool = [tuple(entry) for entry in state["pool"]]
        self.quarantine = Quarantine(**state["quarantine"])

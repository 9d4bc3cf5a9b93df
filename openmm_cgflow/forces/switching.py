"""Free-energy differences by nonequilibrium switching, without a mean force.

The slow atoms are moved along a path from one conformation to another and back, while the fast atoms follow by Langevin
steps. Each move of the slow atoms takes the fast internal coordinates along by their learned response, whatever its
quality; the sum of the changes of energy and volume element is the work W, and <exp(-beta W)> = exp(-beta dA) exactly,
however fast the switching (Jarzynski 1997; with an escort, Vaikuntanathan and Jarzynski 2008; annealed importance
sampling, Neal 2001). Forward and backward works together give dA by Bennett's acceptance ratio.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor

from openmm_cgflow.engines.engine import Schedule
from openmm_cgflow.errors import ReplicaError
from openmm_cgflow.forces.fast_atoms import FastAtoms
from openmm_cgflow.seeds import Stream, derive_seed
from openmm_cgflow.units import thermal_beta

__all__ = ["DISSIPATED", "N_BOOTSTRAP", "Differences", "Switches", "acceptance_ratio", "slower", "switch"]

logger = logging.getLogger(__name__)

_N_LANGEVIN = 10  # steps of the fast atoms after each move of the slow ones, at a slowness of 1
DISSIPATED, _SLOWEST = 2.0, 16  # kT above which switching becomes slower, and the largest slowness
_N_EQUILIBRATION = 150  # steps of the fast atoms at either end
_N_START = 20  # more evaluations to set out: relaxation, energies
N_BOOTSTRAP = 200
_LARGEST_WORK = 1e4  # kT, of a whole path: of no weight, and finite
_SMALLEST_ERROR = 1e-3  # kT; where nothing dissipates, as in some synthetic targets, all works are equal


def acceptance_ratio(forward: np.ndarray, backward: np.ndarray) -> float:
    """Free-energy difference in kT from works of both directions in kT (Bennett 1976; Crooks 2000)."""
    offset = math.log(len(forward) / len(backward))

    def excess(difference: float) -> float:
        return float(expit(difference - offset - forward).sum() - expit(-difference + offset - backward).sum())

    low = min(forward.min(), (-backward).min()) - 10.0
    high = max(forward.max(), (-backward).max()) + 10.0
    return float(brentq(excess, low, high))


def switch(
    fast_atoms: FastAtoms, paths: Tensor, temperature: float, seed: int, slowness: int = 1
) -> tuple[Tensor, Tensor]:
    """Moves one replica along each path.

    Arguments:
        fast_atoms: Run the chains; their response, if they have one, is the escort.
        paths: Slow coordinates, shape (n, n_points, n_features).
        temperature: K.
        seed: Same seed, same works.
        slowness: Multiplies the steps of the fast atoms after each move.

    Returns:
        Works in kT and which of them may be used, shapes (n,).

    Raises:
        ReplicaError: If too many chains fail.
    """
    all_atom, engine, beta = fast_atoms.all_atom, fast_atoms.engine, thermal_beta(temperature)
    set_out = Schedule(temperature, fast_atoms.settings.n_relax, _N_EQUILIBRATION)
    follow_on = Schedule(temperature, stride=slowness * _N_LANGEVIN)
    frames = fast_atoms.run(paths[:, 0], set_out, derive_seed(seed, Stream.SET_OUT), keep=False)
    work, valid = torch.zeros(len(paths), dtype=torch.float64), frames.valid.clone()
    for step in range(1, paths.shape[1]):
        y = all_atom.read_fast(frames.xyz[:, 0])
        y = torch.where(valid[:, None, None], y, y[valid][:1])
        shifted = fast_atoms.moved(y, paths[:, step - 1], paths[:, step])
        moved = all_atom.build(paths[:, step], shifted)
        energy = torch.as_tensor(engine.evaluate(moved.numpy())[0])
        change = beta * (energy - frames.energy[:, 0])
        change -= all_atom.log_volume_fast(shifted) - all_atom.log_volume_fast(y)
        frames = fast_atoms.propagate(moved, follow_on, derive_seed(seed, Stream.ON_THE_WAY, step))
        # An overlap of infinite energy counts, with no weight, whatever follows; what is not a number does not.
        work = torch.where(torch.isposinf(work), work, work + change)
        valid &= frames.valid & ~torch.isnan(work)
        if not valid.any():
            raise ReplicaError(f"no switch was usable after step {step} of {paths.shape[1] - 1}")
    return work.clamp(max=_LARGEST_WORK), valid


def slower(slowness: int, dissipation: float, tolerated: float = DISSIPATED) -> int:
    """The slowness with which to go on along a path that dissipated so many kT.

    As many switches are needed as the exponential of what they dissipate, and that falls as their slowness grows, so
    beyond some kT slower ones are cheaper.
    """
    if not dissipation > tolerated:  # not known, too
        return slowness
    return min(_SLOWEST, slowness * 2 ** math.ceil(math.log2(dissipation / tolerated)))


class Differences(NamedTuple):
    """Free energies at the ends of paths relative to their starts, kT, shapes (n_paths,).

    Attributes:
        value: Bennett's acceptance ratio of the works.
        error: Its standard error.
        dissipation: Mean of forward and backward work; errors are to be believed while it is a few kT.
    """

    value: np.ndarray
    error: np.ndarray
    dissipation: np.ndarray


class Switches:
    """Works along paths there and back, added in blocks.

    Arguments:
        paths: Slow coordinates, shape (n_paths, n_points, n_features).

    Attributes:
        works: There and back, of each path.
        slowness: At which these were done, of each path.
    """

    def __init__(self, paths: Tensor) -> None:
        self.paths = paths
        self.works: list[tuple[Tensor, Tensor]] = [(torch.zeros(0), torch.zeros(0)) for _ in paths]
        self.slowness = [1] * len(paths)

    def cost(self, n_switches: int, slowness: int = 1) -> int:
        """Energy evaluations of switching along one of the paths there and back, at most."""
        # A move, the steps that follow, and the frame that they end with.
        per_switch = self.paths.shape[1] * (1 + slowness * _N_LANGEVIN + 1) + _N_EQUILIBRATION + _N_START
        return 2 * n_switches * per_switch

    def add(
        self,
        run: Callable[[Tensor, int], tuple[Tensor, Tensor]],
        which: list[int],
        n_switches: int,
        slowness: Sequence[int] | None = None,
    ) -> list[int]:
        """Switches along some of the paths; returns those of which too few were usable, fewer than two of a direction.

        Their works stay as they were. Works at another slowness than before take the place of those.

        Arguments:
            run: Works along paths at a slowness, and which may be used, as from :func:`switch`.
            which: Numbers of the paths.
            n_switches: Switches along each, in each direction.
            slowness: Slowness on each, see :func:`switch`; 1 by default.
        """
        each = dict(zip(which, slowness or [1] * len(which), strict=True))
        failed = []
        for slow in sorted(set(each.values())):
            same = [path for path in which if each[path] == slow]
            try:
                failed += self._add(run, same, n_switches, slow)
            except ReplicaError as error:
                logger.warning("switching: %s", error)
                failed += same
        return sorted(failed)

    def _add(
        self, run: Callable[[Tensor, int], tuple[Tensor, Tensor]], which: list[int], n_switches: int, slowness: int
    ) -> list[int]:
        chosen = self.paths[which]
        work, valid = run(torch.cat((chosen, chosen.flip(1))).repeat_interleave(n_switches, 0), slowness)
        work, valid = work.double().reshape(2, -1, n_switches), valid.reshape(2, -1, n_switches)
        failed = []
        for k, path in enumerate(which):
            there, back = work[0, k][valid[0, k]], work[1, k][valid[1, k]]
            if min(len(there), len(back)) < 2:
                failed.append(path)
                continue
            if slowness == self.slowness[path]:
                before = self.works[path]
                there, back = torch.cat((before[0], there)), torch.cat((before[1], back))
            self.works[path], self.slowness[path] = (there, back), slowness
        return failed

    def differences(self, seed: int, n_bootstrap: int = N_BOOTSTRAP) -> Differences:
        """Free-energy differences from all works so far; nan with an infinite error where there are none.

        Arguments:
            seed: Of the bootstrap.
            n_bootstrap: Resamples of the works that the errors are from.
        """
        rng = np.random.default_rng(seed)
        rows = []
        for there, back in ((there.numpy(), back.numpy()) for there, back in self.works):
            if not len(there):
                rows.append((math.nan, math.inf, math.nan))
                continue
            resampled = [
                acceptance_ratio(rng.choice(there, len(there)), rng.choice(back, len(back))) for _ in range(n_bootstrap)
            ]
            error = max(float(np.std(resampled)), _SMALLEST_ERROR)
            rows.append((acceptance_ratio(there, back), error, (there.mean() + back.mean()) / 2))
        return Differences(*np.array(rows).reshape(-1, 3).T)

    def state_dict(self) -> dict[str, Any]:
        """Everything a later run continues from, as tensors and numbers."""
        return {"paths": self.paths, "works": list(self.works), "slowness": list(self.slowness)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Switches:
        """Inverse of :meth:`state_dict`."""
        switches = cls(state["paths"])
        switches.works = [tuple(pair) for pair in state["works"]]
        switches.slowness = list(state["slowness"])
        return switches

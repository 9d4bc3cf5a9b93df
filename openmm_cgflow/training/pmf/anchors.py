"""Free energies of a few conformations by switching, for the last fit of the potential of mean force."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch

from openmm_cgflow.forces.switching import Differences, Switches, slower
from openmm_cgflow.networks.pmf import SlowFreeEnergy
from openmm_cgflow.seeds import Stream, derive_seed
from openmm_cgflow.training.method import EvaluationBudget, Row
from openmm_cgflow.training.pmf.fits import AnchorValues
from openmm_cgflow.training.pmf.paths import low_paths
from openmm_cgflow.training.pmf.state import PMFState

__all__ = ["Anchors"]

logger = logging.getLogger(__name__)

_N_SWITCHES = 16  # to a conformation and back, in one step
_N_STEPS = 24  # at most
_SMALLEST_ERROR = 0.02  # kT, that a difference counts with


class Anchors:
    """Free energies of some conformations by switching between them, for the last fit to hold on to.

    Switches until every difference is known to ``stopping.free_energy_error``, or at most 24 times as the budget
    allows; more slowly where much work is dissipated. Without a torsion, or with ``pmf.n_switched: 0``, there are none.

    Arguments:
        state: Shared by all phases.
        budget: Energy evaluations that may be spent.

    Attributes:
        n_steps: Steps made so far.
        lost: Numbers of the conformations that could not be switched to; what is known of the others stays.
    """

    def __init__(self, state: PMFState, budget: EvaluationBudget) -> None:
        self.state, self.budget = state, budget
        self.n_steps = 0
        self.lost: list[int] = []
        self._switches: Switches | None = None
        # Of the switches so far: their bootstrap takes too long to be done anew for every row of metrics.
        self._found: Differences | None = None
        self._next: list[int] = []

    @property
    def asked_for(self) -> bool:
        """Whether there will be any: paths lead through torsions."""
        return bool(self.state.settings.n_switched and self.state.flow.n_circular)

    @property
    def done(self) -> bool:
        """Whether no difference is to be known better, or none may be."""
        return not self._next

    @property
    def expected_steps(self) -> int:
        return self.n_steps + (not self.done)

    @property
    def unmet(self) -> list[str]:
        wanted, found = self.state.stopping.free_energy_error, []
        if not self.done:
            return []
        error = self.compare(self.state.pmf)["value_error"]
        if error > wanted:  # never so where it is nan
            found.append(f"differences by switching to {error:.3g} kT (wanted {wanted:g})")
        if self.lost:
            found.append(f"{len(self.lost)} conformations could not be switched to")
        return found

    def begin(self) -> None:
        """Chooses conformations and paths; see :func:`openmm_cgflow.training.pmf.paths.low_paths`."""
        if self.asked_for:
            state = self.state
            scale = min(state.exploring, state.flow_fitter.trained_up_to)
            paths = low_paths(
                state.flow, state.pmf, state.coordinates, state.settings.n_switched, state.generator, scale
            )
            self._switches = Switches(paths)
            self._evaluate()
            self._plan()

    def step(self) -> Row:
        """Switches to every conformation whose free energy is not known well enough, and back.

        Those where it does not succeed are left: without them the last fit has mean forces alone, as elsewhere.
        """
        assert self._switches is not None
        state = self.state
        lost = self._switches.add(
            lambda paths, slowness: state.estimator.switch(paths, state.temperature, slowness),
            self._next,
            _N_SWITCHES,
            [self._slowness(path) for path in self._next],
        )
        if lost:
            logger.warning("%d of %d conformations could not be switched to", len(lost), len(self._switches.paths))
        self.lost = sorted({*self.lost, *lost})
        self.n_steps += 1
        self._evaluate()
        self._plan()
        return {"barrier_scale": state.exploring}

    def _evaluate(self) -> None:
        if self._switches is not None:
            self._found = self._switches.differences(derive_seed(self.state.seed, Stream.ANCHOR_ERRORS))

    def _slowness(self, path: int) -> int:
        """Of the next switches along a path."""
        assert self._switches is not None and self._found is not None
        return slower(self._switches.slowness[path], self._found.dissipation[path])

    def _plan(self) -> None:
        """Of the next step: the paths along which to switch, the cheapest first where not all can be afforded."""
        assert self._switches is not None and self._found is not None
        self._next = []
        if self.n_steps == _N_STEPS:
            return
        wanted = self.state.stopping.free_energy_error
        rough = np.setdiff1d(np.flatnonzero(self._found.error > wanted), self.lost).tolist()
        left = self.budget.left
        for path in sorted(rough, key=self._slowness):
            left -= self._switches.cost(_N_SWITCHES, self._slowness(path))
            if left >= 0:
                self._next.append(path)
        self._next.sort()

    def values(self) -> AnchorValues | None:
        """What is known; None where nothing is."""
        if self._switches is None or self._found is None or not np.isfinite(self._found.error).any():
            return None
        known = torch.as_tensor(np.isfinite(self._found.error))
        start, end = self._switches.paths[:, 0], self._switches.paths[:, -1]
        value, error = torch.as_tensor(self._found.value), torch.as_tensor(self._found.error)
        error = error.clamp(min=_SMALLEST_ERROR)
        generator = torch.Generator().manual_seed(derive_seed(self.state.seed, Stream.ANCHOR_WEIGHTS))
        weights = torch.empty((len(error), self.state.settings.n_members)).exponential_(generator=generator)
        return AnchorValues(*(part[known].float() for part in (start, end, value, error, weights)))

    @torch.no_grad()
    def compare(self, pmf: SlowFreeEnergy) -> dict[str, float]:
        """The largest error of a difference, and how far the PMF is from them, root mean square by precision, kT."""
        values = self.values()
        if values is None:
            return {"value_error": math.nan, "value_misfit": math.nan}
        away = pmf(values.end) - pmf(values.start) - values.difference
        precision = values.error**-2
        misfit = (precision * away.square()).sum() / precision.sum()
        return {"value_error": float(values.error.max()), "value_misfit": float(misfit.sqrt())}

    def describe(self, row: Row) -> str:
        return f"switching: free energies to {row['value_error']:.2f} kT, PMF off by {row['value_misfit']:.2f} kT"

    def state_dict(self) -> dict[str, Any]:
        switches = None if self._switches is None else self._switches.state_dict()
        return {"n_steps": self.n_steps, "next": list(self._next), "lost": list(self.lost), "switches": switches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.n_steps, self._next, self.lost = state["n_steps"], list(state["next"]), list(state["lost"])
        self._switches = None if state["switches"] is None else Switches.from_state(state["switches"])
        self._evaluate()

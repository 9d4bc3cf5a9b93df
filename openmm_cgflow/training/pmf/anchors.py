"""Free energies of a few conformations by switching, for the last fit of the potential of mean force."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.forces.estimator import MeanForceEstimator
from openmm_cgflow.forces.switching import Differences, Switches, slower
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.networks.pmf import PMF
from openmm_cgflow.seeds import derive_seed
from openmm_cgflow.training.pmf.fits import AnchorValues
from openmm_cgflow.training.pmf.paths import low_paths

__all__ = ["Anchors"]

logger = logging.getLogger(__name__)

_N_SWITCHES = 16  # to a conformation and back, in one step
_N_STEPS = 24  # at most
_SMALLEST_ERROR = 0.02  # kT, that a difference counts with


class Anchors:
    """Switches until every difference is known to ``stopping.free_energy_error``, or at most 24 times as the
    evaluations allow; more slowly where much work is dissipated.

    Use: ``start(...)`` once there is a PMF, then ``step(...)`` while ``wanted``. Not started, it wants nothing.

    Arguments:
        config: ``pmf.n_switched``, ``pmf.n_members``, ``stopping`` and ``seed`` are used.

    Attributes:
        n_steps: Steps made so far.
        lost: Numbers of the conformations that could not be switched to; what is known of the others stays.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.n_steps = 0
        self.lost: list[int] = []
        self._switches: Switches | None = None
        # Of the switches so far: their bootstrap takes too long to be done anew for every row of metrics.
        self._found: Differences | None = None
        self._next: list[int] = []

    def asked_for(self, flow: CGFlow) -> bool:
        """Whether there will be any: paths lead through torsions."""
        return bool(self.config.pmf.n_switched and flow.n_circular)

    @property
    def wanted(self) -> bool:
        """Whether some difference is to be known better, and may be."""
        return bool(self._next)

    def start(
        self,
        flow: CGFlow,
        pmf: PMF,
        coordinates: Coordinates,
        estimator: MeanForceEstimator,
        generator: torch.Generator,
        gamma: float = 0.1,
    ) -> None:
        """Chooses conformations and paths; none where there is no torsion. See ``paths.low_paths``."""
        if self.asked_for(flow):
            n = self.config.pmf.n_switched
            self._switches = Switches(low_paths(flow, pmf, coordinates, n, generator, gamma))
            self._evaluate()
            self._plan(estimator)

    def step(self, estimator: MeanForceEstimator, temperature: float) -> None:
        """Switches to every conformation whose free energy is not known well enough, and back.

        Those where it does not succeed are left: without them the last fit has mean forces alone, as elsewhere.
        """
        assert self._switches is not None
        lost = self._switches.add(
            lambda paths, slowness: estimator.switch(paths, temperature, slowness),
            self._next,
            _N_SWITCHES,
            [self._slowness(path) for path in self._next],
        )
        if lost:
            logger.warning("%d of %d conformations could not be switched to", len(lost), len(self._switches.paths))
        self.lost = sorted({*self.lost, *lost})
        self.n_steps += 1
        self._evaluate()
        self._plan(estimator)

    def _evaluate(self) -> None:
        if self._switches is not None:
            self._found = self._switches.differences(derive_seed(self.config.seed, 12))

    def _slowness(self, path: int) -> int:
        """Of the next switches along a path."""
        assert self._switches is not None and self._found is not None
        return slower(self._switches.slowness[path], self._found.dissipation[path])

    def _plan(self, estimator: MeanForceEstimator) -> None:
        """Of the next step: the paths along which to switch, the cheapest first where not all can be afforded."""
        assert self._switches is not None and self._found is not None
        self._next = []
        if self.n_steps == _N_STEPS:
            return
        stopping = self.config.stopping
        rough = np.setdiff1d(np.flatnonzero(self._found.error > stopping.free_energy_error), self.lost).tolist()
        left = stopping.max_evaluations - estimator.n_energy_evaluations
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
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, 13))
        weights = torch.empty((len(error), self.config.pmf.n_members)).exponential_(generator=generator)
        return AnchorValues(*(part[known].float() for part in (start, end, value, error, weights)))

    @torch.no_grad()
    def compare(self, pmf: PMF) -> dict[str, float]:
        """The largest error of a difference, and how far the PMF is from them, root mean square by precision, kT."""
        values = self.values()
        if values is None:
            return {"value_error": math.nan, "value_misfit": math.nan}
        away = pmf(values.end) - pmf(values.start) - values.difference
        precision = values.error**-2
        misfit = (precision * away.square()).sum() / precision.sum()
        return {"value_error": float(values.error.max()), "value_misfit": float(misfit.sqrt())}

    def state_dict(self) -> dict[str, Any]:
        switches = None if self._switches is None else self._switches.state_dict()
        return {"n_steps": self.n_steps, "next": list(self._next), "lost": list(self.lost), "switches": switches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.n_steps, self._next, self.lost = state["n_steps"], list(state["next"]), list(state["lost"])
        self._switches = None if state["switches"] is None else Switches.from_state(state["switches"])
        self._evaluate()

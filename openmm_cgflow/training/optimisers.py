"""What stands around an optimizer: running averages, fits that keep one, and a guard against large gradients."""

from __future__ import annotations

import copy
import math
from statistics import median
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from openmm_cgflow.settings import TrainingSettings

__all__ = ["AveragedFit", "GradientGuard", "RunningAverage"]

_M = TypeVar("_M", bound=nn.Module)


class RunningAverage(Generic[_M]):
    """A network that is trained and, beside it, the exponential average of its parameters (Polyak and Juditsky 1992).

    Arguments:
        average: Becomes the average, in place; what is trained starts as its copy.
        decay: Of the average, per update.
    """

    def __init__(self, average: _M, decay: float) -> None:
        self.average, self.trained, self.decay = average, copy.deepcopy(average), decay
        self.n_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """To be called after each step of the optimizer."""
        self.n_updates += 1
        decay = min(self.decay, self.n_updates / (self.n_updates + 10))  # the start is forgotten soon
        for average, parameter in zip(self.average.parameters(), self.trained.parameters(), strict=True):
            average.lerp_(parameter, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {
            "average": self.average.state_dict(),
            "trained": self.trained.state_dict(),
            "n_updates": self.n_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state["average"])
        self.trained.load_state_dict(state["trained"])
        self.n_updates = state["n_updates"]


class AveragedFit(Generic[_M]):
    """A network that Adam trains, and its running average, which is what is used; saved and continued together.

    Arguments:
        network: Becomes the average, in place.
        decay: Of the average, per update.
        learning_rate: Of Adam.
    """

    def __init__(self, network: _M, decay: float, learning_rate: float) -> None:
        self.networks = RunningAverage(network, decay)
        self.optimizer = torch.optim.Adam(self.networks.trained.parameters(), lr=learning_rate)

    def state_dict(self) -> dict[str, Any]:
        return {"networks": self.networks.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.networks.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])


class GradientGuard:
    """Clips moderate gradients and skips very large ones against a running median of norms (paper section 3.3).

    Arguments:
        settings: What is moderate and very large, as multiples of the median, and how many updates it is taken over.

    Attributes:
        norms: Those of the last updates that were finite, skipped updates included.
    """

    def __init__(self, settings: TrainingSettings) -> None:
        self.settings = settings
        self.norms: list[float] = []

    def __call__(self, network: nn.Module) -> tuple[float, bool]:
        """Clips the gradient in place; returns its norm before, and whether the update may be made."""
        norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), math.inf))  # measured, not clipped
        if not math.isfinite(norm):
            return norm, False
        typical = median(self.norms) if self.norms else norm
        self.norms = [*self.norms, norm][-self.settings.median_window :]
        if norm > self.settings.skip_factor * typical:
            return norm, False
        torch.nn.utils.clip_grad_norm_(network.parameters(), self.settings.clip_factor * typical)
        return norm, True

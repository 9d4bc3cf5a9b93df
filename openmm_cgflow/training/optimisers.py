"""Running averages of trained networks (Polyak and Juditsky 1992)."""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import nn

__all__ = ["RunningAverage"]

_M = TypeVar("_M", bound=nn.Module)


class RunningAverage(Generic[_M]):
    """A network that is trained and, beside it, the exponential average of its parameters.

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

"""Which draws of a density become samples: rejection control (Liu, Chen and Wong, J. Am. Stat. Assoc. 93, 1022 (1998)).

A draw of weight w is kept with probability min(1, w / c) and then has the weight max(1, w / c). Weighed samples are
as right as weighed draws are, whatever c; and as they come, without weights, they are off only where w > c.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import brentq
from torch import Tensor

__all__ = ["RejectionControl"]


class RejectionControl:
    """Keeps a given fraction of draws.

    Arguments:
        log_weights: Of draws like those that are to come, unnormalised, shape (n,); those not finite count as none.
        acceptance: Fraction of draws to keep, above 0 and at most 1: 1/3 leaves weights to draws that have more than
            about three times the mean. Where fewer have any weight, all these are kept.

    Attributes:
        log_c: Logarithm of c.

    Raises:
        ValueError: If no draw has weight.
    """

    def __init__(self, log_weights: Tensor, acceptance: float) -> None:
        finite = log_weights[torch.isfinite(log_weights)].double()
        if not len(finite):
            raise ValueError("got no draw with a finite weight")

        def above(log_c: float) -> float:
            return float((finite - log_c).clamp(max=0).exp().sum()) / len(log_weights) - acceptance

        keeps_all, keeps_few = float(finite.min()), float(finite.max()) - math.log(acceptance)
        self.log_c = keeps_all if above(keeps_all) <= 0 else float(brentq(above, keeps_all, keeps_few))

    def keep(self, log_weights: Tensor, generator: torch.Generator) -> Tensor:
        """Which draws to keep, bool, shape (n,)."""
        uniform = torch.rand(log_weights.shape, generator=generator, dtype=torch.float64)
        return torch.isfinite(log_weights) & (uniform.log() < log_weights - self.log_c)

    def left(self, log_weights: Tensor) -> Tensor:
        """Logarithm of the weights that kept draws still have, shape (n,), 0 or more."""
        return (log_weights - self.log_c).clamp(min=0)

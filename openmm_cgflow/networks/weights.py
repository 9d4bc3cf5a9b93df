"""Importance weights: how many samples they are worth, draws with their weights, and which draws become samples."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor

from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.networks.flow import SlowDensity
from openmm_cgflow.networks.pmf import SlowFreeEnergy

__all__ = [
    "RejectionControl",
    "WeightedSamples",
    "clipped_softmax",
    "kl_increase",
    "relative_ess",
    "weighted_log",
    "weighted_samples",
]

_LARGEST_WEIGHT = 30.0  # over the mean weight


def relative_ess(log_weights: Tensor) -> float:
    """Kish's effective sample size divided by the number of samples, from log weights of shape (n,).

    ``analysis.distances`` has it for NumPy, where torch is not loaded.
    """
    weights = torch.softmax(log_weights, dim=0)
    return float(1.0 / (len(weights) * weights.square().sum()))


def kl_increase(log_weights: Tensor) -> float:
    """KL(p_old || p_new) in nats, estimated from log weights of shape (n,) of samples of p_old."""
    return float(torch.logsumexp(log_weights, 0) - math.log(len(log_weights)) - log_weights.mean())


def clipped_softmax(log_weights: Tensor) -> Tensor:
    """Weights of sum one, cut at ``_LARGEST_WEIGHT`` times their mean and then brought back to that sum.

    A few large ones lose most of what they have over the others; a single one that has nearly all keeps it.
    """
    weights = torch.softmax(log_weights, dim=0).clamp(max=_LARGEST_WEIGHT / len(log_weights))
    return weights / weights.sum()


def weighted_log(weights: Tensor, log_q: Tensor) -> Tensor:
    """Weighted sum of log densities, over those that are in the support, shapes (n,) each -> a number."""
    return weights @ torch.where(torch.isfinite(log_q), log_q, 0.0)


class WeightedSamples(NamedTuple):
    """Samples of the flow with what the PMF says of them.

    Attributes:
        z: Shape (n, n_features).
        log_q: log q(z | scale), shape (n,).
        energy: Phi(z) - log J(z) of the ensemble's mean, shape (n,); infinite outside the coordinates' range.
        members: The same of every member, shape (n_members, n).
    """

    z: Tensor
    log_q: Tensor
    energy: Tensor
    members: Tensor

    @property
    def log_weights(self) -> Tensor:
        """Log weights of the target against the flow, unnormalised, shape (n,) (paper eq. 18, coarse-grained)."""
        return -self.energy - self.log_q

    @property
    def ess(self) -> float:
        """Relative effective sample size."""
        return relative_ess(self.log_weights)


@torch.no_grad()
def weighted_samples(
    flow: SlowDensity,
    pmf: SlowFreeEnergy,
    coordinates: Coordinates,
    n: int,
    generator: torch.Generator,
    scale: float = 1.0,
) -> WeightedSamples:
    """Draws n samples of the flow and weighs them."""
    z, log_q = flow.sample(n, generator, scale)
    members = pmf.each(z) - coordinates.log_volume(z)
    return WeightedSamples(z, log_q, members.mean(0), members)


class RejectionControl:
    """Keeps a given fraction of draws (Liu, Chen and Wong, J. Am. Stat. Assoc. 93, 1022 (1998)).

    A draw of weight w is kept with probability min(1, w / c) and then has the weight max(1, w / c). Weighed samples are
    as right as weighed draws are, whatever c; and as they come, without weights, they are off only where w > c.

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

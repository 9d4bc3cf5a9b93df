"""Statistics of mean forces: means over chains of correlated frames with their errors, and vectors cut to size."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["LARGEST_SPREAD", "mean_and_variance", "part_means", "shortened"]

LARGEST_SPREAD = 10.0
"""Times the median; chains that vary more than this say nothing of the others."""
_N_PARTS = 4  # of a chain, kept of every mean force


def shortened(vectors: Tensor, multiple: float) -> Tensor:
    """Vectors no longer than a multiple of their median length, directions kept, shape (n, n_features).

    Slow atoms that overlap have forces many orders above all others, and would be the whole of any sum of squares.
    """
    if not len(vectors) or not math.isfinite(multiple):
        return vectors
    largest = vectors.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
    length = largest * (vectors / largest).norm(dim=-1, keepdim=True)  # squares of 1e20 would not fit in float32
    return vectors * (multiple * length.median() / length.clamp(min=largest)).clamp(max=1.0)


def part_means(values: Tensor) -> Tensor:
    """Means over successive parts of every chain, at most four: shape (B, n_frames, n) -> (B, n_parts, n)."""
    n_parts = min(_N_PARTS, values.shape[1])
    return torch.stack([part.mean(1) for part in values.tensor_split(n_parts, dim=1)], dim=1)


def mean_and_variance(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each chain and its squared standard error.

    Successive frames are correlated, and a chain's own spread says too little of what it has not reached. Both are
    taken from a first-order autoregression, one coefficient per feature pooled over the batch, which matches how far
    the two halves of chains of this length are expected to lie apart. (The correlation of neighbouring frames would
    not do: forces oscillate with the bonds, and errors came out three times too large.) Chains with ten times the
    typical spread do not count there.

    Arguments:
        values: Shape (B, n_frames, n_features).
        valid: Which chains tell of the correlation, shape (B,) bool.

    Returns:
        Shapes (B, n_features); the error is nan where there is one frame.
    """
    n = values.shape[1]
    mean = values.mean(dim=1)
    if n == 1:
        return mean, torch.full_like(mean, float("nan"))
    away = values - mean[:, None]
    spread = away.square().sum(dim=1) / (n - 1)
    if n == 2:  # two frames say nothing of their correlation
        return mean, spread / 2
    # Chains that leave a close contact have drifts a thousand times the others' noise, and would be the whole sum.
    # A limit nearer to the typical spread would leave out chains that drift as they should.
    usual = spread <= LARGEST_SPREAD * spread[valid].median(dim=0).values
    pooled = torch.where(usual[:, None], away, 0.0)[valid]
    half = n // 2
    apart = (pooled[:, :half].mean(dim=1) - pooled[:, n - half :].mean(dim=1)).square().sum(dim=0)
    ratio = apart / pooled.square().sum(dim=(0, 1)).clamp(min=torch.finfo(pooled.dtype).tiny)  # no noise at all
    ratios, factors = _autoregression(n)
    return mean, spread * torch.as_tensor(np.interp(ratio.numpy(), ratios, factors))


def _autoregression(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Drift within chains and error of their means, for correlations rho of successive frames from 0 to 0.95.

    The expected values of (mean of first half - mean of last half)^2 / sum of squares, and of variance of the mean
    over sum of squares / (n - 1).
    """
    rho = np.linspace(0.0, 0.95, 96)
    lag = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    covariance = rho[:, None, None] ** lag
    half = n // 2
    contrast = np.zeros(n)
    contrast[:half], contrast[n - half :] = 1 / half, -1 / half
    apart = (covariance @ contrast) @ contrast
    of_mean = covariance.mean(axis=(1, 2))
    squares = n * (1 - of_mean)
    return apart / squares, of_mean * (n - 1) / squares

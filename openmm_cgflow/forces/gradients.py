"""Gradients of frames in slow and fast coordinates, and their means over chains with errors (paper eqs. 15-17)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from openmm_cgflow.coordinates.all_atom import AllAtomMap
from openmm_cgflow.engines.engine import Frames

__all__ = [
    "LARGEST_SPREAD",
    "cartesian_gradients",
    "comoving_gradients",
    "mean_and_variance",
    "part_means",
    "shortened",
]

LARGEST_SPREAD = 10.0
"""Times the median; chains that vary more than this say nothing of the others."""
_N_PARTS = 4  # of a chain, kept of every mean force


def comoving_gradients(all_atom: AllAtomMap, z: Tensor, frames: Frames[Tensor], beta: float) -> tuple[Tensor, Tensor]:
    """d(beta U)/dz and the force balance of the fast coordinates y, beta dU/dy - d ln J/dy, of every frame.

    The fast atoms' internal coordinates y are held while z moves, so the forces on all atoms count. J is the volume
    element of y. Over the fast atoms, the former averages to the mean force, and the balance to zero at every z.

    Returns:
        Shapes (B, n_frames, n_features) and (B, n_frames, 3 n_fast).
    """
    repeated, y = _repeated(z, frames), all_atom.read_fast(frames.xyz).requires_grad_()
    slow, fast = torch.autograd.grad(all_atom.build(repeated, y), (repeated, y), _reduced(frames, beta))
    (volume,) = torch.autograd.grad(all_atom.log_volume_fast(y).sum(), y)
    valid = frames.valid[:, None, None]
    return torch.where(valid, slow, 0.0), torch.where(valid, (fast - volume).flatten(2), 0.0)


def cartesian_gradients(all_atom: AllAtomMap, z: Tensor, frames: Frames[Tensor], beta: float) -> Tensor:
    """d(beta U)/dz of every frame at fixed positions of the fast atoms, which is the paper's choice.

    The forces on slow atoms alone count. It averages to the mean force, too, with more noise.

    Returns:
        Shape (B, n_frames, n_features).
    """
    repeated = _repeated(z, frames)
    built = all_atom.coordinates.to_xyz(repeated)
    (gradient,) = torch.autograd.grad(built, repeated, _reduced(frames, beta)[..., list(all_atom.slow), :])
    return torch.where(frames.valid[:, None, None], gradient, 0.0)


def _repeated(z: Tensor, frames: Frames[Tensor]) -> Tensor:
    return z.detach()[:, None].expand(-1, frames.energy.shape[1], -1).clone().requires_grad_()


def _reduced(frames: Frames[Tensor], beta: float) -> Tensor:
    """d(beta U)/dx. Invalid replicas hold zeros that rebuild to nan: masked before anything is multiplied."""
    return torch.where(frames.valid[:, None, None, None], -beta * frames.forces, 0.0)


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

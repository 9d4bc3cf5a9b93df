"""The mean force on the slow coordinates from chains of the fast atoms (paper eqs. 15-17).

The contract between OpenMM and training is here: :class:`MeanForceEstimator`. OpenMM itself is not.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from openmm_cgflow.coordinates.all_atom import AllAtomMap
from openmm_cgflow.forces.fast_atoms import FastAtoms, Frames
from openmm_cgflow.forces.switching import switch
from openmm_cgflow.seeds import derive_seed
from openmm_cgflow.units import thermal_beta

__all__ = [
    "ChainParts",
    "MeanForce",
    "MeanForceEstimator",
    "MolecularMeanForce",
    "shortened",
]

_N_PARTS = 4  # of a chain, kept of every mean force
_LARGEST_DRIFT = 4.0  # standard errors, of the energy within chains
_LONGEST_EQUILIBRATION, _MOST_FRAMES = 8, 4  # over the settings
_LARGEST_SPREAD = 10.0  # over the median, of chains that tell how frames are correlated


class ChainParts(NamedTuple):
    """Means over successive parts of every chain; zero where the replica is invalid.

    Attributes:
        slow: d(beta U)/dz at fixed fast internal coordinates y, shape (B, n_parts, n_features).
        fast: beta dU/dy - d ln J/dy, with J the volume element of y, shape (B, n_parts, 3 n_fast). Its average over
            the fast atoms is zero, so it tells of noise and of chains that are not in equilibrium yet.
    """

    slow: Tensor
    fast: Tensor


class MeanForce(NamedTuple):
    """The mean force at a batch of z.

    Attributes:
        gradient: d(beta A)/dz, dimensionless per unit of z, shape (B, n_features).
        variance: Its squared standard error, shape (B, n_features).
        energy: Mean potential energy over the fast atoms, kJ/mol, shape (B,).
        energy_variance: Its squared standard error, shape (B,).
        valid: Whether the replica may be used, shape (B,) bool; where it is False the rest is zero.
        parts: What it is the mean of, with the forces on the fast atoms; None where these are not known.
    """

    gradient: Tensor
    variance: Tensor
    energy: Tensor
    energy_variance: Tensor
    valid: Tensor
    parts: ChainParts | None = None


class MeanForceEstimator(Protocol):
    """Anything that gives mean forces, and works of switching: a molecule in OpenMM or a closed form in a test."""

    @property
    def n_energy_evaluations(self) -> int: ...

    def __call__(self, z: Tensor, temperature: float) -> MeanForce: ...

    def switch(self, paths: Tensor, temperature: float, slowness: int) -> tuple[Tensor, Tensor]:
        """Works along paths, and which may be used; see :func:`openmm_cgflow.forces.switching.switch`."""

    def tune(self, noise: float) -> None:
        """Told how large the squared standard errors are over what a fit to the mean forces aims at."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def shortened(vectors: Tensor, multiple: float) -> Tensor:
    """Vectors no longer than a multiple of their median length, directions kept, shape (n, n_features).

    Slow atoms that overlap have forces many orders above all others, and would be the whole of any sum of squares.
    """
    if not len(vectors) or not math.isfinite(multiple):
        return vectors
    largest = vectors.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
    length = largest * (vectors / largest).norm(dim=-1, keepdim=True)  # squares of 1e20 would not fit in float32
    return vectors * (multiple * length.median() / length.clamp(min=largest)).clamp(max=1.0)


def frame_gradients(all_atom: AllAtomMap, z: Tensor, frames: Frames, beta: float, estimator: str) -> Tensor:
    """d(beta U)/dz of every frame, shape (B, n_frames, n_features).

    ``comoving`` holds the fast atoms' internal coordinates and contracts the forces on all atoms; ``cartesian``, the
    paper's, holds their positions and contracts the forces on the slow atoms alone. Both average to the mean force.
    """
    if estimator == "comoving":
        return comoving_gradients(all_atom, z, frames, beta)[0]
    repeated = _repeated(z, frames)
    built = all_atom.coordinates.to_xyz(repeated)
    (gradient,) = torch.autograd.grad(built, repeated, _reduced(frames, beta)[..., list(all_atom.slow), :])
    return torch.where(frames.valid[:, None, None], gradient, 0.0)


def comoving_gradients(all_atom: AllAtomMap, z: Tensor, frames: Frames, beta: float) -> tuple[Tensor, Tensor]:
    """d(beta U)/dz and the force balance of the fast coordinates y, beta dU/dy - d ln J/dy, of every frame.

    J is the volume element of y. At every z, the balance averages to zero over the fast atoms.

    Returns:
        Shapes (B, n_frames, n_features) and (B, n_frames, 3 n_fast).
    """
    repeated, y = _repeated(z, frames), all_atom.read_fast(frames.xyz).requires_grad_()
    slow, fast = torch.autograd.grad(all_atom.build(repeated, y), (repeated, y), _reduced(frames, beta))
    (volume,) = torch.autograd.grad(all_atom.log_volume_fast(y).sum(), y)
    valid = frames.valid[:, None, None]
    return torch.where(valid, slow, 0.0), torch.where(valid, (fast - volume).flatten(2), 0.0)


def _repeated(z: Tensor, frames: Frames) -> Tensor:
    return z.detach()[:, None].expand(-1, frames.energy.shape[1], -1).clone().requires_grad_()


def _reduced(frames: Frames, beta: float) -> Tensor:
    """d(beta U)/dx. Invalid replicas hold zeros that rebuild to nan: masked before anything is multiplied."""
    return torch.where(frames.valid[:, None, None, None], -beta * frames.forces, 0.0)


def _parts(values: Tensor) -> Tensor:
    """Means over successive parts of every chain, (B, n_frames, n) -> (B, n_parts, n)."""
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
        valid: Shape (B,) bool.
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
    usual = spread <= _LARGEST_SPREAD * spread[valid].median(dim=0).values
    pooled = torch.where(usual[:, None], away, 0.0)[valid]
    half = n // 2
    apart = (pooled[:, :half].mean(dim=1) - pooled[:, n - half :].mean(dim=1)).square().sum(dim=0)
    ratio = apart / pooled.square().sum(dim=(0, 1)).clamp(min=torch.finfo(pooled.dtype).tiny)  # no noise at all
    ratios, factors = _autoregression(n)
    return mean, spread * torch.as_tensor(np.interp(ratio.numpy(), ratios, factors))


def _autoregression(n: int) -> tuple[np.ndarray, np.ndarray]:
    """For rho from 0 to 0.95: distance of the halves over squares about the mean, and variance of the mean over spread.

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


class MolecularMeanForce:
    """Mean forces of a molecule: frozen-slow chains in OpenMM, contracted with the coordinates.

    Arguments:
        chains: Runs the fast atoms.
        estimator: ``comoving`` or ``cartesian``; see :func:`frame_gradients`.
        adaptive: Whether the length of the chains follows what they show.

    Attributes:
        n_equilibration: Steps after the warm start; more of them while energies drift within chains.
        n_frames: Frames of each chain.
    """

    def __init__(
        self,
        fast_atoms: FastAtoms,
        estimator: Literal["comoving", "cartesian"] = "comoving",
        adaptive: bool = False,
    ) -> None:
        self.fast_atoms, self.estimator, self.adaptive = fast_atoms, estimator, adaptive
        self.n_equilibration, self.n_frames = fast_atoms.settings.n_equilibration, fast_atoms.settings.n_frames
        self._earlier_evaluations = 0

    @property
    def n_energy_evaluations(self) -> int:
        """Of the engine, and of the sessions that this one continues."""
        return self._earlier_evaluations + self.fast_atoms.engine.n_energy_evaluations

    def __call__(self, z: Tensor, temperature: float) -> MeanForce:
        frames = self.fast_atoms.run(
            z, temperature, self.n_equilibration, self.n_frames, self.fast_atoms.settings.stride
        )
        beta = thermal_beta(temperature)
        if self.adaptive:
            self._lengthen_equilibration(beta * frames.energy[frames.valid])
        parts = None
        if self.estimator == "comoving":
            gradients, balance = comoving_gradients(self.fast_atoms.all_atom, z, frames, beta)
            parts = ChainParts(_parts(gradients), _parts(balance))
        else:
            gradients = frame_gradients(self.fast_atoms.all_atom, z, frames, beta, self.estimator)
        gradient, variance = mean_and_variance(gradients, frames.valid)
        energies = torch.where(frames.valid[:, None], frames.energy, 0.0)
        energy, energy_variance = mean_and_variance(energies[..., None], frames.valid)
        return MeanForce(gradient, variance, energy[:, 0], energy_variance[:, 0], frames.valid, parts)

    def _lengthen_equilibration(self, energy: Tensor) -> None:
        """By half, where the energy still drifts, kT, shape (B, n_frames): fast atoms arrive cold or hot."""
        quarter = max(1, energy.shape[1] // 4)
        drift = energy[:, -quarter:].mean(1) - energy[:, :quarter].mean(1)
        # A few chains that leave an overlap say nothing of the others.
        drift = drift[(drift - drift.median()).abs() < _LARGEST_SPREAD * drift.std()]
        if len(drift) > 1 and abs(drift.mean()) > _LARGEST_DRIFT * drift.std() / math.sqrt(len(drift)):
            longest = _LONGEST_EQUILIBRATION * self.fast_atoms.settings.n_equilibration
            self.n_equilibration = min(longest, math.ceil(1.5 * self.n_equilibration))

    def tune(self, noise: float) -> None:
        """Chooses the number of frames that makes most of the evaluations, by at most half of it at a time.

        A chain costs its equilibration and its frames; its variance is the inverse of their number plus what the fit
        aims at anyway. The information per evaluation is largest at the geometric mean of what both say. Never fewer
        than in the settings: on alanine dipeptide six instead of eight made each round a fifth cheaper, but 24 of them
        were needed instead of a dozen.
        """
        if not self.adaptive:
            return
        overhead = (self.n_equilibration + self.fast_atoms.settings.n_relax) / self.fast_atoms.settings.stride
        best = math.sqrt(overhead * noise * self.n_frames)
        best = min(max(best, self.n_frames / 1.5), 1.5 * self.n_frames)
        first = self.fast_atoms.settings.n_frames
        self.n_frames = round(min(max(best, first), _MOST_FRAMES * first))

    def switch(self, paths: Tensor, temperature: float, slowness: int) -> tuple[Tensor, Tensor]:
        seed = derive_seed(self.fast_atoms.seed, 11, self.fast_atoms.n_calls)
        return switch(self.fast_atoms, paths, temperature, seed, slowness)

    def state_dict(self) -> dict[str, Any]:
        return {
            "chains": self.fast_atoms.state_dict(),
            "n_energy_evaluations": self.n_energy_evaluations,
            "n_equilibration": self.n_equilibration,
            "n_frames": self.n_frames,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fast_atoms.load_state_dict(state["chains"])
        self.n_equilibration, self.n_frames = state["n_equilibration"], state["n_frames"]
        self._earlier_evaluations = state["n_energy_evaluations"] - self.fast_atoms.engine.n_energy_evaluations

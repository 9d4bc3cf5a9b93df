"""The mean force on the slow coordinates from chains of the fast atoms (paper eqs. 15-17).

The contract between OpenMM and training is here: :class:`MeanForceEstimator`. OpenMM itself is not: the engine that
runs the chains is handed in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from openmm_cgflow.assembly import Assembly
from openmm_cgflow.config import SamplerConfig
from openmm_cgflow.errors import ReplicaError
from openmm_cgflow.seeds import derive_seed
from openmm_cgflow.units import thermal_beta

__all__ = [
    "ChainEngine",
    "FastChains",
    "Frames",
    "MeanForce",
    "MeanForceEstimator",
    "MolecularMeanForce",
    "shortened",
]

logger = logging.getLogger(__name__)

_N_POOLS = 16  # calls whose end states stay in the pool
_N_PARTS = 4  # of a chain, kept of every mean force
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
    """Anything that gives mean forces: a molecule in OpenMM or a closed form in a test."""

    @property
    def n_energy_evaluations(self) -> int: ...

    def __call__(self, z: Tensor, temperature: float) -> MeanForce: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ChainEngine(Protocol):
    """What runs the frozen-slow chains: see :class:`openmm_cgflow.replicas.ReplicaEngine`."""

    @property
    def n_energy_evaluations(self) -> int: ...

    def evaluate(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def run(
        self,
        xyz: np.ndarray,
        temperature: float,
        *,
        n_relax: int,
        n_equilibration: int,
        n_frames: int,
        stride: int,
        seed: int,
    ) -> Any: ...


class Frames(NamedTuple):
    """Frames of the chains, shapes (B, n_frames, n_atoms, 3), the same, (B, n_frames) and (B,); nm and kJ/mol."""

    xyz: Tensor
    forces: Tensor
    energy: Tensor
    valid: Tensor


@dataclass
class Quarantine:
    """How many replicas were set aside, and why."""

    total: int = 0
    not_finite: int = 0
    flipped: int = 0


class FastChains:
    """Short chains of the fast atoms at given z, warm-started from a pool.

    The pool holds the fast internal coordinates where earlier chains ended, with their z; a new z starts from its
    nearest neighbour's. Chains are short, lineages are long, so the fast atoms stay equilibrated. The first pool is a
    thermal draw, relaxed and run for ``n_pool_steps``.

    Arguments:
        engine: Runs the chains.
        assembly: Builds structures.
        draw_fast: Thermal draw of y: (z, temperature, generator) -> y.
        settings: The ``sampler`` section of the configuration.
        seed: The configuration's seed.
    """

    def __init__(
        self,
        engine: ChainEngine,
        assembly: Assembly,
        draw_fast: Callable[[Tensor, float, torch.Generator], Tensor],
        settings: SamplerConfig,
        seed: int,
    ) -> None:
        self.engine, self.assembly, self.settings, self.seed = engine, assembly, settings, seed
        self._draw_fast = draw_fast
        self.follow: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        """Moves y along with z, (y, z before, z after) -> y; without it, fast atoms start as their neighbour's are."""
        self.quarantine = Quarantine()
        self.n_calls = 0
        self.pool: list[tuple[Tensor, Tensor]] = []

    def run(
        self, z: Tensor, temperature: float, n_equilibration: int, n_frames: int, stride: int, seed: int | None = None
    ) -> Frames:
        """Runs one chain at each z and puts where they end into the pool.

        Arguments:
            z: Slow coordinates, shape (B, n_features).
            temperature: K.
            n_equilibration: Steps before the first stride.
            n_frames: Frames of each chain.
            stride: Steps between frames.
            seed: Overrides the seed derived from the number of calls.

        Raises:
            ReplicaError: If more than ``max_invalid`` of the replicas are quarantined.
        """
        z = z.detach()
        if not self.pool:
            self._fill_pool(z, temperature)
        xyz = self.assembly.build(z, self._nearest(z))
        return self._run(z, xyz, temperature, self.settings.n_relax, n_equilibration, n_frames, stride, seed)

    def propagate(self, z: Tensor, xyz: Tensor, temperature: float, n_steps: int, seed: int) -> Frames:
        """Runs given structures at z on for some steps: one frame each, and the pool takes where they end."""
        return self._run(z, xyz, temperature, 0, 0, 1, n_steps, seed)

    def _fill_pool(self, z: Tensor, temperature: float) -> None:
        z = z[:: max(1, len(z) // self.settings.n_pool)]  # evenly: a batch may be sorted
        generator = torch.Generator().manual_seed(derive_seed(self.seed, 1))
        xyz = self.assembly.build(z, self._draw_fast(z, temperature, generator))
        self._run(z, xyz, temperature, 100, self.settings.n_pool_steps, 1, 1, derive_seed(self.seed, 2))

    def _nearest(self, z: Tensor) -> Tensor:
        pool_z = torch.cat([entry[0] for entry in self.pool])
        pool_y = torch.cat([entry[1] for entry in self.pool])
        distance = torch.cdist(self._embed(z), self._embed(pool_z))
        # Equal z, as in a test at one z, must not all descend from one ancestor: ties are broken at random.
        generator = torch.Generator().manual_seed(derive_seed(self.seed, 4, self.n_calls))
        ties = 1e-6 * torch.rand(distance.shape, generator=generator, dtype=distance.dtype)
        nearest = (distance + ties).argmin(dim=-1)
        y = pool_y[nearest]
        return y if self.follow is None else self.follow(y, pool_z[nearest], z)

    def _embed(self, z: Tensor) -> Tensor:
        n = self.assembly.coordinates.n_circular
        # Torsions decide which fast atoms fit. Mean forces just after the start were off by 0.7 kT/rad in a first pool
        # of 256 with a weight of 0.2, by 0.4 with 0.05, and by nothing that could be measured in a pool of 16,000.
        scale = 0.05 if n else 1.0
        return torch.cat((torch.cos(z[:, :n]), torch.sin(z[:, :n]), scale * z[:, n:]), dim=-1)

    def _run(
        self,
        z: Tensor,
        xyz: Tensor,
        temperature: float,
        n_relax: int,
        n_equilibration: int,
        n_frames: int,
        stride: int,
        seed: int | None,
    ) -> Frames:
        self.n_calls += 1
        raw = self.engine.run(
            xyz.numpy(),
            temperature,
            n_relax=n_relax,
            n_equilibration=n_equilibration,
            n_frames=n_frames,
            stride=stride,
            seed=derive_seed(self.seed, 3, self.n_calls) if seed is None else seed,
        )
        frames = Frames(*(torch.as_tensor(array) for array in raw))
        same = self.assembly.same_handedness(frames.xyz).all(-1)
        valid = frames.valid & same if self.settings.keep_chirality else frames.valid
        self.quarantine.total += len(z)
        self.quarantine.not_finite += int((~frames.valid).sum())
        self.quarantine.flipped += int((frames.valid & ~same).sum())
        n_invalid = int((~valid).sum())
        if n_invalid > self.settings.max_invalid * len(z) or n_invalid == len(z):
            n_flipped = int((frames.valid & ~same).sum())
            raise ReplicaError(
                f"{n_invalid} of {len(z)} replicas failed at {temperature:.0f} K ({n_flipped} changed their "
                f"handedness, {n_invalid - n_flipped} diverged), more than sampler.max_invalid = "
                f"{self.settings.max_invalid}. Try a shorter sampler.timestep or, in a reverse_kl training, a lower "
                "tempering.start"
            )
        self.pool.append((z[valid], self.assembly.read_fast(frames.xyz[valid, -1])))
        del self.pool[:-_N_POOLS]
        return frames._replace(valid=valid)

    def state_dict(self) -> dict[str, Any]:
        """Everything a later run continues from, as tensors and numbers."""
        return {"n_calls": self.n_calls, "pool": list(self.pool), "quarantine": vars(self.quarantine).copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.n_calls = state["n_calls"]
        self.pool = [tuple(entry) for entry in state["pool"]]
        self.quarantine = Quarantine(**state["quarantine"])


def shortened(vectors: Tensor, multiple: float) -> Tensor:
    """Vectors no longer than a multiple of their median length, directions kept, shape (n, n_features).

    Slow atoms that overlap have forces many orders above all others, and would be the whole of any sum of squares.
    """
    if not len(vectors) or not math.isfinite(multiple):
        return vectors
    largest = vectors.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
    length = largest * (vectors / largest).norm(dim=-1, keepdim=True)  # squares of 1e20 would not fit in float32
    return vectors * (multiple * length.median() / length.clamp(min=largest)).clamp(max=1.0)


def frame_gradients(assembly: Assembly, z: Tensor, frames: Frames, beta: float, estimator: str) -> Tensor:
    """d(beta U)/dz of every frame, shape (B, n_frames, n_features).

    ``comoving`` holds the fast atoms' internal coordinates and contracts the forces on all atoms; ``cartesian``, the
    paper's, holds their positions and contracts the forces on the slow atoms alone. Both average to the mean force.
    """
    if estimator == "comoving":
        return comoving_gradients(assembly, z, frames, beta)[0]
    repeated = _repeated(z, frames)
    built = assembly.coordinates.to_xyz(repeated)
    (gradient,) = torch.autograd.grad(built, repeated, _reduced(frames, beta)[..., list(assembly.slow), :])
    return torch.where(frames.valid[:, None, None], gradient, 0.0)


def comoving_gradients(assembly: Assembly, z: Tensor, frames: Frames, beta: float) -> tuple[Tensor, Tensor]:
    """d(beta U)/dz and the force balance of the fast coordinates y, beta dU/dy - d ln J/dy, of every frame.

    J is the volume element of y. At every z, the balance averages to zero over the fast atoms.

    Returns:
        Shapes (B, n_frames, n_features) and (B, n_frames, 3 n_fast).
    """
    repeated, y = _repeated(z, frames), assembly.read_fast(frames.xyz).requires_grad_()
    slow, fast = torch.autograd.grad(assembly.build(repeated, y), (repeated, y), _reduced(frames, beta))
    (volume,) = torch.autograd.grad(assembly.log_volume_fast(y).sum(), y)
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
    """

    def __init__(self, chains: FastChains, estimator: Literal["comoving", "cartesian"] = "comoving") -> None:
        self.chains, self.estimator = chains, estimator
        self._earlier_evaluations = 0

    @property
    def n_energy_evaluations(self) -> int:
        """Of the engine, and of the sessions that this one continues."""
        return self._earlier_evaluations + self.chains.engine.n_energy_evaluations

    def __call__(self, z: Tensor, temperature: float) -> MeanForce:
        settings = self.chains.settings
        frames = self.chains.run(z, temperature, settings.n_equilibration, settings.n_frames, settings.stride)
        beta = thermal_beta(temperature)
        parts = None
        if self.estimator == "comoving":
            gradients, balance = comoving_gradients(self.chains.assembly, z, frames, beta)
            parts = ChainParts(_parts(gradients), _parts(balance))
        else:
            gradients = frame_gradients(self.chains.assembly, z, frames, beta, self.estimator)
        gradient, variance = mean_and_variance(gradients, frames.valid)
        energies = torch.where(frames.valid[:, None], frames.energy, 0.0)
        energy, energy_variance = mean_and_variance(energies[..., None], frames.valid)
        return MeanForce(gradient, variance, energy[:, 0], energy_variance[:, 0], frames.valid, parts)

    def state_dict(self) -> dict[str, Any]:
        return {"chains": self.chains.state_dict(), "n_energy_evaluations": self.n_energy_evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chains.load_state_dict(state["chains"])
        self._earlier_evaluations = state["n_energy_evaluations"] - self.chains.engine.n_energy_evaluations

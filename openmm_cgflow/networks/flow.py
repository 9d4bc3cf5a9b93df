"""The flow q(z | scale): torsions on the circle first, then the bounded coordinates given the torsions.

log q(z | scale) = log q(torsions | scale) + log q(bounded | torsions). The *barrier scale* is how high free energy
barriers between torsions are over those of the model, while bonds and angles stay at the target temperature: 1 is the
model, 0 has flat torsions, and in between lies the geometric path from there. Each block is a stack of zuko coupling
layers of rational-quadratic splines (Durkan et al. 2019): circular ones on a uniform base (Rezende et al. 2020) for
torsions, and splines on [-bound, bound] on a truncated normal base (paper section 2.4) for bounded coordinates,
followed by a linear map whose shift and triangular matrix depend on the torsions: bonds and angles are nearly harmonic,
so that alone is nearly exact, and the splines add what is not. Other kinds of first features (``SlowFeatures``) take
the place of torsions in the paper's synthetic systems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from openmm_cgflow.coordinates.features import N_SCALE_FEATURES, SlowFeatures
from openmm_cgflow.coordinates.geometry import Geometry
from openmm_cgflow.networks.layers import (
    ConditionalLinear,
    SplineCoupling,
    alternating_masks,
    inverse_and_ladj,
)
from openmm_cgflow.seeds import Stream, derive_seed
from openmm_cgflow.settings import FlowSettings

__all__ = ["CGFlow", "ConditionalFlow", "SlowDensity", "new_flow"]


class ConditionalFlow(nn.Module):
    """q(r | c): bounded features given a context, splines on a truncated normal base and then a conditional linear map.

    Without splines and with a linear map it is a Gaussian whose mean and covariance depend on the context.

    Arguments:
        n_features: Of r.
        n_context: Of c.
        bound: Half-width of the splines' interval, and of the base.
        n_layers: Coupling layers.
        n_bins: Spline bins.
        hidden_features: Hidden layers of every conditioner.
        covariance: Where it is known roughly, shape (n_features, n_features); the linear map starts at its Cholesky
            factor. Without it there is no linear map, and r stays in [-bound, bound].
    """

    def __init__(
        self,
        n_features: int,
        n_context: int,
        bound: float,
        n_layers: int,
        n_bins: int,
        hidden_features: Sequence[int],
        covariance: Tensor | None,
    ) -> None:
        super().__init__()
        self.n_features, self.bound = n_features, bound
        masks = alternating_masks(n_features, n_layers) if n_features else []
        self.splines = nn.ModuleList(SplineCoupling(mask, n_context, bound, n_bins, hidden_features) for mask in masks)
        linear = covariance is not None and n_features > 0
        self.linear = (
            ConditionalLinear(torch.linalg.cholesky(covariance), n_context, hidden_features) if linear else None
        )

    def draw_base(self, uniform: Tensor) -> Tensor:
        """Truncated standard normals from uniform numbers, shape (n, n_features)."""
        low, high = torch.special.ndtr(torch.tensor([-self.bound, self.bound], dtype=torch.float64))
        return torch.special.ndtri(low + (high - low) * uniform)

    def log_base(self, normals: Tensor) -> Tensor:
        """Log density of the base, shape (n, n_features) -> (n,); -inf outside."""
        mass = math.erf(self.bound / math.sqrt(2))
        constant = self.n_features * math.log(math.sqrt(2 * math.pi) * mass)
        outside = (normals.abs() > self.bound).any(-1)
        return torch.where(outside, -math.inf, -0.5 * normals.square().sum(-1) - constant)

    def forward(self, normals: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """r from its base and log |det|, shapes (n, n_features) and (n,)."""
        ladj = normals.new_zeros(normals.shape[:-1])
        for layer in self.splines:
            normals, change = layer(context).call_and_ladj(normals)
            ladj = ladj + change.sum(-1)
        if self.linear is not None:
            normals, change = self.linear(normals, context)
            ladj = ladj + change
        return normals, ladj

    def inverse(self, r: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The base of r and log |det|, shapes (n, n_features) and (n,)."""
        ladj = r.new_zeros(r.shape[:-1])
        if self.linear is not None:
            r, ladj = self.linear.inverse(r, context)
        for layer in reversed(self.splines):
            r, change = inverse_and_ladj(layer(context), r)
            ladj = ladj + change.sum(-1)
        return r, ladj

    def log_prob(self, r: Tensor, context: Tensor) -> Tensor:
        """log q(r | c), shapes (n, n_features) and (n, n_context) -> (n,); -inf outside the support."""
        normals, ladj = self.inverse(r, context)
        return ladj + self.log_base(normals)


class SlowDensity(Protocol):
    """What training and sampling ask of a flow: first features, such as torsions, then bounded ones given these."""

    @property
    def features(self) -> SlowFeatures:
        """What z is."""

    def sample(self, n: int, generator: torch.Generator, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Independent samples and their log density, float64, shapes (n, n_features) and (n,)."""

    def log_prob(self, z: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """log q(z | scale), shape (n, n_features) -> (n,); -inf outside the support."""

    def log_prob_torsions(self, z: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """log q(torsions | scale), shape (n, n_features) -> (n,)."""

    def log_prob_bounded(self, z: Tensor) -> Tensor:
        """log q(bounded | torsions), shape (n, n_features) -> (n,)."""

    def map_bounded(self, angles: Tensor, normals: Tensor) -> Tensor:
        """Bounded features from their base samples at given torsions, shapes (n, n_circular) and (n, n_bounded)."""

    def double(self) -> Self:
        """In float64, in place."""


class CGFlow(nn.Module):
    """The density of the slow coordinates, q(z | scale); the model is q(z) = q(z | 1).

    Its parameters may be float32, as in training, or float64; inputs are cast to them.

    Arguments:
        features: What z is: how many torsions, which come first, and how many bounded features.
        bound: Half-width of the interval of the bounded features' splines.
        n_layers: Coupling layers of the torsions.
        n_bounded_layers: Coupling layers of the bounded features.
        n_bins: Spline bins.
        hidden_features: Hidden layers of every conditioner.
        covariance: Of the bounded features, where it is known roughly (harmonic); then the splines are followed by a
            linear map that starts at its Cholesky factor, shape (n_bounded, n_bounded). Otherwise the bounded features
            stay in [-bound, bound].
    """

    def __init__(
        self,
        features: SlowFeatures,
        bound: float,
        n_layers: int = 6,
        n_bounded_layers: int = 2,
        n_bins: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        covariance: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.features, self.bound = features, bound
        masks = alternating_masks(features.n_circular, n_layers) if features.n_circular else []
        self.torsions = nn.ModuleList(
            SplineCoupling(mask, N_SCALE_FEATURES, math.pi, n_bins, hidden_features, features) for mask in masks
        )
        self.conditional = ConditionalFlow(
            features.n_bounded, features.size_first, bound, n_bounded_layers, n_bins, hidden_features, covariance
        )
        self.double()

    @property
    def n_circular(self) -> int:
        """Number of torsions, the first features of z."""
        return self.features.n_circular

    @property
    def n_bounded(self) -> int:
        """Number of bounded features."""
        return self.features.n_bounded

    @property
    def n_features(self) -> int:
        return self.features.n_features

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def draw_base(self, n: int, generator: torch.Generator) -> Tensor:
        """Base samples: uniform angles and truncated standard normals, shape (n, n_features)."""
        uniform = torch.rand((n, self.n_features), generator=generator, dtype=torch.float64)
        angles = (2 * uniform[:, : self.n_circular] - 1) * math.pi
        return torch.cat((angles, self.conditional.draw_base(uniform[:, self.n_circular :])), dim=-1)

    def _log_base_torsions(self) -> float:
        return -self.n_circular * math.log(2 * math.pi)

    def log_base(self, base: Tensor) -> Tensor:
        """Log density of the base, shape (n, n_features) -> (n,)."""
        return self.conditional.log_base(base[..., self.n_circular :]) + self._log_base_torsions()

    def context(self, torsions: Tensor) -> Tensor:
        """What bounded features see of torsions, shape (n, n_circular) -> (n, n_context)."""
        return self.features.see_first(torsions)

    def scale_features(self, scale: float | Tensor, n: int) -> Tensor:
        """What networks see of a barrier scale, for n rows, shape (n, 4)."""
        return self.features.scale_features(torch.as_tensor(scale, dtype=self.dtype).expand(n))

    def forward(self, base: Tensor, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """The flow map z = f(base) and log |det df|, shapes (n, n_features) and (n,) (paper eq. 7).

        Arguments:
            base: Shape (n, n_features).
            scale: Of barriers: one number, or one for each row, shape (n,).
        """
        base = base.to(self.dtype)
        angles, normals = base[..., : self.n_circular], base[..., self.n_circular :]
        ladj = base.new_zeros(base.shape[:-1])
        if self.n_circular:
            c = self.scale_features(scale, len(base))
            for layer in self.torsions:
                angles, change = layer(c).call_and_ladj(angles)
                ladj = ladj + change.sum(-1)
        bounded, change = self.conditional(normals, self.context(angles))
        return torch.cat((angles, bounded), dim=-1), ladj + change

    def map_bounded(self, angles: Tensor, normals: Tensor) -> Tensor:
        """Bounded features from their base samples at given torsions, shapes (n, n_circular) and (n, n_bounded)."""
        return self.conditional(normals.to(self.dtype), self.context(angles.to(self.dtype)))[0]

    def _invert_torsions(self, angles: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        ladj = angles.new_zeros(angles.shape[:-1])
        if self.n_circular:
            c = self.scale_features(scale, len(angles))
            for layer in reversed(self.torsions):
                angles, change = inverse_and_ladj(layer(c), angles)
                ladj = ladj + change.sum(-1)
        return angles, ladj

    def inverse(self, z: Tensor, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """base = f^-1(z) and log |det df^-1|, shapes (n, n_features) and (n,)."""
        z = z.to(self.dtype)
        angles, bounded = z[..., : self.n_circular], z[..., self.n_circular :]
        normals, ladj_bounded = self.conditional.inverse(bounded, self.context(angles))
        angles, ladj_torsions = self._invert_torsions(angles, scale)
        return torch.cat((angles, normals), dim=-1), ladj_torsions + ladj_bounded

    def log_prob_torsions(self, z: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """log q(torsions | scale), shape (n, n_features) -> (n,); -inf beyond what they can be."""
        torsions = z[..., : self.n_circular].to(self.dtype)
        _, ladj = self._invert_torsions(torsions, scale)
        return torch.where(self.features.outside(torsions), -math.inf, ladj) + self._log_base_torsions()

    def log_prob_bounded(self, z: Tensor) -> Tensor:
        """log q(bounded | torsions), shape (n, n_features) -> (n,); -inf outside the support."""
        z = z.to(self.dtype)
        return self.conditional.log_prob(z[..., self.n_circular :], self.context(z[..., : self.n_circular]))

    def log_prob(self, z: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """log q(z | scale), shape (n, n_features) -> (n,); -inf outside the support."""
        return self.log_prob_torsions(z, scale) + self.log_prob_bounded(z)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Independent samples and their log density, float64, shapes (n, n_features) and (n,)."""
        base = self.draw_base(n, generator).to(self.dtype)
        z, ladj = self(base, scale)
        return z.double(), (self.log_base(base) - ladj).double()


def new_flow(settings: FlowSettings, geometry: Geometry, seed: int) -> CGFlow:
    """An untrained flow of a geometry's slow coordinates, its weights from the seed of the run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Stream.FLOW))
        return CGFlow(
            geometry.coordinates.features,
            geometry.coordinates.bound,
            settings.n_layers,
            settings.n_bounded_layers,
            settings.n_bins,
            settings.hidden_features,
            geometry.bounded_covariance(),
        )

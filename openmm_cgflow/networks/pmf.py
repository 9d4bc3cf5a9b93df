"""The potential of mean force, fitted to every mean force measured so far.

The reverse KL sees only slopes where the flow is; a fitted PMF has values everywhere, so the weights of basins behind a
barrier come out right, and every OpenMM evaluation serves all later updates of the flow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from openmm_cgflow.coordinates.features import SlowFeatures
from openmm_cgflow.coordinates.geometry import Geometry
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.seeds import Stream, derive_seed
from openmm_cgflow.settings import PMFSettings

__all__ = ["PMF", "SlowFreeEnergy", "new_pmf"]

_SCALE = 3.0  # kT, of what the networks add to the harmonic prior in a molecule


class SlowFreeEnergy(Protocol):
    """What training and sampling ask of Phi(z) = beta A(z), a function of the slow coordinates up to a constant."""

    def __call__(self, z: Tensor) -> Tensor:
        """Phi(z), shape (n, n_features) -> (n,), float64."""

    def each(self, z: Tensor) -> Tensor:
        """Estimates of equal right, whose spread is their error, shape (n, n_features) -> (n_members, n), float64."""

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Phi and d Phi/dz, shapes (n,) and (n, n_features), float64, without graph."""


class PMF(nn.Module):
    """Phi(z) = beta A(z) as an ensemble: harmonic in the stiff coordinates plus networks periodic in the torsions.

    Where the first features are steep instead of periodic, Phi is networks around a parabola that was measured, in
    units of the forces that it leaves.

    The density of z is exp(-Phi(z)) J(z). Each member is fitted with its own random weights of the data (the Bayesian
    bootstrap, Rubin 1981), so the members differ by the statistical error of the fit; their mean is the estimate.

    Arguments:
        features: What z is.
        precision: Inverse covariance of the other features in a harmonic molecule, shape (n_bounded, n_bounded).
        hidden_features: Hidden layers of every member.
        n_members: Size of the ensemble.
    """

    precision: Tensor
    curvature: Tensor
    slope: Tensor
    scale: Tensor

    def __init__(
        self,
        features: SlowFeatures,
        precision: Tensor,
        hidden_features: Sequence[int] = (96, 96),
        n_members: int = 4,
    ) -> None:
        super().__init__()
        self.features, self.n_members = features, n_members
        n_circular = features.n_circular
        sizes = [features.size, *hidden_features, 1]
        pairs = list(pairwise(sizes))
        self.weights = nn.ParameterList([torch.randn(n_members, a, b) / math.sqrt(a) for a, b in pairs])
        self.biases = nn.ParameterList([torch.zeros(n_members, 1, b) for _, b in pairs])
        self.weights[-1].data.mul_(0.1)
        self.register_buffer("precision", precision.float())
        self.register_buffer("curvature", torch.zeros(n_circular, n_circular))
        self.register_buffer("slope", torch.zeros(n_circular))
        self.register_buffer("scale", torch.tensor(_SCALE))

    def measure_background(self, z: Tensor, gradient: Tensor) -> None:
        """Measures the parabola whose slopes are nearest to mean forces, and the scale of what it leaves.

        Only where features are steep; else nothing is done.

        Arguments:
            z: Shape (n, n_features).
            gradient: d Phi/dz there, of the same shape.
        """
        if not self.features.steep:
            return
        n = self.features.n_circular
        # In double precision: the last bits of a solver's result depend on where in memory its arguments happen to lie.
        z, gradient = z.double(), gradient.double()
        at = torch.cat((z[:, :n], torch.ones_like(z[:, :1])), dim=-1)
        linear = torch.linalg.lstsq(at, gradient[:, :n]).solution
        left = gradient[:, :n] - at @ linear
        self.curvature.copy_((linear[:n] + linear[:n].T) / 2)
        self.slope.copy_(linear[n])
        self.scale.copy_(left.square().mean().sqrt().clamp(min=_SCALE))

    def members(self, z: Tensor) -> Tensor:
        """Phi of every member, up to a constant each, shape (n_members, n, n_features) -> (n_members, n).

        float32 as the networks are, unless these were made float64.
        """
        n = self.features.n_circular
        bounded, hidden = z[..., n:], self.features(z)
        last = len(self.weights) - 1
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden, weight)
            if k < last:
                hidden = nn.functional.silu(hidden)
        phi = self.scale * hidden[..., 0] + 0.5 * ((bounded @ self.precision) * bounded).sum(-1)
        if not self.features.steep:
            return phi
        position = z[..., :n]
        return phi + ((0.5 * position @ self.curvature + self.slope) * position).sum(-1)

    def each(self, z: Tensor) -> Tensor:
        """Phi of every member at the same z, shape (n, n_features) -> (n_members, n), float64."""
        return self.members(z.to(self.precision.dtype)[None].expand(self.n_members, -1, -1)).double()

    def forward(self, z: Tensor) -> Tensor:
        """Phi(z), the members' mean, shape (n, n_features) -> (n,), float64."""
        return self.each(z).mean(0)

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Phi and d Phi/dz, shapes (n,) and (n, n_features), float64, without graph."""
        with torch.enable_grad():
            at = z.detach().requires_grad_()
            value = self(at)
            (gradient,) = torch.autograd.grad(value.sum(), at)
        return value.detach(), gradient


def new_pmf(settings: PMFSettings, geometry: Geometry, seed: int) -> PMF:
    """An unfitted PMF of a geometry's slow coordinates, its networks from the seed of the run.

    Raises:
        CGFlowError: If the coordinates are Cartesian.
    """
    covariance = geometry.bounded_covariance()
    if covariance is None:
        raise CGFlowError("a potential of mean force needs coordinates: internal")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Stream.PMF))
        features, precision = geometry.coordinates.features, torch.linalg.inv(covariance)
        return PMF(features, precision, settings.hidden_features, settings.n_members)

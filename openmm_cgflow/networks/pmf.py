"""The potential of mean force, fitted to every mean force measured so far.

The reverse KL sees only slopes where the flow is; a fitted PMF has values everywhere, so the weights of basins behind a
barrier come out right, and every OpenMM evaluation serves all later updates of the flow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openmm_cgflow.coordinates.features import SlowFeatures
from openmm_cgflow.coordinates.geometry import Geometry
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.forces.estimator import MeanForce
from openmm_cgflow.forces.statistics import shortened
from openmm_cgflow.seeds import derive_seed
from openmm_cgflow.settings import PMFSettings
from openmm_cgflow.training.optimisers import RunningAverage

__all__ = ["PMF", "AnchorValues", "MeanForceBuffer", "PMFFitter", "held_out_error", "new_pmf", "squared_aim"]

# A mean force is fitted to within its own noise, but no better than these: close contacts, where forces are a hundred
# times the thermal ones, would otherwise be all the fit looks at. The size is the *predicted* one: weights that depend
# on what was measured, as in a robust loss, bias the fit, because the noise near contacts is skewed.
_RELATIVE_ERROR, _SMALLEST_ERROR = 0.05, 0.1
# Longer mean forces, as multiples of the median, come from slow atoms that overlap and say no more than: not here. A
# nearer limit would be a robust loss on what matters.
_LONGEST = 30.0
# Share of the known differences in the fit. By their number they would have none, but their errors are independent of
# each other, and those of the mean forces are not: what the fast atoms remember is the same in all of a region. On
# alanine dipeptide this share brings Phi within their errors and fits the mean forces as well as without, ten times as
# much does not.
_SHARE_OF_VALUES = 0.001
_AVERAGING = 0.995  # of the running average of the networks, per update
_MEDIAN_OF_NORMAL = 0.6745  # of |x|, x a standard normal
_SCALE = 3.0  # kT, of what the networks add to the harmonic prior in a molecule


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
        """Of steep features, the parabola whose slopes are nearest to mean forces, and the scale of what it leaves.

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


class MeanForceBuffer:
    """All mean forces measured so far, with each ensemble member's random weights of them.

    The first third of all rounds counts no more: their chains started from few others, and slow motions among the fast
    atoms (methyl groups take 1 ps to forget where they were) come to rest along lineages of chains only. On alanine
    dipeptide, rounds 3 to 16 put the left-handed state 0.16 kT too low, rounds 8 to 16 half as much.

    Arguments:
        n_members: Size of the ensemble.
    """

    def __init__(self, n_members: int) -> None:
        self.n_members = n_members
        self.rounds: list[dict[str, Tensor]] = []

    def add(self, z: Tensor, force: MeanForce, generator: torch.Generator) -> None:
        """Adds one round; invalid replicas are left out."""
        valid = force.valid
        one = {"z": z, "gradient": force.gradient, "variance": force.variance}
        if force.parts is not None:
            one |= {"slow": force.parts.slow, "fast": force.parts.fast}
        one = {name: tensor[valid].float() for name, tensor in one.items()}
        one["weights"] = torch.empty((len(one["z"]), self.n_members)).exponential_(generator=generator)
        self.rounds.append(one)

    def data(self) -> dict[str, Tensor]:
        """Everything that counts, float32.

        Returns:
            ``z``, ``gradient`` = d(beta A)/dz and its ``variance``, shapes (n, n_features), ``weights`` (n, n_members)
            and, where they are known, the parts ``slow`` and ``fast`` of the chains, as in ``meanforce.ChainParts``.
        """
        rounds = self.rounds[len(self.rounds) // 3 :]
        return {name: torch.cat([one[name] for one in rounds]) for name in rounds[0]}

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": [dict(one) for one in self.rounds]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rounds = [dict(one) for one in state["rounds"]]


class AnchorValues(NamedTuple):
    """Differences Phi(end) - Phi(start) that are known, with each ensemble member's random weights of them.

    Shapes (n, n_features), the same, (n,), (n,) and (n, n_members).
    """

    start: Tensor
    end: Tensor
    difference: Tensor
    error: Tensor
    weights: Tensor


class PMFFitter:
    """Adam on the weighted squares of predicted minus measured mean force, and difference where some are known.

    The PMF is the running average of what Adam trains: single steps shake free energies of rare states by tenths of a
    kT, the average by hundredths.

    Arguments:
        pmf: Fitted in place.
        learning_rate: Of Adam.
        batch_size: Mean forces of one update.
    """

    def __init__(self, pmf: PMF, learning_rate: float, batch_size: int = 1024) -> None:
        self.pmf, self.learning_rate, self.batch_size = pmf, learning_rate, batch_size
        self.networks = RunningAverage(pmf, _AVERAGING)
        self.optimizer = torch.optim.Adam(self.networks.trained.parameters(), lr=learning_rate)

    def fit(
        self,
        data: dict[str, Tensor],
        n_updates: int,
        generator: torch.Generator,
        scale: float = 1.0,
        values: AnchorValues | None = None,
    ) -> float:
        """Continues the fit; returns the mean weighted square of the mean forces, about 1 where all is noise.

        Arguments:
            data: ``z``, ``gradient``, ``variance`` and ``weights`` of :meth:`MeanForceBuffer.data`.
            n_updates: Steps of Adam.
            generator: Source of all randomness.
            scale: Multiplies the learning rate.
            values: Known differences.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = scale * self.learning_rate
        z, gradient, weights = data["z"], shortened(data["gradient"], _LONGEST), data["weights"]
        noise = data["variance"].median(0).values
        if self.networks.n_updates == 0:
            for pmf in (self.networks.average, self.networks.trained):
                pmf.measure_background(z, gradient)
        total = 0.0
        for _ in range(n_updates):
            rows = torch.randint(len(z), (min(self.batch_size, len(z)),), generator=generator)
            at = z[rows].expand(self.pmf.n_members, -1, -1).clone().requires_grad_()
            (predicted,) = torch.autograd.grad(self.networks.trained.members(at).sum(), at, create_graph=True)
            squares = (predicted - gradient[rows]).square() / (noise + squared_aim(predicted.detach()))
            loss = (weights[rows].T[..., None] * squares).mean()
            total += float(loss.detach())
            if values is not None:
                loss = loss + _SHARE_OF_VALUES * self._misfit_of_values(values)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.networks.update()
        return total / n_updates

    def _misfit_of_values(self, values: AnchorValues) -> Tensor:
        members = self.networks.trained.members
        expand = (self.pmf.n_members, -1, -1)
        predicted = members(values.end.expand(expand)) - members(values.start.expand(expand))
        return (values.weights.T * ((predicted - values.difference) / values.error).square()).mean()

    def state_dict(self) -> dict[str, Any]:
        return {"networks": self.networks.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.networks.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])


def squared_aim(predicted: Tensor) -> Tensor:
    """Squared error that the fit aims at, of predicted mean forces, shape (..., n_features) -> (..., 1)."""
    return _SMALLEST_ERROR**2 + _RELATIVE_ERROR**2 * predicted.square().mean(-1, keepdim=True)


def held_out_error(pmf: PMF, z: Tensor, force: MeanForce) -> float:
    """How far mean forces that the fit has not seen are from its prediction, in units of their noise.

    The median over all features of all valid replicas of |predicted - measured| / standard error, divided by what it
    is for pure noise: 1 where nothing is left to learn. Noise counts as no smaller than what the fit aims at.
    """
    _, predicted = pmf.value_and_gradient(z[force.valid])
    error = torch.maximum(force.variance[force.valid], squared_aim(predicted)).sqrt()
    ratio = (predicted - force.gradient[force.valid]).abs() / error
    return float(ratio.median() / _MEDIAN_OF_NORMAL)


def new_pmf(settings: PMFSettings, geometry: Geometry, seed: int) -> PMF:
    """An unfitted PMF of a geometry's slow coordinates, its networks from the seed of the run.

    Raises:
        CGFlowError: If the coordinates are Cartesian.
    """
    covariance = geometry.bounded_covariance()
    if covariance is None:
        raise CGFlowError("a potential of mean force needs coordinates: internal")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, 9))
        features, precision = geometry.coordinates.features, torch.linalg.inv(covariance)
        return PMF(features, precision, settings.hidden_features, settings.n_members)

"""Blocks of flows: couplings by rational-quadratic splines on intervals and circles, and conditional linear maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from zuko.lazy import LazyTransform
from zuko.nn import MLP
from zuko.transforms import ComposedTransform, CouplingTransform, MonotonicRQSTransform, Transform

from openmm_cgflow.coordinates.features import SlowFeatures, Support, on_circle

__all__ = [
    "ConditionalLinear",
    "SplineCoupling",
    "alternating_masks",
    "inverse_and_ladj",
]

# Of one layer's spline. Steeper or flatter ones make a density so rough that its score, which the path gradient uses,
# grows without bound during training (zuko's default of 1e-3 does); torsions need more contrast than bonds and angles,
# and positions in a box, where modes may be thousands of kT apart, more than torsions: with 0.02, 0.2 % of the draws of
# the paper's mixture of two lay between its modes, which made a mode 9 % wider, with 0.005 half as much.
_SMALLEST_SLOPE: dict[Support, float] = {"bounded": 0.1, "circle": 0.02, "interval": 0.005}


class _CircularRotation(Transform):
    """Rotation of the circle [-pi, pi)."""

    domain = torch.distributions.constraints.real
    codomain = torch.distributions.constraints.real
    bijective = True

    def __init__(self, angle: Tensor) -> None:
        super().__init__()
        self.angle = angle

    def _call(self, x: Tensor) -> Tensor:
        return on_circle(x + self.angle)

    def _inverse(self, y: Tensor) -> Tensor:
        return on_circle(y - self.angle)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


class _IntervalSpline(MonotonicRQSTransform):
    """An interval onto itself, with any slope at its ends; derivatives have shape (*, n_bins + 1)."""

    def __init__(self, widths: Tensor, heights: Tensor, derivatives: Tensor, bound: float, slope: float) -> None:
        super().__init__(widths, heights, derivatives[..., 1:-1], bound, slope)
        self.derivatives = torch.exp(derivatives / (1 + abs(derivatives / math.log(slope))))


class SplineCoupling(LazyTransform):
    """One coupling layer over the first features or over bounded ones, as a lazy zuko transform.

    Torsions go round the circle. Nothing passes through the ends of an interval, nor should it on the path of a sample:
    the density may jump there, and its slopes, which the path gradient follows, would know nothing of that. Its density
    at an end is whatever it should be; splines of bounded coordinates have the slope of one at their ends.

    Arguments:
        mask: Which features stay and condition the others, shape (n,) bool.
        context: Number of context features.
        bound: Half-width of the spline interval (pi for angles).
        n_bins: Spline bins.
        hidden_features: Hidden layers of the conditioner.
        first: The kind of slow coordinates whose first features these are; None for bounded ones.
    """

    mask: Tensor

    def __init__(
        self,
        mask: Tensor,
        context: int,
        bound: float,
        n_bins: int,
        hidden_features: Sequence[int],
        first: SlowFeatures | None = None,
    ) -> None:
        super().__init__()
        self.first, self.bound = first, bound
        self.support: Support = first.support if first is not None else "bounded"
        n_slopes = n_bins + (1 if self.support == "interval" else -1)
        self.sizes = (n_bins, n_bins, n_slopes, *((1,) if self.support == "circle" else ()))
        self.register_buffer("mask", mask)
        n_kept, n_moved = int(mask.sum()), int((~mask).sum())
        n_inputs = self._features(torch.zeros(n_kept)).shape[-1] + context
        self.moved_shape = (n_moved, sum(self.sizes))
        if n_inputs > 0:
            self.conditioner = _conditioner(n_inputs, n_moved * sum(self.sizes), hidden_features)
        else:
            self.conditioner = None
            self.constant = nn.Parameter(torch.zeros(self.moved_shape))

    def _features(self, kept: Tensor) -> Tensor:
        """What the conditioner sees."""
        return kept / self.bound if self.first is None else self.first.see_first(kept)

    def forward(self, c: Tensor | None = None) -> CouplingTransform:
        def meta(kept: Tensor) -> Transform:
            if self.conditioner is None:
                parameters = self.constant.expand(*kept.shape[:-1], *self.moved_shape)
            else:
                inputs = self._features(kept)
                if c is not None:
                    inputs = torch.cat((inputs, c), dim=-1)
                parameters = self.conditioner(inputs).unflatten(-1, self.moved_shape)
            widths, heights, derivatives, *rotation = parameters.split(self.sizes, dim=-1)
            make = _IntervalSpline if self.support == "interval" else MonotonicRQSTransform
            spline = make(widths, heights, derivatives, self.bound, _SMALLEST_SLOPE[self.support])
            if self.support != "circle":
                return spline
            return ComposedTransform(spline, _CircularRotation(rotation[0].squeeze(-1)))

        return CouplingTransform(meta, self.mask)


def inverse_and_ladj(coupling: CouplingTransform, y: Tensor) -> tuple[Tensor, Tensor]:
    """``coupling.inv.call_and_ladj(y)`` with one evaluation of the conditioner: zuko's takes two."""
    kept, moved = coupling.split(y)
    transform = coupling.meta(kept)
    x = transform.inv(moved)
    return coupling.merge(kept, x, y.shape), -transform.log_abs_det_jacobian(x, moved)


def alternating_masks(n_features: int, n_layers: int) -> list[Tensor]:
    """Alternating halves, each pair of layers cut by the next bit of the feature number.

    Two features condition each other if their numbers differ in one of the first n_layers / 2 bits.
    """
    if n_features == 1:
        return [torch.zeros(1, dtype=torch.bool)] * n_layers
    n_bits = max(1, math.ceil(math.log2(n_features)))
    index = torch.arange(n_features)
    masks = [((index >> (layer // 2 % n_bits)) & 1).bool() ^ bool(layer % 2) for layer in range(n_layers)]
    return masks


def _conditioner(n_inputs: int, n_outputs: int, hidden_features: Sequence[int]) -> MLP:
    network = MLP(n_inputs, n_outputs, hidden_features, activation=nn.SiLU)
    for parameter in network[-1].parameters():
        parameter.data.mul_(0.01)  # start at the base distribution
    return network


class ConditionalLinear(nn.Module):
    """r = shift(torsions) + L(torsions) s, with L lower triangular; it starts at shift 0 and the given L.

    Arguments:
        start: L at the start, lower triangular, shape (n, n).
        context: Number of context features; without any, shift and L are the same everywhere.
    """

    start: Tensor

    def __init__(self, start: Tensor, context: int, hidden_features: Sequence[int]) -> None:
        super().__init__()
        n = len(start)
        n_outputs = n + n * (n + 1) // 2
        self.register_buffer("start", start)
        self.conditioner = _conditioner(context, n_outputs, hidden_features) if context else None
        self.constant = None if context else nn.Parameter(torch.zeros(n_outputs))

    def _parameters_at(self, c: Tensor, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        n = len(self.start)
        if self.conditioner is not None:
            flat = self.conditioner(c)
        else:
            assert self.constant is not None
            flat = self.constant.expand(n_rows, -1)
        shift, entries = flat[..., :n], flat[..., n:]
        rows, columns = torch.tril_indices(n, n)
        change = flat.new_zeros(*flat.shape[:-1], n, n)
        change[..., rows, columns] = entries
        logs = change.diagonal(dim1=-2, dim2=-1)
        triangular = change.tril(-1) + torch.diag_embed(logs.exp())
        ladj = logs.sum(-1) + self.start.diagonal().log().sum()
        return shift, self.start @ triangular, ladj

    def forward(self, s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift, triangular, ladj = self._parameters_at(c, len(s))
        return shift + (triangular @ s[..., None])[..., 0], ladj

    def inverse(self, r: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        shift, triangular, ladj = self._parameters_at(c, len(r))
        s = torch.linalg.solve_triangular(triangular, (r - shift)[..., None], upper=False)
        return s[..., 0], -ladj

"""The flow q(z | gamma): torsions on the circle first, then the bounded coordinates given the torsions.

log q(z | gamma) = log q(torsions | gamma) + log q(bounded | torsions). gamma = 1 is the model; gamma = 0 has flat
torsions, and in between lies the geometric path from there, along which free energy barriers between torsions are
gamma times as high while bonds and angles stay at the target temperature. Each block is a stack of zuko coupling layers
of rational-quadratic splines (Durkan et al. 2019): circular ones on a uniform base (Rezende et al. 2020) for torsions,
and splines on [-bound, bound] on a truncated normal base (paper section 2.4) for bounded coordinates, followed by a
linear map whose shift and triangular matrix depend on the torsions: bonds and angles are nearly harmonic, so that
alone is nearly exact, and the splines add what is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from zuko.lazy import LazyTransform
from zuko.nn import MLP
from zuko.transforms import ComposedTransform, CouplingTransform, MonotonicRQSTransform, Transform

__all__ = ["CGFlow", "SplineCoupling", "one_torch_thread", "periodic_features"]


# Of one layer's spline. Steeper or flatter ones make a density so rough that its score, which the path gradient uses,
# grows without bound during training (zuko's default of 1e-3 does); torsions need more contrast than bonds and angles.
_SMALLEST_SLOPE, _SMALLEST_SLOPE_OF_TORSIONS = 0.1, 0.02
_N_HARMONICS = 3  # of the torsions, where they condition other features


class _CircularRotation(Transform):
    """Rotation of the circle [-pi, pi)."""

    domain = torch.distributions.constraints.real
    codomain = torch.distributions.constraints.real
    bijective = True

    def __init__(self, angle: Tensor) -> None:
        super().__init__()
        self.angle = angle

    def _call(self, x: Tensor) -> Tensor:
        return torch.remainder(x + self.angle + math.pi, 2 * math.pi) - math.pi

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.remainder(y - self.angle + math.pi, 2 * math.pi) - math.pi

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


def periodic_features(angles: Tensor) -> Tensor:
    """Cosines and sines of angles and their first multiples, shape (..., n) -> (..., 6 n)."""
    multiples = (angles[..., None] * torch.arange(1, _N_HARMONICS + 1, dtype=angles.dtype)).flatten(-2)
    return torch.cat((torch.cos(multiples), torch.sin(multiples)), dim=-1)


def _gamma_features(gamma: Tensor) -> Tensor:
    """gamma in the scales on which a torsion density changes with it, shape (n,) -> (n, 4)."""
    return torch.stack((gamma, gamma.square(), gamma.sqrt(), torch.exp(-10 * gamma)), dim=-1)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Runs torch on one thread, then as before.

    Measured at 256 samples on two cores: one thread is 15 % slower than two where nothing else runs, and 2.5 times
    faster where both cores are busy; and its sums are the same each time, which a resumed run relies on.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class SplineCoupling(LazyTransform):
    """One coupling layer over torsions or over bounded coordinates, as a lazy zuko transform.

    Arguments:
        mask: Which features stay and condition the others, shape (n_features,) bool.
        context: Number of context features.
        circular: Whether the features are angles on [-pi, pi).
        bound: Half-width of the spline interval (pi for angles).
        n_bins: Spline bins.
        hidden_features: Hidden layers of the conditioner.
    """

    mask: Tensor

    def __init__(
        self, mask: Tensor, context: int, circular: bool, bound: float, n_bins: int, hidden_features: Sequence[int]
    ) -> None:
        super().__init__()
        self.circular = circular
        self.bound = bound
        self.sizes = (n_bins, n_bins, n_bins - 1, *((1,) if circular else ()))
        self.register_buffer("mask", mask)
        n_kept, n_moved = int(mask.sum()), int((~mask).sum())
        n_inputs = n_kept * (2 * _N_HARMONICS if circular else 1) + context
        self.moved_shape = (n_moved, sum(self.sizes))
        if n_inputs > 0:
            self.conditioner = _conditioner(n_inputs, n_moved * sum(self.sizes), hidden_features)
        else:
            self.conditioner = None
            self.constant = nn.Parameter(torch.zeros(self.moved_shape))

    def forward(self, c: Tensor | None = None) -> CouplingTransform:
        def meta(kept: Tensor) -> Transform:
            if self.conditioner is None:
                parameters = self.constant.expand(*kept.shape[:-1], *self.moved_shape)
            else:
                inputs = periodic_features(kept) if self.circular else kept / self.bound
                if c is not None:
                    inputs = torch.cat((inputs, c), dim=-1)
                parameters = self.conditioner(inputs).unflatten(-1, self.moved_shape)
            widths, heights, derivatives, *rotation = parameters.split(self.sizes, dim=-1)
            slope = _SMALLEST_SLOPE_OF_TORSIONS if self.circular else _SMALLEST_SLOPE
            spline = MonotonicRQSTransform(widths, heights, derivatives, bound=self.bound, slope=slope)
            if not self.circular:
                return spline
            return ComposedTransform(spline, _CircularRotation(rotation[0].squeeze(-1)))

        return CouplingTransform(meta, self.mask)


def _masks(n_features: int, n_layers: int) -> list[Tensor]:
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


class _ConditionalLinear(nn.Module):
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


class CGFlow(nn.Module):
    """The density of the slow coordinates, q(z | gamma); without gamma, the model q(z) = q(z | 1).

    Its parameters may be float32, as in training, or float64; inputs are cast to them.

    Arguments:
        n_circular: Number of torsions, the first features of z.
        n_bounded: Number of bounded features.
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
        n_circular: int,
        n_bounded: int,
        bound: float,
        n_layers: int = 6,
        n_bounded_layers: int = 2,
        n_bins: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        covariance: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.n_circular, self.n_bounded, self.bound = n_circular, n_bounded, bound
        self.torsions = nn.ModuleList(
            SplineCoupling(mask, 4, True, math.pi, n_bins, hidden_features)
            for mask in (_masks(n_circular, n_layers) if n_circular else [])
        )
        context = 2 * _N_HARMONICS * n_circular
        self.bounded = nn.ModuleList(
            SplineCoupling(mask, context, False, bound, n_bins, hidden_features)
            for mask in (_masks(n_bounded, n_bounded_layers) if n_bounded else [])
        )
        linear = covariance is not None and n_bounded > 0
        self.linear = (
            _ConditionalLinear(torch.linalg.cholesky(covariance), context, hidden_features) if linear else None
        )
        self.double()

    @property
    def n_features(self) -> int:
        return self.n_circular + self.n_bounded

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def draw_base(self, n: int, generator: torch.Generator) -> Tensor:
        """Base samples: uniform angles and truncated standard normals, shape (n, n_features)."""
        uniform = torch.rand((n, self.n_features), generator=generator, dtype=torch.float64)
        angles = (2 * uniform[:, : self.n_circular] - 1) * math.pi
        low, high = torch.special.ndtr(torch.tensor([-self.bound, self.bound], dtype=torch.float64))
        normals = torch.special.ndtri(low + (high - low) * uniform[:, self.n_circular :])
        return torch.cat((angles, normals), dim=-1)

    def _log_base_torsions(self) -> float:
        return -self.n_circular * math.log(2 * math.pi)

    def _log_base_bounded(self, normals: Tensor) -> Tensor:
        mass = math.erf(self.bound / math.sqrt(2))
        constant = self.n_bounded * math.log(math.sqrt(2 * math.pi) * mass)
        outside = (normals.abs() > self.bound).any(-1)
        return torch.where(outside, -math.inf, -0.5 * normals.square().sum(-1) - constant)

    def log_base(self, base: Tensor) -> Tensor:
        """Log density of the base, shape (n, n_features) -> (n,)."""
        return self._log_base_bounded(base[..., self.n_circular :]) + self._log_base_torsions()

    def _gamma(self, gamma: float | Tensor, n: int) -> Tensor:
        return _gamma_features(torch.as_tensor(gamma, dtype=self.dtype).expand(n))

    def forward(self, base: Tensor, gamma: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """The flow map z = f(base) and log |det df|, shapes (n, n_features) and (n,) (paper eq. 7).

        Arguments:
            base: Shape (n, n_features).
            gamma: One number, or one for each row, shape (n,).
        """
        base = base.to(self.dtype)
        angles, normals = base[..., : self.n_circular], base[..., self.n_circular :]
        ladj = base.new_zeros(base.shape[:-1])
        if self.n_circular:
            c = self._gamma(gamma, len(base))
            for layer in self.torsions:
                angles, change = layer(c).call_and_ladj(angles)
                ladj = ladj + change.sum(-1)
        bounded, change = self._map_bounded(angles, normals)
        return torch.cat((angles, bounded), dim=-1), ladj + change

    def _map_bounded(self, angles: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        context = periodic_features(angles)
        ladj = normals.new_zeros(normals.shape[:-1])
        for layer in self.bounded:
            normals, change = layer(context).call_and_ladj(normals)
            ladj = ladj + change.sum(-1)
        if self.linear is not None:
            normals, change = self.linear(normals, context)
            ladj = ladj + change
        return normals, ladj

    def map_bounded(self, angles: Tensor, normals: Tensor) -> Tensor:
        """Bounded features from their base samples at given torsions, shapes (n, n_circular) and (n, n_bounded)."""
        return self._map_bounded(angles.to(self.dtype), normals.to(self.dtype))[0]

    def _invert_torsions(self, angles: Tensor, gamma: float | Tensor) -> tuple[Tensor, Tensor]:
        ladj = angles.new_zeros(angles.shape[:-1])
        if self.n_circular:
            c = self._gamma(gamma, len(angles))
            for layer in reversed(self.torsions):
                angles, change = layer(c).inv.call_and_ladj(angles)
                ladj = ladj + change.sum(-1)
        return angles, ladj

    def _invert_bounded(self, angles: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        ladj = normals.new_zeros(normals.shape[:-1])
        context = periodic_features(angles)
        if self.linear is not None:
            normals, ladj = self.linear.inverse(normals, context)
        for layer in reversed(self.bounded):
            normals, change = layer(context).inv.call_and_ladj(normals)
            ladj = ladj + change.sum(-1)
        return normals, ladj

    def inverse(self, z: Tensor, gamma: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """base = f^-1(z) and log |det df^-1|, shapes (n, n_features) and (n,)."""
        z = z.to(self.dtype)
        normals, ladj_bounded = self._invert_bounded(z[..., : self.n_circular], z[..., self.n_circular :])
        angles, ladj_torsions = self._invert_torsions(z[..., : self.n_circular], gamma)
        return torch.cat((angles, normals), dim=-1), ladj_torsions + ladj_bounded

    def log_prob_torsions(self, z: Tensor, gamma: float | Tensor = 1.0) -> Tensor:
        """log q(torsions | gamma), shape (n, n_features) -> (n,)."""
        _, ladj = self._invert_torsions(z[..., : self.n_circular].to(self.dtype), gamma)
        return ladj + self._log_base_torsions()

    def log_prob_bounded(self, z: Tensor) -> Tensor:
        """log q(bounded | torsions), shape (n, n_features) -> (n,); -inf outside the support."""
        z = z.to(self.dtype)
        normals, ladj = self._invert_bounded(z[..., : self.n_circular], z[..., self.n_circular :])
        return ladj + self._log_base_bounded(normals)

    def log_prob(self, z: Tensor, gamma: float | Tensor = 1.0) -> Tensor:
        """log q(z | gamma), shape (n, n_features) -> (n,); -inf outside the support."""
        return self.log_prob_torsions(z, gamma) + self.log_prob_bounded(z)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator, gamma: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Independent samples and their log density, float64, shapes (n, n_features) and (n,)."""
        base = self.draw_base(n, generator).to(self.dtype)
        z, ladj = self(base, gamma)
        return z.double(), (self.log_base(base) - ladj).double()

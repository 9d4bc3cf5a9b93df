"""The learned linear map of the paper's synthetic systems: particles as means of slow and fast pseudo-particles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from openmm_cgflow.coordinates.all_atom import ThermalMap, Widths, at_levels
from openmm_cgflow.coordinates.slow import Coordinates

__all__ = ["LinearMap", "along_x"]

_NOTHING = math.exp(-15)  # times the largest weight: smaller ones do not count for how far particles get
_MARGIN = 1.2  # of that, for what the measurement has not seen


def along_x(x: Tensor) -> Tensor:
    """Positions with y and z zero, shape (..., n) -> (..., n, 3)."""
    return torch.stack((x, torch.zeros_like(x), torch.zeros_like(x)), dim=-1)


class _Frame(NamedTuple):
    """Where pseudo-particles are and how they vary, one row for each temperature.

    Attributes:
        scale: Of z: slow pseudo-particles in it are in [-pi, pi], shape (n_ratios, n_slow).
        mean: Of slow and fast ones, as distances from the start, shape (n_ratios, n).
        gain: Regression of the fast ones on the slow ones, shape (n_ratios, n_fast, n_slow).
        root: Cholesky factor of the covariance that is left, shape (n_ratios, n_fast, n_fast).
    """

    scale: Tensor
    mean: Tensor
    gain: Tensor
    root: Tensor


class LinearMap(ThermalMap):
    """x = A (z, y) along the x axis: particles are weighted means of pseudo-particles, slow and fast ones.

    A is right-stochastic, its rows have sum one, so translations of pseudo-particles translate all particles (paper
    eqs. 9-10). So does its inverse, which says what pseudo-particles are made of, and is what is learned.

    z is a slow pseudo-particle in an interval that holds everywhere they get; beyond it the flow has no density. r is
    what is left of the fast ones when their regression on the slow ones is taken out, in widths. The interval is no
    larger than it need be: a flow leaves a little mass wherever there is nothing. How far particles get, and their
    covariance, which regression and widths follow from, are measured at every temperature of the training. So a turn
    of A leaves Gaussians as they are, and needs nothing of the density: were the regression for the density to learn,
    it would lag behind the map and hold it where slow and fast ones are independent, which the true slow direction is
    not alone in. The choice of y, which means nothing, changes nothing.

    Arguments:
        coordinates: Description of the slow pseudo-particles.
        fast: Indices of the particles that start as fast pseudo-particles, in rising order.
        centre: Start of all particles, nm, shape (n,).
        widths: Of all particles, nm, shape (n,): the covariance and, times ``reach``, how far they get, before both
            are measured.
        reach: See ``widths``.
        mixing: Each pseudo-particle starts as (1 - mixing) times a particle and mixing times the mean of all.
        learned: Whether A is trained.
    """

    centre: Tensor
    mixes_all: ClassVar[bool] = True

    def __init__(
        self,
        coordinates: Coordinates,
        fast: Sequence[int],
        centre: Tensor,
        widths: Widths,
        reach: float,
        mixing: float,
        learned: bool,
    ) -> None:
        super().__init__()
        self.n_slow, self.widths, self.reach = len(coordinates.atoms), widths, reach
        order = self.order = [*coordinates.atoms, *fast]
        self.register_buffer("centre", centre.double())
        partition = torch.eye(len(order), dtype=torch.float64)[order]
        self.weights = nn.Parameter((1 - mixing) * partition + mixing / len(order), requires_grad=learned)
        self.set_extra_state({})

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        n = len(self.centre)
        self._log_ratios = state.get("log_ratios", torch.zeros(0, dtype=torch.float64))
        self._means = state.get("means", torch.zeros((0, n), dtype=torch.float64))
        self._covariances = state.get("covariances", torch.zeros((0, n, n), dtype=torch.float64))
        self._extents = state.get("extents", torch.zeros((0, n), dtype=torch.float64))

    def get_extra_state(self) -> dict[str, Tensor]:
        return {
            "log_ratios": self._log_ratios,
            "means": self._means,
            "covariances": self._covariances,
            "extents": self._extents,
        }

    @property
    def n_fast_features(self) -> int:
        return len(self.centre) - self.n_slow

    @property
    def pseudo_particles(self) -> Tensor:
        """What slow and then fast pseudo-particles are made of, the inverse of A, shape (n, n); rows have sum one."""
        return self.weights + (1 - self.weights.sum(1, keepdim=True)) / len(self.weights)

    @property
    def matrix(self) -> Tensor:
        """A, one row a particle, columns of slow and then fast pseudo-particles, shape (n, n)."""
        return torch.linalg.inv(self.pseudo_particles)

    def slow_directions(self) -> Tensor:
        """What the slow pseudo-particles are made of, shape (n_slow, n); sums are one."""
        return self.pseudo_particles[: self.n_slow].detach()

    def describe(self, labels: Sequence[str]) -> list[str]:
        if not self.weights.requires_grad:
            return []
        lines = []
        for k, row in enumerate(self.slow_directions().tolist()):
            terms = [f"{weight:+.3f} {labels[i]}" for i, weight in enumerate(row)]
            lines.append(f"slow coordinate {k + 1} (started as {labels[self.order[k]]}) = {' '.join(terms)}")
        return lines

    def irregularity(self) -> Tensor:
        """Least for orthonormal rows, infinite where A is singular: nothing else holds y away from z."""
        rows = self.pseudo_particles
        return 0.5 * rows.square().sum() - torch.linalg.slogdet(rows)[1]

    def measure(self, beta_ratio: float, xyz: Tensor, weights: Tensor) -> None:
        away = xyz[..., 0] - self.centre
        mean = weights @ away
        covariance = (weights[:, None] * (away - mean)).T @ (away - mean)
        self._log_ratios = torch.cat((self._log_ratios, torch.tensor([math.log(beta_ratio)], dtype=torch.float64)))
        self._means = torch.cat((self._means, mean[None]))
        self._covariances = torch.cat((self._covariances, covariance[None]))
        extent = _MARGIN * away[weights > _NOTHING * weights.max()].abs().amax(0)
        self._extents = torch.cat((self._extents, extent[None]))

    def _measured(self, ratios: Tensor, widths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, covariance and extent of all particles, linear in the log ratio between where they were measured."""
        n = len(self._log_ratios)
        if not n:
            return torch.zeros_like(widths), torch.diag_embed(widths.square()), self.reach * widths
        after = torch.searchsorted(self._log_ratios, ratios.log()).clamp(max=n - 1)
        before = (after - 1).clamp(min=0)
        low, high = self._log_ratios[before], self._log_ratios[after]
        share = torch.where(high > low, (ratios.log() - low) / (high - low), 0.0).clamp(0.0, 1.0)
        mean = torch.lerp(self._means[before], self._means[after], share[:, None])
        covariance = torch.lerp(self._covariances[before], self._covariances[after], share[:, None, None])
        return mean, covariance, torch.lerp(self._extents[before], self._extents[after], share[:, None])

    def _frame(self, beta_ratio: float | Tensor) -> _Frame:
        ratios, widths, which = at_levels(self.widths, beta_ratio)
        mean, covariance, extent = self._measured(ratios, widths)
        rows, n = self.pseudo_particles, self.n_slow
        # An ellipsoid of the covariance's shape, stretched along every particle's axis to how far that gets.
        stretched = rows[:n] * extent[:, None] / covariance.diagonal(dim1=-2, dim2=-1)[:, None].sqrt()
        scale = (stretched @ covariance * stretched).sum(-1).sqrt() / math.pi
        covariance = rows @ covariance @ rows.T
        slow, cross = covariance[:, :n, :n], covariance[:, :n, n:]
        gain = torch.linalg.solve(slow, cross).mT
        root = torch.linalg.cholesky(covariance[:, n:, n:] - gain @ cross)
        return _Frame(scale[which], (mean @ rows.T)[which], gain[which], root[which])

    def build(self, z: Tensor, r: Tensor, beta_ratio: float | Tensor) -> Tensor:
        frame, n = self._frame(beta_ratio), self.n_slow
        slow = frame.scale * z
        away = (frame.gain @ (slow - frame.mean[..., :n])[..., None] + frame.root @ r[..., None])[..., 0]
        pseudo = torch.cat((slow, frame.mean[..., n:] + away), dim=-1)
        return along_x(self.centre + pseudo @ self.matrix.T)

    def read(self, xyz: Tensor, beta_ratio: float | Tensor) -> tuple[Tensor, Tensor]:
        frame, n = self._frame(beta_ratio), self.n_slow
        pseudo = (xyz[..., 0] - self.centre) @ self.pseudo_particles.T
        away = (pseudo - frame.mean)[..., None]
        left = away[..., n:, :] - frame.gain @ away[..., :n, :]
        r = torch.linalg.solve_triangular(frame.root, left, upper=False)[..., 0]
        return pseudo[..., :n] / frame.scale, r

    def log_volume(self, z: Tensor, r: Tensor, beta_ratio: float | Tensor) -> Tensor:
        frame = self._frame(beta_ratio)
        volume = frame.scale.log().sum(-1) + frame.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return volume - torch.linalg.slogdet(self.pseudo_particles)[1]

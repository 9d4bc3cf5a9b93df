"""What networks, searches and paths see of slow coordinates: which of them go round a circle, and what that means.

The first features of z are those with barriers between modes, on [-pi, pi]; all others are bounded, in units of their
thermal widths. What the first ones are decides how networks see them, how far apart two of them are, and what ends
where. In a molecule they are torsions; the paper's synthetic systems have a kind of their own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["N_HARMONICS", "N_SCALE_FEATURES", "SlowFeatures", "Support", "Torsions", "harmonics", "on_circle"]

N_HARMONICS = 3  # of the first features, as networks see them
N_SCALE_FEATURES = 4
_HALF = 0.5  # of bounded features, as networks see them
_NEAR = 0.05  # of bounded features beside torsions, in distances between conformations

Support = Literal["circle", "interval", "bounded"]
"""Of splines: angles on [-pi, pi), positions that end at -pi and pi, or coordinates seldom outside an interval."""


def on_circle(angles: Tensor) -> Tensor:
    """Angles brought to [-pi, pi), radians, of any shape."""
    return torch.remainder(angles + math.pi, 2 * math.pi) - math.pi


def harmonics(angles: Tensor) -> Tensor:
    """Cosines and sines of angles and their first multiples, shape (..., n) -> (..., 6 n)."""
    multiples = (angles[..., None] * torch.arange(1, N_HARMONICS + 1, dtype=angles.dtype)).flatten(-2)
    return torch.cat((torch.cos(multiples), torch.sin(multiples)), dim=-1)


@dataclass(frozen=True)
class SlowFeatures(ABC):
    """A kind of slow coordinates, and how many of them there are.

    Attributes:
        n_circular: Number of the first features, those with barriers.
        n_bounded: Number of the others.
        support: Which spline the first features need.
        n_each: Numbers that networks see of each of the first features.
        steep: Whether free energies along the first features may be thousands of kT: then a parabola is measured and
            taken out before networks learn what is left.
    """

    n_circular: int
    n_bounded: int

    support: ClassVar[Support]
    n_each: ClassVar[int]
    steep: ClassVar[bool]

    @property
    def n_features(self) -> int:
        """Number of slow coordinates z."""
        return self.n_circular + self.n_bounded

    @property
    def size(self) -> int:
        """How many numbers networks see of z."""
        return self.n_each * self.n_circular + self.n_bounded

    @property
    def size_first(self) -> int:
        """How many they see of the first features alone."""
        return self.n_each * self.n_circular

    def __call__(self, z: Tensor) -> Tensor:
        """What networks see of z, shape (..., n_features) -> (..., size)."""
        n = self.n_circular
        return torch.cat((self.see_first(z[..., :n]), _HALF * z[..., n:]), dim=-1)

    @abstractmethod
    def see_first(self, first: Tensor) -> Tensor:
        """What networks see of any number of first features, shape (..., n) -> (..., n_each n)."""

    @abstractmethod
    def scale_features(self, scale: Tensor) -> Tensor:
        """What networks see of a barrier scale in [0, 1], shape (n,) -> (n, 4)."""

    @abstractmethod
    def describe(self) -> str:
        """What the slow coordinates are, for people."""

    def embed(self, z: Tensor) -> Tensor:
        """Points whose distances tell which fast atoms fit where, shape (n, n_features) -> (n, k)."""
        n = self.n_circular
        # Torsions decide which fast atoms fit. Mean forces just after the start were off by 0.7 kT/rad in a first pool
        # of 256 with a weight of 0.2, by 0.4 with 0.05, and by nothing that could be measured in a pool of 16,000.
        weight = _NEAR if n else 1.0
        return torch.cat((torch.cos(z[:, :n]), torch.sin(z[:, :n]), weight * z[:, n:]), dim=-1)

    @abstractmethod
    def embed_first(self, first: Tensor) -> Tensor:
        """Points whose distances are those along paths of the first features, shape (n, n_circular) -> (n, k)."""

    @abstractmethod
    def wrap(self, first: Tensor) -> Tensor:
        """First features brought to where they are counted once, of any shape."""

    @abstractmethod
    def unwrap(self, curve: np.ndarray) -> np.ndarray:
        """First features along a curve made continuous, shape (n_points, n_circular)."""

    @abstractmethod
    def outside(self, first: Tensor) -> Tensor:
        """Where no density is: beyond what the first features can be, shape (..., n_circular) -> (...,) bool."""


class Torsions(SlowFeatures):
    """Torsions on the circle, then bonds, angles, impropers or positions: the slow coordinates of a molecule."""

    support: ClassVar[Support] = "circle"
    n_each: ClassVar[int] = 2 * N_HARMONICS
    steep: ClassVar[bool] = False

    def see_first(self, first: Tensor) -> Tensor:
        return harmonics(first)

    def scale_features(self, scale: Tensor) -> Tensor:
        return torch.stack((scale, scale.square(), scale.sqrt(), torch.exp(-10 * scale)), dim=-1)

    def describe(self) -> str:
        return f"{self.n_circular} of them torsions"

    def embed_first(self, first: Tensor) -> Tensor:
        return torch.cat((first.cos(), first.sin()), dim=-1)

    def wrap(self, first: Tensor) -> Tensor:
        return on_circle(first)

    def unwrap(self, curve: np.ndarray) -> np.ndarray:
        return np.unwrap(curve, axis=0)

    def outside(self, first: Tensor) -> Tensor:
        return first.new_zeros(first.shape[:-1], dtype=torch.bool)

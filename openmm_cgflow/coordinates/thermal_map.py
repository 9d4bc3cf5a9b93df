"""Thermal maps of a joint density: positions from slow features z and fast features r, and back (paper eq. 2).

Features are in thermal widths, so that what is harmonic looks the same at every temperature. ``beta_ratio`` is beta
over that of the target, T / temperature with T the target: one number, or one for each row, shape (n,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from openmm_cgflow.coordinates.all_atom import AllAtomMap

__all__ = ["InternalThermalMap", "ThermalMap", "Widths", "at_levels"]

Widths = Callable[[float], Tensor]
"""Thermal widths at a beta_ratio."""


def at_levels(widths: Widths, beta_ratio: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each ratio that occurs, the widths there, and which of these is each row's."""
    levels, which = torch.as_tensor(beta_ratio, dtype=torch.float64).reshape(-1).unique(return_inverse=True)
    return levels, torch.stack([widths(level) for level in levels.tolist()]), which


class ThermalMap(nn.Module, ABC):
    """An invertible map x = f(z, r) at every temperature.

    Attributes:
        mixes_all: Whether slow coordinates are combinations of all particles, so that no force acts on slow ones alone.
    """

    mixes_all: ClassVar[bool] = False

    @property
    @abstractmethod
    def n_fast_features(self) -> int:
        """Number of features r."""

    @abstractmethod
    def build(self, z: Tensor, r: Tensor, beta_ratio: float | Tensor) -> Tensor:
        """All-atom positions, nm, shape (n, n_atoms, 3)."""

    @abstractmethod
    def read(self, xyz: Tensor, beta_ratio: float | Tensor) -> tuple[Tensor, Tensor]:
        """z and r of all-atom positions."""

    @abstractmethod
    def log_volume(self, z: Tensor, r: Tensor, beta_ratio: float | Tensor) -> Tensor:
        """log |dx/d(z, r)|, rigid motions included, shape (n,)."""

    def same_handedness(self, xyz: Tensor) -> Tensor:
        """Whether every stereocentre has the input structure's handedness, shape (n,) bool."""
        return torch.ones(len(xyz), dtype=torch.bool)

    def irregularity(self) -> Tensor:
        """What training adds to its loss, so that a learned map stays invertible; a number."""
        return torch.zeros((), dtype=torch.float64)

    def describe(self, labels: Sequence[str]) -> list[str]:
        """What each slow coordinate is made of, where that is learned; a line each.

        Arguments:
            labels: Of all atoms.
        """
        return []

    def measure(self, beta_ratio: float, xyz: Tensor, weights: Tensor) -> None:
        """Learns where structures are at a temperature lower than all before, before any density there is trained.

        Arguments:
            beta_ratio: T / temperature.
            xyz: Positions, nm, shape (n, n_atoms, 3).
            weights: Of sum one, that make them samples of that temperature, shape (n,).
        """


class InternalThermalMap(ThermalMap):
    """z are the slow coordinates of an all-atom map, r its fast ones around their start.

    Arguments:
        all_atom: The map from coordinates to positions.
        centre: Start of the fast coordinates, nm and radians, shape (n_fast, n_axes).
        widths: Theirs, of the same shape.
    """

    centre: Tensor

    def __init__(self, all_atom: AllAtomMap, centre: Tensor, widths: Widths) -> None:
        super().__init__()
        self.all_atom, self.widths = all_atom, widths
        self.register_buffer("centre", centre.double())

    @property
    def n_fast_features(self) -> int:
        return self.centre.numel()

    def _widths(self, beta_ratio: float | Tensor) -> Tensor:
        _, widths, which = at_levels(self.widths, beta_ratio)
        return widths[which]

    def _physical(self, r: Tensor, beta_ratio: float | Tensor) -> Tensor:
        return self.centre + self._widths(beta_ratio) * r.unflatten(-1, self.centre.shape)

    def build(self, z: Tensor, r: Tensor, beta_ratio: float | Tensor) -> Tensor:
        return self.all_atom.build(z, self._physical(r, beta_ratio))

    def read(self, xyz: Tensor, beta_ratio: float | Tensor) -> tuple[Tensor, Tensor]:
        away = self.all_atom.wrap_fast(self.all_atom.read_fast(xyz) - self.centre)
        return self.all_atom.read_slow(xyz), (away / self._widths(beta_ratio)).flatten(-2)

    def log_volume(self, z: Tensor, r: Tensor, beta_ratio: float | Tensor) -> Tensor:
        volume = self.all_atom.coordinates.log_volume(z) + self.all_atom.log_volume_fast(self._physical(r, beta_ratio))
        return volume + self._widths(beta_ratio).log().sum((-1, -2))

    def same_handedness(self, xyz: Tensor) -> Tensor:
        return self.all_atom.same_handedness(xyz)

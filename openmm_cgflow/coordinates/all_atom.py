"""All-atom structures from slow and fast coordinates, and back (paper eq. 2).

Fast coordinates are y, bonds, angles and dihedrals in nm and radians, where OpenMM moves them; or r, the same in
thermal widths of any temperature, where a density of all atoms is learned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from openmm_cgflow.coordinates.features import on_circle
from openmm_cgflow.coordinates.placement import Placement, signed_volumes
from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.coordinates.zmatrix import ZMatrix
from openmm_cgflow.errors import CGFlowError

__all__ = ["AllAtomMap", "InternalThermalMap", "MoleculeMap", "ThermalMap", "Widths", "at_levels"]

Widths = Callable[[float], Tensor]
"""Thermal widths at a beta_ratio."""


class AllAtomMap(nn.Module, ABC):
    """x = f(z, y) (paper eq. 2), invertible.

    The volume element of y does not depend on z, so the fast coordinates may be held while z moves: this is what the
    co-moving estimator does.

    Attributes:
        coordinates: Description of the slow atoms.
    """

    def __init__(self, coordinates: Coordinates) -> None:
        super().__init__()
        self.coordinates = coordinates

    @property
    def slow(self) -> Sequence[int]:
        """Slow atom indices in the order of the coordinates' positions."""
        return self.coordinates.atoms

    def read_slow(self, xyz: Tensor) -> Tensor:
        """z of all-atom positions, shape (..., n_features)."""
        return self.coordinates.from_xyz(xyz[..., list(self.slow), :])

    @property
    def n_stereocentres(self) -> int:
        """Number of stereocentres whose handedness is known."""
        return 0

    @abstractmethod
    def build(self, z: Tensor, y: Tensor) -> Tensor:
        """All-atom positions in the standard frame of the slow atoms, nm, shape (..., n_atoms, 3)."""

    @abstractmethod
    def read_fast(self, xyz: Tensor) -> Tensor:
        """y of all-atom positions: the coordinates of each fast atom, shape (..., n_fast, 3)."""

    def wrap_fast(self, difference: Tensor) -> Tensor:
        """Differences of y with angles of the circle brought to [-pi, pi), shape (..., n_fast, n_axes)."""
        return difference

    @abstractmethod
    def log_volume_fast(self, y: Tensor) -> Tensor:
        """Logarithm of the volume element of the fast atoms' positions in y, shape (..., n_fast, 3) -> (...,)."""

    def same_handedness(self, xyz: Tensor) -> Tensor:
        """Whether every stereocentre has the input structure's handedness, shape (...,) bool."""
        return torch.ones(xyz.shape[:-2], dtype=torch.bool)


class MoleculeMap(AllAtomMap):
    """Slow atoms from z, then every fast atom in a frame of atoms placed before it; y are bonds, angles, dihedrals.

    Arguments:
        coordinates: Description of the slow atoms.
        fast: Z-matrix of the fast atoms.
        stereocentres: Rows of four neighbours, shape (n_centres, 4).
        positions: Input structure, nm, shape (n_atoms, 3); its handedness is the one to keep.

    Raises:
        CGFlowError: If a fast atom is to be placed from three atoms on a straight line.
    """

    to_topology: Tensor
    stereocentres: Tensor
    handedness: Tensor

    def __init__(
        self, coordinates: Coordinates, fast: ZMatrix, stereocentres: np.ndarray, positions: np.ndarray
    ) -> None:
        super().__init__(coordinates)
        self.placement = Placement(fast, np.array(coordinates.atoms))
        self.register_buffer("to_topology", torch.as_tensor(np.argsort(self.placement.order)))
        self.register_buffer("stereocentres", torch.as_tensor(stereocentres))
        self._refuse_straight_frames(fast, positions)
        reference = torch.tensor(positions, dtype=torch.float64)
        self.register_buffer("handedness", torch.sign(signed_volumes(reference, self.stereocentres)))

    @staticmethod
    def _refuse_straight_frames(fast: ZMatrix, positions: np.ndarray) -> None:
        for atom, row in zip(fast.atoms.tolist(), fast.references.tolist(), strict=True):
            a, b, c = positions[row]
            sine = np.linalg.norm(np.cross(a - b, c - b)) / (np.linalg.norm(a - b) * np.linalg.norm(c - b))
            if sine < 0.1:
                raise CGFlowError(
                    f"fast atom {atom} (0-based) hangs on atoms {row}, which lie on a straight line and give it no "
                    "frame. Groups such as alkynes are not supported among the fast atoms: make them slow up to a bend"
                )

    @property
    def n_stereocentres(self) -> int:
        return len(self.stereocentres)

    def build(self, z: Tensor, y: Tensor) -> Tensor:
        return self.placement(self.coordinates.to_xyz(z), y)[..., self.to_topology, :]

    def read_fast(self, xyz: Tensor) -> Tensor:
        return self.placement.read(xyz)

    def wrap_fast(self, difference: Tensor) -> Tensor:
        return torch.cat((difference[..., :2], on_circle(difference[..., 2:])), dim=-1)

    def log_volume_fast(self, y: Tensor) -> Tensor:
        return (2 * torch.log(y[..., 0]) + torch.log(torch.sin(y[..., 1]))).sum(-1)

    def same_handedness(self, xyz: Tensor) -> Tensor:
        return (torch.sign(signed_volumes(xyz, self.stereocentres)) == self.handedness).all(-1)


def at_levels(widths: Widths, beta_ratio: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each ratio that occurs, the widths there, and which of these is each row's."""
    levels, which = torch.as_tensor(beta_ratio, dtype=torch.float64).reshape(-1).unique(return_inverse=True)
    return levels, torch.stack([widths(level) for level in levels.tolist()]), which


class ThermalMap(nn.Module, ABC):
    """An invertible map x = f(z, r) at every temperature (paper eq. 2), for a density of all atoms.

    The features z and r are in thermal widths, so that what is harmonic looks the same at every temperature.
    ``beta_ratio`` is beta over that of the target, T / temperature with T the target: one number, or one for each row,
    shape (n,).

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

"""All-atom structures from slow coordinates z and fast coordinates y, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from openmm_cgflow.coordinates.features import on_circle
from openmm_cgflow.coordinates.placement import Placement, signed_volumes
from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.coordinates.zmatrix import ZMatrix
from openmm_cgflow.errors import CGFlowError

__all__ = ["AllAtomMap", "MoleculeMap"]


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

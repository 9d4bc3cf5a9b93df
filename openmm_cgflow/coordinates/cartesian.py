"""Cartesian coordinates of the slow atoms, the paper's choice: six of them fixed by three reference atoms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from openmm_cgflow.coordinates.slow import SMALLEST_BOND, Coordinates

__all__ = ["CartesianCoordinates"]


class CartesianCoordinates(Coordinates):
    """The paper's choice (section 3.3): Cartesian slow positions with six coordinates fixed by three reference atoms.

    The first reference atom is the origin, the second lies on the x axis and the third in the xy plane. Features are
    their x_2, x_3, y_3 > 0 and the positions of all others. J = x_2^2 y_3, the volume of the rigid motions.

    Arguments:
        atoms: Slow atoms, the three reference atoms first.
        labels: A label per atom of the topology.
        centre: A centre for each feature's interval, nm, shape (3 n_slow - 6,).
        half_width: Half of each interval, nm, shape (3 n_slow - 6,).
        bound: Half-width of the intervals in z.
    """

    flat: Tensor

    def __init__(
        self, atoms: Sequence[int], labels: Sequence[str], centre: np.ndarray, half_width: np.ndarray, bound: float
    ) -> None:
        axes = [(1, "x"), (2, "x"), (2, "y"), *((k, axis) for k in range(3, len(atoms)) for axis in "xyz")]
        names = [f"{axis} {labels[atoms[k]]}" for k, axis in axes]
        low, high = centre - half_width, centre + half_width
        low[[0, 2]] = np.maximum(low[[0, 2]], SMALLEST_BOND)
        super().__init__(atoms, names, np.zeros(len(names), dtype=bool), low, high, bound)
        flat = torch.tensor([3 * k + "xyz".index(axis) for k, axis in axes])
        self.register_buffer("flat", flat)

    def to_xyz(self, z: Tensor) -> Tensor:
        xyz = z.new_zeros(*z.shape[:-1], 3 * len(self.atoms))
        return xyz.scatter(-1, self.flat.expand(z.shape), self.to_physical(z)).unflatten(-1, (-1, 3))

    def from_xyz(self, xyz: Tensor) -> Tensor:
        centred = xyz - xyz[..., :1, :]
        x = nn.functional.normalize(centred[..., 1, :], dim=-1)
        third = centred[..., 2, :]
        y = nn.functional.normalize(third - (third * x).sum(-1, keepdim=True) * x, dim=-1)
        frame = torch.stack((x, y, torch.linalg.cross(x, y)), dim=-1)
        return self.from_physical((centred @ frame).flatten(-2)[..., self.flat])

    def log_volume(self, z: Tensor) -> Tensor:
        values = self.to_physical(z)
        return 2 * torch.log(values[..., 0]) + torch.log(values[..., 2]) + self._log_scale()

"""Coordinates of the slow atoms: z <-> positions, with the exact volume element.

z is what the flow models. Torsions are radians on the circle; every other feature is an affine map of its interval
[low, high] to [-bound, bound], the interval of the splines. ``log_volume`` is the logarithm of J(z) of

    integral over positions, rigid motions integrated out = constant x integral J(z) dz,

so exp(-beta A(z)) J(z) is the density of z in a free simulation (paper eq. 5; its own code leaves J out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from openmm_cgflow.coordinates.features import SlowFeatures, Torsions, on_circle
from openmm_cgflow.coordinates.placement import Placement, bond_angle_dihedral, place_first_three
from openmm_cgflow.coordinates.zmatrix import ZMatrix
from openmm_cgflow.errors import CGFlowError

__all__ = ["CartesianCoordinates", "Coordinates", "InternalCoordinates"]

_SMALLEST_BOND = 0.03  # nm
_SMALLEST_SINE = 0.05  # rad from a straight or a folded angle


class Coordinates(nn.Module):
    """Base of all descriptions: feature names, the circle, and the scaling of bounded features.

    Attributes:
        atoms: Slow atom indices in the order of the positions, shape (n_slow,).
        circular: Which features are torsions, shape (n_features,) bool; they come first.
        names: One name per feature.
        features: What networks and paths see of z.
        bound: Half-width of the interval of bounded features.
    """

    circular: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        atoms: Sequence[int],
        names: Sequence[str],
        circular: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        bound: float,
        kind: type[SlowFeatures] = Torsions,
    ) -> None:
        super().__init__()
        self.atoms = tuple(int(i) for i in atoms)
        self.names = tuple(names)
        self.bound, n_circular = float(bound), int(circular.sum())
        self.features = kind(n_circular, len(names) - n_circular)
        self.register_buffer("circular", torch.as_tensor(circular))
        self.register_buffer("low", torch.as_tensor(low, dtype=torch.float64))
        self.register_buffer("high", torch.as_tensor(high, dtype=torch.float64))

    @property
    def n_circular(self) -> int:
        """Number of torsions."""
        return self.features.n_circular

    @property
    def n_features(self) -> int:
        return self.features.n_features

    @property
    def scale(self) -> Tensor:
        """Physical units per unit of each bounded feature, shape (n_features,)."""
        return (self.high - self.low) / (2 * self.bound)

    def to_physical(self, z: Tensor) -> Tensor:
        """z -> torsions in radians, lengths in nm, angles in radians, shape (..., n_features)."""
        n = self.n_circular
        return torch.cat((z[..., :n], (self.low + (z + self.bound) * self.scale)[..., n:]), dim=-1)

    def from_physical(self, values: Tensor) -> Tensor:
        """Inverse of :meth:`to_physical`; torsions are wrapped to [-pi, pi)."""
        n = self.n_circular
        torsions = self.features.wrap(values[..., :n])
        bounded = (values - self.low) / (self.high - self.low) * (2 * self.bound) - self.bound
        return torch.cat((torsions, bounded[..., n:]), dim=-1)

    def _log_scale(self) -> Tensor:
        n = self.n_circular
        return torch.log(self.scale)[n:].sum()

    def to_xyz(self, z: Tensor) -> Tensor:
        """Slow positions in the standard frame, nm, shape (..., n_slow, 3)."""
        raise NotImplementedError

    def from_xyz(self, xyz: Tensor) -> Tensor:
        """z of slow positions in any frame, nm, shape (..., n_slow, 3) -> (..., n_features)."""
        raise NotImplementedError

    def log_volume(self, z: Tensor) -> Tensor:
        """log J(z) up to a constant that does not depend on z, shape (...,); -inf where z is no structure."""
        raise NotImplementedError


class InternalCoordinates(Coordinates):
    """Torsions, bonds, angles and impropers of a Z-matrix of the slow atoms.

    Torsions that turn a bond are circular; impropers and the torsions of stiff bonds (rings, held peptide bonds) are
    bounded around the input structure, which keeps its handedness and its cis and trans bonds.
    J = prod r^2 sin(theta), over all bonds and angles; the rigid-body factor of the first three atoms has that form.

    Arguments:
        zmatrix: From :func:`openmm_cgflow.coordinates.zmatrix.slow_zmatrix`.
        labels: A label per atom of the topology, for the names.
        centre: Equilibrium bond, angle, dihedral of each atom, nm and radians, shape (n_slow, 3).
        width: Their thermal widths (standard deviations), shape (n_slow, 3).
        bound: Half-width of the interval in thermal widths.

    Raises:
        CGFlowError: If an angle is straight, where its dihedral is undefined.
    """

    references: Tensor
    slot_atom: Tensor
    slot_kind: Tensor
    slot: Tensor
    stiff: Tensor
    row: Tensor

    def __init__(
        self, zmatrix: ZMatrix, labels: Sequence[str], centre: np.ndarray, width: np.ndarray, bound: float
    ) -> None:
        n = len(zmatrix.atoms)
        is_torsion = zmatrix.rotatable
        is_stiff = (zmatrix.references[:, 2] >= 0) & ~is_torsion
        slots: list[tuple[int, int]] = [(k, 2) for k in range(n) if is_torsion[k]]
        n_torsions = len(slots)
        slots += [(k, 0) for k in range(1, n)] + [(k, 1) for k in range(2, n)]
        slots += [(k, 2) for k in range(n) if is_stiff[k]]
        names, low, high = [], [], []
        for k, kind in slots:
            chain = [int(zmatrix.atoms[k]), *zmatrix.references[k].tolist()][: kind + 2]
            name = "-".join(labels[i] for i in reversed(chain))
            names.append(f"{('bond', 'angle', 'improper' if zmatrix.improper[k] else 'dihedral')[kind]} {name}")
            middle, half = centre[k, kind], bound * width[k, kind]
            if kind == 1 and middle > math.pi - 0.1:
                raise CGFlowError(f"{names[-1]} is straight; such a chain has no torsion. Choose other slow atoms")
            # A stiff dihedral beyond half a turn would count conformations twice.
            turn = (middle - math.pi, middle + math.pi)
            smallest, largest = ((_SMALLEST_BOND, 1.0), (_SMALLEST_SINE, math.pi - _SMALLEST_SINE), turn)[kind]
            low.append(max(middle - half, smallest))
            high.append(min(middle + half, largest))
            if (k, kind) in slots[:n_torsions]:
                low[-1], high[-1] = -math.pi, math.pi
        circular = np.arange(len(slots)) < n_torsions
        super().__init__(zmatrix.atoms.tolist(), names, circular, np.array(low), np.array(high), bound)
        self.zmatrix = zmatrix
        self.placement = Placement(zmatrix.without_first_three(), zmatrix.atoms[:3])
        position = {int(atom): k for k, atom in enumerate(zmatrix.atoms)}
        references = []
        for k, row in enumerate(zmatrix.references.tolist()):
            # The first three atoms have others where they have no reference: of an angle between an atom and itself the
            # gradient is nan, and times zero it still is.
            known = [position[r] for r in row if r >= 0]
            references.append([*known, *(j for j in range(n) if j != k and j not in known), k][:3])
        self.register_buffer("references", torch.tensor(references))
        self.register_buffer("slot_atom", torch.tensor([k for k, _ in slots]))
        self.register_buffer("slot_kind", torch.tensor([kind for _, kind in slots]))
        self.register_buffer("slot", self.slot_atom * 3 + self.slot_kind, persistent=False)
        self.register_buffer("stiff", (self.slot_kind == 2) & ~self.circular)
        order = {int(atom): k for k, atom in enumerate(self.placement.order)}
        self.register_buffer("row", torch.tensor([order[int(atom)] for atom in zmatrix.atoms]))

    def table(self, z: Tensor) -> Tensor:
        """Bond, angle, dihedral of each slow atom, shape (..., n_slow, 3); entries that do not exist are zero."""
        values = z.new_zeros(*z.shape[:-1], len(self.atoms) * 3)
        return values.scatter(-1, self.slot.expand(z.shape), self.to_physical(z)).unflatten(-1, (-1, 3))

    def from_table(self, table: Tensor) -> Tensor:
        """Inverse of :meth:`table`; stiff dihedrals are unwrapped into their interval."""
        values = table.flatten(-2).index_select(-1, self.slot)
        middle = (self.low + self.high) / 2
        turned = on_circle(values - middle) + middle
        return self.from_physical(torch.where(self.slot_kind == 2, turned, values))

    def to_xyz(self, z: Tensor) -> Tensor:
        table = self.table(z)
        first = place_first_three(table[..., 1, 0], table[..., 2, 0], table[..., 2, 1])
        return self.placement(first, table[..., 3:, :])[..., self.row, :]

    def from_xyz(self, xyz: Tensor) -> Tensor:
        atoms = torch.arange(len(self.atoms))
        return self.from_table(bond_angle_dihedral(xyz, atoms, self.references))

    def log_volume(self, z: Tensor) -> Tensor:
        values = self.to_physical(z)
        bonds, angles = values[..., self.slot_kind == 0], values[..., self.slot_kind == 1]
        exists = (bonds > 0).all(-1) & (angles > 0).all(-1) & (angles < math.pi).all(-1)
        away = (values - (self.low + self.high) / 2)[..., self.stiff]
        exists &= (away.abs() <= math.pi + 1e-9).all(-1)  # further round is another conformation's second count
        # Masked before the logarithm: a nan would pass through the gradient of where().
        bonds = torch.where(exists[..., None], bonds, 1.0)
        angles = torch.where(exists[..., None], angles, 1.0)
        volume = 2 * torch.log(bonds).sum(-1) + torch.log(torch.sin(angles)).sum(-1) + self._log_scale()
        return torch.where(exists, volume, -math.inf)


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
        low[[0, 2]] = np.maximum(low[[0, 2]], _SMALLEST_BOND)
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

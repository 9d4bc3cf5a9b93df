"""Internal coordinates to Cartesian positions and back, differentiable, vectorised by levels of placement."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from openmm_cgflow.coordinates.zmatrix import ZMatrix

__all__ = ["Placement", "bond_angle_dihedral", "place", "place_first_three", "signed_volumes"]


def bond_angle_dihedral(xyz: Tensor, atoms: Tensor, references: Tensor) -> Tensor:
    """Bond i-a, angle i-a-b and dihedral i-a-b-c of atoms i with references (a, b, c).

    Arguments:
        xyz: Positions, nm, shape (..., n_atoms, 3).
        atoms: Indices i, shape (n,).
        references: Indices (a, b, c), shape (n, 3).

    Returns:
        nm, radians in (0, pi), radians in (-pi, pi] (IUPAC sign), shape (..., n, 3).
    """
    quadruples = torch.cat((atoms, references.T.flatten()))
    i, a, b, c = xyz.index_select(-2, quadruples).unflatten(-2, (4, -1)).unbind(-3)
    ia, ab, bc = a - i, b - a, c - b
    normal_1, normal_2 = torch.linalg.cross(ia, ab), torch.linalg.cross(ab, bc)
    bond = ia.norm(dim=-1)
    angle = torch.atan2(normal_1.norm(dim=-1), -(ia * ab).sum(-1))
    sine = (ia * normal_2).sum(-1) * ab.norm(dim=-1)
    dihedral = torch.atan2(sine, (normal_1 * normal_2).sum(-1))
    return torch.stack((bond, angle, dihedral), dim=-1)


def place(a: Tensor, b: Tensor, c: Tensor, internal: Tensor) -> Tensor:
    """Position of the atom with the given bond, angle and dihedral to atoms at a, b, c (each (..., 3), nm)."""
    bond, angle, dihedral = internal.unbind(-1)
    axis = nn.functional.normalize(a - b, dim=-1)
    normal = nn.functional.normalize(torch.linalg.cross(b - c, axis), dim=-1)
    across = torch.linalg.cross(normal, axis)
    radius = bond * torch.sin(angle)
    return (
        a
        - (bond * torch.cos(angle))[..., None] * axis
        + (radius * torch.cos(dihedral))[..., None] * across
        + (radius * torch.sin(dihedral))[..., None] * normal
    )


def place_first_three(bond_1: Tensor, bond_2: Tensor, angle: Tensor) -> Tensor:
    """Three bonded atoms in the standard frame: at the origin, on the x axis, in the xy plane, shape (..., 3, 3).

    ``bond_2`` joins the third atom to the second; ``angle`` is at the second.
    """
    zero = torch.zeros_like(bond_1)
    first = torch.stack((zero, zero, zero), dim=-1)
    second = torch.stack((bond_1, zero, zero), dim=-1)
    third = torch.stack((bond_1 - bond_2 * torch.cos(angle), bond_2 * torch.sin(angle), zero), dim=-1)
    return torch.stack((first, second, third), dim=-2)


def signed_volumes(xyz: Tensor, centres: Tensor) -> Tensor:
    """Signed volume of the four neighbours of each stereocentre; its sign is the handedness, shape (..., n_centres)."""
    first, second, third, fourth = (xyz[..., index, :] for index in centres.unbind(-1))
    return (torch.linalg.cross(first - fourth, second - fourth) * (third - fourth)).sum(-1)


class Placement(nn.Module):
    """Places the atoms of a Z-matrix beside atoms whose positions are known.

    Arguments:
        zmatrix: Every row must have three references.
        known: Atom indices that are placed already, shape (n_known,).
    """

    atoms: Tensor
    references: Tensor

    def __init__(self, zmatrix: ZMatrix, known: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("atoms", torch.as_tensor(zmatrix.atoms))
        self.register_buffer("references", torch.as_tensor(zmatrix.references))
        slot = {int(atom): k for k, atom in enumerate(known)}
        level = dict.fromkeys(slot, 0)
        for atom, refs in zip(zmatrix.atoms.tolist(), zmatrix.references.tolist(), strict=True):
            level[atom] = 1 + max(level[r] for r in refs)
        self.levels: list[tuple[Tensor, Tensor]] = []
        for depth in range(1, max(level.values(), default=0) + 1):
            rows = [k for k, atom in enumerate(zmatrix.atoms.tolist()) if level[atom] == depth]
            references = [[slot[r] for r in zmatrix.references[k].tolist()] for k in rows]
            slot |= {int(zmatrix.atoms[k]): len(slot) + n for n, k in enumerate(rows)}
            self.levels.append((torch.tensor(rows), torch.tensor(references).T))
        self.order = np.array(sorted(slot, key=slot.__getitem__))
        """Atom indices in the order of the result's rows: ``known``, then level by level."""

    def read(self, xyz: Tensor) -> Tensor:
        """Internal coordinates of the placed atoms, (..., n_atoms, 3) nm -> (..., n, 3) in Z-matrix order."""
        return bond_angle_dihedral(xyz, self.atoms, self.references)

    def forward(self, known: Tensor, internal: Tensor) -> Tensor:
        """Positions of all atoms in the order ``self.order``.

        Arguments:
            known: Positions of the known atoms, nm, shape (..., n_known, 3).
            internal: Bond, angle, dihedral in Z-matrix order, shape (..., n, 3).
        """
        xyz = known
        for rows, (a, b, c) in self.levels:
            placed = place(xyz[..., a, :], xyz[..., b, :], xyz[..., c, :], internal[..., rows, :])
            xyz = torch.cat((xyz, placed), dim=-2)
        return xyz

"""Bonded terms of a molecule in PyTorch: harmonic bonds, angles and impropers, and cosines of dihedrals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from openmm_cgflow.coordinates.placement import bond_angle_dihedral

__all__ = ["BondedTerms"]


class BondedTerms(nn.Module):
    """Positions (..., n_atoms, 3) nm -> energies (...) kJ/mol.

    k/2 (r - r0)^2 of bonds, k/2 (a - a0)^2 of angles and of impropers, and |k| + k cos(n d) of dihedrals d. An improper
    is a dihedral in (-pi, pi], from which a0 is subtracted as it is: it holds one handedness.

    Arguments:
        bonds: Rows (i, j, r0 in nm, k in kJ/mol/nm^2).
        angles: Rows (i, j, k, a0 in degrees, k in kJ/mol/degree^2), the angle at j.
        dihedrals: Rows (i, j, k, l, n, k in kJ/mol).
        impropers: Rows (i, j, k, l, a0 in degrees, k in kJ/mol/degree^2).
    """

    bonds_atoms: Tensor
    bonds_values: Tensor
    angles_atoms: Tensor
    angles_values: Tensor
    dihedrals_atoms: Tensor
    dihedrals_values: Tensor
    impropers_atoms: Tensor
    impropers_values: Tensor

    def __init__(
        self,
        bonds: Sequence[Sequence[float]],
        angles: Sequence[Sequence[float]],
        dihedrals: Sequence[Sequence[float]],
        impropers: Sequence[Sequence[float]],
    ) -> None:
        super().__init__()
        for name, rows, n_atoms in (
            ("bonds", bonds, 2),
            ("angles", angles, 3),
            ("dihedrals", dihedrals, 4),
            ("impropers", impropers, 4),
        ):
            table = torch.tensor(rows, dtype=torch.float64).reshape(-1, n_atoms + 2)
            self.register_buffer(f"{name}_atoms", table[:, :n_atoms].long())
            self.register_buffer(f"{name}_values", table[:, n_atoms:].T.contiguous())

    @classmethod
    def from_dict(cls, terms: Mapping[str, Any]) -> Self:
        """From lists of terms with named parameters, as the file of ``systems/alanine_dipeptide_heavy`` has them.

        Raises:
            KeyError: If a list or a parameter is missing.
        """
        names = {
            "bonds": ("i", "j", "r0_nm", "k_kJ_mol_nm2"),
            "angles": ("i", "j", "k", "theta0_deg", "k_kJ_mol_deg2"),
            "dihedrals": ("i", "j", "k", "l", "n", "kd_kJ_mol"),
            "impropers": ("i", "j", "k", "l", "psi0_deg", "k_kJ_mol_deg2"),
        }
        return cls(**{kind: [[term[name] for name in row] for term in terms[kind]] for kind, row in names.items()})

    def forward(self, positions: Tensor) -> Tensor:
        i, j = self.bonds_atoms.T
        length, strength = self.bonds_values
        bonds = (positions[..., i, :] - positions[..., j, :]).norm(dim=-1)
        energy = (0.5 * strength * (bonds - length).square()).sum(-1)
        i, j, k = self.angles_atoms.T
        angle, strength = self.angles_values
        first, second = positions[..., i, :] - positions[..., j, :], positions[..., k, :] - positions[..., j, :]
        angles = torch.atan2(torch.linalg.cross(first, second).norm(dim=-1), (first * second).sum(-1))
        energy = energy + (0.5 * strength * (angles.rad2deg() - angle).square()).sum(-1)
        multiplicity, strength = self.dihedrals_values
        dihedrals = _dihedrals(positions, self.dihedrals_atoms)
        energy = energy + (strength.abs() + strength * torch.cos(multiplicity * dihedrals)).sum(-1)
        angle, strength = self.impropers_values
        impropers = _dihedrals(positions, self.impropers_atoms)
        return energy + (0.5 * strength * (impropers.rad2deg() - angle).square()).sum(-1)


def _dihedrals(positions: Tensor, atoms: Tensor) -> Tensor:
    return bond_angle_dihedral(positions, atoms[:, 0], atoms[:, 1:])[..., 2]

"""Potentials in PyTorch for tests: springs of length zero between given atoms, in every form to be told apart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from toys import HarmonicBath

from openmm_cgflow.coordinates.placement import bond_angle_dihedral
from openmm_cgflow.paper.bonded_terms import BondedTerms

_ALL_PAIRS = [(i, j, 20.0) for i in range(14) for j in range(i)]


class Springs(nn.Module):
    """Positions (..., n_atoms, 3) nm -> energies (...) kJ/mol.

    Attributes:
        calls: Shapes of the positions of all calls in this process.
    """

    calls: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, springs: list[tuple[int, int, float]]) -> None:
        super().__init__()
        first, second, strength = zip(*springs, strict=True)
        self.register_buffer("ends", torch.tensor([first, second]))
        self.register_buffer("strength", torch.tensor(strength, dtype=torch.float64))

    def forward(self, positions: Tensor) -> Tensor:
        self.calls.append(tuple(positions.shape))
        ends = positions[..., self.ends[0], :] - positions[..., self.ends[1], :]
        return 0.5 * (self.strength * ends.square().sum(-1)).sum(-1)


class OneAtATime(Springs):
    """One structure only, as most published potentials."""

    def forward(self, positions: Tensor) -> Tensor:
        if positions.dim() != 2:
            raise IndexError("expected positions (n_atoms, 3)")
        return super().forward(positions)


class Mixing(Springs):
    """Takes batches, but its energies are those of all structures together."""

    def forward(self, positions: Tensor) -> Tensor:
        energy = super().forward(positions)
        return energy + 0.1 * (energy.sum() - energy)


class ScriptedSprings(nn.Module):
    """Without what TorchScript does not know."""

    def __init__(self) -> None:
        super().__init__()
        springs = Springs(_ALL_PAIRS)
        self.register_buffer("ends", springs.ends)
        self.register_buffer("strength", springs.strength)

    def forward(self, positions: Tensor) -> Tensor:
        ends = positions.index_select(-2, self.ends[0]) - positions.index_select(-2, self.ends[1])
        return 0.5 * (self.strength * ends.square().sum(-1)).sum(-1)


class Field(Springs):
    """Changes when the molecule is moved."""

    def forward(self, positions: Tensor) -> Tensor:
        return super().forward(positions) + 10 * positions[..., 0].sum(-1)


class ReplicaContext(BondedTerms):
    """A chain of atoms with a phase in every term of its torsions."""

    def __init__(self, terms: list[tuple[tuple[int, float, float], ...]]) -> None:
        degree = math.degrees(1.0)
        n_atoms = len(terms) + 3
        bonds = [(i, i + 1, 0.15, 1e5) for i in range(n_atoms - 1)]
        angles = [(i, i + 1, i + 2, 1.9 * degree, 300.0 / degree**2) for i in range(n_atoms - 2)]
        super().__init__(bonds, angles, [], [])
        rows = [(first, *term) for first, of_torsion in enumerate(terms) for term in of_torsion]
        first, self.order, self.phase, self.strength = (torch.tensor(column) for column in zip(*rows, strict=True))
        self.ends, self.references = first + 3, first[:, None] + torch.tensor([2, 1, 0])

    def forward(self, positions: Tensor) -> Tensor:
        torsions = bond_angle_dihedral(positions, self.ends, self.references)[..., 2]
        terms = self.strength * (1 + torch.cos(self.order * torsions - self.phase))
        return super().forward(positions) + terms.sum(-1)


class PerAtom(Springs):
    def forward(self, positions: Tensor) -> Tensor:
        return positions.square().sum(-1)


def bath() -> Springs:
    return Springs(list(HarmonicBath.springs))


def all_pairs() -> Springs:
    return Springs(_ALL_PAIRS)


def one_at_a_time() -> OneAtATime:
    return OneAtATime(_ALL_PAIRS)


def mixing() -> Mixing:
    return Mixing(_ALL_PAIRS)


def field() -> Field:
    return Field(_ALL_PAIRS)


def per_atom() -> PerAtom:
    return PerAtom(_ALL_PAIRS)


def scripted() -> torch.jit.ScriptModule:
    return torch.jit.script(ScriptedSprings())


def from_table(table: Path, scale: float = 1.0) -> Springs:
    return Springs([(i, j, scale * strength) for i, j, strength in json.loads(table.read_text())])


def not_a_module() -> int:
    return 3

"""Which atoms are slow: presets, MDTraj selections and index lists, checked and made readable."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import networkx as nx

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.bonds import amide_bonds, bond_graph, connected_components
from openmm_cgflow.molecule.system import MolecularSystem

__all__ = ["Partition"]

_MINIMUM = 3
"""Two bonds and one angle; below that no internal coordinate but a length is left."""


@dataclass(frozen=True)
class Partition:
    """Slow and fast atoms.

    Attributes:
        slow: Sorted 0-based indices; they form one bonded connected set.
        fast: All the others, sorted.
    """

    slow: tuple[int, ...]
    fast: tuple[int, ...]

    @classmethod
    def resolve(
        cls, molecular_system: MolecularSystem, selection: str | Sequence[int], sampled_amides: bool = False
    ) -> Self:
        """Slow atoms by a selection, and all the others as fast ones.

        Arguments:
            molecular_system: The molecule.
            selection: ``"backbone"`` (N, CA, C of every amino-acid residue, the carbons of the caps and the nitrogen
                of a C-terminal cap), ``"heavy"`` (all but hydrogens, and the hydrogens of hydroxyl and thiol groups),
                an MDTraj selection, or 0-based indices.
            sampled_amides: Amide bonds are to turn, so the hydrogens on their nitrogens are slow, too.

        Raises:
            CGFlowError: If the selection is not understood, empty, everything, too small, or not bonded together.
        """
        slow = _indices(molecular_system, selection)
        if sampled_amides:
            slow = sorted({*slow, *_amide_hydrogens(molecular_system, slow)})
        _check(molecular_system, slow, _quote(selection))
        chosen = set(slow)
        return cls(tuple(slow), tuple(i for i in range(molecular_system.n_atoms) if i not in chosen))

    def describe(self, molecular_system: MolecularSystem) -> str:
        """A readable table: one line a residue, its slow and its fast atoms by name."""
        slow = set(self.slow)
        rows = [("residue", "slow atoms", "fast atoms")]
        for residue in molecular_system.topology.residues():
            names: tuple[list[str], list[str]] = ([], [])
            label = ""
            for atom in residue.atoms():
                names[atom.index not in slow].append(atom.name)
                label = label or molecular_system.atom_label(atom.index).rpartition(":")[0]
            rows.append((label, " ".join(names[0]) or "-", " ".join(names[1]) or "-"))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        table = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        return "\n".join(
            [f"{len(self.slow)} slow and {len(self.fast)} fast atoms of {molecular_system.n_atoms}", *table]
        )

    def to_json(self, molecular_system: MolecularSystem) -> dict[str, Any]:
        """The partition as plain lists: indices, and the names of the slow atoms."""
        return {
            "n_atoms": molecular_system.n_atoms,
            "slow": list(self.slow),
            "fast": list(self.fast),
            "slow_atoms": [molecular_system.atom_label(i) for i in self.slow],
        }


def _quote(selection: str | Sequence[int]) -> str:
    if isinstance(selection, str):
        return f"slow atoms '{selection}'"
    return f"slow atoms given as {len(selection)} indices"


def _indices(molecular_system: MolecularSystem, selection: str | Sequence[int]) -> list[int]:
    if isinstance(selection, str):
        if selection.strip().lower() == "backbone":
            return _backbone(molecular_system)
        if selection.strip().lower() == "heavy":
            return _heavy(molecular_system)
        return _select(molecular_system, selection)
    return _listed(molecular_system, selection)


def _select(molecular_system: MolecularSystem, selection: str) -> list[int]:
    try:
        chosen = molecular_system.mdtraj_topology.select(selection)
    except Exception as error:  # MDTraj's parser and its compiled filters raise many unrelated types
        # MDTraj's parser first lists everything that it knows.
        found = re.search(r"found (.*?)\s+\(at char \d+\)", str(error))
        reason = [f"unexpected {found.group(1)}"] if found else str(error).strip().splitlines()
        short = reason[0][:200] if reason else type(error).__name__
        raise CGFlowError(
            f"slow atoms '{selection}': neither a preset (backbone, heavy) nor an MDTraj selection such as "
            f'"name N CA C": {short}'
        ) from error
    return sorted(int(i) for i in chosen)


def _listed(molecular_system: MolecularSystem, selection: Sequence[int]) -> list[int]:
    n_atoms = molecular_system.n_atoms
    result = []
    try:
        items = list(selection)
    except TypeError:
        raise CGFlowError(f"slow atoms {selection!r}: expected a selection text or a list of 0-based indices") from None
    for item in items:
        if isinstance(item, bool) or type(item).__name__ in ("bool", "bool_"):
            raise CGFlowError("slow atoms: got a list of true and false, expected 0-based atom indices")
        try:
            result.append(operator.index(item))
        except TypeError:
            raise CGFlowError(f"slow atoms: {item!r} is not a whole number; expected 0-based atom indices") from None
    outside = [i for i in result if not 0 <= i < n_atoms]
    if outside:
        raise CGFlowError(f"slow atoms: {outside[:5]} not in range; indices go from 0 to {n_atoms - 1}")
    repeated = sorted({i for i in result if result.count(i) > 1})
    if repeated:
        raise CGFlowError(f"slow atoms: {repeated[:5]} given more than once")
    return sorted(result)


def _backbone(molecular_system: MolecularSystem) -> list[int]:
    residues = list(molecular_system.topology.residues())
    main = [_main_chain(residue) for residue in residues]
    if not any(main):
        raise CGFlowError(
            "slow atoms 'backbone': no residue has the atoms N, CA and C of an amino acid; use 'heavy', an "
            'MDTraj selection such as "name C1 C2 C3", or a list of indices'
        )
    amino = {i for atoms in main for i in atoms}
    graph = bond_graph(molecular_system.n_atoms, molecular_system.bonds)
    chosen = set(amino)
    for residue, atoms in zip(residues, main, strict=True):
        if not atoms:
            chosen |= _cap(residue, amino, graph, molecular_system.elements)
    return sorted(chosen)


def _main_chain(residue: Any) -> list[int]:
    """Indices of N, CA and C, or nothing if the residue lacks one of them."""
    named = {(atom.name, atom.element.symbol): atom.index for atom in residue.atoms() if atom.element is not None}
    wanted = [("N", "N"), ("CA", "C"), ("C", "C")]
    return [named[key] for key in wanted] if all(key in named for key in wanted) else []


def _cap(residue: Any, amino: set[int], graph: nx.Graph, elements: list[str]) -> set[int]:
    """The atom of a cap that joins it to an amino acid by a C-N bond, and the carbons on it; nothing if it is no cap.

    So ACE gives C and CH3, FOR gives C, NME gives N and its carbon under any name, NH2 gives N.
    """
    inside = {atom.index for atom in residue.atoms()}
    chosen = set()
    for i in inside:
        partners = [j for j in graph[i] if j in amino]
        if any({elements[i], elements[j]} == {"C", "N"} for j in partners):
            chosen.add(i)
            chosen.update(j for j in graph[i] if j in inside and elements[j] == "C")
    return chosen


def _heavy(molecular_system: MolecularSystem) -> list[int]:
    """All but hydrogens, save the one of a hydroxyl or thiol group.

    It turns alone, so its states differ, as those of a methyl group do not, and it binds to what is near: short
    chains do not go from one to the other.
    """
    graph, elements = bond_graph(molecular_system.n_atoms, molecular_system.bonds), molecular_system.elements
    light = {i for i, symbol in enumerate(elements) if symbol in ("H", "D")}
    alone = {
        i
        for i in light
        for parent in graph[i]
        if elements[parent] in ("O", "S", "Se") and len(graph[parent]) == 2 and not light.issuperset(graph[parent])
    }
    return [i for i in range(molecular_system.n_atoms) if i not in light or i in alone]


def _amide_hydrogens(molecular_system: MolecularSystem, slow: list[int]) -> set[int]:
    """Hydrogens on the nitrogens of amide bonds about which slow atoms turn.

    Half way, such a nitrogen is a pyramid, and its hydrogen on the one side or the other: short chains do not change
    sides, and which one they start on would decide the free energy of the cis state.
    """
    graph = bond_graph(molecular_system.n_atoms, molecular_system.bonds)
    elements, chosen = molecular_system.elements, set(slow)
    found = set()
    for bond in amide_bonds(graph, elements):
        if bond <= chosen and all(chosen & set(graph[i]) - bond for i in bond):
            found |= {i for atom in bond if elements[atom] == "N" for i in graph[atom] if elements[i] == "H"}
    return found


def _check(molecular_system: MolecularSystem, slow: list[int], name: str) -> None:
    n_atoms = molecular_system.n_atoms
    if not slow:
        raise CGFlowError(
            f"{name}: no atom is selected; compare the names with those in the structure, or use a preset, "
            "backbone or heavy"
        )
    if len(slow) == n_atoms:
        raise CGFlowError(f"{name}: all {n_atoms} atoms are selected; at least one must stay fast")
    if not len(molecular_system.bonds):  # particles of a target; the atoms of a molecule are connected
        return
    position = {atom: k for k, atom in enumerate(slow)}
    bonds = [(position[int(i)], position[int(j)]) for i, j in molecular_system.bonds if i in position and j in position]
    parts = connected_components(len(slow), bonds)
    if len(parts) > 1:
        listed = "; ".join(
            " ".join(molecular_system.atom_label(slow[k]) for k in part[:4]) + (" ..." if len(part) > 4 else "")
            for part in parts[:6]
        )
        raise CGFlowError(
            f"{name}: the {len(slow)} atoms are not bonded to one another in one piece but form "
            f"{len(parts)} parts ({listed}{'; ...' if len(parts) > 6 else ''}); add the atoms between them"
        )
    if len(slow) < _MINIMUM:
        labels = " ".join(molecular_system.atom_label(i) for i in slow)
        raise CGFlowError(f"{name}: {len(slow)} atom(s) selected ({labels}), at least {_MINIMUM} are needed")

"""Which atoms place which: the bond graph read as a Z-matrix, for the slow atoms and then for the fast ones.

Pure graph work on bonds, without positions. An atom i is placed by its bond i-a, its angle i-a-b and its dihedral
i-a-b-c. Where c is bonded to a, the dihedral is an *improper* one: it says how i sits relative to its sibling c, is
stiff, and carries the handedness of a. Otherwise it is the torsion of the bond a-b.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np

from openmm_cgflow.errors import CGFlowError

__all__ = [
    "ZMatrix",
    "fast_zmatrix",
    "reference_triple",
    "rotamers",
    "slow_zmatrix",
]


@dataclass(frozen=True)
class ZMatrix:
    """The order of placement and the three atoms that place each one.

    Attributes:
        atoms: Atom indices in the topology, in the order of placement, shape (n,).
        references: Atom indices a, b, c of each atom, shape (n, 3); -1 where the first three atoms have none.
        improper: Whether the dihedral is measured against a sibling, shape (n,) bool.
        rotatable: Whether the dihedral turns a bond that is neither in a ring nor held stiff, shape (n,) bool.
    """

    atoms: np.ndarray
    references: np.ndarray
    improper: np.ndarray
    rotatable: np.ndarray

    def without_first_three(self) -> ZMatrix:
        """The rows that have three references."""
        return ZMatrix(self.atoms[3:], self.references[3:], self.improper[3:], self.rotatable[3:])


def slow_zmatrix(
    graph: nx.Graph, slow: Sequence[int], stiff: Collection[frozenset[int]] = (), elements: Sequence[str] = ()
) -> ZMatrix:
    """Z-matrix of the slow atoms along their longest chain, branches as impropers.

    Arguments:
        graph: The molecule.
        slow: Slow atoms.
        stiff: Bonds that are not turned: their torsions vibrate around the input structure's.
        elements: Of all atoms; hydrogens are branches where another atom may be in the chain.

    Raises:
        CGFlowError: If the slow atoms contain a ring, whose closing bond has no coordinate of its own.
    """
    tree = graph.subgraph(slow)
    hydrogens = {i for i, element in enumerate(elements) if element == "H"}
    rings = nx.cycle_basis(tree)
    if rings:
        raise CGFlowError(
            f"the slow atoms contain a ring (atoms {sorted(rings[0])}, 0-based). Rings among the slow atoms are not "
            "supported: leave at least one atom of each ring out of partition.slow (init: --slow); fast atoms "
            "may form rings"
        )
    path = _longest_path(tree, hydrogens)
    parent: dict[int, int] = {}
    references = {path[0]: (-1, -1, -1), path[1]: (path[0], -1, -1), path[2]: (path[1], path[0], -1)}
    for child, above in nx.bfs_predecessors(tree, path[0]):
        parent[child] = above
    height = _heights(tree, path[0])
    queue, atoms = [path[0]], []
    while queue:
        atom = queue.pop(0)
        atoms.append(atom)
        below = (i for i in tree[atom] if parent.get(i) == atom)
        children = sorted(below, key=lambda i: (-height[i], i in hydrogens, i))
        for child in children:
            if child not in references:
                above = parent[atom]
                # A second child is measured against the first: its own torsion would turn the same bond twice.
                third = children[0] if child != children[0] else parent[above]
                references[child] = (atom, above, third)
        queue.extend(children)
    return _finish(graph, atoms, references, stiff)


def fast_zmatrix(graph: nx.Graph, slow: Sequence[int]) -> ZMatrix:
    """Z-matrix that places every fast atom from slow atoms and fast atoms placed before it.

    An atom whose parent has two placed neighbours sits in the frame of these three, so it follows the torsions on
    both sides; slow neighbours come first.
    """
    placed = list(slow)
    is_slow = set(slow)
    references: dict[int, tuple[int, int, int]] = {}
    known = set(placed)

    def neighbours(atom: int, *excluded: int) -> list[int]:
        return sorted((i for i in graph[atom] if i in known and i not in excluded), key=lambda i: (i not in is_slow, i))

    for parent in placed:  # grows while it is read: breadth first
        for atom in sorted(i for i in graph[parent] if i not in known):
            frame = neighbours(parent)
            if len(frame) < 2:
                frame = [frame[0], neighbours(frame[0], parent)[0]]
            references[atom] = (parent, frame[0], frame[1])
            known.add(atom)
            placed.append(atom)
    atoms = [atom for atom in placed if atom not in is_slow]
    return _finish(graph, atoms, references)


def reference_triple(graph: nx.Graph, slow: Sequence[int]) -> tuple[int, int, int]:
    """Three bonded slow atoms in the middle of the longest chain, for Cartesian coordinates with six fixed."""
    path = _longest_path(graph.subgraph(slow))
    start = (len(path) - 3) // 2
    return path[start], path[start + 1], path[start + 2]


def _finish(
    graph: nx.Graph,
    atoms: list[int],
    references: dict[int, tuple[int, int, int]],
    stiff: Collection[frozenset[int]] = (),
) -> ZMatrix:
    turning = {frozenset(edge) for edge in nx.bridges(graph)} - set(stiff)
    rows = [references[atom] for atom in atoms]
    improper = [c >= 0 and graph.has_edge(a, c) for a, _, c in rows]
    rotatable = [
        c >= 0 and not sibling and frozenset((a, b)) in turning
        for (a, b, c), sibling in zip(rows, improper, strict=True)
    ]
    return ZMatrix(
        np.array(atoms, dtype=np.int64),
        np.array(rows, dtype=np.int64).reshape(-1, 3),
        np.array(improper, dtype=bool),
        np.array(rotatable, dtype=bool),
    )


def _longest_path(tree: nx.Graph, hydrogens: Collection[int] = ()) -> list[int]:
    """The longest chain of a tree, if possible without hydrogens at its ends.

    Ties go to the lower indices, so the result does not depend on bond order.
    """

    def farthest(start: int) -> int:
        lengths = nx.single_source_shortest_path_length(tree, start)
        return min(lengths, key=lambda i: (-lengths[i], i in hydrogens, i))

    end = farthest(min(tree))
    start = farthest(end)
    path = nx.shortest_path(tree, start, end)
    return path if path[0] < path[-1] else path[::-1]


def _heights(tree: nx.Graph, root: int) -> dict[int, int]:
    height = dict.fromkeys(tree, 0)
    for child, parent in reversed(list(nx.bfs_predecessors(tree, root))):
        height[parent] = max(height[parent], height[child] + 1)
    return height


def rotamers(fast: ZMatrix, elements: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """Torsions of fast atoms whose states differ: they turn a heavy atom, or a hydrogen alone, as in hydroxyl groups.

    A methyl group looks the same after a third of a turn.
    """
    found = []
    for parent, *rest in fast.references[fast.rotatable].tolist():
        # The torsion turns all atoms on its parent together, whichever of them carries it.
        turned = fast.atoms[fast.references[:, 0] == parent].tolist()
        told_apart = [atom for atom in turned if elements[atom] != "H" or len(turned) == 1]
        found += [(rest[1], rest[0], parent, atom) for atom in told_apart[:1]]
    return found

"""What bonds alone tell of a molecule: its graph, connected parts, amide bonds and stereocentres; without OpenMM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import networkx as nx
import numpy as np

__all__ = ["amide_bonds", "bond_graph", "connected_components", "stereocentres"]


def bond_graph(n_atoms: int, bonds: Iterable[Sequence[int]]) -> nx.Graph:
    """The molecule as an undirected graph of atom indices."""
    graph = nx.Graph()
    graph.add_nodes_from(range(n_atoms))
    graph.add_edges_from((int(i), int(j)) for i, j in bonds)
    return graph


def connected_components(n_atoms: int, bonds: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Sorted atom indices of each connected part, in order of their first atoms."""
    return sorted(sorted(part) for part in nx.connected_components(bond_graph(n_atoms, bonds)))


def amide_bonds(graph: nx.Graph, elements: Sequence[str]) -> set[frozenset[int]]:
    """C-N bonds of amides, peptide bonds among them: a carbonyl carbon and a nitrogen of three neighbours each.

    In a molecule without hydrogens two neighbours of the nitrogen are enough.
    """
    nitrogen_degrees = (3,) if "H" in elements else (2, 3)

    def is_carbonyl(atom: int) -> bool:
        oxygens = [i for i in graph[atom] if elements[i] == "O" and graph.degree(i) == 1]
        return elements[atom] == "C" and graph.degree(atom) == 3 and len(oxygens) == 1

    return {
        frozenset((c, n))
        for edge in graph.edges
        for c, n in (edge, edge[::-1])
        if is_carbonyl(c) and elements[n] == "N" and graph.degree(n) in nitrogen_degrees
    }


def stereocentres(graph: nx.Graph, elements: Sequence[str]) -> np.ndarray:
    """Atoms with four neighbours that differ within 16 bonds, with these neighbours.

    In a molecule without hydrogens, a carbon with three such neighbours, none of them a carbonyl's oxygen, is one too:
    it stands in for its own hydrogen.

    Returns:
        Rows of (n1, n2, n3, n4), shape (n_centres, 4); the handedness is the sign of their signed volume.
    """
    labelled = graph.copy()
    nx.set_node_attributes(labelled, {i: element for i, element in enumerate(elements)}, "element")
    colours = nx.weisfeiler_lehman_subgraph_hashes(
        labelled, node_attr="element", iterations=16, include_initial_labels=True
    )
    rows = []
    for atom in graph:
        around = sorted(graph[atom])
        if "H" not in elements and len(around) == 3 and elements[atom] == "C":
            carbonyl = any(elements[i] == "O" and graph.degree(i) == 1 for i in around)
            around = [] if carbonyl else [*around, atom]
        if len(around) == 4 and len({tuple(colours[i]) for i in around}) == 4:
            rows.append(around)
    return np.array(rows, dtype=np.int64).reshape(-1, 4)

"""The Z-matrix is exact on known molecules and sound on any tree."""

import networkx as nx
import numpy as np
import pytest
from analytic import BONDS, n_atoms_of, random_tree
from molecules import alanine_dipeptide, molecule

from openmm_cgflow.coordinates.zmatrix import fast_zmatrix, reference_triple, rotamers, slow_zmatrix
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.bonds import amide_bonds, bond_graph


@pytest.fixture(scope="module")
def alanine():
    return alanine_dipeptide()


BACKBONE = ["ACE:CH3", "ACE:C", "ALA:N", "ALA:CA", "ALA:C", "NME:N", "NME:C"]


def named(names, zmatrix):
    return {
        names[atom]: tuple(names[r] for r in references if r >= 0)
        for atom, references in zip(zmatrix.atoms, zmatrix.references, strict=True)
    }


def test_slow_atoms_of_alanine_dipeptide(alanine):
    names, graph, _ = alanine
    zmatrix = slow_zmatrix(graph, [names.index(name) for name in BACKBONE])
    expected = {name: tuple(reversed(BACKBONE[max(0, k - 3) : k])) for k, name in enumerate(BACKBONE)}
    assert list(named(names, zmatrix)) == BACKBONE
    assert named(names, zmatrix) == expected
    assert zmatrix.rotatable.tolist() == [False] * 3 + [True] * 4
    assert not zmatrix.improper.any()


def test_slow_hydrogens_are_branches(alanine):
    """The last torsion is still that of the carbon, whose number is higher."""
    names, graph, elements = alanine
    slow = [names.index(name) for name in (*BACKBONE, "ALA:H", "NME:H")]
    zmatrix = slow_zmatrix(graph, slow, elements=elements)
    plain = slow_zmatrix(graph, [names.index(name) for name in BACKBONE])
    found, expected = named(names, zmatrix), named(names, plain)
    assert {name: found[name] for name in BACKBONE} == expected
    improper = {names[i] for i in zmatrix.atoms[zmatrix.improper]}
    assert improper == {"ALA:H", "NME:H"}
    assert zmatrix.rotatable.sum() == plain.rotatable.sum() == 4
    # Nor does the chain begin with one, though its number is the lowest.
    graph = bond_graph(5, [(0, 1), (1, 2), (2, 3), (1, 4)])
    assert slow_zmatrix(graph, range(5), elements="HNCCC").atoms[:3].tolist() == [3, 2, 1]


def test_fast_atoms_of_alanine_dipeptide(alanine):
    names, graph, _ = alanine
    zmatrix = fast_zmatrix(graph, [names.index(name) for name in BACKBONE])
    cap, ca, cb, end = "ACE:CH3", "ALA:CA", "ALA:CB", "NME:C"
    assert named(names, zmatrix) == {
        "ACE:H1": (cap, "ACE:C", "ALA:N"),
        "ACE:H2": (cap, "ACE:C", "ACE:H1"),
        "ACE:H3": (cap, "ACE:C", "ACE:H1"),
        "ACE:O": ("ACE:C", cap, "ALA:N"),
        "ALA:H": ("ALA:N", "ACE:C", ca),
        "ALA:HA": (ca, "ALA:N", "ALA:C"),
        "ALA:CB": (ca, "ALA:N", "ALA:C"),
        "ALA:O": ("ALA:C", ca, "NME:N"),
        "ALA:HB1": (cb, ca, "ALA:N"),
        "ALA:HB2": (cb, ca, "ALA:HB1"),
        "ALA:HB3": (cb, ca, "ALA:HB1"),
        "NME:H": ("NME:N", "ALA:C", end),
        "NME:H1": (end, "NME:N", "ALA:C"),
        "NME:H2": (end, "NME:N", "NME:H1"),
        "NME:H3": (end, "NME:N", "NME:H1"),
    }
    turning = {names[i] for i in zmatrix.atoms[zmatrix.rotatable]}
    assert turning == {"ACE:H1", "ALA:HB1", "NME:H1"}  # three methyls, nothing else
    assert (zmatrix.improper == ~zmatrix.rotatable).all()


def test_reference_triple_is_in_the_middle(alanine):
    names, graph, _ = alanine
    triple = reference_triple(graph, [names.index(name) for name in BACKBONE])
    assert [names[i] for i in triple] == ["ALA:N", "ALA:CA", "ALA:C"]


def test_isobutane_has_one_improper_and_no_torsion():
    zmatrix = slow_zmatrix(bond_graph(4, BONDS["isobutane"]), range(4))
    assert zmatrix.atoms.tolist() == [0, 1, 2, 3]
    assert zmatrix.references.tolist() == [[-1, -1, -1], [0, -1, -1], [1, 0, -1], [1, 0, 2]]
    assert zmatrix.improper.tolist() == [False, False, False, True]
    assert not zmatrix.rotatable.any()


def test_valine_has_a_torsion_for_each_bond_and_an_improper_for_each_branch():
    bonds = BONDS["valine"]  # N CA C O CB CG1 CG2
    zmatrix = slow_zmatrix(bond_graph(7, bonds), range(7))
    rows = dict(zip(zmatrix.atoms.tolist(), zmatrix.references.tolist(), strict=True))
    assert zmatrix.atoms[:3].tolist() == [3, 2, 1]  # the longest chain is O C CA CB CG1
    assert rows[4] == [1, 2, 3] and rows[0] == [1, 2, 4]
    assert rows[5] == [4, 1, 2] and rows[6] == [4, 1, 5]
    assert set(zmatrix.atoms[zmatrix.rotatable]) == {4, 5}
    assert set(zmatrix.atoms[zmatrix.improper]) == {0, 6}


def ring_with_tail():
    return [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 2), (3, 6)]  # a four-ring 2-3-4-5 on a chain


def test_a_ring_of_slow_atoms_is_refused_by_name():
    graph = bond_graph(7, ring_with_tail())
    with pytest.raises(CGFlowError, match=r"contain a ring \(atoms \[2, 3, 4, 5\]"):
        slow_zmatrix(graph, range(7))


def test_a_ring_that_fast_atoms_close_is_stiff():
    graph = bond_graph(7, ring_with_tail())
    slow = [0, 1, 2, 3, 6]
    zmatrix = slow_zmatrix(graph, slow)
    rotatable = {frozenset(r[:2]) for r in zmatrix.references[zmatrix.rotatable].tolist()}
    assert rotatable == {frozenset((1, 2))}  # 2-3 is in the ring
    assert sorted(fast_zmatrix(graph, slow).atoms) == [4, 5]
    assert not fast_zmatrix(graph, slow).rotatable.any()


def test_stiff_bonds_are_not_turned(alanine):
    """The torsions of held peptide bonds stay, but as vibrations; all else is as without."""
    names, graph, elements = alanine
    slow = [names.index(name) for name in BACKBONE]
    free, held = slow_zmatrix(graph, slow), slow_zmatrix(graph, slow, amide_bonds(graph, elements))
    assert held.atoms.tolist() == free.atoms.tolist()
    assert held.references.tolist() == free.references.tolist()
    assert held.improper.tolist() == free.improper.tolist()
    turning = {names[i] for i in held.atoms[held.rotatable]}
    assert turning == {"ALA:C", "NME:N"}  # phi and psi
    assert {names[i] for i in free.atoms[free.rotatable]} - turning == {"ALA:CA", "NME:C"}  # the two omegas


def connected_subset(graph, size, rng):
    chosen = [int(rng.integers(len(graph)))]
    while len(chosen) < size:
        border = sorted({j for i in chosen for j in graph[i]} - set(chosen))
        chosen.append(int(rng.choice(border)))
    return chosen


def check_rows(graph, zmatrix, placed):
    for row, (atom, (a, b, c)) in enumerate(zip(zmatrix.atoms.tolist(), zmatrix.references.tolist(), strict=True)):
        references = [r for r in (a, b, c) if r >= 0]
        assert set(references) <= placed and atom not in placed
        assert len(set(references)) == len(references)
        for first, second in zip([atom, a], [a, b], strict=True):  # i-a and a-b are bonds
            assert second < 0 or graph.has_edge(first, second)
        if c >= 0:
            assert graph.has_edge(a, c) != graph.has_edge(b, c)
            assert zmatrix.improper[row] == graph.has_edge(a, c)
            assert zmatrix.rotatable[row] == graph.has_edge(b, c)  # a tree has no rings
        placed.add(atom)


@pytest.mark.parametrize("seed", range(40))
def test_random_trees(seed):
    """Every atom is placed once, by atoms placed before it, and every bond turns once."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 30))
    bonds = random_tree(n, rng)
    graph = bond_graph(n, bonds)
    slow = connected_subset(graph, int(rng.integers(3, n + 1)), rng)
    slow_rows, fast_rows = slow_zmatrix(graph, slow), fast_zmatrix(graph, sorted(slow))
    placed: set[int] = set()
    check_rows(graph, slow_rows, placed)
    assert placed == set(slow)
    assert (slow_rows.references[3:] >= 0).all()
    check_rows(graph, fast_rows, placed)
    assert placed == set(range(n))

    references = np.concatenate((slow_rows.references[slow_rows.rotatable], fast_rows.references[fast_rows.rotatable]))
    turned = [frozenset(row[:2]) for row in references.tolist()]
    inner = {frozenset(bond) for bond in bonds if min(graph.degree[bond[0]], graph.degree[bond[1]]) > 1}
    assert len(turned) == len(set(turned))
    assert set(turned) == inner

    shuffled = bond_graph(n, [bonds[k][:: int(rng.choice([-1, 1]))] for k in rng.permutation(len(bonds))])
    again = slow_zmatrix(shuffled, [slow[k] for k in rng.permutation(len(slow))]), fast_zmatrix(shuffled, sorted(slow))
    for first, second in zip((slow_rows, fast_rows), again, strict=True):
        assert first.atoms.tolist() == second.atoms.tolist()
        assert first.references.tolist() == second.references.tolist()
    assert reference_triple(graph, slow) == reference_triple(shuffled, slow)


@pytest.mark.parametrize("name", BONDS)
def test_slow_atoms_start_with_the_longest_chain(name):
    bonds = BONDS[name]
    graph = bond_graph(n_atoms_of(bonds), bonds)
    zmatrix = slow_zmatrix(graph, range(len(graph)))
    first = zmatrix.atoms[:3].tolist()
    longest = nx.diameter(graph)
    assert max(nx.single_source_shortest_path_length(graph, first[0]).values()) == longest
    assert graph.has_edge(*first[:2]) and graph.has_edge(*first[1:])


# ---------------------------------------------------------------- torsions of fast atoms whose states differ


@pytest.mark.parametrize(
    ("text", "bonds", "expected"),
    [
        ("CCCC" + "HHH", [(0, 1), (1, 2), (2, 3), (2, 4), (2, 5), (2, 6)], [(0, 1, 2, 3)]),  # a heavy atom
        ("CCC" + "HHH", [(0, 1), (1, 2), (2, 3), (2, 4), (2, 5)], []),  # a methyl group
        ("CCOH", [(0, 1), (1, 2), (2, 3)], [(0, 1, 2, 3)]),  # a hydroxyl group
    ],
)
def test_rotamers(text, bonds, expected):
    """Slow atoms 0, 1 and 2: what 2 carries turns about its bond with 1."""
    graph, elements = molecule(text, bonds)
    assert rotamers(fast_zmatrix(graph, range(3)), elements) == expected

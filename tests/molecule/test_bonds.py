"""Connected parts, amide bonds and stereocentres of known molecules."""

import pytest
from molecules import alanine_dipeptide, molecule

from openmm_cgflow.molecule.bonds import amide_bonds, bond_graph, stereocentres


@pytest.fixture(scope="module")
def alanine():
    return alanine_dipeptide()


def test_stereocentres(alanine):
    names, graph, elements = alanine
    rows = stereocentres(graph, elements)
    around = sorted(names.index(f"ALA:{name}") for name in ("N", "HA", "C", "CB"))
    assert rows.tolist() == [around]

    star = bond_graph(5, [(0, 1), (0, 2), (0, 3), (0, 4)])
    assert stereocentres(star, ["C", "H", "F", "Cl", "Br"]).tolist() == [[1, 2, 3, 4]]
    assert stereocentres(star, ["C", "H", "H", "Cl", "Br"]).shape == (0, 4)


def test_glycine_has_no_stereocentre(alanine):
    names, graph, elements = alanine
    glycine = graph.copy()
    glycine.remove_nodes_from([names.index(f"ALA:HB{k}") for k in (1, 2, 3)])
    elements = ["H" if name == "ALA:CB" else element for name, element in zip(names, elements, strict=True)]
    assert len(stereocentres(glycine, elements)) == 0


def test_a_difference_far_away_makes_a_stereocentre():
    """3-methyl-heptane-like: the arms of atom 0 differ in length only."""
    arms = [(0, 1), (0, 2), (0, 3), (3, 4), (4, 5), (0, 6), (6, 7), (7, 8)]
    elements = ["C", "H", "F", *"CCC", *"CCC"]
    assert len(stereocentres(bond_graph(9, arms), elements)) == 0
    longer = [*arms, (8, 9)]
    assert stereocentres(bond_graph(10, longer), [*elements, "C"]).tolist() == [[1, 2, 3, 6]]


def without_hydrogens(graph, elements):
    """The molecule with its heavy atoms alone, and their indices in it."""
    heavy = [i for i, element in enumerate(elements) if element != "H"]
    place = {atom: k for k, atom in enumerate(heavy)}
    bonds = [(place[i], place[j]) for i, j in graph.edges if i in place and j in place]
    return bond_graph(len(heavy), bonds), [elements[i] for i in heavy], heavy


def test_alanine_dipeptide_without_hydrogens(alanine):
    """CA stands in for HA; carbonyl carbons are flat; peptide bonds are still amides."""
    names, graph, elements = alanine
    heavy_graph, heavy_elements, heavy = without_hydrogens(graph, elements)
    (centre,) = stereocentres(heavy_graph, heavy_elements).tolist()
    assert {names[heavy[i]] for i in centre} == {"ALA:N", "ALA:CB", "ALA:C", "ALA:CA"}
    assert names[heavy[centre[3]]] == "ALA:CA"
    found = {frozenset(names[heavy[i]] for i in bond) for bond in amide_bonds(heavy_graph, heavy_elements)}
    assert found == {frozenset(("ACE:C", "ALA:N")), frozenset(("ALA:C", "NME:N"))}


def test_amide_bonds_of_alanine_dipeptide(alanine):
    names, graph, elements = alanine
    found = {frozenset(names[i] for i in bond) for bond in amide_bonds(graph, elements)}
    assert found == {frozenset(("ACE:C", "ALA:N")), frozenset(("ALA:C", "NME:N"))}


def test_a_tertiary_amide_is_an_amide():
    """As before proline: the nitrogen's third neighbour is a carbon, not a hydrogen."""
    graph, elements = molecule("CCONCC", [(0, 1), (1, 2), (1, 3), (3, 4), (3, 5)])
    assert amide_bonds(graph, elements) == {frozenset((1, 3))}


def test_both_bonds_of_urea_are_amides():
    graph, elements = molecule("NCON" + "HHHH", [(0, 1), (1, 2), (1, 3), (0, 4), (0, 5), (3, 6), (3, 7)])
    assert amide_bonds(graph, elements) == {frozenset((0, 1)), frozenset((1, 3))}


@pytest.mark.parametrize(
    ("text", "bonds"),
    [
        ("CCOOC", [(0, 1), (1, 2), (1, 3), (3, 4)]),  # ester
        ("CCNHH", [(0, 1), (1, 2), (2, 3), (2, 4)]),  # amine, the carbon without its hydrogens
        ("CCONHHC", [(0, 1), (1, 2), (1, 3), (3, 4), (3, 5), (3, 6)]),  # four neighbours: no lone pair to conjugate
        ("CCNCH", [(0, 1), (1, 2), (2, 3), (1, 4)]),  # imine
        ("CCOHNHH", [(0, 1), (1, 2), (2, 3), (1, 4), (4, 5), (4, 6)]),  # a hydroxyl where the carbonyl would be
        ("CSONHH", [(0, 1), (1, 2), (1, 3), (3, 4), (3, 5)]),  # sulfur instead of carbon
    ],
    ids=["ester", "amine", "ammonium", "imine", "hemiaminal", "sulfinamide"],
)
def test_what_is_no_amide(text, bonds):
    graph, elements = molecule(text, bonds)
    assert amide_bonds(graph, elements) == set()

"""Small molecules as graphs of their bonds."""

from pathlib import Path

import mdtraj

from openmm_cgflow.molecule.bonds import bond_graph

_SYSTEMS = Path(__file__).resolve().parent.parent / "systems"


def alanine_dipeptide():
    """Names such as ALA:CA, the graph, and the elements."""
    topology = mdtraj.load_topology(str(_SYSTEMS / "alanine_dipeptide" / "alanine_dipeptide.pdb"))
    names = [f"{atom.residue.name}:{atom.name}" for atom in topology.atoms]
    bonds = [(bond.atom1.index, bond.atom2.index) for bond in topology.bonds]
    return names, bond_graph(len(names), bonds), [atom.element.symbol for atom in topology.atoms]


def molecule(text, bonds):
    """Elements of atoms 0, 1, 2... as letters, and their graph."""
    return bond_graph(len(text), bonds), list(text)

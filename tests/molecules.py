"""The small molecules of tests: their files, and as frames, systems and graphs of their bonds."""

from pathlib import Path

import mdtraj

from openmm_cgflow import MolecularSystem
from openmm_cgflow.molecule.bonds import bond_graph

_SYSTEMS = Path(__file__).resolve().parent.parent / "systems"
ALANINE = _SYSTEMS / "alanine_dipeptide" / "alanine_dipeptide.pdb"
BUTANE = _SYSTEMS / "butane" / "butane.pdb"
BUTANE_FORCEFIELD = [str(_SYSTEMS / "butane" / "butane.xml")]
AMBER = ["amber99sbildn.xml"]
AMBER_IN_WATER = [*AMBER, "amber99_obc.xml"]
"""An implicit solvent."""


def frame(path):
    """Structure and topology for MDTraj."""
    return mdtraj.load(str(path))


def alanine_in_water():
    return MolecularSystem.from_files(ALANINE, AMBER_IN_WATER)


def alanine_in_vacuum():
    return MolecularSystem.from_files(ALANINE, AMBER)


def butane():
    return MolecularSystem.from_files(BUTANE, BUTANE_FORCEFIELD)


def alanine_dipeptide():
    """Names such as ALA:CA, the graph, and the elements."""
    topology = frame(ALANINE).topology
    names = [f"{atom.residue.name}:{atom.name}" for atom in topology.atoms]
    bonds = [(bond.atom1.index, bond.atom2.index) for bond in topology.bonds]
    return names, bond_graph(len(names), bonds), [atom.element.symbol for atom in topology.atoms]


def molecule(text, bonds):
    """Elements of atoms 0, 1, 2... as letters, and their graph."""
    return bond_graph(len(text), bonds), list(text)

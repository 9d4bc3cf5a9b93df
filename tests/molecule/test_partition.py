"""Which atoms are slow: exact names for presets, and a reason for every refusal."""

import json
from pathlib import Path

import molecules
import numpy as np
import openmm
import pytest
from openmm import app

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem

SYSTEMS = Path(__file__).parents[2] / "systems"
# Residue, atoms, bonds inside the residue; the C of each residue is joined to the N of the next.
ACE = ("ACE", "CH3 H1 H2 H3 C O", "CH3-H1 CH3-H2 CH3-H3 CH3-C C-O")
FOR = ("FOR", "H C O", "H-C C-O")
ALA = ("ALA", "N H CA HA CB HB1 HB2 HB3 C O", "N-H N-CA CA-HA CA-CB CB-HB1 CB-HB2 CB-HB3 CA-C C-O")
SER = ("SER", "N H CA HA CB HB1 HB2 OG HG C O", "N-H N-CA CA-HA CA-CB CB-HB1 CB-HB2 CB-OG OG-HG CA-C C-O")
NME = ("NME", "N H C H1 H2 H3", "N-H N-C C-H1 C-H2 C-H3")
NME_CH3 = ("NME", "N H CH3 H1 H2 H3", "N-H N-CH3 CH3-H1 CH3-H2 CH3-H3")
NMA = ("NMA", "N H CA HA1 HA2 HA3", "N-H N-CA CA-HA1 CA-HA2 CA-HA3")
NHE = ("NHE", "N HN1 HN2", "N-HN1 N-HN2")
COO = ("GLY", "N H CA HA2 HA3 C O OXT", "N-H N-CA CA-HA2 CA-HA3 CA-C C-O C-OXT")
GLY = ("GLY", "N H1 H2 H3 CA HA2 HA3 C O", "N-H1 N-H2 N-H3 N-CA CA-HA2 CA-HA3 CA-C C-O")


def peptide(*residues):
    """A molecule with these residues in a row, joined by C-N bonds; its geometry means nothing."""
    topology = app.Topology()
    chain = topology.addChain()
    previous = None
    for name, atoms, bonds in residues:
        residue = topology.addResidue(name, chain)
        made = {atom: topology.addAtom(atom, app.Element.getBySymbol(atom[0]), residue) for atom in atoms.split()}
        for bond in bonds.split():
            first, second = bond.split("-")
            topology.addBond(made[first], made[second])
        if previous is not None:
            topology.addBond(previous, made["N"])
        previous = made.get("C")
    n_atoms = topology.getNumAtoms()
    return MolecularSystem(topology, openmm.System(), np.zeros((n_atoms, 3)))


def names(molecule, partition):
    return " ".join(molecule.atom_label(i) for i in partition.slow)


@pytest.fixture(scope="module")
def alanine():
    return molecules.alanine_in_vacuum()


@pytest.fixture(scope="module")
def butane():
    return molecules.butane()


def test_backbone_of_alanine_dipeptide(alanine):
    partition = Partition.resolve(alanine, "backbone")
    assert names(alanine, partition) == "ACE1:CH3 ACE1:C ALA2:N ALA2:CA ALA2:C NME3:N NME3:C"
    assert partition.slow == (0, 4, 6, 8, 10, 16, 18)
    assert sorted(partition.slow + partition.fast) == list(range(22)) and partition.fast == tuple(
        sorted(partition.fast)
    )


@pytest.mark.parametrize(
    ("residues", "expected"),
    [
        ((ACE, ALA, NME_CH3), "ACE1:CH3 ACE1:C ALA2:N ALA2:CA ALA2:C NME3:N NME3:CH3"),
        ((ACE, ALA, NMA), "ACE1:CH3 ACE1:C ALA2:N ALA2:CA ALA2:C NMA3:N NMA3:CA"),
        ((FOR, ALA, NHE), "FOR1:C ALA2:N ALA2:CA ALA2:C NHE3:N"),
        ((GLY, ALA, COO), "GLY1:N GLY1:CA GLY1:C ALA2:N ALA2:CA ALA2:C GLY3:N GLY3:CA GLY3:C"),
        ((ACE, ALA, ALA, NME), "ACE1:CH3 ACE1:C ALA2:N ALA2:CA ALA2:C ALA3:N ALA3:CA ALA3:C NME4:N NME4:C"),
    ],
)
def test_backbone_with_other_caps_and_free_ends(residues, expected):
    molecule = peptide(*residues)
    assert names(molecule, Partition.resolve(molecule, "backbone")) == expected


@pytest.mark.parametrize(
    ("residues", "expected"),
    [
        (
            (ACE, ALA, NME_CH3),
            "ACE1:CH3 ACE1:C ALA2:N ALA2:CA ALA2:C ALA2:H NME3:N NME3:CH3 NME3:H",
        ),
        ((FOR, ALA, NHE), "FOR1:C ALA2:N ALA2:CA ALA2:C NHE3:N"),  # nothing slow that would turn
    ],
)
def test_hydrogens_of_amide_bonds_that_turn_are_slow(residues, expected):
    molecule = peptide(*residues)
    partition = Partition.resolve(molecule, "backbone", sampled_amides=True)
    assert sorted(names(molecule, partition).split()) == sorted(expected.split())


def test_heavy(alanine, butane):
    assert names(butane, Partition.resolve(butane, "heavy")) == "BUT1:C1 BUT1:C2 BUT1:C3 BUT1:C4"
    heavy = Partition.resolve(alanine, "heavy")
    assert len(heavy.slow) == 10 and not any(alanine.elements[i] == "H" for i in heavy.slow)
    assert {alanine.elements[i] for i in heavy.fast} == {"H"}


def test_heavy_has_the_hydrogens_of_hydroxyl_groups():
    molecule = peptide(FOR, SER, NHE)
    expected = "FOR1:C FOR1:O SER2:N SER2:CA SER2:CB SER2:OG SER2:HG SER2:C SER2:O NHE3:N"
    assert names(molecule, Partition.resolve(molecule, "heavy")) == expected


def test_backbone_without_amino_acids_suggests_heavy(butane):
    with pytest.raises(CGFlowError, match="no residue has the atoms N, CA and C of an amino acid; use 'heavy'"):
        Partition.resolve(butane, "backbone")


def test_mdtraj_selections_and_lists_agree(alanine):
    by_text = Partition.resolve(alanine, "resid 1 and name N CA C CB")
    assert names(alanine, by_text) == "ALA2:N ALA2:CA ALA2:C ALA2:CB"
    for indices in ([12, 6, 10, 8], (6, 8, 10, 12), np.array([6, 8, 10, 12])):
        assert Partition.resolve(alanine, indices) == by_text


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("name XX", "'name XX': no atom is selected"),
        ("", "MDTraj selection"),
        ([], "given as 0 indices: no atom is selected"),
        ("all", "all 22 atoms are selected; at least one must stay fast"),
        (list(range(22)), "all 22 atoms"),
        ("name CA C", r"3 parts \(ACE1:C; ALA2:CA ALA2:C; NME3:C\)"),
        ("name CB N", r"'name CB N': the 3 atoms .* form 3 parts \(ALA2:N; ALA2:CB; NME3:N\)"),
        ([0, 4, 6, 16, 18], r"2 parts \(ACE1:CH3 ACE1:C ALA2:N; NME3:N NME3:C\)"),
        ([0, 4], r"2 atom\(s\) selected \(ACE1:CH3 ACE1:C\), at least 3"),
        ("name CA and", "neither a preset .* nor an MDTraj selection"),
        ("backbon", "neither a preset .* nor an MDTraj selection"),
        ("nmae CA", "neither a preset"),
        ("name CA; import os", "neither a preset"),
        ([0, 22], r"\[22\] not in range; indices go from 0 to 21"),
        ([-1, 0, 4], r"\[-1\] not in range"),
        ([0, 4, 4, 6], r"\[4\] given more than once"),
        ([0, 4.0, 6], "4.0 is not a whole number"),
        ([0, "C", 6], "'C' is not a whole number"),
        ([True, False, True], "list of true and false"),
        (np.ones(22, dtype=bool), "list of true and false"),
        (7, "expected a selection text or a list"),
        (None, "expected a selection text or a list"),
    ],
)
def test_refusals_give_the_reason(alanine, selection, message):
    with pytest.raises(CGFlowError, match=message):
        Partition.resolve(alanine, selection)


def test_describe_lists_every_atom_once(alanine):
    text = Partition.resolve(alanine, "backbone").describe(alanine)
    lines = text.splitlines()
    assert lines[0] == "7 slow and 15 fast atoms of 22"
    assert lines[3].split() == ["ALA2", "N", "CA", "C", "H", "HA", "O", "CB", "HB1", "HB2", "HB3"]
    assert sum(len(line.split()) - 1 for line in lines[2:]) == 22
    only_heavy = Partition.resolve(alanine, "resname ALA and not element H").describe(alanine)
    assert only_heavy.splitlines()[2].split()[:2] == ["ACE1", "-"]


def test_to_json_can_be_read_back(alanine):
    partition = Partition.resolve(alanine, "backbone")
    tree = json.loads(json.dumps(partition.to_json(alanine)))
    assert tree["slow_atoms"][0] == "ACE1:CH3" and tree["n_atoms"] == 22
    assert Partition.resolve(alanine, tree["slow"]) == partition
    assert tree["fast"] == list(partition.fast)

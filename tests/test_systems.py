"""The example systems: right atoms, bonds, handedness, and parameters from where they are said to be from."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from openmm import app, unit


def _positions(pdb):
    return pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer)


@pytest.mark.parametrize(("name", "n_atoms", "n_bonds"), [("alanine_dipeptide", 22, 21), ("butane", 14, 13)])
def test_openmm_reads_every_bond(systems, name, n_atoms, n_bonds):
    pdb = app.PDBFile(str(systems / name / f"{name}.pdb"))
    assert (pdb.topology.getNumAtoms(), pdb.topology.getNumBonds()) == (n_atoms, n_bonds)
    xyz = _positions(pdb)
    lengths = [np.linalg.norm(xyz[bond.atom1.index] - xyz[bond.atom2.index]) for bond in pdb.topology.bonds()]
    assert 0.09 < min(lengths) < max(lengths) < 0.16


@pytest.mark.parametrize("name", ["alanine_dipeptide", "butane"])
def test_data_without_code(systems, name):
    assert {path.suffix for path in (systems / name).iterdir()} <= {".pdb", ".yaml", ".md", ".xml"}
    assert (systems / name / "SOURCE.md").is_file()


def test_alanine_is_left_handed(systems):
    pdb = app.PDBFile(str(systems / "alanine_dipeptide" / "alanine_dipeptide.pdb"))
    xyz = _positions(pdb)
    at = {atom.name: xyz[atom.index] for atom in pdb.topology.atoms() if atom.residue.name == "ALA"}
    # Seen from HA, CO, R and N follow each other clockwise.
    away = at["CA"] - at["HA"]
    assert np.dot(away, np.cross(at["C"] - at["CA"], at["CB"] - at["CA"])) > 0
    assert np.dot(away, np.cross(at["CB"] - at["CA"], at["N"] - at["CA"])) > 0


def _parameters(tree):
    """Every bonded term between CT and HC, and their Lennard-Jones parameters."""
    root = tree.getroot()
    types = {node.get("name"): node.get("class") for node in root.iter("Type")}
    found = {}
    for tag in ("Bond", "Angle", "Proper"):
        for node in root.iter(tag):
            classes = [node.get(key) for key in ("class1", "class2", "class3", "class4") if node.get(key) is not None]
            if classes and set(classes) <= {"CT", "HC"}:
                values = {key: float(value) for key, value in node.attrib.items() if not key.startswith("class")}
                found[tag, *classes] = values
    for node in root.find("NonbondedForce").iter("Atom"):
        name = node.get("class") or types[node.get("type")]
        if name in ("CT", "HC"):
            found["Atom", name] = {key: float(node.get(key)) for key in ("sigma", "epsilon")}
    scales = root.find("NonbondedForce").attrib
    found["scales"] = {key: float(scales[key]) for key in ("coulomb14scale", "lj14scale")}
    return found


def test_butane_has_the_parameters_of_parm99(systems):
    ours = _parameters(ElementTree.parse(systems / "butane" / "butane.xml"))
    theirs = _parameters(ElementTree.parse(Path(app.__file__).parent / "data" / "amber99sbildn.xml"))
    assert len(ours) == 11
    assert ours == {key: theirs[key] for key in ours}


def test_butane_is_neutral_and_whole(systems):
    pdb = app.PDBFile(str(systems / "butane" / "butane.pdb"))
    system = app.ForceField(str(systems / "butane" / "butane.xml")).createSystem(pdb.topology)
    forces = {force.getName(): force for force in system.getForces()}
    nonbonded = forces["NonbondedForce"]
    charges = [nonbonded.getParticleParameters(i)[0].value_in_unit(unit.elementary_charge) for i in range(14)]
    assert abs(sum(charges)) < 1e-12
    assert forces["HarmonicBondForce"].getNumBonds() == 13
    assert forces["HarmonicAngleForce"].getNumAngles() == 24
    torsions = forces["PeriodicTorsionForce"]
    assert len({tuple(torsions.getTorsionParameters(i)[:4]) for i in range(torsions.getNumTorsions())}) == 27

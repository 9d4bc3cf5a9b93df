"""The example systems: right atoms, bonds and handedness, parameters from where they are said to be from."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from openmm import app, unit

from openmm_cgflow.config import load_config
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.sanitize import energy_and_forces
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.runs.build import load_molecule
from openmm_cgflow.units import thermal_beta


def _positions(pdb):
    return pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer)


SIZES = [
    ("alanine_dipeptide", 22, 21),
    ("alanine_dipeptide_ff96", 22, 21),
    ("alanine_dipeptide_heavy", 10, 9),
    ("alanine_hexapeptide", 62, 61),
    ("alanine_tetrapeptide", 42, 41),
    ("butane", 14, 13),
    ("glycine_dipeptide", 19, 18),
    ("glycine_hexapeptide", 47, 46),
    ("glycine_tetrapeptide", 33, 32),
    ("valine_dipeptide", 28, 27),
]
OLIGOPEPTIDES = [
    ("alanine_hexapeptide", "AAAAA"),
    ("alanine_tetrapeptide", "AAA"),
    ("glycine_hexapeptide", "GGGGG"),
    ("glycine_tetrapeptide", "GGG"),
]
HEAVY = "alanine_dipeptide_heavy"  # its energy needs files that are not in the repository
TARGETS = ["double_well", "gmm_10d", "gmm_2d"]


def test_every_system_is_here(systems):
    molecules = [name for name, *_ in SIZES]
    assert sorted(path.name for path in systems.iterdir() if path.is_dir()) == sorted([*molecules, *TARGETS])


@pytest.mark.parametrize("name", TARGETS)
def test_configuration_of_a_target_loads_and_names_its_own_run(systems, name):
    path = systems / name / f"{name}.yaml"
    config = load_config(path)
    assert config.system.target is not None
    assert thermal_beta(config.temperature) == pytest.approx(1.0, abs=1e-6)
    molecule = load_molecule(config)
    assert Partition.resolve(molecule, config.partition.slow).fast
    for command in ("train", "evaluate"):
        assert f"openmm-cgflow {command}" in path.read_text()
    assert (systems / name / "SOURCE.md").is_file()


@pytest.mark.parametrize(("name", "n_atoms", "n_bonds"), SIZES)
def test_openmm_reads_every_bond(systems, name, n_atoms, n_bonds):
    pdb = app.PDBFile(str(systems / name / f"{name}.pdb"))
    assert (pdb.topology.getNumAtoms(), pdb.topology.getNumBonds()) == (n_atoms, n_bonds)
    xyz = _positions(pdb)
    lengths = [np.linalg.norm(xyz[bond.atom1.index] - xyz[bond.atom2.index]) for bond in pdb.topology.bonds()]
    assert 0.09 < min(lengths) < max(lengths) < 0.16


@pytest.mark.parametrize("name", [name for name, *_ in SIZES])
def test_data_without_code(systems, name):
    assert {path.suffix for path in (systems / name).iterdir()} <= {".pdb", ".yaml", ".md", ".xml"}
    assert (systems / name / "SOURCE.md").is_file()


@pytest.mark.parametrize("name", [name for name, *_ in SIZES if name != HEAVY])
def test_configuration_loads_and_names_its_own_run(systems, name):
    path = systems / name / f"{name}.yaml"
    config = load_config(path)
    assert config.temperature == 300.0
    molecule = MolecularSystem.from_files(config.system)
    energy, forces = energy_and_forces(molecule.system, molecule.positions)
    # Minimised where it is, but for held torsions and the rounding of a PDB file.
    assert np.isfinite(energy)
    assert np.abs(forces).max() < 200.0
    command = next(line for line in path.read_text().splitlines() if "openmm-cgflow train" in line)
    assert f"systems/{name}/{name}.yaml" in command


@pytest.mark.parametrize(
    ("name", "slow"),
    [
        ("glycine_dipeptide", "ACE1:CH3 ACE1:C GLY2:N GLY2:CA GLY2:C NME3:N NME3:C"),
        (
            "glycine_tetrapeptide",
            "ACE1:CH3 ACE1:C GLY2:N GLY2:CA GLY2:C GLY3:N GLY3:CA GLY3:C GLY4:N GLY4:CA GLY4:C NME5:N NME5:C",
        ),
        ("alanine_dipeptide_ff96", "ACE1:CH3 ACE1:C ALA2:N ALA2:CA ALA2:C NME3:N NME3:C"),
        (
            "valine_dipeptide",
            "ACE1:CH3 ACE1:C VAL2:N VAL2:CA VAL2:C VAL2:CB VAL2:CG1 VAL2:CG2 NME3:N NME3:C",
        ),
    ],
)
def test_slow_atoms(systems, name, slow):
    config = load_config(systems / name / f"{name}.yaml")
    molecule = MolecularSystem.from_files(config.system)
    partition = Partition.resolve(molecule, config.partition.slow)
    assert {molecule.atom_label(i) for i in partition.slow} == set(slow.split())


def test_the_heavy_atoms_of_the_paper(systems, root):
    path = systems / HEAVY / f"{HEAVY}.yaml"
    assert f"openmm-cgflow train systems/{HEAVY}/{HEAVY}.yaml" in path.read_text()
    with pytest.raises(CGFlowError, match=r"params\.npz: no such file|prior\.json: no such file"):
        MolecularSystem.from_files(load_config(path).system)
    folder = root.parent / "shared" / "reference" / "dimenet"
    if not folder.is_dir():
        pytest.skip("the weights of the paper's potential do not lie beside the checkout")
    files = {"weights": "params.npz", "prior": "prior.json"}
    config = load_config(path, [f"system.potential.files.{key}={folder / name}" for key, name in files.items()])
    assert config.temperature == 330.0
    molecule = MolecularSystem.from_files(config.system)
    partition = Partition.resolve(molecule, config.partition.slow)
    expected = "ACE1:CH3 ACE1:C ALA2:N ALA2:CA ALA2:C NME3:N NME3:C"
    assert [molecule.atom_label(i) for i in partition.slow] == expected.split()
    vectors = np.load(folder / "vectors.npz")
    energy, _ = energy_and_forces(molecule.system, vectors["positions"][0])
    assert energy == pytest.approx(vectors["energy"][0], abs=0.01)
    mirrored, _ = energy_and_forces(molecule.system, -vectors["positions"][0])
    assert mirrored - energy > 1000.0  # by the prior's improper


def _residues(systems, name, residue):
    """Positions of atoms by name, of every residue with that name."""
    pdb = app.PDBFile(str(systems / name / f"{name}.pdb"))
    xyz = _positions(pdb)
    found = (one for one in pdb.topology.residues() if one.name == residue)
    return [{atom.name: xyz[atom.index] for atom in one.atoms()} for one in found]


@pytest.mark.parametrize(
    ("name", "residue", "n"),
    [
        ("alanine_dipeptide", "ALA", 1),
        ("alanine_dipeptide_ff96", "ALA", 1),
        (HEAVY, "ALA", 1),
        ("alanine_hexapeptide", "ALA", 5),
        ("alanine_tetrapeptide", "ALA", 3),
        ("valine_dipeptide", "VAL", 1),
    ],
)
def test_amino_acids_are_left_handed(systems, name, residue, n):
    found = _residues(systems, name, residue)
    assert len(found) == n
    for at in found:
        # Seen from HA, CO, R and N follow each other clockwise; without hydrogens it is opposite to the others.
        others = (at["C"] + at["CB"] + at["N"]) / 3
        away = at["CA"] - at["HA"] if "HA" in at else others - at["CA"]
        assert np.dot(away, np.cross(at["C"] - at["CA"], at["CB"] - at["CA"])) > 0
        assert np.dot(away, np.cross(at["CB"] - at["CA"], at["N"] - at["CA"])) > 0


@pytest.mark.parametrize(("name", "sequence"), OLIGOPEPTIDES)
def test_the_builder_makes_an_oligopeptide_of_its_sequence(systems, name, sequence, tmp_path):
    pytest.importorskip("PeptideBuilder", reason="PeptideBuilder is not installed; the extra [systems] has it")
    from build_systems import write_sequence

    write_sequence(sequence, tmp_path / name)
    built, kept = (folder / name / f"{name}.yaml" for folder in (tmp_path, systems))
    # All but where the structure lies, which is compared itself, up to the last digit of the minimiser.
    ours, theirs = (load_config(path).model_dump(exclude={"system": {"structure"}}) for path in (built, kept))
    assert ours == theirs
    structures = [app.PDBFile(str(path.with_suffix(".pdb"))) for path in (built, kept)]
    labels = [[(atom.residue.name, atom.name) for atom in pdb.topology.atoms()] for pdb in structures]
    assert labels[0] == labels[1]
    assert np.abs(_positions(structures[0]) - _positions(structures[1])).max() < 0.001


def test_the_builder_refuses_clashes():
    builder = pytest.importorskip("build_systems", reason="the extra [systems] is not installed")
    topology, xyz = builder.build_peptide("GG", ["amber99sbildn.xml"])
    xyz[-1] = xyz[0] + 0.1
    with pytest.raises(RuntimeError, match=r"atoms \d+ and 25 \(0-based\) are 0\.1\d\d nm apart"):
        builder.refuse_clashes(topology, xyz)


def test_valine_has_its_methyl_groups_in_the_order_of_iupac(systems):
    (at,) = _residues(systems, "valine_dipeptide", "VAL")
    # Seen along the bond from CA, CG1, CG2 and HB follow each other clockwise.
    away = at["CB"] - at["CA"]
    for first, second in (("CG1", "CG2"), ("CG2", "HB"), ("HB", "CG1")):
        assert np.dot(away, np.cross(at[first] - at["CB"], at[second] - at["CB"])) > 0


def test_ff96_keeps_its_obc1(systems):
    """OBC1 has no built-in force: turned into OBC2 it would be another energy function."""
    config = load_config(systems / "alanine_dipeptide_ff96" / "alanine_dipeptide_ff96.yaml")
    molecule = MolecularSystem.from_files(config.system)  # kept: its forces live no longer than it does
    forces = {force.getName(): force for force in molecule.system.getForces()}
    assert "GBSAOBCForce" not in forces
    assert "tanh(0.8*psi+2.909125*psi^3)" in forces["CustomGBForce"].getComputedValueParameters(1)[1]


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

"""Every file route gives the same energy, and every bad file one clear message."""

import textwrap

import numpy as np
import openmm
import pytest
from molecules import ALANINE, AMBER
from openmm import app, unit

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.force_fields import near_force_fields
from openmm_cgflow.molecule.readers import load_files
from openmm_cgflow.molecule.sanitize import energy_and_forces
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.settings import SystemSettings


def energy_of(molecule, xyz=None):
    return energy_and_forces(molecule.system, molecule.positions if xyz is None else xyz)[0]


@pytest.fixture(scope="module")
def vacuum():
    return MolecularSystem.from_files(ALANINE, AMBER)


@pytest.fixture(scope="module")
def written(tmp_path_factory, vacuum):
    """The same molecule as Amber, GROMACS and serialized OpenMM files."""
    parmed = pytest.importorskip("parmed")
    folder = tmp_path_factory.mktemp("routes")
    structure = parmed.openmm.load_topology(vacuum.topology, vacuum.system, vacuum.positions * unit.nanometer)
    structure.save(str(folder / "no_radii.prmtop"))
    parmed.tools.changeRadii(structure, "mbondi2").execute()
    for name in ("ala.prmtop", "ala.inpcrd", "ala.rst7", "ala.gro", "ala.top"):
        structure.save(str(folder / name))
    # Amber topologies are often called .top, as GROMACS ones are.
    (folder / "amber.top").write_text((folder / "ala.prmtop").read_text())
    (folder / "system.xml").write_text(vacuum.to_xml())
    with (folder / "ala.cif").open("w") as handle:
        app.PDBxFile.writeFile(vacuum.topology, vacuum.positions * unit.nanometer, handle, keepIds=True)
    return folder


# --- routes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "settings"),
    [
        ("ala.cif", {"forcefield": AMBER}),
        ("ala.cif", {"system_xml": "system.xml"}),
        ("ala.inpcrd", {"topology": "ala.prmtop"}),
        ("ala.rst7", {"topology": "ala.prmtop"}),
        ("ala.cif", {"topology": "ala.prmtop"}),
        ("ala.inpcrd", {"topology": "amber.top"}),
        ("ala.gro", {"topology": "ala.top"}),
        ("ala.cif", {"topology": "ala.top"}),
    ],
)
def test_every_route_gives_the_same_energy(written, vacuum, structure, settings):
    settings = {key: value if key == "forcefield" else written / value for key, value in settings.items()}
    molecule = MolecularSystem.from_files(written / structure, **settings)
    # At one geometry, since gro files round to 1e-3 nm; the formats keep six to eight digits of the parameters.
    assert energy_of(molecule, vacuum.positions) == pytest.approx(energy_of(vacuum), abs=1e-4)
    np.testing.assert_allclose(molecule.positions, vacuum.positions, atol=6e-4)
    assert molecule.bonds.tolist() == vacuum.bonds.tolist()
    assert molecule.system.getNumConstraints() == 0
    assert not any(isinstance(force, openmm.CMMotionRemover) for force in molecule.system.getForces())
    box = "the box of the input was dropped: the molecule is treated without periodicity"
    vacuum_note = "the System has no implicit solvent: the molecule is in vacuum"
    assert molecule.notes in ((vacuum_note,), (box, vacuum_note))


@pytest.mark.parametrize("solvent", ["hct", "obc1", "obc2", "gbn", "gbn2"])
def test_implicit_solvent_with_a_prmtop_equals_the_force_field_xml(written, solvent):
    molecule = MolecularSystem.from_files(
        written / "ala.inpcrd", topology=written / "ala.prmtop", implicit_solvent=solvent
    )
    reference = MolecularSystem.from_files(ALANINE, [*AMBER, f"implicit/{solvent}.xml"])
    # OpenMM assigns other radii than mbondi2 in HCT and GBn, and then says so.
    tolerance = 3.0 if solvent in ("hct", "gbn") else 1e-4
    assert energy_of(molecule, reference.positions) == pytest.approx(energy_of(reference), abs=tolerance)
    assert any(solvent in note and "ACE" in note for note in molecule.notes)
    assert any("Non-optimal GB parameters" in note for note in molecule.notes) == (solvent in ("hct", "gbn"))
    if solvent == "obc2":
        assert any(isinstance(force, openmm.GBSAOBCForce) for force in molecule.system.getForces())


@pytest.mark.parametrize("solvent", ["obc2", "gbn2"])
def test_implicit_solvent_with_a_gromacs_top(written, vacuum, solvent):
    molecule = MolecularSystem.from_files(written / "ala.gro", topology=written / "ala.top", implicit_solvent=solvent)
    reference = MolecularSystem.from_files(ALANINE, [*AMBER, f"implicit/{solvent}.xml"])
    assert energy_of(molecule, vacuum.positions) == pytest.approx(energy_of(reference), abs=1.0)  # ParmEd's radii
    assert abs(energy_of(molecule, vacuum.positions) - energy_of(vacuum)) > 20
    assert "GB radii were assigned by ParmEd" in molecule.notes


def test_gromacs_include_files(written, tmp_path):
    text = (written / "ala.top").read_text()
    (tmp_path / "main.top").write_text('#include "inner.itp"\n')
    includes = tmp_path / "includes"
    includes.mkdir()
    (includes / "inner.itp").write_text(text)
    for solvent in (None, "obc2"):
        settings = {"topology": tmp_path / "main.top", "implicit_solvent": solvent}
        molecule = MolecularSystem.from_files(written / "ala.gro", include_dir=includes, **settings)
        assert molecule.n_atoms == 22
        with pytest.raises(CGFlowError, match=r"inner\.itp"):
            MolecularSystem.from_files(written / "ala.gro", **settings)
        with pytest.raises(CGFlowError, match="no such directory"):
            MolecularSystem.from_files(written / "ala.gro", include_dir=tmp_path / "nowhere", **settings)


PSF = """PSF

       1 !NTITLE
 REMARKS five atoms in a chain

       5 !NATOM
       1 SEG  1    LIG  C1   CT     0.200000       12.0110           0
       2 SEG  1    LIG  C2   CT    -0.300000       12.0110           0
       3 SEG  1    LIG  C3   CT     0.150000       12.0110           0
       4 SEG  1    LIG  C4   CT    -0.250000       12.0110           0
       5 SEG  1    LIG  O5   OT     0.200000       15.9990           0

       4 !NBOND: bonds
       1       2       2       3       3       4       4       5

       3 !NTHETA: angles
       1       2       3       2       3       4       3       4       5

       2 !NPHI: dihedrals
       1       2       3       4       2       3       4       5

       0 !NIMPHI: impropers


       0 !NDON: donors


       0 !NACC: acceptors


       0 !NNB

       0       0       0       0       0

       1       0 !NGRP NST2
       0       0       0

       0 !NCRTERM: cross-terms


"""
RTF = "* masses\n*\n36 1\n\nMASS  1 CT  12.01100 C\nMASS  2 OT  15.99900 O\n\nEND\n"
PRM = """* parameters
*

BONDS
CT CT 222.500 1.5300
CT OT 320.000 1.4100

ANGLES
CT CT CT 58.350 113.60
CT CT OT 45.000 110.00

DIHEDRALS
CT CT CT CT 0.2000 3 0.00
CT CT CT OT 0.1500 1 180.00

NONBONDED nbxmod 5 atom cdiel shift vatom vdistance vswitch -
cutnb 14.0 ctofnb 12.0 ctonnb 10.0 eps 1.0 e14fac 1.0 wmin 1.5
CT 0.0 -0.1100 2.0000
OT 0.0 -0.1521 1.7700

END
"""


@pytest.fixture(scope="module")
def charmm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("charmm")
    for name, text in (("lig.psf", PSF), ("lig.rtf", RTF), ("lig.prm", PRM)):
        (folder / name).write_text(text)
    xyz = np.array([[0, 0, 0], [1.5, 0.2, 0], [2.1, 1.6, 0.1], [3.6, 1.7, -0.3], [4.1, 2.6, 0.6]])
    rows = [
        f"ATOM  {i + 1:5d}  {name:<3} LIG A   1    {x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           {name[0]}\n"
        for i, (name, (x, y, z)) in enumerate(zip(("C1", "C2", "C3", "C4", "O5"), xyz, strict=True))
    ]
    (folder / "lig.pdb").write_text("".join(rows) + "END\n")
    lines = [
        f"{i + 1:5d}{1:5d} LIG  {name:<4}{x:10.5f}{y:10.5f}{z:10.5f} SEG  1      0.00000\n"
        for i, (name, (x, y, z)) in enumerate(zip(("C1", "C2", "C3", "C4", "O5"), xyz, strict=True))
    ]
    (folder / "lig.crd").write_text("* five atoms\n*\n    5\n" + "".join(lines))
    return folder


def hand_energy(xyz):
    """The CHARMM energy of the five-atom chain, kcal/mol and ångström."""

    def angle(a, b, c):
        u, v = a - b, c - b
        return np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v))

    def dihedral(a, b, c, d):
        first, second = np.cross(b - a, c - b), np.cross(c - b, d - c)
        sign = np.sign(first @ (d - c))
        return sign * np.arccos(first @ second / np.linalg.norm(first) / np.linalg.norm(second))

    bonds = [(222.5, 1.53)] * 3 + [(320.0, 1.41)]
    energy = sum(k * (np.linalg.norm(xyz[i + 1] - xyz[i]) - r) ** 2 for i, (k, r) in enumerate(bonds))
    angles = [(58.35, 113.6)] * 2 + [(45.0, 110.0)]
    energy += sum(k * (angle(*xyz[i : i + 3]) - np.deg2rad(t)) ** 2 for i, (k, t) in enumerate(angles))
    energy += 0.2 * (1 + np.cos(3 * dihedral(*xyz[:4]))) + 0.15 * (1 + np.cos(dihedral(*xyz[1:]) - np.pi))
    charge, radius, depth = [0.2, -0.3, 0.15, -0.25, 0.2], [2.0] * 4 + [1.77], [0.11] * 4 + [0.1521]
    for i, j in ((0, 3), (0, 4), (1, 4)):
        r = np.linalg.norm(xyz[i] - xyz[j])
        six = ((radius[i] + radius[j]) / r) ** 6
        energy += 332.0637 * charge[i] * charge[j] / r + np.sqrt(depth[i] * depth[j]) * (six**2 - 2 * six)
    return energy


@pytest.mark.parametrize("coordinates", ["lig.pdb", "lig.crd"])
def test_charmm_psf_equals_the_energy_by_hand(charmm, coordinates):
    settings = {"topology": charmm / "lig.psf", "parameters": [charmm / "lig.rtf", charmm / "lig.prm"]}
    molecule = MolecularSystem.from_files(charmm / coordinates, **settings)
    assert energy_of(molecule) == pytest.approx(4.184 * hand_energy(10 * molecule.positions), abs=1e-3)
    assert molecule.bonds.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    solvated = MolecularSystem.from_files(charmm / coordinates, **settings, implicit_solvent="obc2")
    assert any(isinstance(force, openmm.GBSAOBCForce) for force in solvated.system.getForces())


def test_charmm_without_or_with_wrong_parameters(charmm, tmp_path):
    with pytest.raises(CGFlowError, match=r"needs its parameter files: set system\.parameters"):
        MolecularSystem.from_files(charmm / "lig.pdb", topology=charmm / "lig.psf")
    partial = tmp_path / "partial.prm"
    partial.write_text(PRM.replace("CT OT 320.000 1.4100\n", ""))
    with pytest.raises(CGFlowError, match=r"lig\.psf: OpenMM cannot build a System .* Missing bond type"):
        MolecularSystem.from_files(
            charmm / "lig.pdb", topology=charmm / "lig.psf", parameters=[charmm / "lig.rtf", partial]
        )
    with pytest.raises(CGFlowError, match=r"go with a psf topology"):
        MolecularSystem.from_files(ALANINE, AMBER, parameters=[charmm / "lig.prm"])


def test_from_files_takes_a_configuration(vacuum):
    config = SystemSettings(structure=ALANINE, forcefield=AMBER)
    assert MolecularSystem.from_files(config).fingerprint() == vacuum.fingerprint()
    assert MolecularSystem.from_files(str(ALANINE), AMBER[0]).fingerprint() == vacuum.fingerprint()
    assert load_files(config).system.getNumConstraints() == 0


# --- bad input ----------------------------------------------------------------------------------------------------


def refuse(message, *arguments, **settings):
    with pytest.raises(CGFlowError, match=message) as caught:
        MolecularSystem.from_files(*arguments, **settings)
    return str(caught.value)


def edited(tmp_path, change, name="edited.pdb"):
    path = tmp_path / name
    path.write_text(change(ALANINE.read_text()))
    return path


def without(*names):
    """Drops atoms by name, and CONECT records with them."""

    def change(text):
        kept = [line for line in text.splitlines() if line[12:16].strip() not in names]
        return "\n".join(line for line in kept if not line.startswith("CONECT")) + "\n"

    return change


def test_settings_that_contradict_each_other(tmp_path):
    refuse("exactly one of forcefield", ALANINE)
    refuse("exactly one of forcefield", ALANINE, AMBER, system_xml=tmp_path / "a.xml")
    refuse("implicit_solvent goes with topology", ALANINE, AMBER, implicit_solvent="obc2")
    refuse(r"system\.implicit_solvent", ALANINE, topology="a.top", implicit_solvent="water")


def test_missing_files(tmp_path, written):
    refuse(r"nowhere\.pdb: no such file", tmp_path / "nowhere.pdb", AMBER)
    refuse("is a directory, not a file", tmp_path, AMBER)
    refuse(r"nowhere\.prmtop: no such file", ALANINE, topology=tmp_path / "nowhere.prmtop")
    refuse(r"nowhere\.xml: no such file", ALANINE, system_xml=tmp_path / "nowhere.xml")
    refuse(r"nowhere\.prm: no such file", ALANINE, topology=written / "ala.top", parameters=[tmp_path / "nowhere.prm"])


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("amber99sb-ildn.xml", "amber99sbildn.xml"),
        ("amber99sbildn", "amber99sbildn.xml"),
        ("obc2.xml", "implicit/obc2.xml"),
        ("implicit/obc.xml", "implicit/obc2.xml"),
        ("amber14/protein.ff14sb.xml", "amber14/protein.ff14SB.xml"),
        ("protein.ff14SB.xml", "amber14/protein.ff14SB.xml"),
        ("charm36.xml", "charmm36.xml"),
    ],
)
def test_unknown_force_fields_name_near_ones(name, near):
    assert near in near_force_fields(name)
    refuse(f"unknown force field '{name}'; did you mean .*{near}", ALANINE, [*AMBER, name])


def test_a_force_field_that_resembles_nothing(tmp_path):
    refuse("unknown force field 'zzz'; nothing that OpenMM ships", ALANINE, ["zzz"])
    broken = tmp_path / "broken.xml"
    broken.write_text("<ForceField><Atom")
    refuse("broken.xml.*cannot be loaded", ALANINE, [str(broken)])


def test_missing_hydrogens_say_what_to_run(tmp_path):
    hydrogens = ("H", "HA", "H1", "H2", "H3", "HB1", "HB2", "HB3")
    path = edited(tmp_path, without(*hydrogens))
    text = refuse("hydrogens are missing in ACE1, ALA2, NME3", path, AMBER)
    assert f"pdbfixer {path} --add-atoms=hydrogen" in text and "modeller.addHydrogens(" in text and str(path) in text
    some = edited(tmp_path, without("HA", "HB3"))
    refuse("hydrogens are missing in ALA2: .*missing 2 H atoms", some, AMBER)


def test_the_hydrogen_recipe_works(tmp_path, monkeypatch):
    path = edited(tmp_path, without("H", "HA", "H1", "H2", "H3", "HB1", "HB2", "HB3"))
    recipe = refuse("hydrogens", path, AMBER).split("or in Python\n")[1]
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(recipe), {})
    assert MolecularSystem.from_files("with_hydrogens.pdb", AMBER).n_atoms == 22


def test_residues_without_template(tmp_path):
    text = refuse("no template for ALA2", edited(tmp_path, without("CB")), AMBER)
    assert "system.system_xml" in text and "CONECT" in text
    refuse("no template for LIG2", edited(tmp_path, lambda text: text.replace(" ALA ", " LIG ")), AMBER)


@pytest.mark.parametrize("name", ["implicit/obc2.xml", "implicit/gbn2.xml", "amber99_obc.xml"])
def test_implicit_solvent_alone(name):
    refuse(f"add a protein force field before {name}", ALANINE, [name])


def test_force_field_files_of_different_families():
    refuse("Do the files belong together", ALANINE, ["amber14-all.xml", "amber99_obc.xml"])


WATER = """HETATM   30  O   HOH B   1      20.000  20.000  20.000  1.00  0.00           O
HETATM   31  H1  HOH B   1      20.957  20.000  20.000  1.00  0.00           H
HETATM   32  H2  HOH B   1      19.760  20.927  20.000  1.00  0.00           H
HETATM   33 NA    NA C   1      25.000  20.000  20.000  1.00  0.00          NA
"""


def test_explicit_water_and_ions(tmp_path):
    path = edited(tmp_path, lambda text: text.replace("TER ", WATER + "TER ", 1))
    text = refuse(r"explicit water or ions \(.*\) are not supported yet", path, [*AMBER, "tip3p.xml"])
    assert "HOH" in text and "NA" in text and "implicit" in text


def test_a_box_record_alone_is_dropped(tmp_path, vacuum):
    box = "CRYST1    1.000    1.000    1.000  90.00  90.00  90.00 P 1           1\n"
    molecule = MolecularSystem.from_files(edited(tmp_path, lambda text: box + text), AMBER)
    assert any("box" in note for note in molecule.notes)
    assert molecule.fingerprint() == vacuum.fingerprint()


def test_two_molecules(tmp_path):
    def doubled(text):
        atoms = [line for line in text.splitlines() if line[:6].strip() in ("ATOM", "HETATM")]
        moved = [f"{line[:21]}B{line[22:30]}{float(line[30:38]) + 20:8.3f}{line[38:]}" for line in atoms]
        return "\n".join([*atoms, "TER", *moved, "TER", "END"]) + "\n"

    refuse("2 separate molecules .22 atom.*several molecules are not supported", edited(tmp_path, doubled), AMBER)


def test_nan_coordinates(tmp_path):
    def spoil(text):
        lines = text.splitlines()
        row = next(i for i, line in enumerate(lines) if line[12:16].strip() == "CA")
        lines[row] = lines[row][:30] + "     nan" + lines[row][38:]
        return "\n".join(lines) + "\n"

    refuse(r"not finite numbers: ALA2:CA \(atom 8\)", edited(tmp_path, spoil), AMBER)


@pytest.mark.parametrize("name", ["garbage.pdb", "garbage.cif", "empty.pdb"])
def test_unreadable_structures(tmp_path, name):
    path = tmp_path / name
    path.write_text("" if name.startswith("empty") else "ATOM  this is no coordinate file at all, nor ever was one\n")
    refuse(name, path, AMBER)
    path.write_bytes(bytes(range(256)))
    refuse(name, path, AMBER)


def test_unknown_kinds_of_files(tmp_path, written):
    odd = tmp_path / "ala.xyz"
    odd.write_text("22\n")
    refuse("expected a PDB", odd, AMBER)
    refuse("expected a PDB", written / "ala.gro", AMBER)
    refuse("unknown kind of coordinates '.xyz'", odd, topology=written / "ala.prmtop")
    refuse("unknown kind of topology '.xyz'", ALANINE, topology=odd)


@pytest.mark.parametrize("name", ["garbage.prmtop", "garbage.top", "garbage.psf"])
def test_unreadable_topologies(tmp_path, name):
    path = tmp_path / name
    path.write_text("no topology\n")
    refuse(name, ALANINE, topology=path, parameters=[ALANINE] if name.endswith("psf") else [])


def test_unreadable_amber_coordinates(tmp_path, written):
    path = tmp_path / "garbage.inpcrd"
    path.write_text("title\n   22\n 1.0 x\n")
    refuse(r"garbage\.inpcrd: .*cannot read it", path, topology=written / "ala.prmtop")


def test_malformed_system_xml(tmp_path, written):
    path = tmp_path / "system.xml"
    for text in ("<System", "<ForceField/>", "", openmm.XmlSerializer.serialize(openmm.VerletIntegrator(0.001))):
        path.write_text(text)
        refuse(r"system\.xml: .*serialized openmm\.System", ALANINE, system_xml=path)
    path.write_text(openmm.XmlSerializer.serialize(openmm.System()))
    refuse("22 atoms but the System has 0 particles", ALANINE, system_xml=path)


def test_topology_and_positions_must_match(written, charmm, tmp_path):
    refuse(r"lig\.pdb has 5 atoms but .*ala\.prmtop has 22", charmm / "lig.pdb", topology=written / "ala.prmtop")
    refuse("has 5 atoms", charmm / "lig.pdb", topology=written / "ala.top")

    def swap(text):
        lines = text.splitlines()
        rows = [i for i, line in enumerate(lines) if line[:6].strip() in ("ATOM", "HETATM")]
        lines[rows[0]], lines[rows[1]] = lines[rows[1]], lines[rows[0]]
        return "\n".join(lines) + "\n"

    text = refuse("atom 0 is ACE:CH3 .C. in", edited(tmp_path, swap), topology=written / "ala.prmtop")
    assert "same order" in text


def test_a_prmtop_without_gb_radii(written):
    for solvent in ("hct", "obc1", "obc2", "gbn2"):
        text = refuse(
            "no_radii.prmtop", written / "ala.inpcrd", topology=written / "no_radii.prmtop", implicit_solvent=solvent
        )
        assert "PBradii" in text


def test_polarizable_force_fields_are_refused():
    refuse("ACE1", ALANINE, ["charmm_polar_2023.xml"])

"""MolecularSystem: what is changed in a System, what is refused, and that the caller's objects stay as they were."""

import numpy as np
import openmm
import pytest
from molecules import ALANINE
from openmm import app, unit

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.sanitize import energy_and_forces
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.molecule.topology import topology_from_table, topology_to_table


@pytest.fixture(scope="module")
def pdb():
    return app.PDBFile(str(ALANINE))


@pytest.fixture(scope="module")
def vacuum():
    return app.ForceField("amber99sbildn.xml")


def build(force_field, pdb, **options):
    settings = {"constraints": None, "rigidWater": False, "removeCMMotion": False} | options
    return force_field.createSystem(pdb.topology, **settings)


def force_names(system):
    return {type(force).__name__ for force in system.getForces()}


def chain(n_atoms, bonded=True, element=app.element.carbon, spacing=0.15):
    """A zigzag of harmonic bonds, with its topology and positions."""
    topology, system = app.Topology(), openmm.System()
    residue = topology.addResidue("CHN", topology.addChain())
    bonds = openmm.HarmonicBondForce()
    atoms = []
    for i in range(n_atoms):
        atoms.append(topology.addAtom(f"C{i}", element, residue))
        system.addParticle(12.0)
        if i and bonded:
            topology.addBond(atoms[i - 1], atoms[i])
            bonds.addBond(i - 1, i, spacing, 1e5)
    system.addForce(bonds)
    xyz = np.array([[0.8 * spacing * i, 0.6 * spacing * (i % 2), 0.0] for i in range(n_atoms)])
    return topology, system, xyz


# --- what is kept -------------------------------------------------------------------------------------------------


def test_from_openmm_leaves_the_callers_objects_alone(pdb, vacuum):
    system = build(vacuum, pdb, removeCMMotion=True)
    system.addForce(openmm.AndersenThermostat(300, 1))
    system.addForce(openmm.MonteCarloBarostat(1, 300))
    before = openmm.XmlSerializer.serialize(system)
    n_bonds = pdb.topology.getNumBonds()
    molecule = MolecularSystem.from_openmm(pdb.topology, system, pdb.positions)
    assert openmm.XmlSerializer.serialize(system) == before
    assert molecule.topology is not pdb.topology and pdb.topology.getNumBonds() == n_bonds
    assert not force_names(molecule.system) & {"CMMotionRemover", "AndersenThermostat", "MonteCarloBarostat"}
    for name in ("CMMotionRemover", "AndersenThermostat", "MonteCarloBarostat"):
        assert any(note.startswith(name) for note in molecule.notes)


@pytest.mark.parametrize(
    "barostat",
    [
        openmm.MonteCarloAnisotropicBarostat(openmm.Vec3(1, 1, 1), 300),
        openmm.MonteCarloFlexibleBarostat(1, 300),
        openmm.MonteCarloMembraneBarostat(
            1, 0, 300, openmm.MonteCarloMembraneBarostat.XYIsotropic, openmm.MonteCarloMembraneBarostat.ZFree
        ),
    ],
    ids=lambda force: type(force).__name__,
)
def test_every_barostat_is_stripped(barostat):
    topology, system, xyz = chain(4)
    system.addForce(openmm.XmlSerializer.clone(barostat))
    assert force_names(MolecularSystem.from_openmm(topology, system, xyz).system) == {"HarmonicBondForce"}


def test_attributes(pdb, vacuum):
    molecule = MolecularSystem.from_openmm(pdb.topology, build(vacuum, pdb), pdb.positions)
    assert molecule.n_atoms == 22
    assert molecule.positions.shape == (22, 3) and molecule.positions.dtype == np.float64
    assert not molecule.positions.flags.writeable
    assert molecule.atom_label(8) == "ALA2:CA"
    assert molecule.elements[8:10] == ["C", "H"]
    np.testing.assert_allclose(molecule.masses[8:10], [12.01078, 1.007947])
    assert molecule.bonds.shape == (21, 2) and (molecule.bonds[:, 0] < molecule.bonds[:, 1]).all()
    assert molecule.mdtraj_topology.n_atoms == 22 and molecule.mdtraj_topology.n_bonds == 21
    rebuilt = openmm.XmlSerializer.deserialize(molecule.to_xml())
    assert (
        energy_and_forces(rebuilt, molecule.positions)[0] == energy_and_forces(molecule.system, molecule.positions)[0]
    )


def test_fingerprint_sees_energy_and_names_but_not_positions(pdb, vacuum):
    system = build(vacuum, pdb)
    first = MolecularSystem.from_openmm(pdb.topology, system, pdb.positions)
    xyz = first.positions + 0.001 * np.random.default_rng(0).normal(size=(22, 3))
    assert MolecularSystem.from_openmm(pdb.topology, system, xyz).fingerprint() == first.fingerprint()
    assert len(first.fingerprint()) == 64
    other = build(vacuum, pdb)
    bonds = next(force for force in other.getForces() if isinstance(force, openmm.HarmonicBondForce))
    i, j, length, strength = bonds.getBondParameters(0)
    bonds.setBondParameters(0, i, j, length, 1.001 * strength)
    assert MolecularSystem.from_openmm(pdb.topology, other, pdb.positions).fingerprint() != first.fingerprint()
    renamed = app.PDBFile(str(ALANINE)).topology
    next(renamed.atoms()).name = "CX"
    assert MolecularSystem.from_openmm(renamed, system, pdb.positions).fingerprint() != first.fingerprint()


def test_repartitioned_masses_are_kept(pdb, vacuum):
    molecule = MolecularSystem.from_openmm(pdb.topology, build(vacuum, pdb, hydrogenMass=3.0), pdb.positions)
    assert molecule.masses[9] == pytest.approx(3.0)


def test_several_chains_are_told_apart():
    topology, system, xyz = chain(4)
    extra = topology.addAtom("SG", app.element.sulfur, topology.addResidue("CYX", topology.addChain("B"), id="7"))
    topology.addBond(list(topology.atoms())[3], extra)
    system.addParticle(32.0)
    molecule = MolecularSystem.from_openmm(topology, system, np.vstack([xyz, xyz[-1] + [0.15, 0, 0]]))
    assert molecule.atom_label(4) == "B/CYX7:SG"


# --- positions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        lambda xyz: xyz,
        lambda xyz: xyz.tolist(),
        lambda xyz: [openmm.Vec3(*row) for row in xyz],
        lambda xyz: [openmm.Vec3(*row) * unit.nanometer for row in xyz],
        lambda xyz: (10 * xyz) * unit.angstrom,
        lambda xyz: [openmm.Vec3(*row) for row in xyz] * unit.nanometer,
    ],
    ids=["array", "lists", "Vec3", "Vec3 Quantities", "angstrom", "Vec3 list Quantity"],
)
def test_positions_in_any_form(convert):
    topology, system, xyz = chain(4)
    np.testing.assert_allclose(MolecularSystem.from_openmm(topology, system, convert(xyz)).positions, xyz, atol=1e-15)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda xyz: xyz[None], r"positions have shape \(1, 4, 3\), expected \(4, 3\)"),
        (lambda xyz: xyz[:3], r"positions have shape \(3, 3\), expected \(4, 3\)"),
        (lambda xyz: xyz.T, r"positions have shape \(3, 4\), expected \(4, 3\)"),
        (lambda xyz: None, "positions are missing"),
        (lambda xyz: xyz * unit.picosecond, "positions are not understood"),
        (lambda xyz: [[0, 0], [0, 0, 0]], "positions are not understood"),
        (lambda xyz: "xyz", "positions are not understood"),
        (lambda xyz: np.where(np.arange(4)[:, None] == 2, np.nan, xyz), r"not finite numbers: CHN1:C2 \(atom 2\)"),
        (lambda xyz: np.where(np.arange(4)[:, None] == 2, np.inf, xyz), "not finite numbers"),
        (lambda xyz: 10 * xyz, r"CHN1:C0-CHN1:C1 is 1.50 nm long: positions must be in nm"),
        (lambda xyz: np.vstack([xyz[:3], xyz[1]]), "atoms CHN1:C1 and CHN1:C3 overlap"),
    ],
)
def test_wrong_positions_are_refused(convert, message):
    topology, system, xyz = chain(4)
    with pytest.raises(CGFlowError, match=message):
        MolecularSystem.from_openmm(topology, system, convert(xyz))


def test_positions_are_copied():
    topology, system, xyz = chain(4)
    molecule = MolecularSystem.from_openmm(topology, system, xyz)
    xyz += 1.0
    assert abs(molecule.positions - xyz).min() > 0.9


# --- constraints --------------------------------------------------------------------------------------------------


def test_constraints_go_when_every_pair_has_a_bond_term(pdb, vacuum):
    free = build(vacuum, pdb)
    constrained = build(vacuum, pdb, constraints=app.AllBonds, flexibleConstraints=True)
    assert constrained.getNumConstraints() == 21
    molecule = MolecularSystem.from_openmm(pdb.topology, constrained, pdb.positions)
    assert molecule.system.getNumConstraints() == 0 and constrained.getNumConstraints() == 21
    assert any("21 constraint(s) removed" in note for note in molecule.notes)
    energy, forces = energy_and_forces(free, molecule.positions)
    other_energy, other_forces = energy_and_forces(molecule.system, molecule.positions)
    assert other_energy == pytest.approx(energy, abs=1e-9)
    np.testing.assert_allclose(other_forces, forces, atol=1e-7)


def test_constraints_without_bond_terms_are_refused(pdb, vacuum):
    system = build(vacuum, pdb, constraints=app.HBonds)
    with pytest.raises(CGFlowError, match=r"constraints that cannot be removed: 12 of 12 .*constraints=None"):
        MolecularSystem.from_openmm(pdb.topology, system, pdb.positions)


def test_a_bond_term_of_zero_strength_does_not_hold():
    topology, system, xyz = chain(3)
    system.getForce(0).setBondParameters(0, 0, 1, 0.15, 0.0)
    system.addConstraint(0, 1, 0.15)
    with pytest.raises(CGFlowError, match="CHN1:C0-CHN1:C1"):
        MolecularSystem.from_openmm(topology, system, xyz)


def test_custom_bonds_and_angles_hold_too():
    topology, system, xyz = chain(4)
    system.getForce(0).setBondParameters(0, 0, 1, 0.15, 0.0)
    custom = openmm.CustomBondForce("1000*(r-0.15)^2")
    custom.addBond(1, 0, [])
    angle = openmm.HarmonicAngleForce()
    angle.addAngle(0, 1, 2, 1.9, 300.0)
    for force in (custom, angle):
        system.addForce(force)
    system.addConstraint(0, 1, 0.15)
    system.addConstraint(2, 0, 0.25)
    assert MolecularSystem.from_openmm(topology, system, xyz).system.getNumConstraints() == 0


# --- OBC2 ---------------------------------------------------------------------------------------------------------


def test_obc2_becomes_the_builtin_force(pdb):
    force_field = app.ForceField("amber99sbildn.xml", "implicit/obc2.xml")
    system = build(force_field, pdb)
    molecule = MolecularSystem.from_openmm(pdb.topology, system, pdb.positions)
    assert "GBSAOBCForce" in force_names(molecule.system) and "CustomGBForce" not in force_names(molecule.system)
    assert "CustomGBForce" in force_names(system)
    rng = np.random.default_rng(1)
    for scale in (0.0, 0.01, 0.02):
        xyz = molecule.positions + scale * rng.normal(size=(22, 3))
        energy, forces = energy_and_forces(system, xyz)
        other_energy, other_forces = energy_and_forces(molecule.system, xyz)
        assert other_energy == pytest.approx(energy, abs=1e-4)  # kJ/mol; the Coulomb constants differ by 2e-7
        np.testing.assert_allclose(other_forces, forces, atol=1e-3)


@pytest.mark.parametrize("options", [{"sasaMethod": None}, {"soluteDielectric": 2.0, "solventDielectric": 30.0}])
def test_obc2_options_are_carried_over(pdb, options):
    system = build(app.ForceField("amber99sbildn.xml", "implicit/obc2.xml"), pdb, **options)
    plain = build(app.ForceField("amber99sbildn.xml", "implicit/obc2.xml"), pdb)
    molecule = MolecularSystem.from_openmm(pdb.topology, system, pdb.positions)
    assert "GBSAOBCForce" in force_names(molecule.system)
    energy = energy_and_forces(molecule.system, molecule.positions)[0]
    assert energy == pytest.approx(energy_and_forces(system, molecule.positions)[0], abs=1e-4)
    assert abs(energy - energy_and_forces(plain, molecule.positions)[0]) > 1.0


@pytest.mark.parametrize("name", ["hct", "obc1", "gbn", "gbn2"])
def test_other_implicit_solvents_stay(pdb, name):
    system = build(app.ForceField("amber99sbildn.xml", f"implicit/{name}.xml"), pdb)
    molecule = MolecularSystem.from_openmm(pdb.topology, system, pdb.positions)
    assert "CustomGBForce" in force_names(molecule.system)
    assert molecule.notes == ()


def test_obc2_with_salt_stays(pdb):
    force_field = app.ForceField("amber99sbildn.xml", "implicit/obc2.xml")
    system = build(force_field, pdb, implicitSolventKappa=1.0 / unit.nanometer)
    assert "CustomGBForce" in force_names(MolecularSystem.from_openmm(pdb.topology, system, pdb.positions).system)


def test_a_look_alike_of_obc2_is_caught_by_the_numbers(pdb):
    system = build(app.ForceField("amber99sbildn.xml", "implicit/obc2.xml"), pdb)
    custom = next(force for force in system.getForces() if isinstance(force, openmm.CustomGBForce))
    expression, kind = custom.getEnergyTermParameters(1)
    custom.setEnergyTermParameters(1, expression.replace("28.3919551", "28.5"), kind)
    molecule = MolecularSystem.from_openmm(pdb.topology, system, pdb.positions)
    assert "CustomGBForce" in force_names(molecule.system)
    assert any("differs from GBSAOBCForce" in note for note in molecule.notes)


# --- refusals -----------------------------------------------------------------------------------------------------


def refuse(message, topology, system, xyz):
    with pytest.raises(CGFlowError, match=message):
        MolecularSystem.from_openmm(topology, system, xyz)


def test_massless_particles_virtual_sites_and_drude_particles_are_refused():
    topology, system, xyz = chain(4)
    system.setParticleMass(1, 0.0)
    refuse(r"no mass \(CHN1:C1\)", topology, system, xyz)
    system.setVirtualSite(1, openmm.TwoParticleAverageSite(0, 2, 0.5, 0.5))
    refuse(r"virtual site\(s\) \(CHN1:C1\)", topology, system, xyz)
    topology, system, xyz = chain(4)
    system.addForce(openmm.DrudeForce())
    refuse("Drude particles", topology, system, xyz)


@pytest.mark.parametrize("method", [openmm.NonbondedForce.PME, openmm.NonbondedForce.CutoffPeriodic])
def test_periodic_systems_are_refused(method):
    topology, system, xyz = chain(4)
    nonbonded = openmm.NonbondedForce()
    nonbonded.setNonbondedMethod(method)
    for _ in range(4):
        nonbonded.addParticle(0, 0.3, 0.1)
    system.addForce(nonbonded)
    refuse(r"periodic boundary conditions \(NonbondedForce\).*not supported yet: remove water", topology, system, xyz)


def test_a_cutoff_without_periodicity_is_noted():
    topology, system, xyz = chain(4)
    nonbonded = openmm.NonbondedForce()
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.CutoffNonPeriodic)
    for _ in range(4):
        nonbonded.addParticle(0, 0.3, 0.1)
    system.addForce(nonbonded)
    molecule = MolecularSystem.from_openmm(topology, system, xyz)
    assert any("NonbondedForce has a cutoff (1.0 nm)" in note for note in molecule.notes)


def test_a_box_without_water_is_dropped_with_a_note():
    topology, system, xyz = chain(4)
    topology.setPeriodicBoxVectors(np.eye(3) * unit.nanometer)
    molecule = MolecularSystem.from_openmm(topology, system, xyz)
    assert molecule.topology.getPeriodicBoxVectors() is None and any("box" in note for note in molecule.notes)
    assert topology.getPeriodicBoxVectors() is not None


def test_water_and_ions_are_refused_by_name():
    topology, system, xyz = chain(4)
    water = topology.addResidue("HOH", topology.addChain())
    for name, element in (("O", app.element.oxygen), ("H1", app.element.hydrogen), ("H2", app.element.hydrogen)):
        topology.addAtom(name, element, water)
        system.addParticle(1.0)
    topology.addAtom("NA", app.element.sodium, topology.addResidue("NA", topology.addChain()))
    system.addParticle(23.0)
    refuse(r"water or ions \(1 HOH, 1 NA\) are not supported yet", topology, system, np.vstack([xyz, xyz + 1.0]))


def test_two_molecules_are_refused_by_name():
    topology, system, xyz = chain(6)
    broken = app.Topology()
    residue = broken.addResidue("CHN", broken.addChain())
    atoms = [broken.addAtom(atom.name, atom.element, residue) for atom in topology.atoms()]
    for i in (0, 1, 3, 4):
        broken.addBond(atoms[i], atoms[i + 1])
    system.getForce(0).setBondParameters(2, 2, 3, 0.15, 0.0)
    refuse(r"2 separate molecules \(3 atom\(s\) from CHN1:C0 to CHN1:C2; 3 atom", broken, system, xyz)


def test_bonds_that_the_topology_lacks_come_from_the_bond_terms():
    topology, system, xyz = chain(4)
    bare = app.Topology()
    residue = bare.addResidue("LIG", bare.addChain())
    for atom in topology.atoms():
        bare.addAtom(atom.name, atom.element, residue)
    urey_bradley = openmm.HarmonicBondForce()
    urey_bradley.addBond(0, 2, 0.25, 1e4)
    angle = openmm.HarmonicAngleForce()
    angle.addAngle(0, 1, 2, 1.9, 300.0)
    for force in (urey_bradley, angle):
        system.addForce(force)
    molecule = MolecularSystem.from_openmm(bare, system, xyz)
    assert molecule.bonds.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert bare.getNumBonds() == 0 and any("3 bond(s)" in note for note in molecule.notes)


def test_sizes_and_types_must_agree():
    topology, system, xyz = chain(4)
    system.addParticle(1.0)
    refuse("the topology has 4 atoms but the System has 5 particles", topology, system, xyz)
    refuse("system is a str, expected an openmm.System", topology, "system.xml", xyz)
    refuse("topology is a str, expected an openmm.app.Topology", "a.pdb", system, xyz)
    refuse("no atoms", app.Topology(), openmm.System(), np.zeros((0, 3)))


def test_an_energy_that_is_not_finite_is_refused():
    topology, system, xyz = chain(3)
    force = openmm.CustomBondForce("sqrt(-r)")
    force.addBond(0, 1, [])
    system.addForce(force)
    refuse("energy of the starting structure is nan", topology, system, xyz)


def test_restraints_in_space_are_refused():
    topology, system, xyz = chain(3)
    force = openmm.CustomExternalForce("100*x^2")
    force.addParticle(0, [])
    system.addForce(force)
    refuse("remove position restraints", topology, system, xyz)


def test_from_parmed_gives_the_same_energy(pdb, vacuum):
    parmed = pytest.importorskip("parmed")
    system = build(vacuum, pdb)
    structure = parmed.openmm.load_topology(pdb.topology, system, pdb.positions)
    molecule = MolecularSystem.from_parmed(structure)
    energy = energy_and_forces(system, molecule.positions)[0]
    assert energy_and_forces(molecule.system, molecule.positions)[0] == pytest.approx(energy, abs=1e-6)
    assert "GBSAOBCForce" in force_names(MolecularSystem.from_parmed(structure, implicit_solvent="obc2").system)
    with pytest.raises(CGFlowError, match="implicit_solvent is 'gb', expected one of hct, obc1"):
        MolecularSystem.from_parmed(structure, implicit_solvent="gb")
    with pytest.raises(CGFlowError, match=r"expected a parametrised parmed\.Structure"):
        MolecularSystem.from_parmed("x.prmtop")
    structure.coordinates = None
    with pytest.raises(CGFlowError, match="no coordinates"):
        MolecularSystem.from_parmed(structure)


def test_from_parmed_without_parameters_is_refused():
    parmed = pytest.importorskip("parmed")
    with pytest.raises(CGFlowError, match="ParmEd cannot build"):
        MolecularSystem.from_parmed(parmed.load_file(str(ALANINE)))


def test_topology_table_keeps_what_a_pdb_file_would_lose():
    """Equal atom names in one residue, bonds between standard residues that have no CONECT, insertion codes."""
    topology = app.Topology()
    chain = topology.addChain("Q")
    first, second = topology.addResidue("ALA", chain, "7", "B"), topology.addResidue("GLY", chain, "9")
    atoms = [topology.addAtom("C", app.Element.getBySymbol("C"), first, str(k)) for k in range(3)]
    atoms.append(topology.addAtom("X", None, second))
    for i, j in ((0, 1), (1, 2), (0, 3)):
        topology.addBond(atoms[i], atoms[j])
    back = topology_from_table(topology_to_table(topology))
    assert topology_to_table(back) == topology_to_table(topology)
    assert [(bond.atom1.index, bond.atom2.index) for bond in back.bonds()] == [(0, 1), (1, 2), (0, 3)]

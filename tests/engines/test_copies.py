"""The giant System: same forces as single molecules for every Force type, and copies that keep apart."""

import numpy as np
import openmm
import pytest
from molecules import ALANINE
from openmm import app, unit
from toys import HarmonicBath, make_toy

from openmm_cgflow.engines.context import frozen_system
from openmm_cgflow.engines.copies import _COPIED, NotReplicableError, check_copies, plan_lattice, replicate_system

N_ATOMS = 8
BONDS = [(i, i + 1) for i in range(N_ATOMS - 1)]
CUTOFF = 3.0


def zigzag():
    i = np.arange(N_ATOMS)
    noise = np.random.default_rng(0).normal(0.0, 0.01, (N_ATOMS, 3))
    return np.stack([0.12 * i, 0.08 * (i % 2), 0.05 * (i % 3)], axis=1) + noise


# ---------------------------------------------------------------- one builder for each Force type
# Every term has parameters of its own, so that a mixed-up index changes a force.


def harmonic_bond():
    force = openmm.HarmonicBondForce()
    for k, (i, j) in enumerate(BONDS):
        force.addBond(i, j, 0.1 + 0.01 * k, 1000.0 + 100 * k)
    return force


def harmonic_angle():
    force = openmm.HarmonicAngleForce()
    for i in range(N_ATOMS - 2):
        force.addAngle(i, i + 1, i + 2, 1.5 + 0.1 * i, 100.0 + i)
    return force


def periodic_torsion():
    force = openmm.PeriodicTorsionForce()
    for i in range(N_ATOMS - 3):
        force.addTorsion(i, i + 1, i + 2, i + 3, 1 + i % 3, 0.3 * i, 5.0 + i)
    return force


def rb_torsion():
    force = openmm.RBTorsionForce()
    for i in range(N_ATOMS - 3):
        force.addTorsion(i, i + 1, i + 2, i + 3, *[1.0 + 0.3 * i * c for c in range(6)])
    return force


def cmap():
    force = openmm.CMAPTorsionForce()
    rng = np.random.default_rng(1)
    for _ in range(2):
        force.addMap(8, rng.normal(size=64).tolist())
    force.addTorsion(0, 0, 1, 2, 3, 1, 2, 3, 4)
    force.addTorsion(1, 3, 4, 5, 6, 4, 5, 6, 7)
    return force


def nonbonded():
    force = openmm.NonbondedForce()
    for i in range(N_ATOMS):
        force.addParticle(0.1 * (i - 3.5), 0.15 + 0.01 * i, 0.2 + 0.05 * i)
    for i, j in BONDS:
        force.addException(i, j, 0.0, 0.1, 0.0)
    for i in range(N_ATOMS - 3):
        force.addException(i, i + 3, 0.02 * i - 0.05, 0.2, 0.1 + 0.1 * i)
    return force


def nonbonded_with_offsets():
    force = nonbonded()
    force.addGlobalParameter("charging", 0.7)
    force.addGlobalParameter("soften", 0.2)
    for i in (1, 4, 6):
        force.addParticleParameterOffset("charging", i, 0.1 * i, 0.01, 0.02)
    for k in (8, 10):
        force.addExceptionParameterOffset("soften", k, 0.3, 0.01 * k, 0.1)
    return force


def gbsa_obc():
    force = openmm.GBSAOBCForce()
    for i in range(N_ATOMS):
        force.addParticle(0.2 * (i - 3.5), 0.12 + 0.01 * i, 0.7 + 0.02 * i)
    return force


def custom_bond():
    force = openmm.CustomBondForce("scale*k*(r-r0)^4")
    force.addGlobalParameter("scale", 2.0)
    force.addPerBondParameter("k")
    force.addPerBondParameter("r0")
    for k, (i, j) in enumerate(BONDS):
        force.addBond(i, j, [5e4 + 1e3 * k, 0.1 + 0.01 * k])
    return force


def custom_angle():
    force = openmm.CustomAngleForce("k*(theta-2)^2")
    force.addPerAngleParameter("k")
    for i in range(N_ATOMS - 2):
        force.addAngle(i, i + 1, i + 2, [50.0 + i])
    return force


def custom_torsion():
    force = openmm.CustomTorsionForce("k*cos(theta)^2")
    force.addPerTorsionParameter("k")
    for i in range(N_ATOMS - 3):
        force.addTorsion(i, i + 1, i + 2, i + 3, [5.0 + i])
    return force


def custom_nonbonded():
    force = openmm.CustomNonbondedForce("a1*a2*table(r)")
    force.addTabulatedFunction("table", openmm.Continuous1DFunction([5.0, 3.0, 2.0, 1.0, 0.5, 0.4], 0.0, 2.0))
    force.addPerParticleParameter("a")
    for i in range(N_ATOMS):
        force.addParticle([1.0 + 0.3 * i])
    for i, j in BONDS:
        force.addExclusion(i, j)
    return force


def custom_nonbonded_with_switch():
    """Without a cutoff the switching function is ignored; in the giant System it must stay so."""
    force = custom_nonbonded()
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.2)
    return force


def custom_nonbonded_groups():
    force = custom_nonbonded()
    force.addInteractionGroup({0, 1, 2}, {5, 6})
    force.addInteractionGroup({3}, {7, 0})
    return force


def custom_gb():
    force = openmm.CustomGBForce()
    for name in ("q", "radius"):
        force.addPerParticleParameter(name)
    force.addComputedValue("I", "radius2/(r+0.1)^3", openmm.CustomGBForce.ParticlePairNoExclusions)
    force.addComputedValue("B", "1/(1/radius-tanh(0.01*I)/(radius+0.05))", openmm.CustomGBForce.SingleParticle)
    force.addEnergyTerm("-q^2/B", openmm.CustomGBForce.SingleParticle)
    force.addEnergyTerm("-60*q1*q2/sqrt(r^2+B1*B2)", openmm.CustomGBForce.ParticlePair)
    for i in range(N_ATOMS):
        force.addParticle([0.2 * (i - 3.3), 0.12 + 0.01 * i])
    for i, j in BONDS:
        force.addExclusion(i, j)
    return force


def custom_compound_bond():
    force = openmm.CustomCompoundBondForce(3, "k*(distance(p1,p2)-distance(p2,p3))^2 + angle(p1,p2,p3)")
    force.addPerBondParameter("k")
    for i in range(N_ATOMS - 2):
        force.addBond([i, i + 1, i + 2], [300.0 + 10 * i])
    return force


def custom_centroid_bond():
    force = openmm.CustomCentroidBondForce(2, "k*distance(g1,g2)^2")
    force.addPerBondParameter("k")
    for group in ([0, 1], [2, 3, 4], [5, 6, 7]):
        force.addGroup(group)
    force.addGroup([0, 7], [0.3, 0.7])
    force.addBond([0, 1], [100.0])
    force.addBond([1, 3], [200.0])
    force.addBond([2, 0], [300.0])
    return force


BUILDERS = [
    harmonic_bond,
    harmonic_angle,
    periodic_torsion,
    rb_torsion,
    cmap,
    nonbonded,
    nonbonded_with_offsets,
    gbsa_obc,
    custom_bond,
    custom_angle,
    custom_torsion,
    custom_nonbonded,
    custom_nonbonded_with_switch,
    custom_nonbonded_groups,
    custom_gb,
    custom_compound_bond,
    custom_centroid_bond,
]


def forces_of(system, positions):
    integrator = openmm.VerletIntegrator(0.001)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    return context.getState(forces=True).getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)


def copies_error(system, positions, spacing, n_copies=3):
    """Largest relative difference between forces on distorted copies and on the same structures one by one."""
    rng = np.random.default_rng(2)
    structures = positions + rng.normal(0.0, 0.01, (n_copies, *positions.shape))
    sites = spacing * np.arange(n_copies)[:, None, None] * np.array([0.0, 1.0, 0.0])
    single = np.stack([forces_of(system, xyz) for xyz in structures])
    giant = forces_of(replicate_system(system, n_copies, CUTOFF), (structures + sites).reshape(-1, 3)).reshape(
        single.shape
    )
    assert np.abs(single).max() > 0.1
    return np.abs(giant - single).max() / np.abs(single).max()


@pytest.mark.parametrize("builder", BUILDERS)
def test_copies_feel_the_forces_of_single_molecules(builder):
    toy = make_toy("CH" * (N_ATOMS // 2), BONDS, zigzag(), builder())
    assert copies_error(toy.system, toy.positions, 5.0) < 1e-9
    check_copies(toy.system, toy.positions, np.array([0.0, 0.0, 6.0]), CUTOFF)


def test_every_copied_type_is_tested():
    assert {type(builder()) for builder in BUILDERS} == set(_COPIED)


@pytest.mark.parametrize("builder", [nonbonded, gbsa_obc, custom_nonbonded, custom_gb])
def test_copies_too_close_are_noticed(builder):
    toy = make_toy("CH" * (N_ATOMS // 2), BONDS, zigzag(), builder())
    assert copies_error(toy.system, toy.positions, 1.0) > 1e-6
    with pytest.raises(NotReplicableError, match="off by"):
        check_copies(toy.system, toy.positions, np.array([0.0, 0.0, 1.0]), CUTOFF)


@pytest.mark.parametrize(
    "forcefield",
    [("amber99sbildn.xml", "amber99_obc.xml"), ("amber19/protein.ff19SB.xml", "implicit/gbn2.xml")],
)
def test_copies_of_a_peptide(forcefield):
    pdb = app.PDBFile(str(ALANINE))
    system = app.ForceField(*forcefield).createSystem(pdb.topology, removeCMMotion=False)
    positions = pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    assert copies_error(system, positions, 6.0) < 1e-9


# ---------------------------------------------------------------- what is not copied


def external():
    force = openmm.CustomExternalForce("x^2")
    force.addParticle(0, [])
    return force


def hydrogen_bond():
    force = openmm.CustomHbondForce("distance(d1,a1)^2")
    force.addDonor(0, 1, 2)
    force.addAcceptor(5, 6, 7)
    return force


def periodic_bond():
    force = harmonic_bond()
    force.setUsesPeriodicBoundaryConditions(True)
    return force


def with_cutoff():
    force = nonbonded()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffNonPeriodic)
    return force


@pytest.mark.parametrize(
    ("builder", "reason"),
    [
        (external, "CustomExternalForce"),
        (hydrogen_bond, "CustomHbondForce"),
        (periodic_bond, "periodic"),
        (with_cutoff, "cutoff"),
    ],
)
def test_unknown_forces_are_refused(builder, reason):
    toy = make_toy("C" * N_ATOMS, BONDS, zigzag(), builder())
    with pytest.raises(NotReplicableError, match=reason):
        replicate_system(toy.system, 2, CUTOFF)


def test_constraints_and_virtual_sites_are_refused():
    toy = make_toy("CCC", [(0, 1), (1, 2)], zigzag()[:3])
    toy.system.addConstraint(0, 1, 0.1)
    with pytest.raises(NotReplicableError, match="constraints"):
        replicate_system(toy.system, 2, CUTOFF)
    toy.system.removeConstraint(0)
    toy.system.setParticleMass(2, 0.0)
    toy.system.setVirtualSite(2, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    with pytest.raises(NotReplicableError, match="virtual sites"):
        replicate_system(toy.system, 2, CUTOFF)


def test_energies_of_absolute_positions_are_found_out():
    force = openmm.CustomCompoundBondForce(2, "100*(x1-x2)^2 + 10*x1^2")
    force.addBond([0, 1], [])
    toy = make_toy("C" * N_ATOMS, BONDS, zigzag(), force)
    with pytest.raises(NotReplicableError, match="off by"):
        plan_lattice(toy.system, toy.positions, BONDS, [0, 1], 8)


# ---------------------------------------------------------------- the lattice


def test_lattice_keeps_copies_apart():
    toy = make_toy("C" * N_ATOMS, BONDS, zigzag(), nonbonded())
    plan = plan_lattice(toy.system, toy.positions, BONDS, [2, 3, 4], 100)
    assert plan.sites.shape == (100, 3) and plan.system(100).getNumParticles() == 100 * N_ATOMS
    apart = np.abs(plan.sites[:, None] - plan.sites).max(axis=-1) + 1e9 * np.eye(100)
    assert apart.min() > plan.cutoff + 2 * plan.radius
    assert np.abs(plan.sites).max() + plan.radius < 20.0
    contour = sum(np.linalg.norm(toy.positions[i] - toy.positions[j]) for i, j in BONDS)
    assert plan.cutoff > 1.25 * contour


def test_lattice_ends_20_nm_from_the_origin():
    toy = make_toy("C" * N_ATOMS, BONDS, zigzag(), harmonic_bond())
    plan = plan_lattice(toy.system, toy.positions, BONDS, [0, 1], 10**6)
    assert 1 < len(plan.sites) < 10**6 and np.abs(plan.sites).max() + plan.radius < 20.0
    with pytest.raises(NotReplicableError, match="too large"):
        plan_lattice(toy.system, 30 * toy.positions, BONDS, [0, 1], 8)


def test_molecule_in_pieces_has_no_size():
    toy = make_toy("CCCC", [(0, 1), (2, 3)], zigzag()[:4])
    with pytest.raises(NotReplicableError, match="do not connect"):
        plan_lattice(toy.system, toy.positions, [(0, 1), (2, 3)], [0, 1], 8)


def test_masses_of_copies_are_those_of_the_molecule():
    bath = HarmonicBath()
    system = frozen_system(bath.toy, bath.slow, 4.0)
    giant = replicate_system(system, 3, CUTOFF)
    masses = [giant.getParticleMass(i).value_in_unit(unit.dalton) for i in range(12)]
    assert masses == [0.0, 0.0, 12.0, 4.0] * 3

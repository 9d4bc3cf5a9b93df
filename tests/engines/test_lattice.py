"""The giant System: same forces as single molecules for every Force type, and the engine on top of it."""

import numpy as np
import openmm
import pytest
from openmm import app, unit
from toys import HarmonicBath, make_toy

from openmm_cgflow.engines import lattice as lattice_module
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.copies import _COPIED, NotReplicableError, check_copies, plan_lattice, replicate_system
from openmm_cgflow.engines.engine import Schedule
from openmm_cgflow.engines.frozen import frozen_system
from openmm_cgflow.engines.lattice import LatticeEngine
from openmm_cgflow.engines.workers import ContextsEngine
from openmm_cgflow.settings import ChainSettings

N_ATOMS = 8
BONDS = [(i, i + 1) for i in range(N_ATOMS - 1)]
CUTOFF = 3.0
SCHEDULE = Schedule(300.0, n_relax=3, n_equilibration=5, n_frames=2, stride=4)


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
def test_copies_of_a_peptide(systems, forcefield):
    pdb = app.PDBFile(str(systems / "alanine_dipeptide" / "alanine_dipeptide.pdb"))
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


# ---------------------------------------------------------------- the engine


def settings(**changes):
    return ChainSettings(engine="lattice", platform="Reference", n_workers=1, timestep=0.002, **changes)


def test_engine_samples_the_closed_form():
    bath = HarmonicBath()
    with create_engine(bath.toy, bath.slow, settings(n_replicas=100)) as engine:
        assert "lattice engine, 100 replicas" in engine.description
        start = np.repeat(bath.toy.positions[None], 200, axis=0)
        start += np.random.default_rng(0).normal(0.0, 2.0, (200, 1, 3))  # engines do not care where a molecule is
        frames = engine.run(start, Schedule(300.0, 5, 150, 8, 40), seed=1)
    assert frames.valid.all()
    assert np.array_equal(frames.xyz[:, :, :2], np.repeat(start[:, None, :2], 8, axis=1))
    shift = (start - bath.toy.positions)[:, None]
    deviations = bath.deviations(frames._replace(xyz=frames.xyz - shift), 300.0)
    assert max(deviations.values()) < 4.5, deviations
    wrong = bath.deviations(frames._replace(xyz=frames.xyz - shift), 400.0)
    assert wrong["covariance"] > 8 and wrong["energy"] > 8


def test_engine_repeats_itself():
    bath = HarmonicBath()
    start = np.repeat(bath.toy.positions[None], 20, axis=0)
    with create_engine(bath.toy, bath.slow, settings(n_replicas=8)) as engine:
        first, other, again = (engine.run(start, SCHEDULE, seed=seed) for seed in (1, 2, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.xyz, other.xyz)
    fast = first.xyz[:, 0, 2:].reshape(20, -1)
    assert len(np.unique(fast, axis=0)) == 20, "two replicas had the same noise"


def test_forces_and_energies_belong_to_the_frames():
    bath = HarmonicBath()
    start = np.repeat(bath.toy.positions[None], 5, axis=0)
    with create_engine(bath.toy, bath.slow, settings(n_replicas=3)) as engine:
        frames = engine.run(start, SCHEDULE, seed=1)
        energy, forces = engine.evaluate(frames.xyz.reshape(-1, 4, 3))
    assert np.array_equal(energy, frames.energy.ravel())
    assert np.array_equal(forces.reshape(frames.forces.shape), frames.forces)


def test_evaluations_are_counted_with_padding():
    """Eleven replicas on eight sites: a full round, and one of three on half of the sites."""
    bath = HarmonicBath()
    start = np.repeat(bath.toy.positions[None], 11, axis=0)
    with create_engine(bath.toy, bath.slow, settings(n_replicas=8)) as engine:
        engine.run(start, SCHEDULE, seed=1)
        assert engine.n_energy_evaluations == (8 + 4) * (3 + 5 + 2 * 4) + 11 * 2
        engine.evaluate(start)
        assert engine.n_energy_evaluations == (8 + 4) * (3 + 5 + 2 * 4) + 11 * 2 + 11


def clashing():
    """A molecule whose fast atoms 2 and 3 must not coincide."""
    force = openmm.NonbondedForce()
    for i in range(4):
        force.addParticle(0.0, 0.05, 0.1 if i > 1 else 0.0)
    bath = HarmonicBath()
    bath.toy.system.addForce(force)
    start = np.repeat(bath.toy.positions[None], 12, axis=0)
    start[5, 3] = start[5, 2]
    start[7, 2] = np.nan
    return bath, start


def test_diverged_copies_are_quarantined(every_platform):
    bath, start = clashing()
    options = settings(n_replicas=4).model_copy(update={"platform": every_platform.name})
    with create_engine(bath.toy, bath.slow, options) as engine:
        frames = engine.run(start, SCHEDULE, seed=1)
        energy, _ = engine.evaluate(frames.xyz[frames.valid][:, 0])
    assert np.flatnonzero(~frames.valid).tolist() == [5, 7]
    for part in frames[:3]:
        assert np.isfinite(part).all() and not part[[5, 7]].any()
    assert np.allclose(energy, frames.energy[frames.valid][:, 0])
    assert np.abs(frames.xyz[frames.valid]).max() < 1.0


def test_molecules_too_large_for_their_place_run_alone(monkeypatch):
    bath = HarmonicBath()
    start = np.repeat(bath.toy.positions[None], 6, axis=0)
    start[2, 1] += 1.5  # slow atoms torn apart
    asked = []
    run = ContextsEngine.run

    def spy(self, xyz, *arguments, **keywords):
        asked.append(len(xyz))
        return run(self, xyz, *arguments, **keywords)

    monkeypatch.setattr(ContextsEngine, "run", spy)
    with create_engine(bath.toy, bath.slow, settings(n_replicas=6)) as engine:
        frames = engine.run(start, SCHEDULE, seed=1)
    assert asked == [1] and frames.valid.all()
    assert np.array_equal(frames.xyz[2, :, :2], np.repeat(start[2][None, :2], 2, axis=0))


def test_rounds_that_keep_failing_end_in_single_contexts(monkeypatch):
    bath = HarmonicBath()
    start = np.repeat(bath.toy.positions[None], 10, axis=0)
    rounds = []
    original = LatticeEngine._round

    def failing(self, local, schedule, entropy):
        frames, good = original(self, local, schedule, entropy)
        rounds.append(len(local))
        good[0] = False
        return frames, good

    monkeypatch.setattr(LatticeEngine, "_round", failing)
    with create_engine(bath.toy, bath.slow, settings(n_replicas=10)) as engine:
        frames = engine.run(start, SCHEDULE, seed=1)
    assert rounds == [10, 9, 8, 7, 6, 5, 4, 3] and len(rounds) == lattice_module._MAX_ATTEMPTS
    assert frames.valid.all()


def test_system_that_cannot_be_copied_falls_back(caplog):
    bath = HarmonicBath()
    bath.toy.system.addForce(external())
    with create_engine(bath.toy, bath.slow, settings()) as engine:
        assert isinstance(engine, ContextsEngine)
        assert "CustomExternalForce" in engine.description and "contexts engine" in engine.description
    assert "CustomExternalForce" in caplog.text


def test_masses_of_copies_are_those_of_the_molecule():
    bath = HarmonicBath()
    system = frozen_system(bath.toy, bath.slow, 4.0)
    giant = replicate_system(system, 3, CUTOFF)
    masses = [giant.getParticleMass(i).value_in_unit(unit.dalton) for i in range(12)]
    assert masses == [0.0, 0.0, 12.0, 4.0] * 3


@pytest.mark.gpu
def test_engine_on_a_gpu(systems, gpu_platform):
    from openmm_cgflow.molecule.partition import Partition
    from openmm_cgflow.molecule.system import MolecularSystem

    folder = systems / "alanine_dipeptide"
    peptide = MolecularSystem.from_files(folder / "alanine_dipeptide.pdb", ["amber99sbildn.xml", "amber99_obc.xml"])
    slow = Partition.resolve(peptide, "backbone").slow
    start = np.repeat(peptide.positions[None], 64, axis=0)
    schedule = Schedule(300.0, n_relax=20, n_equilibration=1000, n_frames=5, stride=100)
    energies = []
    for engine_name, platform in (("lattice", gpu_platform), ("contexts", "Reference")):
        options = ChainSettings(engine=engine_name, platform=platform, n_replicas=64, n_workers=1)
        with create_engine(peptide, slow, options) as engine:
            assert engine_name in engine.description
            frames = engine.run(start, schedule, seed=1)
        assert frames.valid.all()
        assert np.array_equal(frames.xyz[:, :, slow], np.repeat(start[:, None, slow], 5, axis=1))
        energies.append(frames.energy.mean(axis=1))
    error = np.sqrt(sum(energy.var(ddof=1) / len(energy) for energy in energies))
    assert abs(energies[0].mean() - energies[1].mean()) < 4 * error

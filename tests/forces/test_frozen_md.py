"""Chains of the fast atoms against long frozen-slow MD, sharing no code, time step, masses or friction."""

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from openmm_cgflow import MolecularSystem, Partition, load_config
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.engine import Schedule
from openmm_cgflow.forces.fast_atoms import FastAtoms
from openmm_cgflow.forces.gradients import cartesian_gradients, comoving_gradients
from openmm_cgflow.runs.build import build_geometry
from openmm_cgflow.runs.loop import hottest_temperature
from openmm_cgflow.units import thermal_beta

TEMPERATURE = 300.0


def frozen_md(molecule, slow, positions, seed, *, remove_motion=False, n_chains=8, n_frames=300):
    """Energies (n_chains, n_frames) and frames by a plain Langevin integrator, 0.05 ps apart."""
    system = openmm.XmlSerializer.deserialize(molecule.to_xml())
    for atom in slow:
        system.setParticleMass(atom, 0.0)
    if remove_motion:
        system.addForce(openmm.CMMotionRemover())
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 5.0, 0.0005)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    energy, xyz = np.empty((n_chains, n_frames)), np.empty((n_chains, n_frames, molecule.n_atoms, 3))
    for chain in range(n_chains):
        context.setPositions(positions)
        context.setVelocitiesToTemperature(TEMPERATURE, seed + chain)
        integrator.step(4000)
        for frame in range(n_frames):
            integrator.step(100)
            state = context.getState(positions=True, energy=True)
            energy[chain, frame] = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
            xyz[chain, frame] = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    return energy, xyz


def sigmas(ours, theirs):
    """Difference of means in standard errors; ours are chains, theirs are cut into blocks of 1.5 ps."""
    a = ours.mean(axis=1)
    b = theirs.reshape(-1, 30, *theirs.shape[2:]).mean(axis=1)
    error = np.sqrt(a.var(axis=0, ddof=1) / len(a) + b.var(axis=0, ddof=1) / len(b))
    return (a.mean(axis=0) - b.mean(axis=0)) / error


@pytest.fixture(scope="module")
def at_one_z(systems):
    """Our chains at the input structure's z: the molecule, what it is built from, and the frames."""
    config = load_config(
        systems / "alanine_dipeptide" / "alanine_dipeptide.yaml", ["chains.n_workers=1", "chains.platform=Reference"]
    )
    molecule = MolecularSystem.from_files(config.system)
    partition = Partition.resolve(molecule, config.partition.slow)
    with create_engine(molecule, partition.slow, config.chains) as engine:
        geometry = build_geometry(config, molecule, partition, hottest_temperature(config), engine.evaluate)
        z = geometry.all_atom.read_slow(torch.tensor(molecule.positions)).expand(128, -1)
        fast_atoms = FastAtoms(engine, geometry.all_atom, geometry.draw_fast, config.chains, config.seed)
        frames = fast_atoms.run(z, Schedule(TEMPERATURE, config.chains.n_relax, 500, 20, 10))
    assert frames.valid.all()
    return molecule, partition, geometry, frames


@pytest.fixture(scope="module")
def reference(at_one_z):
    molecule, partition, _, frames = at_one_z
    return frozen_md(molecule, partition.slow, frames.xyz[0, -1].numpy(), seed=3)


@pytest.mark.slow
def test_mean_energy(at_one_z, reference):
    frames = at_one_z[-1]
    assert abs(sigmas(frames.energy.numpy(), reference[0])) < 4


@pytest.mark.slow
def test_fast_atoms_are_distributed_alike(at_one_z, reference):
    """Means and widths of the bonds, angles and stiff dihedrals of the fast atoms.

    A methyl group turns rarely in the reference, and which of its hydrogens is which then matters to each one's angle:
    bonds and angles are averaged over its three hydrogens, and its dihedrals left out.
    """
    _, _, geometry, frames = at_one_z
    fast = geometry.harmonic.fast
    rotors = [fast.references[:, 0] == parent for parent in fast.references[fast.rotatable, 0]]
    assert [rotor.sum() for rotor in rotors] == [3, 3, 3]
    single = ~np.any(rotors, axis=0)
    values = [geometry.all_atom.read_fast(torch.as_tensor(xyz)).numpy() for xyz in (frames.xyz, reference[1])]
    centre = values[1][0, 0].copy()
    for rotor in rotors:
        centre[rotor] = centre[rotor].mean(axis=0)

    def columns(table):
        groups = [table[..., rotor, :2].mean(axis=-2) for rotor in rotors]
        return np.concatenate((table[..., single, :].reshape(*table.shape[:2], -1), *groups), axis=-1)

    away = [table - centre for table in values]
    for table in away:
        table[..., 2] = np.remainder(table[..., 2] + np.pi, 2 * np.pi) - np.pi  # none wraps
    assert columns(away[0]).shape[-1] == 6 * 3 + 3 * 2
    assert np.abs(sigmas(*map(columns, away))).max() < 4
    # Widths about the reference's means.
    mean = away[1].mean(axis=(0, 1))
    for rotor in rotors:
        mean[rotor] = mean[rotor].mean(axis=0)
    assert np.abs(sigmas(*(columns((table - mean) ** 2) for table in away))).max() < 4


@pytest.mark.slow
def test_a_motion_remover_would_be_seen(at_one_z):
    """With frozen atoms CMMotionRemover biases the fast ones: the tests above must be able to see that."""
    molecule, partition, _, frames = at_one_z
    biased, _ = frozen_md(molecule, partition.slow, frames.xyz[0, -1].numpy(), seed=3, remove_motion=True, n_frames=180)
    assert abs(sigmas(frames.energy.numpy(), biased)) > 4


@pytest.mark.slow
def test_both_estimators_have_the_same_mean(at_one_z):
    """Co-moving and Cartesian, on the same frames; the noise of the co-moving one is far smaller."""
    _, _, geometry, frames = at_one_z
    z = geometry.all_atom.read_slow(frames.xyz[:, 0])
    given = geometry.all_atom, z, frames, thermal_beta(TEMPERATURE)
    comoving, cartesian = (
        gradients.mean(1).numpy() for gradients in (comoving_gradients(*given)[0], cartesian_gradients(*given))
    )
    difference = cartesian - comoving  # one row a chain, and the chains are independent
    assert np.abs(difference.mean(0) / (difference.std(0, ddof=1) / np.sqrt(len(difference)))).max() < 4
    assert (cartesian.var(0) > 5 * comoving.var(0)).all()

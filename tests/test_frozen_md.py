"""Chains of the fast atoms against long frozen-slow MD, sharing no code, time step, masses or friction."""

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from openmm_cgflow import MolecularSystem, Partition, load_config
from openmm_cgflow.model import Scaffold
from openmm_cgflow.replicas import create_engine

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
    """Difference of means in standard errors; rows are independent, entries of a row are not."""
    a, b = ours.mean(axis=1), theirs.mean(axis=1)
    error = np.sqrt(a.var(axis=0, ddof=1) / len(a) + b.var(axis=0, ddof=1) / len(b))
    return (a.mean(axis=0) - b.mean(axis=0)) / error


@pytest.fixture(scope="module")
def at_one_z(systems):
    """Our chains at the input structure's z: the molecule, what it is built from, and the frames."""
    config = load_config(
        systems / "alanine_dipeptide" / "alanine_dipeptide.yaml", ["sampler.n_workers=1", "sampler.platform=Reference"]
    )
    molecule = MolecularSystem.from_files(config.system)
    partition = Partition.resolve(molecule, config.partition.slow)
    with create_engine(molecule, partition.slow, config.sampler) as engine:
        scaffold = Scaffold.build(config, molecule, partition, engine.evaluate)
        z = scaffold.assembly.read_slow(torch.tensor(molecule.positions)).expand(128, -1)
        frames = scaffold.chains(engine).run(z, TEMPERATURE, 500, 20, 10)
    assert frames.valid.all()
    return molecule, partition, scaffold, frames


@pytest.fixture(scope="module")
def reference(at_one_z):
    molecule, partition, _, frames = at_one_z
    return frozen_md(molecule, partition.slow, frames.xyz[0, -1].numpy(), seed=3)


def test_mean_energy(at_one_z, reference):
    frames = at_one_z[-1]
    assert abs(sigmas(frames.energy.numpy(), reference[0])) < 4


def test_fast_atoms_are_distributed_alike(at_one_z, reference):
    """Means and widths of every bond, angle and stiff dihedral of the fast atoms."""
    _, _, scaffold, frames = at_one_z
    assembly = scaffold.assembly
    theirs = assembly.read_fast(torch.tensor(reference[1])).numpy()
    ours = assembly.read_fast(frames.xyz).numpy()
    centre = theirs[0, 0].copy()
    for values in (ours, theirs):
        values -= centre
        values[..., 2] = np.remainder(values[..., 2] + np.pi, 2 * np.pi) - np.pi  # none wraps
    stiff = np.ones(theirs.shape[2:], dtype=bool)
    stiff[scaffold.harmonic.fast.rotatable, 2] = False  # the methyl rotors turn too rarely to be compared
    assert stiff.sum() == stiff.size - 3
    ours, theirs = ours[..., stiff], theirs[..., stiff]
    mean = theirs.mean(axis=(0, 1))
    assert np.abs(sigmas(ours, theirs)).max() < 4
    assert np.abs(sigmas((ours - mean) ** 2, (theirs - mean) ** 2)).max() < 4


def test_a_motion_remover_would_be_seen(at_one_z):
    """With frozen atoms CMMotionRemover biases the fast ones: the tests above must be able to see that."""
    molecule, partition, _, frames = at_one_z
    biased, _ = frozen_md(molecule, partition.slow, frames.xyz[0, -1].numpy(), seed=3, remove_motion=True, n_frames=200)
    assert abs(sigmas(frames.energy.numpy(), biased)) > 4

"""A model of n-butane with networks of random weights, and what its forces must be."""

import numpy as np
import openmm
import pytest
import torch

from openmm_cgflow import MolecularSystem, Partition, load_config
from openmm_cgflow.engines.platforms import PlatformChoice
from openmm_cgflow.model.density import PMFDensity
from openmm_cgflow.molecule.sanitize import energy_and_forces
from openmm_cgflow.networks.flow import new_flow
from openmm_cgflow.networks.pmf import new_pmf
from openmm_cgflow.networks.response import new_response
from openmm_cgflow.runs.build import Setup, build_geometry, new_model
from openmm_cgflow.runs.loop import hottest_temperature

REFERENCE = PlatformChoice("Reference")


def butane_model(systems):
    settings = ["flow.n_layers=2", "flow.hidden_features=[8]", "pmf.hidden_features=[16]", "pmf.n_members=2"]
    config = load_config(systems / "butane" / "butane.yaml", settings)
    molecule = MolecularSystem.from_files(config.system)
    partition = Partition.resolve(molecule, config.partition.slow)

    def evaluate(xyz):
        energies, forces = zip(*(energy_and_forces(molecule.system, frame) for frame in xyz), strict=True)
        return np.array(energies), np.array(forces)

    geometry = build_geometry(config, molecule, partition, hottest_temperature(config), evaluate)
    flow, pmf = new_flow(config.flow, geometry, config.seed), new_pmf(config.pmf, geometry, config.seed)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*flow.parameters(), *pmf.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    response = new_response(config.pmf, geometry, config.temperature, config.seed)
    density = PMFDensity(geometry.coordinates, flow, pmf, response)
    return new_model(Setup(config, molecule, partition, geometry), density, [config.temperature], [], "Reference")


def all_atoms(model, seed=0):
    """Positions near the input structure."""
    positions = model.molecular_system.positions
    return positions + 0.003 * np.random.default_rng(seed).normal(size=positions.shape)


def expected(model, positions, atoms, scale=1.0, energy=None):
    at = torch.tensor(positions, requires_grad=True)
    value = model.energy_of_positions(scale, energy)(at[list(atoms)])
    (gradient,) = torch.autograd.grad(value, at)
    return value.item(), -gradient.numpy()


def evaluate(system, positions, platform=REFERENCE, groups=-1):
    context = platform.context(system, openmm.VerletIntegrator(0.001))
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True, groups=groups)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value


def system_of(force, n_atoms):
    system = openmm.System()
    for _ in range(n_atoms):
        system.addParticle(12.0)
    system.addForce(force)
    return system


def close(found, true):
    assert found[0] == pytest.approx(true[0], rel=1e-5)
    np.testing.assert_allclose(found[1], true[1], atol=1e-5 * np.abs(true[1]).max())

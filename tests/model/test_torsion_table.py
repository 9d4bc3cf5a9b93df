"""Tables of torsions against the energy that they hold."""

import numpy as np
import openmm
import pytest
import torch

from openmm_cgflow.coordinates.features import Torsions
from openmm_cgflow.coordinates.slow import InternalCoordinates
from openmm_cgflow.coordinates.zmatrix import slow_zmatrix
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.model.force import torsion_table
from openmm_cgflow.model.free_energy import FlowPotential, FreeEnergy, TorsionPotential
from openmm_cgflow.molecule.bonds import bond_graph
from openmm_cgflow.networks.flow import CGFlow


class Waves(torch.nn.Module):
    """beta A of torsions that no two of them share, so that they cannot be taken for each other."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, z):
        phase = torch.arange(1, self.n + 1, dtype=z.dtype)
        return (phase * torch.cos(z[:, : self.n] - 0.3 * phase)).sum(-1) + torch.sin(z[:, : self.n]).prod(-1)


def chain(n_torsions):
    """Coordinates of a chain and its order; the atoms come in another one."""
    n = n_torsions + 3
    zmatrix = slow_zmatrix(bond_graph(n + 1, [(i, i + 1) for i in range(n)]), range(n))
    centre, width = np.array([[0.15, 1.9, 0.0]] * n), np.array([[0.003, 0.05, 0.0]] * n)
    coordinates = InternalCoordinates(zmatrix, [f"C{i}" for i in range(n + 1)], centre, width, 6.0)
    n_bounded = coordinates.n_features - n_torsions
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = CGFlow(Torsions(n_torsions, n_bounded), 6.0, 2, 2, 4, [8], torch.eye(n_bounded).double())
    return coordinates, flow, list(np.random.default_rng(1).permutation(n))


def energy_of(n_torsions):
    coordinates, flow, slow = chain(n_torsions)
    potential = TorsionPotential(Waves(n_torsions), flow, coordinates)
    return FreeEnergy(coordinates, slow, potential, 2.0)


def context_of(force, n_atoms):
    system = openmm.System()
    for _ in range(n_atoms):
        system.addParticle(12.0)
    system.addForce(force)
    return openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))


@pytest.mark.parametrize(("n_torsions", "error"), [(1, 1e-5), (2, 1e-3), (3, 0.03)])
def test_is_the_energy(n_torsions, error):
    """Energies and forces, kJ/mol and kJ/mol/nm (0.1 nm is about a radian), at torsions all around the circle."""
    energy = energy_of(n_torsions)
    n = n_torsions + 3
    atoms = [2 * i + 1 for i in range(n)]
    context = context_of(torsion_table(energy, atoms), 2 * n + 1)
    angles = (2 * torch.rand(20, n_torsions, generator=torch.Generator().manual_seed(2)).double() - 1) * np.pi
    z = torch.cat((angles, torch.zeros(20, energy.coordinates.n_features - n_torsions).double()), dim=1)
    for xyz in energy.coordinates.to_xyz(z):
        at = torch.empty_like(xyz).index_copy(0, energy.order, xyz).requires_grad_()
        value = energy(at)
        (gradient,) = torch.autograd.grad(value, at)
        positions = np.random.default_rng(0).normal(size=(2 * n + 1, 3))
        positions[atoms] = at.detach().numpy()
        context.setPositions(positions)
        state = context.getState(energy=True, forces=True)
        assert state.getPotentialEnergy()._value == pytest.approx(value.item(), abs=error)
        forces = state.getForces(asNumpy=True)._value
        np.testing.assert_allclose(forces[atoms], -gradient.numpy(), atol=100 * error)
        assert not np.delete(forces, atoms, axis=0).any()


def test_bonds_and_many_torsions_are_refused():
    coordinates, flow, slow = chain(1)
    whole = FreeEnergy(coordinates, slow, FlowPotential(flow, coordinates, 1.0), 2.0)
    with pytest.raises(CGFlowError, match="cannot hold bonds and angles"):
        torsion_table(whole, range(4))
    with pytest.raises(CGFlowError, match="up to three torsions, and there are 4"):
        torsion_table(energy_of(4), range(7))

"""The free energy of positions: against the model's own numbers, its volume element, and where the support ends."""

import numpy as np
import pytest
import torch

from openmm_cgflow.coordinates.slow import InternalCoordinates
from openmm_cgflow.coordinates.zmatrix import slow_zmatrix
from openmm_cgflow.model.free_energy import FlowPotential, FreeEnergy, PMFPotential, TorsionPotential
from openmm_cgflow.molecule.bonds import bond_graph
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.networks.pmf import PMF

KT = 2.5
N = 4


@pytest.fixture(scope="module")
def coordinates():
    """A chain of four atoms with bonds and angles so soft that their volume element shows."""
    zmatrix = slow_zmatrix(bond_graph(5, [(0, 1), (1, 2), (2, 3), (3, 4)]), range(N))
    centre = np.array([[0.15, 1.8, 0.0]] * N)
    width = np.array([[0.015, 0.15, 0.0]] * N)
    return InternalCoordinates(zmatrix, [f"C{i}" for i in range(5)], centre, width, 6.0)


def shaken(module, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


@pytest.fixture(scope="module")
def flow(coordinates):
    n_bounded = coordinates.n_features - coordinates.n_circular
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = CGFlow(coordinates.features, 6.0, 2, 2, 6, [16], torch.eye(n_bounded).double())
    return shaken(made, 0.1)


@pytest.fixture(scope="module")
def pmf(coordinates):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return shaken(PMF(coordinates.features, torch.eye(5).double(), [16], 2), 0.05)


@pytest.fixture(scope="module")
def potentials(coordinates, flow, pmf):
    whole = {"flow": FlowPotential(flow, coordinates, 1.0), "pmf": PMFPotential(pmf)}
    return {**whole, "torsions": TorsionPotential(whole["pmf"], flow, coordinates)}


@pytest.fixture(scope="module")
def make(coordinates, potentials):
    return lambda name, scale=KT: FreeEnergy(coordinates, range(N), potentials[name], scale)


def drawn(flow, coordinates, n, seed=0):
    z, log_q = flow.sample(n, torch.Generator().manual_seed(seed))
    return z, log_q, coordinates.to_xyz(z)


def test_flow_gives_the_density_of_positions(make, flow, coordinates):
    z, log_q, xyz = drawn(flow, coordinates, 200)
    expected = -KT * (log_q - coordinates.log_volume(z))
    difference = make("flow")(xyz) - expected
    torch.testing.assert_close(difference, difference[:1].expand(200), atol=1e-8, rtol=0)


def test_pmf_is_the_fitted_one(make, pmf, flow, coordinates):
    z, _, xyz = drawn(flow, coordinates, 200)
    with torch.no_grad():
        torch.testing.assert_close(make("pmf")(xyz), KT * pmf(z), rtol=1e-5, atol=1e-5)


def test_torsions_of_a_flow_have_its_marginal(flow, coordinates, potentials):
    """And so they have of anything whose conditional of bonds and angles is the flow's."""
    z, _, xyz = drawn(flow, coordinates, 200)
    torsions = FreeEnergy(coordinates, range(N), TorsionPotential(potentials["flow"], flow, coordinates), KT)
    with torch.no_grad():
        difference = torsions(xyz) + KT * flow.log_prob_torsions(z)
    torch.testing.assert_close(difference, difference[:1].expand(200), atol=1e-8, rtol=0)


def test_torsions_know_no_bonds(make, flow, coordinates):
    z, _, _ = drawn(flow, coordinates, 200)
    others = torch.cat((z[:, :1], z[:, 1:].flip(0)), dim=1)
    torch.testing.assert_close(make("torsions")(coordinates.to_xyz(z)), make("torsions")(coordinates.to_xyz(others)))


@pytest.mark.parametrize("name", ["flow", "pmf", "torsions"])
def test_knows_no_frame_and_no_order(make, coordinates, potentials, flow, name):
    xyz = drawn(flow, coordinates, 20)[2]
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    rotation *= torch.sign(torch.linalg.det(rotation))
    expected = make(name)(xyz)
    torch.testing.assert_close(make(name)(xyz @ rotation + 0.3), expected)
    slow = [2, 0, 3, 1]
    other = FreeEnergy(coordinates, slow, potentials[name], KT)
    torch.testing.assert_close(other(xyz[:, slow]), expected)
    torch.testing.assert_close(other(xyz[0, slow]), expected[0])


@pytest.mark.parametrize("name", ["flow", "pmf", "torsions"])
def test_forces_are_slopes(make, flow, coordinates, name):
    energy, xyz = make(name), drawn(flow, coordinates, 5)[2].requires_grad_()
    (gradient,) = torch.autograd.grad(energy(xyz).sum(), xyz)
    move = torch.randn(xyz.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        slope = (energy(xyz + 1e-6 * move) - energy(xyz - 1e-6 * move)) / 2e-6
    torch.testing.assert_close(slope, (gradient * move).sum((-1, -2)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["flow", "pmf"])
@pytest.mark.parametrize("stretch", [0.25, 1.9])
def test_beyond_the_support_it_pulls_back(make, coordinates, flow, name, stretch):
    """The end of the chain at a quarter and twice its bond length: beyond the bound of 6 widths."""
    xyz = coordinates.to_xyz(torch.zeros(coordinates.n_features, dtype=torch.float64))
    bond = xyz[3] - xyz[2]
    xyz[3] = xyz[2] + stretch * bond
    z = coordinates.from_xyz(xyz)
    assert z[1:].abs().max() > coordinates.bound
    assert flow.log_prob(z[None]).item() == -np.inf
    xyz.requires_grad_()
    energy = make(name)(xyz)
    (gradient,) = torch.autograd.grad(energy, xyz)
    assert torch.isfinite(energy) and torch.isfinite(gradient).all()
    outwards = np.sign(stretch - 1) * (gradient[3] * bond).sum()
    assert outwards > 0


def far_from_the_flow(energy, flow, coordinates):
    """Metropolis steps in Cartesian coordinates from samples of the flow; standard errors that bonds then moved."""
    generator = torch.Generator().manual_seed(4)
    z, _, xyz = drawn(flow, coordinates, 2500)
    with torch.no_grad():
        now = energy(xyz)
        for _ in range(60):
            trial = xyz + 0.006 * torch.randn(xyz.shape, generator=generator, dtype=torch.float64)
            then = energy(trial)
            accept = torch.rand(len(xyz), generator=generator, dtype=torch.float64).log() < (now - then) / KT
            xyz, now = torch.where(accept[:, None, None], trial, xyz), torch.where(accept, then, now)
    moved = coordinates.from_xyz(xyz)[:, 1:6] - z[:, 1:]
    return float((moved.mean(0).abs() / (moved.std(0) / np.sqrt(len(moved)))).max())


def test_beads_keep_the_density_of_the_flow(make, flow, coordinates):
    assert far_from_the_flow(make("flow"), flow, coordinates) < 4


def test_without_the_volume_element_they_do_not(coordinates, flow, potentials):
    class Density(torch.nn.Module):
        def forward(self, z):
            return potentials["flow"](z) - coordinates.log_volume(z)

    assert far_from_the_flow(FreeEnergy(coordinates, range(N), Density(), KT), flow, coordinates) > 5

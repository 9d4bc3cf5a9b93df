"""The joint density and its maps: round trips, volumes against autograd, densities that integrate to one."""

import math

import pytest
import torch
from analytic import assembly_of, random_structure

from openmm_cgflow.assembly import LinearAssembly
from openmm_cgflow.coordinates import BoxCoordinates
from openmm_cgflow.flow import N_GAMMA_FEATURES, CGFlow, ConditionalFlow
from openmm_cgflow.joint import JointFlow
from openmm_cgflow.splines import N_HARMONICS

BOX = 4.0


def linear(n_slow=1, n_fast=1, mixing=0.0, learned=True, roughness=0.0, seed=0):
    labels = [f"X{i}" for i in range(n_slow + n_fast)]
    slow, fast = range(1, n_slow + 1), (0, *range(n_slow + 1, n_slow + n_fast))
    assembly = LinearAssembly(BoxCoordinates(slow, labels, BOX), fast, mixing, learned)
    shaken(assembly, roughness, seed)
    return assembly


def shaken(module, roughness, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += roughness * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def joint_flow(assembly, centre, n_layers=0, roughness=0.1):
    n_circular, n_features = assembly.coordinates.n_circular, assembly.coordinates.n_features
    context = 2 * N_HARMONICS * n_circular + n_features - n_circular + N_GAMMA_FEATURES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        flow = CGFlow(n_circular, n_features - n_circular, assembly.coordinates.bound, 3, 2, 6, [8])
        conditional = ConditionalFlow(
            centre.numel(), context, 6.0, n_layers, 6, [8], torch.eye(centre.numel()).double()
        )
    for part in (flow, conditional.double()):
        shaken(part, roughness)
    return JointFlow(
        flow, conditional, assembly, centre, lambda gamma: 0.3 / math.sqrt(gamma) * torch.ones_like(centre)
    )


def drawn(joint, n, gamma=1.0, seed=3):
    with torch.no_grad():
        return joint(joint.draw_base(n, torch.Generator().manual_seed(seed)), gamma)


# ---------------------------------------------------------------- the learned map


def test_it_starts_as_the_partition():
    assembly = linear(2, 2)
    z, y = torch.tensor([[0.3, -1.0]]).double(), torch.tensor([[[5.0], [7.0]]]).double()
    xyz = assembly.build(z, y)
    expected = [5.0, 0.3 * BOX / math.pi, -1.0 * BOX / math.pi, 7.0]
    torch.testing.assert_close(xyz[0, :, 0], torch.tensor(expected).double())
    assert (xyz[..., 1:] == 0).all()
    torch.testing.assert_close(assembly.slow_directions(), torch.eye(4)[[1, 2]].double())


@pytest.mark.parametrize("mixing", [0.0, 0.5, 0.9])
def test_rows_sum_to_one_whatever_is_learned(mixing):
    assembly = linear(2, 3, mixing, roughness=0.3)
    ones = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(assembly.matrix.sum(1), ones)
    torch.testing.assert_close(assembly.slow_directions().sum(1), ones[:2])
    # A translation of all pseudo-particles translates all particles.
    z, y = torch.rand(4, 2).double(), torch.rand(4, 3, 1).double()
    moved = assembly.build(z + 0.2 * math.pi / BOX, y + 0.2) - assembly.build(z, y)
    torch.testing.assert_close(moved[..., 0], torch.full((4, 5), 0.2).double())


def test_more_mixing_is_nearer_to_the_mean():
    zero = torch.zeros(1, 1, 1).double()
    volumes = [float(linear(1, 1, mixing).log_volume_fast(zero).detach()) for mixing in (0.0, 0.5, 0.9)]
    assert volumes[0] == pytest.approx(0) and volumes[1] == pytest.approx(math.log(0.5))
    assert volumes[2] == pytest.approx(math.log(0.1))


def test_linear_map_and_back():
    assembly = linear(2, 3, 0.3, roughness=0.3)
    z, y = 2 * torch.rand(6, 2).double() - 1, torch.randn(6, 3, 1).double()
    xyz = assembly.build(z, y)
    torch.testing.assert_close(assembly.read_slow(xyz), z)
    torch.testing.assert_close(assembly.read_fast(xyz), y)


def test_volume_of_the_linear_map_is_that_of_autograd():
    assembly = linear(2, 3, 0.3, roughness=0.3)
    z, y = torch.tensor([0.3, -0.5]).double(), torch.randn(3, 1).double()

    def positions(flat):
        return assembly.build(flat[None, :2], flat[None, 2:, None])[0, :, 0]

    jacobian = torch.autograd.functional.jacobian(positions, torch.cat((z, y[:, 0])))
    found = assembly.coordinates.log_volume(z[None]) + assembly.log_volume_fast(y[None])
    assert float(found.detach()) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]))


def test_a_fixed_map_has_nothing_to_train():
    assert not any(parameter.requires_grad for parameter in linear(learned=False).parameters())


# ---------------------------------------------------------------- the density


@pytest.mark.parametrize("n_layers", [0, 2])
@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_density_of_two_particles_integrates_to_one(n_layers, gamma):
    joint = joint_flow(linear(mixing=0.3, roughness=0.1), torch.tensor([[0.4]]).double(), n_layers)
    n, reach = 700, 12.0
    axis = ((torch.arange(n) + 0.5) / n * 2 - 1).double() * reach
    x = torch.cartesian_prod(axis, axis)
    xyz = torch.zeros((len(x), 2, 3), dtype=torch.float64)
    xyz[..., 0] = x
    with torch.no_grad():
        # One image of the box only: pseudo-particles outside are read as inside.
        pseudo = torch.linalg.solve(joint.assembly.matrix, x.T)[0]
        inside = pseudo.abs() < BOX
        mass = (joint.log_prob_xyz(xyz, gamma).exp() * inside).sum() * (2 * reach / n) ** 2
    assert float(mass) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_density_of_positions_is_that_of_what_was_drawn(gamma):
    joint = joint_flow(linear(2, 2, 0.2, roughness=0.1), torch.tensor([[0.4], [-0.1]]).double())
    z, r = drawn(joint, 50, gamma)
    xyz = joint.build(z, r, gamma)
    for found, expected in zip(joint.read(xyz, gamma), (z, r), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        joint.log_prob_xyz(xyz, gamma), joint.log_prob(z, r, gamma) - joint.log_volume(z, r, gamma)
    )
    assert not torch.allclose(joint.log_prob(z, r, gamma), joint.log_prob(z, r, 0.5))


def test_volume_is_that_of_autograd():
    joint = joint_flow(linear(1, 2, 0.2, roughness=0.1), torch.tensor([[0.4], [-0.1]]).double())
    z, r = drawn(joint, 1)

    def positions(flat):
        return joint.build(flat[None, :1], flat[None, 1:], 0.4)[0, :, 0]

    jacobian = torch.autograd.functional.jacobian(positions, torch.cat((z[0], r[0])))
    found = float(joint.log_volume(z, r, 0.4).detach())
    assert found == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]))


@pytest.mark.parametrize("n_layers", [0, 2])
def test_density_of_a_molecule(n_layers):
    """Fast atoms in internal coordinates, one of them with a dihedral at the seam of the circle."""
    bonds = [(0, 1), (1, 2), (2, 3), (2, 4), (4, 5)]
    xyz = random_structure(bonds, 4)
    assembly = assembly_of(bonds, [0, 1, 2, 3], xyz)
    centre = assembly.read_fast(xyz[None])[0].clone()
    centre[1, 2] = math.pi - 0.01
    joint = joint_flow(assembly, centre, n_layers, roughness=0.03)
    joint.widths = lambda gamma: torch.tensor([0.003, 0.05, 0.2]).double().expand(2, 3)
    z, r = drawn(joint, 40)
    z[:, 1:] *= 0.1
    built = joint.build(z, r)
    found_z, found_r = joint.read(built)
    torch.testing.assert_close(found_z, z)
    torch.testing.assert_close(found_r, r)
    torch.testing.assert_close(joint.log_prob_xyz(built), joint.log_prob(z, r) - joint.log_volume(z, r))

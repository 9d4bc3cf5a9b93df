"""The joint density: it integrates to one, and its log density is that of what it draws."""

import math

import pytest
import torch
from analytic import assembly_of, random_structure
from joint_models import drawn, internal, joint_flow, linear


@pytest.mark.parametrize("n_layers", [0, 2])
@pytest.mark.parametrize("beta_ratio", [1.0, 0.3])
def test_density_of_two_particles_integrates_to_one(n_layers, beta_ratio):
    joint = joint_flow(linear(mixing=0.3, roughness=0.1), n_layers=n_layers)
    n, reach = 700, 12.0
    axis = ((torch.arange(n) + 0.5) / n * 2 - 1).double() * reach
    x = torch.cartesian_prod(axis, axis)
    xyz = torch.zeros((len(x), 2, 3), dtype=torch.float64)
    xyz[..., 0] = x
    with torch.no_grad():
        z, _ = joint.read(xyz, beta_ratio)
        # One image of the circle only: pseudo-particles outside are read as inside.
        scale = float(joint.thermal_map._frame(beta_ratio).scale)
        slow = ((xyz[..., 0] - joint.thermal_map.centre) @ joint.thermal_map.pseudo_particles.T)[:, 0]
        inside = (slow / scale - z[:, 0]).abs() < 1e-6
        mass = (joint.log_prob_xyz(xyz, beta_ratio).exp() * inside).sum() * (2 * reach / n) ** 2
    assert float(mass) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("beta_ratio", [1.0, 0.3])
def test_density_of_positions_is_that_of_what_was_drawn(beta_ratio):
    joint = joint_flow(linear(2, 2, 0.2, roughness=0.1), n_circular=2)
    z, r = drawn(joint, 50, beta_ratio)
    xyz = joint.build(z, r, beta_ratio)
    for found, expected in zip(joint.read(xyz, beta_ratio), (z, r), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        joint.log_prob_xyz(xyz, beta_ratio), joint.log_prob(z, r, beta_ratio) - joint.log_volume(z, r, beta_ratio)
    )
    assert not torch.allclose(joint.log_prob(z, r, beta_ratio), joint.log_prob(z, r, 0.5))


def test_rows_may_have_temperatures_of_their_own():
    joint = joint_flow(linear(mixing=0.2, roughness=0.1))
    beta_ratio = torch.tensor([0.2, 1.0, 0.2, 0.5]).double()
    xyz = joint.build(*drawn(joint, 4, beta_ratio), beta_ratio)
    together = joint.log_prob_xyz(xyz, beta_ratio)
    for k, one in enumerate(beta_ratio.tolist()):
        torch.testing.assert_close(together[k], joint.log_prob_xyz(xyz[k : k + 1], one)[0])


@pytest.mark.parametrize("n_layers", [0, 2])
def test_density_of_a_molecule(n_layers):
    """Fast atoms in internal coordinates, one of them with a dihedral at the seam of the circle."""
    bonds = [(0, 1), (1, 2), (2, 3), (2, 4), (4, 5)]
    xyz = random_structure(bonds, 4)
    all_atom = assembly_of(bonds, [0, 1, 2, 3], xyz)
    centre = all_atom.read_fast(xyz[None])[0].clone()
    centre[1, 2] = math.pi - 0.01
    thermal_map = internal(all_atom, centre, torch.tensor([0.003, 0.05, 0.2]).double().expand(2, 3))
    n_circular, n_features = all_atom.coordinates.n_circular, all_atom.coordinates.n_features
    joint = joint_flow(thermal_map, n_circular, n_features - n_circular, n_layers, roughness=0.03)
    z, r = drawn(joint, 40)
    z[:, 1:] *= 0.1
    built = joint.build(z, r)
    found_z, found_r = joint.read(built)
    torch.testing.assert_close(found_z, z)
    torch.testing.assert_close(found_r, r)
    torch.testing.assert_close(joint.log_prob_xyz(built), joint.log_prob(z, r) - joint.log_volume(z, r))

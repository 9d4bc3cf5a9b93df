"""The learned linear map: round trips, volumes against autograd, and what is measured of particles."""

import math

import pytest
import torch
from joint_models import REACH, drawn, joint_flow, linear


def test_it_starts_as_the_partition():
    thermal_map = linear(2, 2)
    torch.testing.assert_close(thermal_map.slow_directions(), torch.eye(4)[[1, 2]].double())
    z, r = torch.tensor([[0.3, -1.0]]).double(), torch.tensor([[1.0, -2.0]]).double()
    xyz = thermal_map.build(z, r, 0.25)
    widths = 2 * torch.linspace(0.3, 0.9, 4).double()
    steps = torch.tensor([1.0, 0.3 * REACH / math.pi, -REACH / math.pi, -2.0]).double()
    torch.testing.assert_close(xyz[0, :, 0], thermal_map.centre + steps * widths)
    assert (xyz[..., 1:] == 0).all()


@pytest.mark.parametrize("mixing", [0.0, 0.5, 0.9])
def test_rows_sum_to_one_whatever_is_learned(mixing):
    thermal_map = linear(2, 3, mixing, roughness=0.1)
    ones = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(thermal_map.matrix.sum(1), ones)
    torch.testing.assert_close(thermal_map.slow_directions().sum(1), ones[:2])
    # A translation of all particles translates all pseudo-particles.
    x = torch.rand(4, 5).double()
    moved = (x + 0.2) @ thermal_map.pseudo_particles.T - x @ thermal_map.pseudo_particles.T
    torch.testing.assert_close(moved, torch.full((4, 5), 0.2).double())


def test_mixing_takes_each_pseudo_particle_to_the_mean():
    torch.testing.assert_close(linear(mixing=0.5).slow_directions(), torch.tensor([[0.25, 0.75]]).double())
    torch.testing.assert_close(
        linear(3, 1, mixing=0.8).slow_directions()[0], torch.tensor([0.2, 0.4, 0.2, 0.2]).double()
    )


@pytest.mark.parametrize(
    "beta_ratio", [0.4, torch.tensor([0.1, 1.0, 0.4, 0.4, 1.0, 0.1]).double()], ids=["one", "rows"]
)
def test_linear_map_and_back(beta_ratio):
    thermal_map = linear(2, 3, 0.3, roughness=0.1)
    z, r = 2 * torch.rand(6, 2).double() - 1, torch.randn(6, 3).double()
    for found, expected in zip(thermal_map.read(thermal_map.build(z, r, beta_ratio), beta_ratio), (z, r), strict=True):
        torch.testing.assert_close(found, expected)


def jacobian_volume(thermal_map, z, r, beta_ratio):
    def positions(flat):
        return thermal_map.build(flat[None, : len(z)], flat[None, len(z) :], beta_ratio)[0, :, 0]

    return float(torch.linalg.slogdet(torch.autograd.functional.jacobian(positions, torch.cat((z, r))))[1])


def test_volume_of_the_linear_map_is_that_of_autograd():
    thermal_map = linear(2, 3, 0.3, roughness=0.1)
    z, r = torch.tensor([0.3, -0.5]).double(), torch.randn(3).double()
    for beta_ratio in (1.0, 0.2):
        found = float(thermal_map.log_volume(z[None], r[None], beta_ratio).detach())
        assert found == pytest.approx(jacobian_volume(thermal_map, z, r, beta_ratio))


def test_a_turn_of_the_map_leaves_gaussians_of_the_thermal_widths_as_they_are():
    """z and r of such particles have unit covariance whatever the map, so that it can turn without the density."""
    widths = torch.tensor([0.3, 2.0, 0.7]).double()
    generator = torch.Generator().manual_seed(0)
    for mixing, roughness in ((0.0, 0.0), (0.4, 0.2)):
        thermal_map = linear(1, 2, mixing, roughness=roughness, widths=widths)
        noise = torch.randn((200_000, 3), generator=generator, dtype=torch.float64)
        x = torch.zeros((len(noise), 3, 3), dtype=torch.float64)
        x[..., 0] = thermal_map.centre + 2 * widths * noise
        with torch.no_grad():
            z, r = thermal_map.read(x, 0.25)
        features = torch.cat((z * REACH / math.pi, r), dim=-1)
        inside = features[:, 0].abs() < 0.9 * REACH
        covariance = features[inside].T.cov()
        torch.testing.assert_close(covariance, torch.eye(3).double(), atol=0.02, rtol=0)


def correlated(n, beta_ratio, seed=0):
    """Positions of three particles that are Gaussian, not independent and not where the chart starts."""
    root = torch.tensor([[0.5, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.3, 0.2, 0.9]]).double() / math.sqrt(beta_ratio)
    noise = torch.randn((n, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.zeros((n, 3, 3), dtype=torch.float64)
    x[..., 0] = torch.tensor([0.2, -0.5, 0.1]) + noise @ root.T
    return x


@pytest.mark.parametrize("measured", [True, False])
def test_what_is_left_of_the_fast_ones_knows_nothing_of_the_slow_ones(measured):
    """Of Gaussians whose covariance was measured, whatever the map; without it, it does."""
    thermal_map = linear(1, 2, 0.4, roughness=0.2, widths=torch.tensor([2.0, 3.0, 2.0]).double())
    if measured:
        for beta_ratio in (0.1, 0.25, 1.0):
            x = correlated(100_000, beta_ratio)
            thermal_map.measure(beta_ratio, x, torch.full((len(x),), 1 / len(x)).double())
    means = []
    for beta_ratio in (0.1, 1.0):
        with torch.no_grad():
            z, r = thermal_map.read(correlated(100_000, beta_ratio, seed=1), beta_ratio)
        assert float(z.abs().max()) < 3.0  # nothing is beyond the circle
        found = torch.cat((z / z.std(), r), dim=-1).T.cov()
        expected = torch.eye(3).double()
        assert torch.allclose(found, expected, atol=0.03) == measured
        means.append(float(r.mean(0).abs().max()))
    assert (max(means) < 0.03) == measured


def test_weights_enter_what_is_measured():
    thermal_map, x = linear(), torch.zeros((3, 2, 3)).double()
    x[:, :, 0] = torch.tensor([[0.0, 1.0], [2.0, 0.0], [5.0, 5.0]])
    thermal_map.measure(1.0, x, torch.tensor([0.75, 0.25, 0.0]).double())
    state = thermal_map.get_extra_state()
    torch.testing.assert_close(state["means"][0] + thermal_map.centre, torch.tensor([0.5, 0.75]).double())
    torch.testing.assert_close(state["covariances"][0], torch.tensor([[0.75, -0.375], [-0.375, 0.1875]]).double())


def test_the_circle_holds_what_was_seen_and_no_more():
    thermal_map, x = linear(1, 2), correlated(5000, 1.0)
    weights = torch.full((len(x),), 1 / len(x)).double()
    x[0, :, 0], weights[0] = 1e3, 1e-12  # of no weight
    thermal_map.measure(1.0, x, weights)
    z, _ = thermal_map.read(x, 1.0)
    inside = z[1:].abs() / math.pi
    assert 0.8 < float(inside.max().detach()) <= 1.0  # a margin, and no more
    flow = joint_flow(thermal_map)
    log_q = flow.log_prob_xyz(x, 1.0)
    assert torch.isfinite(log_q[1:]).all() and log_q[0] == -math.inf


@pytest.mark.parametrize("beta_ratio", [0.05, 0.2, 0.5, 1.0])
def test_map_and_volume_between_what_was_measured(beta_ratio):
    thermal_map = linear(1, 2, 0.3, roughness=0.1)
    for measured in (0.1, 0.3, 0.8):
        x = correlated(1000, measured)
        thermal_map.measure(measured, x, torch.full((len(x),), 1e-3).double())
    z, r = torch.tensor([[0.3]]).double(), torch.tensor([[0.5, -1.0]]).double()
    xyz = thermal_map.build(z, r, beta_ratio)
    torch.testing.assert_close(torch.cat(thermal_map.read(xyz, beta_ratio), dim=-1), torch.cat((z, r), dim=-1))
    assert float(thermal_map.log_volume(z, r, beta_ratio).detach()) == pytest.approx(
        jacobian_volume(thermal_map, z[0], r[0], beta_ratio)
    )
    again = linear(1, 2)
    again.load_state_dict(thermal_map.state_dict())
    torch.testing.assert_close(again.build(z, r, beta_ratio), xyz)


def test_what_y_is_made_of_changes_nothing():
    first, second = linear(mixing=0.3), linear(mixing=0.3)
    with torch.no_grad():
        second.weights[1] += torch.tensor([0.4, -0.4])
    one, other = joint_flow(first), joint_flow(second)
    xyz = one.build(*drawn(one, 50))
    torch.testing.assert_close(one.log_prob_xyz(xyz), other.log_prob_xyz(xyz))


def test_a_fixed_map_has_nothing_to_train():
    assert not any(parameter.requires_grad for parameter in linear(learned=False).parameters())


def test_irregularity_drives_the_map_away_from_singular_ones():
    thermal_map = linear(2, 2)
    assert float(thermal_map.irregularity().detach()) == pytest.approx(2)
    with torch.no_grad():
        thermal_map.weights[2] = (
            0.99 * thermal_map.weights[1] + 0.01 * thermal_map.weights[2]
        )  # a fast row, nearly a slow one
    optimizer = torch.optim.Adam([thermal_map.weights], lr=1e-2)
    before = float(torch.linalg.cond(thermal_map.matrix.detach()))
    for _ in range(100):
        optimizer.zero_grad()
        thermal_map.irregularity().backward()
        optimizer.step()
    assert before > 100 and float(torch.linalg.cond(thermal_map.matrix.detach())) < 10

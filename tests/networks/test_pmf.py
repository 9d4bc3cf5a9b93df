"""The potential of mean force as a network: exact derivatives, circles, boxes, members of their own."""

import math

import pytest
import torch
from analytic import assert_identical
from pmf_models import PRECISION, in_a_box, new_pmf, pmf_of, random_z

from openmm_cgflow.coordinates.features import Torsions
from openmm_cgflow.paper.box import BoxFeatures


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


# ---------------------------------------------------------------- the function


@pytest.mark.parametrize(("n_circular", "n_bounded"), [(1, 2), (2, 0), (0, 3), (3, 1)])
def test_gradient_is_that_of_the_members_mean(n_circular, n_bounded, generator):
    pmf = new_pmf(n_circular, 2 * torch.eye(n_bounded), roughness=0.3)
    z = random_z(6, generator, n_circular, n_bounded)
    value, gradient = pmf.value_and_gradient(z)
    assert value.shape == (6,) and gradient.shape == z.shape
    assert value.dtype == gradient.dtype == torch.float64 and not value.requires_grad and not gradient.requires_grad
    torch.testing.assert_close(value, pmf(z).detach())
    assert pmf.each(z).shape == (4, 6)
    torch.testing.assert_close(pmf.each(z).mean(0), pmf(z))
    assert float(pmf.each(z).detach().std(0).min()) > 0.1

    double = new_pmf(n_circular, 2 * torch.eye(n_bounded), roughness=0.3).double()

    def mean(at):
        return double.members(at.expand(4, -1, -1)).mean(0)

    at = z.clone().requires_grad_()
    (exact,) = torch.autograd.grad(mean(at).sum(), at)
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(value, mean(z).detach(), rtol=1e-4, atol=1e-4)
    for k in range(z.shape[1]):
        step = 1e-5 * torch.eye(z.shape[1]).double()[k]
        torch.testing.assert_close((mean(z + step) - mean(z - step)).detach() / 2e-5, exact[:, k], rtol=1e-4, atol=1e-5)
    assert float(exact.abs().min(0).values.max()) > 0.01


def test_gradients_do_not_need_grad_mode(generator):
    pmf = new_pmf(roughness=0.3)
    z = random_z(5, generator)
    value, gradient = pmf.value_and_gradient(z)
    with torch.no_grad():
        again = pmf.value_and_gradient(z)
    assert torch.equal(value, again[0]) and torch.equal(gradient, again[1])
    assert all(parameter.grad is None for parameter in pmf.parameters())
    assert not z.requires_grad


@pytest.mark.parametrize("turn", [-1, 1, 2])
def test_torsions_are_periodic(turn, generator):
    pmf = new_pmf(2, PRECISION, roughness=0.3)
    z = random_z(20, generator, 2)
    for k in range(2):
        moved = z.clone()
        moved[:, k] += 2 * math.pi * turn
        for found, expected in zip(pmf.value_and_gradient(moved), pmf.value_and_gradient(z), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        moved[:, k] += 1.0
        assert float((pmf(moved) - pmf(z)).detach().abs().max()) > 0.1
    moved = z.clone()
    moved[:, 2] += 2 * math.pi
    assert float((pmf(moved) - pmf(z)).detach().abs().max()) > 1  # bounded features have no period


def test_without_networks_it_is_harmonic(generator):
    pmf = new_pmf(roughness=0.3)
    with torch.no_grad():
        pmf.weights[-1].zero_()
        pmf.biases[-1].zero_()
    z = random_z(30, generator)
    value, gradient = pmf.value_and_gradient(z)
    bounded = z[:, 1:]
    torch.testing.assert_close(value, 0.5 * ((bounded @ PRECISION) * bounded).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[:, 1:], bounded @ PRECISION, rtol=1e-5, atol=1e-5)
    assert (gradient[:, 0] == 0).all()


def test_members_start_apart_and_small(generator):
    pmf = new_pmf(hidden=(96, 96))
    z = random_z(200, generator)
    away = pmf.each(z).detach() - 0.5 * ((z[:, 1:] @ PRECISION) * z[:, 1:]).sum(1)
    assert float(away.abs().max()) < 5
    assert float(away.std(0).median()) > 0.01


# ---------------------------------------------------------------- positions in a box


def test_the_walls_of_a_box_are_not_one_point():
    wall = torch.tensor([[math.pi, 0.3]], dtype=torch.float64)
    for features in (Torsions, BoxFeatures):
        pmf = pmf_of(features)
        apart = float((pmf(wall) - pmf(wall * torch.tensor([-1.0, 1.0]))).detach().abs())
        assert (apart < 1e-5) == (features is Torsions)


def test_the_background_of_a_box_is_the_nearest_parabola(generator):
    pmf, z = pmf_of(BoxFeatures), in_a_box(500, generator).float()
    curvature, slope = torch.tensor([[80.0, 5.0], [5.0, 50.0]]), torch.tensor([30.0, -7.0])
    pmf.measure_background(z, z @ curvature + slope)
    torch.testing.assert_close(pmf.curvature, curvature, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(pmf.slope, slope, rtol=1e-4, atol=1e-2)
    assert float(pmf.scale) == float(pmf_of(BoxFeatures).scale)
    pmf.measure_background(z, z @ curvature + slope + 100 * torch.sign(z))
    assert 20 < float(pmf.scale) < 80  # of the part of the step that is not linear


def test_torsions_have_no_background(generator):
    pmf, z = pmf_of(Torsions), in_a_box(500, generator).float()
    before = {name: tensor.clone() for name, tensor in pmf.state_dict().items()}
    pmf.measure_background(z, 100 * z)
    assert_identical(before, pmf.state_dict())

"""Rejection control: what is kept follows the target, with the weights that are left exactly so."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from openmm_cgflow.networks.weights import RejectionControl

N = 200_000


def draws(n=N, seed=0):
    """A normal of width 1.3 around 0.4, as if it were a model of the standard normal; x and log w + 5."""
    x = 0.4 + 1.3 * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    log_weight = torch.as_tensor(norm.logpdf(x) - norm.logpdf(x, 0.4, 1.3)) + 5.0
    return x, log_weight


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def n_sigma(values, weights, expected):
    """How far a weighted mean is from what it should be, in its own standard errors."""
    mean = np.average(values, weights=weights)
    error = math.sqrt(np.sum((weights * (values - mean)) ** 2)) / weights.sum()
    return abs(mean - expected) / error


@pytest.mark.parametrize("acceptance", [0.05, 1 / 3, 0.6, 0.9])
def test_as_many_are_kept_as_asked_for_and_weighed_they_follow_the_target(acceptance):
    x, log_weight = draws()
    control = RejectionControl(log_weight[:4096], acceptance)
    kept = control.keep(log_weight, generator())
    # The pilot knows the fraction to a few in a hundred.
    assert float(kept.double().mean()) == pytest.approx(
        acceptance, abs=5 * math.sqrt(acceptance * (1 - acceptance) / 4096)
    )
    left, at = control.left(log_weight[kept]).exp().numpy(), x[kept].numpy()
    assert left.min() >= 1
    for power, moment in ((1, 0.0), (2, 1.0), (4, 3.0)):
        assert n_sigma(at**power, left, moment) < 4
    assert n_sigma((at > 1.5).astype(float), left, norm.sf(1.5)) < 4


def test_without_weights_they_follow_the_target_where_no_weight_is_above_c():
    x, log_weight = draws()
    control = RejectionControl(log_weight[:4096], 1 / 3)
    assert float(log_weight.max()) < control.log_c  # a wide model: its weights are bounded
    kept = x[control.keep(log_weight, generator())].numpy()
    ones = np.ones(len(kept))
    assert n_sigma(kept, ones, 0.0) < 4
    assert n_sigma(kept**2, ones, 1.0) < 4
    assert n_sigma(x.numpy() ** 2, np.ones(N), 1.0) > 50  # as drawn they do not


def test_a_third_leaves_weights_to_draws_of_three_times_the_mean():
    flat = RejectionControl(torch.full((1000,), -7.0), 1 / 3)
    assert flat.log_c == pytest.approx(-7.0 + math.log(3))
    assert torch.equal(flat.left(torch.tensor([-7.0])), torch.zeros(1))
    torch.testing.assert_close(flat.left(torch.tensor([flat.log_c + 0.5])), torch.tensor([0.5]))


def test_all_are_kept_where_fewer_than_asked_for_have_weight():
    log_weight = torch.full((1000,), -math.inf)
    log_weight[:100] = torch.linspace(-3, 3, 100)
    log_weight[500] = math.nan
    control = RejectionControl(log_weight, 1 / 3)
    assert torch.equal(control.keep(log_weight, generator()), torch.isfinite(log_weight))
    torch.testing.assert_close(control.left(log_weight[:100]), log_weight[:100] + 3)  # weights as they were
    with pytest.raises(ValueError, match="no draw with a finite weight"):
        RejectionControl(torch.full((10,), -math.inf), 1 / 3)


def test_a_constant_factor_of_the_weights_changes_nothing():
    _, log_weight = draws(5000)
    one, other = (RejectionControl(log_weight + shift, 0.25) for shift in (0.0, 700.0))
    assert torch.equal(one.keep(log_weight, generator()), other.keep(log_weight + 700, generator()))
    torch.testing.assert_close(one.left(log_weight), other.left(log_weight + 700), rtol=0, atol=1e-9)

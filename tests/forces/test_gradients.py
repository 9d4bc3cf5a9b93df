"""Standard errors of chains of correlated frames, and vectors cut to size."""

import math

import pytest
import torch

from openmm_cgflow.forces.gradients import mean_and_variance, shortened


def autoregression(n_chains, n_frames, rho, seed=0, n_features=6):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((n_frames, n_chains, n_features), generator=generator, dtype=torch.float64)
    for k in range(1, n_frames):
        noise[k] = rho * noise[k - 1] + math.sqrt(1 - rho**2) * noise[k]
    return noise.transpose(0, 1)


@pytest.mark.parametrize(
    ("n_frames", "rho"), [(3, 0.0), (3, 0.5), *((n, rho) for n in (4, 8, 30) for rho in (0.0, 0.3, 0.6, 0.85))]
)
def test_standard_error_of_correlated_frames(n_frames, rho):
    values = autoregression(12000, n_frames, rho)
    mean, variance = mean_and_variance(values, torch.ones(12000, dtype=torch.bool))
    truth = mean.square().mean(0).sqrt()
    assert float((variance.mean(0).sqrt() / truth - 1).abs().max()) < 0.15
    assert mean.shape == variance.shape == (12000, 6)


def test_features_have_their_own_correlation():
    values = torch.cat((autoregression(3000, 8, 0.0), 1e3 * autoregression(3000, 8, 0.8, seed=1)), dim=2)
    mean, variance = mean_and_variance(values, torch.ones(3000, dtype=torch.bool))
    ratio = variance.mean(0).sqrt() / mean.square().mean(0).sqrt()
    assert float((ratio - 1).abs().max()) < 0.15


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_chains_that_leave_a_contact_say_nothing_of_the_others_correlation(share):
    """Drifts a thousand times the noise in some chains: their own errors are large, those of the rest as without."""
    values, valid = autoregression(4000, 16, 0.3), torch.ones(4000, dtype=torch.bool)
    _, clean = mean_and_variance(values, valid)
    n = int(4000 * share)
    drift = torch.exp(-torch.arange(16, dtype=torch.float64) / 4)[:, None]
    values[:n] += 1000 * drift * torch.randn((n, 1, 6), generator=torch.Generator().manual_seed(1)).double()
    _, variance = mean_and_variance(values, valid)
    assert float((variance[n:].mean(0) / clean[n:].mean(0) - 1).abs().max()) < 0.1
    assert float((variance[:n].mean(0) / clean[:n].mean(0)).min()) > 1e4


def test_two_frames_count_as_independent_and_one_has_no_error():
    values = autoregression(3000, 2, 0.0)
    valid = torch.ones(3000, dtype=torch.bool)
    mean, variance = mean_and_variance(values, valid)
    assert float((variance.mean(0) / mean.square().mean(0) - 1).abs().max()) < 0.15
    mean, variance = mean_and_variance(values[:, :1], valid)
    assert torch.equal(mean, values[:, 0]) and variance.isnan().all()


def test_constant_frames_have_no_error():
    mean, variance = mean_and_variance(torch.full((4, 5, 2), 3.0).double(), torch.ones(4, dtype=torch.bool))
    assert (mean == 3).all() and (variance == 0).all()


def test_invalid_replicas_do_not_enter_the_pooled_correlation():
    values = autoregression(100, 6, 0.3)
    valid = torch.ones(100, dtype=torch.bool)
    clean = mean_and_variance(values, valid)
    spoilt = torch.cat((values, 1e6 * autoregression(5, 6, 0.99, seed=2)))
    mask = torch.cat((valid, torch.zeros(5, dtype=torch.bool)))
    for found, expected in zip(mean_and_variance(spoilt, mask), clean, strict=True):
        torch.testing.assert_close(found[:100], expected)


def test_vectors_are_shortened_to_a_multiple_of_the_median():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 5.0], [6e30, 8e30], [0.0, 0.0], [1.0, 0.0], [0.0, 7.0]])
    found = shortened(vectors, 2.0)
    torch.testing.assert_close(found[[0, 1, 3, 4, 5]], vectors[[0, 1, 3, 4, 5]])
    torch.testing.assert_close(found[2], torch.tensor([6.0, 8.0]))
    assert shortened(vectors, math.inf) is vectors and len(shortened(vectors[:0], 2.0)) == 0

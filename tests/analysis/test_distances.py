"""Distances against closed forms, noise floors and bootstrap errors against what theory says of them."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from openmm_cgflow.analysis import distances
from openmm_cgflow.analysis.distances import (
    PSEUDOCOUNT,
    block_sums,
    bootstrap,
    circle_histogram,
    circle_overlap,
    compare,
    effective_size,
    ks_distance,
    mean_of,
    sampling_floor,
)
from openmm_cgflow.networks.weights import relative_ess


def alanine_like(n_bins=36):
    """Three basins at φ < 0 and one of 2 % at φ > 0 on a map of 10° bins."""
    centres = np.linspace(-np.pi, np.pi, n_bins, endpoint=False) + np.pi / n_bins
    phi, psi = np.meshgrid(centres, centres, indexing="ij")
    total = np.zeros_like(phi)
    for share, a, b in ((0.4, -75, -15), (0.32, -140, 155), (0.26, -70, 150), (0.02, 58, 35)):
        peak = np.exp(8 * np.cos(phi - np.radians(a)) + 8 * np.cos(psi - np.radians(b)))
        total += share * peak / peak.sum()
    return total


def test_histogram_wraps_and_weighs():
    angles = np.radians([[-175, 5], [185, 5], [-175 + 720, -355], [15, -5]])
    histogram = circle_histogram(angles, np.array([1.0, 1.0, 2.0, 4.0]))
    assert histogram.shape == (36, 36)
    assert histogram[0, 18] == 0.5
    assert histogram[19, 17] == 0.5
    assert np.isclose(circle_histogram(angles[:, :1], np.ones(4)).sum(), 1)


@pytest.mark.parametrize("n", [7, 36, 72, 100])
@pytest.mark.parametrize("offset", [-0.5, 0.0, 0.3])
def test_rebinning_keeps_the_mass_exactly(n, offset):
    centres = -np.pi + (np.arange(n) + 0.5 + offset) * 2 * np.pi / n
    edges = np.linspace(-np.pi, np.pi, 37)
    overlap = circle_overlap(centres, np.column_stack((edges[:-1], edges[1:])))
    assert np.allclose(overlap.sum(axis=0), 1, atol=1e-12)
    assert np.allclose(overlap.sum(axis=1), n / 36, atol=1e-12)
    if n == 72 and offset == 0:
        values = np.random.default_rng(0).uniform(size=72)
        assert np.allclose(overlap @ values, values.reshape(36, 2).sum(axis=1))


def test_overlap_with_an_interval():
    centres = np.radians([-135, -45, 45, 135])
    overlap = circle_overlap(centres, np.radians([[-100, 0], [0, 180], [-120, 50]]))
    assert np.allclose(overlap, [[10 / 90, 1, 0, 0], [0, 0, 1, 1], [30 / 90, 1, 50 / 90, 0]])


def test_distances_of_two_bins():
    p, q = np.array([0.75, 0.25, 0.0]), np.array([0.25, 0.25, 0.5])
    found = compare(p, q)
    smooth = [(x + PSEUDOCOUNT / 3) / (1 + PSEUDOCOUNT) for x in (p, q)]
    assert np.isclose(found.kl, np.sum(smooth[0] * np.log(smooth[0] / smooth[1])))
    assert np.isclose(found.tv, 0.5)
    # JS by hand: the mean is (1/2, 1/4, 1/4).
    first = 0.75 * np.log(0.75 / 0.5)
    second = 0.25 * np.log(0.25 / 0.5) + 0.5 * np.log(0.5 / 0.25)
    assert np.isclose(found.js, (first + second) / 2)
    assert found.outside == 0.5
    # KL(reference || samples), not the other way round.
    assert abs(compare(p, q).kl - compare(q, p).kl) > 0.5
    assert compare(p, p) == distances.Distances(0.0, 0.0, 0.0, 0.0)
    disjoint = compare(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert np.isclose(disjoint.js, np.log(2))
    assert disjoint.tv == disjoint.outside == 1.0


def test_a_lost_basin_shows_in_every_distance():
    p = alanine_like()
    lost = p.copy()
    lost[18:] = 0
    found = compare(p, lost / lost.sum())
    assert np.isclose(found.tv, p[18:].sum())
    assert 0.05 < found.kl < 0.12
    assert 0.005 < found.js < 0.015


def test_floor_of_many_samples_is_that_of_theory():
    """KL of n counts in B bins is chi-squared with B - 1 degrees of freedom, over 2 n; TV sums folded normals."""
    n, n_bins, rng = 20_000, 36, np.random.default_rng(4)
    p = rng.uniform(0.5, 1.5, n_bins)
    p /= p.sum()
    floor = sampling_floor(p, n, rng, np.tile(p, (400, 1)))
    expected = (n_bins - 1) / (2 * n)
    # 400 draws of a spread of sqrt(2 / 35); the pseudocount takes 1 %.
    assert abs(floor.kl / expected - 1) < 4 * np.sqrt(2 / 35 / 400) + 0.015
    assert abs(floor.js / (expected / 4) - 1) < 4 * np.sqrt(2 / 35 / 400) + 0.01
    assert abs(floor.tv / (np.sqrt(2 * p * (1 - p) / (np.pi * n)).sum() / 2) - 1) < 0.03


def test_floor_knows_the_noise_of_the_reference():
    rng = np.random.default_rng(5)
    n, n_frames, p = 4000, 4000, np.full(36, 1 / 36)
    labels = rng.integers(36, size=n_frames)
    redraws = bootstrap(block_sums(labels, np.ones(n_frames), 36, 1000), rng, 200)
    floor = sampling_floor(np.bincount(labels, minlength=36) / n_frames, n, rng, redraws)
    assert abs(floor.kl / (35 / 2 * (1 / n + 1 / n_frames)) - 1) < 0.15
    alone = sampling_floor(p, n, rng, np.tile(p, (200, 1)))
    assert abs(alone.kl / (35 / 2 / n) - 1) < 0.15


def test_kl_above_its_floor_hardly_depends_on_the_pseudocount(monkeypatch):
    p = alanine_like()
    wrong = p.copy()
    wrong[18:] *= 2
    wrong[:18, :20] *= 0.8
    wrong /= wrong.sum()
    above = []
    for factor in (1 / 3, 1, 3):
        monkeypatch.setattr(distances, "PSEUDOCOUNT", factor * PSEUDOCOUNT)
        rng = np.random.default_rng(6)
        score = mean_of([compare(p, rng.multinomial(10_000, wrong.ravel()) / 10_000) for _ in range(200)])
        above.append(score.kl - sampling_floor(p, 10_000, rng, np.tile(p.ravel(), (200, 1))).kl)
    exact = np.sum(p * np.log(p / wrong))
    assert np.ptp(above) < 0.15 * above[1]
    assert abs(above[1] / exact - 1) < 0.25


def test_ks_is_scipys_where_weights_are_equal():
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=300), rng.normal(0.3, 1, size=200)
    for digits in (8, 1):  # with ties too
        x, y = a.round(digits), b.round(digits)
        expected = ks_2samp(x, y).statistic
        assert np.isclose(ks_distance(x, np.full(300, 2.0), y, np.ones(200)), expected)
    times = rng.integers(0, 4, 300)
    assert np.isclose(ks_distance(a, times.astype(float), b, np.ones(200)), ks_2samp(np.repeat(a, times), b).statistic)
    assert ks_distance(a, np.ones(300), a, np.ones(300)) == 0.0


def test_effective_size():
    assert effective_size(np.full(7, 0.3)) == pytest.approx(7)
    assert effective_size(np.array([1.0, 1.0, 0.0, 0.0])) == pytest.approx(2)
    log_weights = np.random.default_rng(8).normal(0, 0.7, 5000)
    ours = effective_size(np.exp(log_weights)) / 5000
    assert ours == pytest.approx(relative_ess(torch.tensor(log_weights)))
    # n E[w]^2 / E[w^2] of lognormal weights.
    assert abs(ours / np.exp(-(0.7**2)) - 1) < 0.1


def test_blocks_cover_all_frames_in_order():
    labels = np.array([0, 0, 1, 1, 2, 2, 2])
    weights = np.arange(1.0, 8.0)
    assert block_sums(labels, weights, 3, 7).sum(axis=1).tolist() == weights.tolist()
    sums = block_sums(labels, weights, 3, 2)
    assert sums.tolist() == [[3.0, 7.0, 0.0], [0.0, 0.0, 18.0]]


@pytest.mark.parametrize("length", [1, 50])
def test_bootstrap_errors_know_correlations(length):
    """The standard error of a share p is sqrt(p (1 - p) / n) of n independent values, each ``length`` frames long."""
    rng = np.random.default_rng(9)
    n_independent, p = 4000 // length * 10, 0.3
    labels = np.repeat((rng.uniform(size=n_independent) < p).astype(int), length)
    errors = []
    n_blocks = len(labels) if length == 1 else 40
    for _ in range(10):
        totals = bootstrap(block_sums(labels, np.ones(len(labels)), 2, n_blocks), rng)
        assert totals.shape == (200, 2)
        errors.append((totals[:, 1] / totals.sum(axis=1)).std())
    share = labels.mean()
    expected = np.sqrt(share * (1 - share) / n_independent)
    # 40 blocks know the error to 1 / sqrt(80) of itself, whatever the number of replicates.
    tolerance = 4 / np.sqrt(80) if length > 1 else 4 / np.sqrt(2 * 2000)
    assert abs(np.mean(errors) / expected - 1) < tolerance
    if length > 1:
        naive = bootstrap(block_sums(labels, np.ones(len(labels)), 2, len(labels)), rng)
        assert (naive[:, 1] / naive.sum(axis=1)).std() < expected / 4

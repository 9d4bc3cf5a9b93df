"""The ladder: weights with the right sign and size, and steps that end at the target and never beyond."""

import math
from itertools import pairwise

import pytest
import torch

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.networks.weights import kl_increase, relative_ess
from openmm_cgflow.settings import TemperingSettings
from openmm_cgflow.training.ladder import log_weights, next_temperature, start_temperature
from openmm_cgflow.units import thermal_beta

TARGET = 300.0
NONE = torch.zeros(1)


def settings(**values):
    return TemperingSettings(**values)


def skewed(n=4000, scale=12.0, seed=0):
    """Energies with a long tail upwards (exponential): a sign error changes every number."""
    generator = torch.Generator().manual_seed(seed)
    return -80 - scale * torch.log(torch.rand(n, generator=generator, dtype=torch.float64))


def test_effective_sample_size():
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    assert relative_ess(weights.log() + 700) == pytest.approx(1 / (4 * (0.25 + 0.0625 + 2 * 0.015625)))
    assert relative_ess(torch.zeros(7)) == pytest.approx(1)
    assert relative_ess(torch.tensor([0.0, -1000.0, -1000.0, -1000.0])) == pytest.approx(0.25)


def test_kl_increase():
    """Against the direct formula for two distributions on three points, sampled in their exact proportions."""
    old, new = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.1, 0.2, 0.7]).double()
    direct = float((old * (old / new).log()).sum())
    counts = torch.tensor([50, 30, 20])
    log_ratio = (new / old).log().repeat_interleave(counts) - 33.0
    assert kl_increase(log_ratio) == pytest.approx(direct)
    assert direct != pytest.approx(float((new * (new / old).log()).sum()), rel=0.05)  # KL is not symmetric
    assert kl_increase(torch.full((5,), 3.0)) == pytest.approx(0, abs=1e-6)


def test_weights_prefer_low_energies_when_cooling():
    energy = torch.tensor([0.0, 1.0, 10.0]).double()
    weights = log_weights(energy, torch.zeros(3), 0.2)
    torch.testing.assert_close(weights - weights[0], -0.2 * energy)
    torch.testing.assert_close(log_weights(energy, torch.zeros(3), -0.1) * -2, weights)


def test_weights_of_an_asymmetric_density():
    """Two unequal states with U and p ~ exp(-beta U): reweighted averages are those at the new temperature."""
    old, delta = thermal_beta(600), thermal_beta(450) - thermal_beta(600)
    energy = torch.tensor([0.0, 3.0, 14.0]).double()
    counts = (1e6 * torch.softmax(-old * energy, 0)).round().long()
    sample = energy.repeat_interleave(counts)
    weights = torch.softmax(log_weights(sample, torch.zeros(1), delta), 0)
    expected = (energy * torch.softmax(-(old + delta) * energy, 0)).sum()
    assert float((weights * sample).sum()) == pytest.approx(float(expected), rel=1e-4)


def test_noise_of_the_energies_is_not_taken_for_spread():
    generator = torch.Generator().manual_seed(1)
    energy = skewed(20000)
    variance = torch.full_like(energy, 200.0)
    noisy = energy + math.sqrt(200.0) * torch.randn(energy.shape, generator=generator, dtype=torch.float64)
    clean = log_weights(energy, torch.zeros(1), 0.05)
    corrected, naive = log_weights(noisy, variance, 0.05), log_weights(noisy, torch.zeros(1), 0.05)
    assert float(corrected.std() / clean.std()) == pytest.approx(1, rel=0.03)
    assert float(naive.std() / clean.std()) > 1.4
    ladder = settings(start=1200, min_ess=0.7)
    steps = [
        next_temperature(ladder, 1200, TARGET, *pair) for pair in ((energy, NONE), (noisy, variance), (noisy, NONE))
    ]
    assert steps[0] < steps[2]  # noise left in makes the step shorter
    assert abs(steps[1] - steps[0]) < 0.7 * abs(steps[2] - steps[0])


def test_unknown_and_overwhelming_noise():
    energy = skewed(100)
    unknown = log_weights(energy, torch.full_like(energy, math.nan), 0.1)
    torch.testing.assert_close(unknown, log_weights(energy, torch.zeros(100), 0.1))
    buried = log_weights(energy, torch.full_like(energy, 1e9), 0.1)
    assert torch.isfinite(buried).all() and float(buried.std()) > 0


def test_equal_energies_allow_any_step():
    for energy in (torch.full((5,), -3.0).double(), torch.tensor([2.0]).double()):
        assert torch.equal(log_weights(energy, torch.zeros(1), 0.1), torch.zeros_like(energy))
        assert next_temperature(settings(start=1200), 1200, TARGET, energy, NONE) == TARGET


def ladder_of(config, energy_at, target=TARGET, limit=500):
    temperatures = [start_temperature(config, target)]
    while temperatures[-1] > target:
        energy = energy_at(temperatures[-1])
        temperatures.append(next_temperature(config, temperatures[-1], target, energy, torch.zeros_like(energy)))
        assert len(temperatures) < limit
    return temperatures


@pytest.mark.parametrize("values", [
    {"start": 1200}, {"start": 1200, "criterion": "kl"}, {"start": 1200, "min_ess": 0.99}, {"start": 301},
    {"start": 5000, "schedule": "linear", "n_stages": 7}, {"start": 1200, "schedule": "linear", "n_stages": 1},
    {"schedule": "list", "temperatures": [900, 500.5, 310]}, {"schedule": "list", "temperatures": [900, 300]},
    {"start": 300}, {"schedule": "list", "temperatures": [300]},
])  # fmt: skip
def test_every_ladder_falls_and_ends_at_the_target_exactly(values):
    def heat(temperature):
        return skewed(500, scale=temperature * 0.05)

    ladder = ladder_of(settings(**values), heat)
    assert ladder[-1] == TARGET
    assert all(hot > cold for hot, cold in pairwise(ladder))


@pytest.mark.parametrize("energy", [1e6, 1e-6])
def test_extreme_energies_still_end_at_the_target(energy):
    ladder = ladder_of(settings(start=1200), lambda t: energy * skewed(50))
    assert ladder[-1] == TARGET
    assert all(thermal_beta(cold) >= 1.0049 * thermal_beta(hot) for hot, cold in pairwise(ladder[:-1]))


@pytest.mark.parametrize(("criterion", "bound"), [("ess", 0.7), ("kl", 0.2)])
def test_adaptive_steps_meet_their_bound(criterion, bound):
    energy = skewed(4000, scale=30.0)
    config = settings(start=1200, criterion=criterion, min_ess=0.7, max_kl=0.2)
    cooler = next_temperature(config, 1200, TARGET, energy, NONE)
    assert TARGET < cooler < 1200
    delta = thermal_beta(cooler) - thermal_beta(1200)
    if criterion == "ess":
        assert relative_ess(log_weights(energy, NONE, delta)) == pytest.approx(bound, rel=1e-6)
    else:  # shrunk by 0.6 until it is met
        assert (
            kl_increase(log_weights(energy, NONE, delta)) <= bound < kl_increase(log_weights(energy, NONE, delta / 0.6))
        )
    # The exponential tail in closed form, with a = scale x delta: (1 + 2 a)/(1 + a)^2 and a - log(1 + a).
    a = 30.0 * delta
    closed = (1 + 2 * a) / (1 + a) ** 2 if criterion == "ess" else a - math.log1p(a)
    assert closed == pytest.approx(bound, rel=0.1 if criterion == "ess" else 0.7)
    # The mirrored energies have another closed form: the sign of the weights matters.
    mirrored = next_temperature(config, 1200, TARGET, -energy, NONE)
    assert abs(mirrored - cooler) > 20


def test_the_kl_bound_is_relative_only_above_one_nat():
    """Relative to a KL near zero, as published, steps would shrink to nothing."""
    energy = skewed(4000, scale=30.0)
    config = settings(start=1200, criterion="kl", max_kl=0.2)
    steps = {kl: next_temperature(config, 1200, TARGET, energy, NONE, kl) for kl in (None, 0.0, 0.5, 1.0, 4.0)}
    assert steps[None] == steps[0.0] == steps[0.5] == steps[1.0] > steps[4.0] >= TARGET


def test_a_stricter_bound_makes_shorter_steps():
    energy = skewed(1000)
    ladder = [next_temperature(settings(start=1200, min_ess=e), 1200, TARGET, energy, NONE) for e in (0.9, 0.7, 0.5)]
    assert ladder[0] > ladder[1] > ladder[2]


def test_constants_added_to_the_energy_do_not_matter():
    energy = skewed(1000)
    steps = [next_temperature(settings(start=1200), 1200, TARGET, energy + c, NONE) for c in (0, -1e5)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-6)


def test_linear_ladder_is_equally_spaced_in_beta():
    ladder = ladder_of(settings(schedule="linear", start=1200, n_stages=6), lambda t: skewed(10))
    betas = torch.tensor([thermal_beta(t) for t in ladder]).double()
    assert len(ladder) == 6
    torch.testing.assert_close(betas.diff(), betas.diff().mean().expand(5))


def test_listed_temperatures_are_visited():
    assert ladder_of(settings(schedule="list", temperatures=[800, 500]), lambda t: skewed(10)) == [800, 500, 300]
    assert ladder_of(settings(schedule="list", temperatures=[800, 300]), lambda t: skewed(10)) == [800, 300]
    assert start_temperature(settings(schedule="list"), 300) == 300


@pytest.mark.parametrize(("values", "message"), [
    ({"start": 250}, "tempering.start: got 250 K, below the target of 300 K"),
    ({"schedule": "list", "temperatures": [500, 600]}, "tempering.temperatures"),
    ({"schedule": "list", "temperatures": [500, 500]}, "tempering.temperatures"),
    ({"schedule": "list", "temperatures": [500, 250]}, "tempering.temperatures"),
    ({"schedule": "list", "temperatures": [500, 300, 250]}, "tempering.temperatures"),
])  # fmt: skip
def test_wrong_ladders_are_refused(values, message):
    with pytest.raises(CGFlowError, match=message):
        start_temperature(settings(**values), TARGET)

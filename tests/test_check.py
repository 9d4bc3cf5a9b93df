import argparse

import pytest
import torch

from openmm_cgflow.check import count_stages
from openmm_cgflow.cli import _duration
from openmm_cgflow.config import TemperingConfig
from openmm_cgflow.tempering import next_temperature
from openmm_cgflow.units import thermal_beta


def _ladder(settings, target, n_features):
    """The schedule itself on a harmonic molecule, whose slow energy is Gamma-distributed with shape n_features/2."""
    generator = torch.Generator().manual_seed(0)
    temperatures = [settings.temperatures[0] if settings.schedule == "list" else settings.start]
    while temperatures[-1] > target:
        normal = torch.randn(4000, n_features, generator=generator, dtype=torch.float64)
        energy = 0.5 * normal.square().sum(-1) / thermal_beta(temperatures[-1])
        temperatures.append(next_temperature(settings, temperatures[-1], target, energy, torch.zeros(4000)))
    return temperatures


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        (TemperingConfig(schedule="linear", n_stages=7), 0),
        (TemperingConfig(schedule="list", temperatures=[900, 600, 300]), 0),
        (TemperingConfig(schedule="list", temperatures=[900, 600]), 0),
        (TemperingConfig(start=300), 0),
        (TemperingConfig(), 2),
        (TemperingConfig(criterion="kl"), 2),
        (TemperingConfig(min_ess=0.9), 3),
    ],
)
def test_the_number_of_stages_is_foreseen(settings, tolerance):
    actual = len(_ladder(settings, 300.0, 15))
    assert abs(count_stages(settings, 300.0, 15) - actual) <= tolerance


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("11h30m", 41400), ("90s", 90), ("2d", 172800), ("1h1m1s", 3661)]
)
def test_durations(text, seconds):
    assert _duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "30m1h", "-5m", "0s", "1.5h"])
def test_wrong_durations(text):
    with pytest.raises(argparse.ArgumentTypeError, match="30m, 11h30m or 90s"):
        _duration(text)

import argparse

import numpy as np
import pytest
import torch
from settings import TINY_BUT_MANY_ROUNDS

from openmm_cgflow import MolecularSystem, Partition, load_config
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.options import _duration
from openmm_cgflow.runs.build import build_geometry
from openmm_cgflow.runs.estimate import measure_cost
from openmm_cgflow.runs.loop import hottest_temperature
from openmm_cgflow.settings import TemperingSettings
from openmm_cgflow.training.ladder import count_stages, next_temperature
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
        (TemperingSettings(schedule="linear", n_stages=7), 0),
        (TemperingSettings(schedule="list", temperatures=[900, 600, 300]), 0),
        (TemperingSettings(schedule="list", temperatures=[900, 600]), 0),
        (TemperingSettings(start=300), 0),
        (TemperingSettings(), 2),
        (TemperingSettings(criterion="kl"), 2),
        (TemperingSettings(min_ess=0.9), 3),
    ],
)
def test_the_number_of_stages_is_foreseen(settings, tolerance):
    actual = len(_ladder(settings, 300.0, 15))
    assert abs(count_stages(settings, 300.0, 15) - actual) <= tolerance


@pytest.fixture(scope="module")
def butane(systems):
    """A geometry and an engine."""
    config = load_config(systems / "butane" / "butane.yaml", TINY_BUT_MANY_ROUNDS)
    molecule = MolecularSystem.from_files(config.system)
    partition = Partition.resolve(molecule, config.partition.slow)
    with create_engine(molecule, partition.slow, config.chains) as engine:
        yield config, build_geometry(config, molecule, partition, hottest_temperature(config), engine.evaluate), engine


def with_settings(config, **sections):
    changes = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changes)


def test_cost_of_a_learned_pmf_is_bounded_by_its_limits(butane):
    """The rounds by the smaller of the two limits; a first pool, the final samples and the check on top."""
    config, geometry, engine = butane
    one = 16 * (5 + 20 + 16 * 3 + 16)  # n_replicas x (n_relax + n_equilibration + n_frames x (stride + its own))
    extra = 16 * 30 + 24 * (5 + 10 + 2) + 2 * 8 * 16 * 600  # pool, samples, switches
    few = measure_cost(with_settings(config, stopping={"max_rounds": 7}), geometry, engine)
    assert few.n_evaluations == pytest.approx(7 * one + extra, rel=0.02)
    # Two cycles of 20 updates of the flow, at a third of the time of the four in a round, and the last fit.
    assert (few.plan.n_stages, few.plan.n_steps) == (1, 7 + 4)
    assert few.seconds_per_step > 0 and few.evaluations_per_second > 0
    limited = measure_cost(with_settings(config, stopping={"max_evaluations": 3 * one}), geometry, engine)
    assert limited.n_evaluations == pytest.approx(3 * one + extra, rel=0.02)
    assert limited.plan.n_steps == 3 + 4


def test_fewer_replicas_of_a_slow_potential_are_timed(butane):
    """And what they cost is scaled to all."""
    config, geometry, engine = butane
    config = with_settings(config, chains={"n_replicas": 64}, stopping={"max_rounds": 7})
    counts = [engine.n_energy_evaluations]
    whole = measure_cost(config, geometry, engine)
    counts.append(engine.n_energy_evaluations)
    quick = measure_cost(config, geometry, engine, long_step=0.0)
    counts.append(engine.n_energy_evaluations)
    in_whole, in_quick = np.diff(counts)
    assert in_quick < 0.35 * in_whole  # 16 of 64 replicas
    assert quick.n_evaluations == pytest.approx(whole.n_evaluations, rel=0.02)


def test_cost_of_a_ladder_is_its_stages(butane):
    config, geometry, engine = butane
    ladder = with_settings(
        config, training={"method": "reverse_kl", "n_steps_first": 3, "n_steps": 2, "n_steps_last": 4}
    )
    cost = measure_cost(with_settings(ladder, tempering={"schedule": "linear", "n_stages": 3}), geometry, engine)
    assert (cost.plan.n_stages, cost.plan.n_steps) == (3, 9)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("11h30m", 41400), ("90s", 90), ("2d", 172800), ("1h1m1s", 3661)]
)
def test_durations(text, seconds):
    assert _duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "30m1h", "-5m", "0s", "1.5h"])
def test_wrong_durations(text):
    with pytest.raises(argparse.ArgumentTypeError, match="30m, 11h30m or 90s"):
        _duration(text)

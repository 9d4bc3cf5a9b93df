"""Free energies by switching for the last fit: as many switches as it takes, within the evaluations there are."""

import math
from types import SimpleNamespace

import pytest
import torch
from analytic import AnalyticMeanForce, assert_identical

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.features import Torsions
from openmm_cgflow.errors import ReplicaError
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.training.method import EvaluationBudget
from openmm_cgflow.training.pmf.anchors import Anchors
from openmm_cgflow.units import thermal_beta

TEMPERATURE = 300.0
BETA = thermal_beta(TEMPERATURE)
COORDINATES = SimpleNamespace(features=Torsions(2, 0), log_volume=lambda z: torch.zeros(len(z), dtype=torch.float64))


def phi(z):
    return 1.5 * torch.cos(2 * z[:, 0]) + torch.sin(z[:, 0]) + torch.cos(z[:, 1])


def settings(n_switched=4, error=0.1, limit=1e6, seed=1):
    stopping = {"free_energy_error": error, "max_evaluations": limit}
    return Config(temperature=TEMPERATURE, seed=seed, pmf={"n_switched": n_switched}, stopping=stopping)


def new_anchors(config, flow=None, estimator=None):
    """Of a state that is what they ask for, and no more."""
    estimator = estimator or AnalyticMeanForce(lambda z: phi(z) / BETA)
    state = SimpleNamespace(
        settings=config.pmf,
        stopping=config.stopping,
        seed=config.seed,
        temperature=TEMPERATURE,
        flow=flow,
        pmf=phi,
        coordinates=COORDINATES,
        estimator=estimator,
        generator=torch.Generator().manual_seed(1),
        exploring=0.1,
        flow_fitter=SimpleNamespace(trained_up_to=1.0),
    )
    return Anchors(state, EvaluationBudget(config.stopping.max_evaluations, estimator))


def started(config, n_circular=2, earlier=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = CGFlow(Torsions(n_circular, 2 - n_circular), 5.0, 2, 2, 8, [8])
    values = new_anchors(config, flow)
    values.state.estimator.n_energy_evaluations = earlier
    values.begin()
    return values, values.state.estimator


def finish(values, estimator):
    while not values.done:
        values.step()
    return values.differences()


@pytest.mark.parametrize("error", [0.2, 0.1])
def test_every_difference_is_known_as_well_as_asked(error):
    values, estimator = started(settings(error=error))
    found = finish(values, estimator)
    assert found.start.shape == found.end.shape == (4, 2)
    assert found.difference.shape == found.error.shape == (4,) and found.weights.shape == (4, 4)
    assert float(found.error.min()) >= 0.02 and float(found.error.max()) <= error
    exact = phi(found.end) - phi(found.start)
    assert float(exact.abs().max()) > 0.3
    assert float(((found.difference - exact) / found.error).abs().max()) < 4
    # About as many as a dissipation of half a kT takes; those that are known already are not switched again.
    per_path = estimator.n_energy_evaluations / 2 / 4
    assert 0.3 < per_path / (1.1 / error**2) < 3


def test_easy_paths_are_left_when_they_are_known():
    values, estimator = started(settings(error=0.1))
    lengths, switch = [], estimator.switch
    estimator.switch = lambda asked, *how: (lengths.append(len(asked)), switch(asked, *how))[1]
    finish(values, estimator)
    assert lengths[0] == 2 * 4 * 16 and lengths == sorted(lengths, reverse=True) and len(lengths) == values.n_steps


def test_switching_is_slower_where_much_is_dissipated():
    values, estimator = started(settings(error=0.1))
    estimator.dissipation = 12.0
    found = finish(values, estimator)
    assert values.n_steps < 24 and values._switches.slowness == [8] * 4
    exact = phi(found.end) - phi(found.start)
    assert float(found.error.max()) <= 0.1 and float(((found.difference - exact) / found.error).abs().max()) < 4


def test_what_can_be_afforded_is_done():
    values, estimator = started(settings(error=1e-4))
    cost = values._switches.cost(16)
    values, estimator = started(settings(error=1e-4, limit=2.5 * cost))
    asked, switch = [], estimator.switch
    estimator.switch = lambda paths, *how: (asked.append(len(paths) // 32), switch(paths, *how))[1]
    values.step()
    assert asked == [2]


def test_it_stops_within_the_evaluations():
    values, estimator = started(settings(error=1e-4, limit=3e5))
    switch = estimator.switch

    def costly(asked, temperature, slowness):
        estimator.n_energy_evaluations += len(asked) * (150 + 12 * (asked.shape[1] - 1))  # as in a molecule
        return switch(asked, temperature, slowness)

    estimator.switch = costly
    finish(values, estimator)
    assert 1 < values.n_steps < 24
    assert 2e5 < estimator.n_energy_evaluations <= 3e5
    values, estimator = started(settings(error=1e-4))
    finish(values, estimator)
    assert values.n_steps == 24
    values, estimator = started(settings(limit=1000), earlier=900)
    assert values.done and values.differences() is None


@pytest.mark.parametrize(("n_switched", "n_circular"), [(0, 2), (4, 0)])
def test_nothing_to_switch(n_switched, n_circular):
    values, _ = started(settings(n_switched), n_circular)
    assert values.done and values.differences() is None and values.n_steps == 0
    assert all(math.isnan(value) for value in values.compare(phi).values())


def test_comparison_tells_a_right_pmf_from_a_wrong_one():
    values, estimator = started(settings(error=0.1))
    finish(values, estimator)
    right = values.compare(phi)
    assert right["anchor_error"] <= 0.1 and right["anchor_misfit"] < 0.2
    assert values.compare(lambda z: 2 * phi(z))["anchor_misfit"] > 0.5


def test_conformations_that_cannot_be_reached_are_left_alone(caplog):
    """The training goes on with what is known of the others, and says so."""
    values, estimator = started(settings(error=0.1))
    switch = estimator.switch

    def breaking(asked, *how):
        work, valid = switch(asked, *how)
        ends = values._switches.paths[1, [0, -1]]
        lost = ((asked[:, 0] == ends[0]) & (asked[:, -1] == ends[1])).all(1)
        return work, valid & ~lost

    estimator.switch = breaking
    found = finish(values, estimator)
    assert values.lost == [1] and "1 of 4 conformations could not be switched to" in caplog.text
    ends = values._switches.paths[:, -1].float()
    assert torch.equal(found.end, ends[[0, 2, 3]]) and torch.isfinite(found.difference).all()
    assert float(found.error.max()) <= 0.1 and values.compare(phi)["anchor_error"] <= 0.1
    again = new_anchors(settings(error=0.1))
    again.load_state_dict(values.state_dict())
    assert again.lost == [1] and again.done


def test_nothing_can_be_switched(caplog):
    values, estimator = started(settings())

    def failing(asked, *how):
        raise ReplicaError("no switch was usable")

    estimator.switch = failing
    assert finish(values, estimator) is None
    assert values.lost == [0, 1, 2, 3] and values.n_steps == 1 and "no switch was usable" in caplog.text
    assert all(math.isnan(value) for value in values.compare(phi).values())


def test_it_continues_from_its_state():
    values, estimator = started(settings(error=0.1))
    values.step()
    other = AnalyticMeanForce(lambda z: phi(z) / BETA)
    again = new_anchors(settings(error=0.1), estimator=other)
    again.load_state_dict(values.state_dict())
    other.load_state_dict(estimator.state_dict())
    first, second = finish(values, estimator), finish(again, other)
    assert_identical(first._asdict(), second._asdict())
    assert again.n_steps == values.n_steps > 1
    assert_identical(values.state_dict(), again.state_dict())

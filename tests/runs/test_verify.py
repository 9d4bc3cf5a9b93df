"""The check by switching: it passes the exact potential of mean force and fails a wrong one."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from moving import TEMPERATURE, MovingBath, chains_of, exact, molecule

from openmm_cgflow import CGFlowError
from openmm_cgflow.coordinates.features import Torsions
from openmm_cgflow.forces.switching import DISSIPATED
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.runs.verify import Verification, verify


def model_of(engine, scale=1.0):
    """A model whose PMF is the quadratic bath's own, times a number; its flow is untrained."""
    all_atom = molecule()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = CGFlow(Torsions(1, 5), 5.0, 2, 2, 8, [8])
    return SimpleNamespace(
        density=SimpleNamespace(can_be_switched=True, free_energy=lambda z: scale * exact(engine, all_atom, z)),
        coordinates=all_atom.coordinates,
        flow=flow,
        temperature=TEMPERATURE,
        fast_atoms=lambda given: chains_of(given, all_atom),
    )


def check(seed=4, scale=1.0, n_replicas=40, dissipated=DISSIPATED, **broken):
    engine = MovingBath()
    vars(engine).update(broken)
    engine.n_energy_evaluations = 1000  # of what was done before
    model = model_of(engine, scale)
    found = verify(model, engine, 3, n_replicas, seed, n_bootstrap=50, dissipated=dissipated)
    return found, engine


def test_the_exact_pmf_passes_and_a_wrong_one_does_not():
    found, engine = check()
    assert len(found.torsions) == len(found.pmf) == len(found.switching) == len(found.error) == 3
    assert len(found.dissipation) == 3 and all(len(row) == 1 for row in found.torsions)
    assert max(map(abs, found.pmf)) > 1
    pull = (np.array(found.pmf) - found.switching) / found.error
    assert np.abs(pull).max() < 4
    assert 0 < max(found.error) < 0.3 and 0 < max(found.dissipation) < 4
    assert found.rms_difference < 4 * found.rms_error
    wrong, _ = check(scale=2.0)
    assert wrong.rms_difference > 8 * wrong.rms_error
    # Counted are this check's own evaluations: 150 + 1 steps at the start, an evaluation and 10 steps per move.
    n_chains = 2 * 3 * 40
    assert found.n_evaluations == engine.n_energy_evaluations - 1000
    assert found.n_evaluations > n_chains * (151 + 11 * engine.n_evaluated)


def test_what_dissipates_much_is_switched_to_again_and_slower():
    before, _ = check()
    worst = int(np.argmax(before.dissipation))
    threshold = before.dissipation[worst] / 8
    found, engine = check(dissipated=threshold)
    same = [a == b for a, b in zip(found.switching, before.switching, strict=True)]
    assert same == [dissipation <= threshold for dissipation in before.dissipation]
    assert found.dissipation[worst] < 0.6 * before.dissipation[worst]
    assert abs(found.switching[worst] - found.pmf[worst]) < 4 * found.error[worst]
    assert found.n_evaluations == engine.n_energy_evaluations - 1000 > before.n_evaluations


def test_its_errors_are_those_of_repeated_checks():
    """Over seeds, with the same paths: differences in units of their errors have the spread of one."""
    pulls = []
    for seed in range(30):
        found, _ = check(seed, n_replicas=30)
        pulls.append((np.array(found.switching) - found.pmf) / found.error)
    mean_square = float(np.square(pulls).mean())
    assert abs(mean_square - 1) < 4 * math.sqrt(2 / 90)


def test_same_seed_same_result():
    assert check()[0] == check()[0]
    assert check()[0].switching != check(seed=5)[0].switching


def test_the_check_leaves_invalid_replicas_out():
    clean, _ = check()
    # Conformations in order, 40 replicas each, there and then back: two of the second, one of each direction.
    found, _ = check(broken={6: [45, 120 + 41]})
    assert [a == b for a, b in zip(found.switching, clean.switching, strict=True)] == [True, False, True]
    assert abs(found.switching[1] - clean.switching[1]) < 3 * clean.error[1]
    assert np.isfinite(found.error).all() and np.isfinite(found.dissipation).all()


def test_what_cannot_be_checked_is_refused():
    model = model_of(MovingBath())
    model.density.can_be_switched = False
    with pytest.raises(CGFlowError, match="needs a potential of mean force and at least one slow torsion"):
        verify(model, MovingBath(), 2, 2, 0)


def test_too_few_conformations_are_named():
    model = model_of(MovingBath())
    model.density.free_energy = lambda z: 1e5 * (1 - torch.cos(z[:, 0] - 1.0))
    with pytest.raises(CGFlowError, match=r"found only \d+ conformations to check, expected 2000"):
        verify(model, MovingBath(), 2000, 2, 0)


# ---------------------------------------------------------------- its summary


def summary(pmf, switching, error):
    rows = [[0.0]] * len(pmf)
    return Verification(rows, list(pmf), list(switching), list(error), [1.0] * len(pmf), 7)


def test_summary_of_equal_errors():
    found = summary([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5])
    assert found.rms_difference == pytest.approx(math.sqrt(5 / 3))
    assert found.rms_error == pytest.approx(0.5)
    wrong_start = replace(found, pmf=[value + 40 for value in found.pmf])
    assert wrong_start.rms_difference > 39


def test_summary_of_unequal_errors():
    found = summary([0.0, 7.0], [0.0, 2.0], [1.0, 0.5])  # weights 1 and 4, differences 0 and 5
    assert found.rms_difference == pytest.approx(math.sqrt(20))
    assert found.rms_error == pytest.approx(math.sqrt(2 / 5))


def test_the_expected_difference_is_that_of_the_errors():
    rng = np.random.default_rng(2)
    error = np.array([0.1, 0.4, 0.2, 1.0])
    squares = [summary(rng.normal(0.0, error), np.zeros(4), error).rms_difference ** 2 for _ in range(3000)]
    expected = summary(np.zeros(4), np.zeros(4), error).rms_error ** 2
    assert abs(np.mean(squares) - expected) < 4 * np.std(squares) / math.sqrt(3000)


def test_summary_as_plain_data():
    found = summary([1.0, 2.0], [1.5, 2.0], [0.5, 0.5])
    data = json.loads(json.dumps(found.to_dict()))
    assert data["pmf"] == [1.0, 2.0] and data["n_evaluations"] == 7 and data["unit"] == "kT"
    assert data["rms_difference"] == found.rms_difference and data["rms_error"] == found.rms_error

"""The evaluations that a training may spend."""

import math
from types import SimpleNamespace

import pytest

from openmm_cgflow.training.method import EvaluationBudget


def test_a_budget_follows_what_is_counted():
    counted = SimpleNamespace(n_energy_evaluations=0)
    budget = EvaluationBudget(1000, counted)
    assert budget.left == 1000
    counted.n_energy_evaluations = 400
    assert budget.left == 600
    assert budget.allows(600) and not budget.allows(601)
    counted.n_energy_evaluations = 1200  # a first pool may go beyond
    assert budget.left == -200 and not budget.allows(0)


@pytest.mark.parametrize(("share", "n"), [(1.0, 600), (0.6, 200), (0.5, 100)])
def test_a_share_of_it_is_less(share, n):
    """Rounds leave something for switching."""
    budget = EvaluationBudget(1000, SimpleNamespace(n_energy_evaluations=400))
    assert budget.allows(n, share) and not budget.allows(n + 1, share)


def test_a_budget_may_be_without_end():
    assert EvaluationBudget(math.inf, SimpleNamespace(n_energy_evaluations=10**12)).allows(1e15, 0.6)

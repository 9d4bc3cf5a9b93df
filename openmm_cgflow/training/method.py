"""What a training method must offer to be run, checked, saved and continued, and the evaluations that it may spend."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from openmm_cgflow.model.density import TrainedDensity

__all__ = ["EvaluationBudget", "Method", "Outcome", "Plan", "Row"]

Row = dict[str, float]
"""One row of ``metrics.csv``: the columns of a method are the same in all of its rows, nan where there is no value."""


class Outcome(NamedTuple):
    """How a training ended.

    Attributes:
        reason: Why no more forces are measured; empty while they are.
        unmet: What the training ended without, one phrase each.
    """

    reason: str = ""
    unmet: tuple[str, ...] = ()


class Plan(NamedTuple):
    """What a training will take, as far as that can be known before it.

    Attributes:
        n_stages: Stages of the temperature ladder.
        n_steps: Steps, or at most so many.
        n_measured: Of them, those that cost energy evaluations.
        course: What lies before it, for people; empty where that is said by the steps.
        precision: Of ``n_steps``: "at most ", "about " or nothing.
        end: What ends it before, for people.
    """

    n_stages: int
    n_steps: int
    n_measured: float
    course: str = ""
    precision: str = ""
    end: str = ""


class Method(Protocol):
    """A training method: stages of falling temperature, each a number of steps.

    Use: ``step()`` while not ``stage_done``, then keep the stage's ``density()`` and call ``next_stage()``, until
    ``done``. The state can be saved after any step, and continued from there bit for bit.

    Attributes:
        n_steps: Steps made so far.
        temperatures: Of all stages so far, K.
        log_interval: Steps between two lines of the log, where there is no progress bar.
    """

    n_steps: int
    temperatures: list[float]
    log_interval: int

    @property
    def stage_done(self) -> bool:
        """Whether the current stage needs no more steps."""
        ...

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        ...

    @property
    def expected_steps(self) -> int:
        """All steps of the training, as far as that is known by now."""
        ...

    @property
    def n_energy_evaluations(self) -> int:
        """Spent so far, by the processes that this one continues too."""
        ...

    @property
    def outcome(self) -> Outcome:
        """How the training ended, as far as it has."""
        ...

    def plan(self, evaluations_per_step: float) -> Plan:
        """What the whole training will take, where a step at its start takes so many energy evaluations."""
        ...

    def step(self) -> Row:
        """Makes one step; returns its row of metrics."""
        ...

    def next_stage(self) -> None:
        """Goes on to the next, colder stage."""
        ...

    def describe(self, row: Row) -> str:
        """A line on the row of the last step, for the progress bar and the log."""
        ...

    def density(self) -> TrainedDensity:
        """What has been learned so far, at the temperature of the current stage: a copy in double precision."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The whole state: tensors, numbers and lists only, so that ``torch.load(weights_only=True)`` reads it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        ...


class _Counted(Protocol):
    @property
    def n_energy_evaluations(self) -> int: ...


class EvaluationBudget:
    """The energy evaluations that a training may spend, ``stopping.max_evaluations``.

    Arguments:
        limit: All of them.
        counted: What counts those that are spent.
    """

    def __init__(self, limit: float, counted: _Counted) -> None:
        self.limit, self._counted = limit, counted

    @property
    def left(self) -> float:
        """Evaluations that may still be made."""
        return self.limit - self._counted.n_energy_evaluations

    def allows(self, n: float, share: float = 1.0) -> bool:
        """Whether ``n`` more evaluations would keep within a share of all."""
        return self._counted.n_energy_evaluations + n <= share * self.limit

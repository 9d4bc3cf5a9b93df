"""After the last force: the potential of mean force is fitted once more from its start, then the flow is trained on it.

Networks keep a memory of the few and cold forces they saw first (in one run 0.2 kT of the left-handed state of alanine
dipeptide), so the last fit starts anew; a flow that gains nothing more by its training starts anew as well.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from openmm_cgflow.training.method import Row
from openmm_cgflow.training.pmf.anchors import Anchors
from openmm_cgflow.training.pmf.state import Phase, PMFState

__all__ = ["LastFit", "Polish"]

_UPDATES = 200  # of the potential of mean force, in one step
_ESS_LOST = 0.03  # by a cycle of updates of the flow; the noise of the test is less


class LastFit(Phase):
    """The fit of the potential of mean force to all that was measured, from the start.

    Arguments:
        state: Shared by all phases.
        anchors: Free-energy differences that the second half of the fit meets, too.
    """

    def __init__(self, state: PMFState, anchors: Anchors) -> None:
        self.state, self.anchors = state, anchors
        self.n_steps = 0

    @property
    def done(self) -> bool:
        return self.n_steps >= self.expected_steps

    @property
    def expected_steps(self) -> int:
        return math.ceil(self.state.settings.final_updates / _UPDATES)

    def step(self) -> Row:
        state, n_updates = self.state, self.state.settings.final_updates
        noise_left = math.nan
        if self.n_steps == 0:
            noise_left = state.fit_response(n_updates, final=True)
            state.restart_pmf()
        # Far from them in the beginning, their large gradients would make Adam's steps small for a long time.
        anchors = self.anchors.differences() if self.n_steps >= self.expected_steps // 2 else None
        rate = 1 - self.n_steps / self.expected_steps
        misfit = state.fit_pmf(min(_UPDATES, n_updates - self.n_steps * _UPDATES), rate, anchors)
        self.n_steps += 1
        return state.tested() | {"misfit": misfit, "noise_left": noise_left}

    def describe(self, row: Row) -> str:
        return f"last fit: ESS {row['ess']:.2f}, free-energy error {row['free_energy_error']:.2f} kT"

    def state_dict(self) -> dict[str, Any]:
        return {"n_steps": self.n_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_steps = state["n_steps"]


class Polish(Phase):
    """Cycles of updates of the flow alone, while they help.

    A flow that gained nothing by a whole cycle starts anew, once: the first and wrong potentials that it saw leave
    something that more updates do not mend. Of valine dipeptide, one with an effective sample size of 0.86 before and
    0.83 after a cycle got to 0.96 from the start.

    Arguments:
        state: Shared by all phases.
        smallest_gain: In effective sample size, by a cycle, that is worth another one.

    Attributes:
        cycles: Effective sample sizes after each cycle.
        gained: Whether the last cycle did.
        anew_after: Cycles before the flow started anew; 0 where it did not.
    """

    def __init__(self, state: PMFState, smallest_gain: float = 0.005) -> None:
        self.state, self.smallest_gain = state, smallest_gain
        self.n_steps = 0
        self.cycles: list[float] = []
        self.gained = True
        self.anew_after = 0
        self._before: tuple[float, dict[str, Any]] | None = None

    @property
    def _length(self) -> int:
        """Steps of a cycle."""
        return max(1, self.state.settings.polish_updates // self.state.settings.polish_block)

    @property
    def done(self) -> bool:
        if self.n_steps == 0 or self.n_steps % self._length:
            return False
        stopping = self.state.stopping
        if self.cycles[-1] >= stopping.ess or len(self.cycles) >= stopping.max_polish_cycles:
            return True
        return not self.gained and self.anew_after > 0

    @property
    def expected_steps(self) -> int:
        return self._length * max(1, math.ceil(self.n_steps / self._length))

    @property
    def unmet(self) -> tuple[str, ...]:
        wanted = self.state.stopping.ess
        if not self.done or self.cycles[-1] >= wanted:
            return ()
        return (f"effective sample size {self.cycles[-1]:.3g} (wanted {wanted:g})",)

    def step(self) -> Row:
        state, block = self.state, self.state.settings.polish_block
        first = self.n_steps % self._length
        if first == 0:
            self._begin_cycle()
        for k in range(block):
            progress = (first * block + k) / (self._length * block)
            n_before = len(self.cycles) - self.anew_after
            rate = (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))) * 0.5**n_before
            if state.flow_fitter.trained_up_to < 1:  # still on its way to the model
                rate = 1.0
            state.flow_fitter.update(state.pmf, state.generator, rate, state.settings.polish_at_target)
        self.n_steps += 1
        row = state.tested()
        return self._end_cycle(row) if self.n_steps % self._length == 0 else row

    def _begin_cycle(self) -> None:
        state = self.state
        ess = state.weigh(state.settings.n_test).ess
        self._before = ess, copy.deepcopy(state.flow_fitter.state_dict())
        if not self.gained and not self.anew_after:
            self.anew_after = len(self.cycles)
            state.restart_flow()

    def _end_cycle(self, row: Row) -> Row:
        """Takes a flow back that the cycle lost, and says how the one is that stays."""
        assert self._before is not None
        ess, before = self._before
        # On the way to the model, no gain says nothing.
        on_the_way = self.state.flow_fitter.trained_up_to < 1 and before["trained_up_to"] < 1
        self.gained = on_the_way or row["ess"] > ess + self.smallest_gain
        # A flow of many coordinates can be lost in a few updates, what was before is not. A new one must be better.
        is_new = self.anew_after > 0 and len(self.cycles) == self.anew_after
        kept = row["ess"] >= ess - (0.0 if is_new else _ESS_LOST)  # never so where it is nan
        if not kept and before["trained_up_to"] == 1:
            self.state.flow_fitter.load_state_dict(before)
            row = self.state.tested()
        self.cycles.append(row["ess"])
        self._before = None
        return row

    def describe(self, row: Row) -> str:
        return f"flow: ESS {row['ess']:.2f}, free-energy error {row['free_energy_error']:.2f} kT"

    def state_dict(self) -> dict[str, Any]:
        return {
            "n_steps": self.n_steps,
            "cycles": list(self.cycles),
            "gained": self.gained,
            "anew_after": self.anew_after,
            "before": self._before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_steps, self.cycles = state["n_steps"], list(state["cycles"])
        self.gained, self.anew_after, self._before = state["gained"], state["anew_after"], state["before"]

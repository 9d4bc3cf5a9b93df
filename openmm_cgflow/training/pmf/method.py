"""Training on a potential of mean force that is learned on the fly: the default method, as a list of phases.

Rounds explore, measure mean forces at the target temperature, fit the potential to all of them and train the flow on
it. When the potential has converged, free energies of some conformations, the anchors, are measured by switching
between them: mean forces carry what their chains remember of where they started (0.1 kT between right- and left-handed
states of alanine dipeptide), and that adds up along a path; the errors of switching do not. Then the potential is
fitted once more from its start to all of this, and the flow alone is trained to the end. Nothing here knows OpenMM.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from openmm_cgflow.model.density import PMFDensity
from openmm_cgflow.settings import ChainSettings
from openmm_cgflow.training.method import EvaluationBudget, Outcome, Plan, Row
from openmm_cgflow.training.pmf.anchors import Anchors
from openmm_cgflow.training.pmf.refine import LastFit, Polish
from openmm_cgflow.training.pmf.rounds import Rounds
from openmm_cgflow.training.pmf.state import Phase, PMFState

__all__ = ["PMFTraining"]

_COLUMNS = (
    "barrier_scale",
    "noise_left",
    "held_out",
    "misfit",
    "ess",
    "free_energy_error",
    "moved",
    "energy",
    "invalid",
)


class PMFTraining:
    """Phases over one state, one after another; see :class:`openmm_cgflow.training.method.Method`.

    There is one stage, at the target temperature.

    Arguments:
        state: Networks, coordinates, estimator.
        budget: Energy evaluations that may be spent.
        chains: Numbers of replicas.
    """

    log_interval = 1

    def __init__(self, state: PMFState, budget: EvaluationBudget, chains: ChainSettings) -> None:
        self.state = state
        self.anchors = Anchors(state, budget)
        self.rounds = Rounds(state, budget, chains, self.anchors.asked_for)
        self.last_fit = LastFit(state, self.anchors)
        self.polish = Polish(state)
        # In their order.
        self._phases: dict[str, Phase] = {
            "rounds": self.rounds,
            "anchors": self.anchors,
            "last_fit": self.last_fit,
            "polish": self.polish,
        }
        self.temperatures = [state.temperature]
        self.n_steps = 0
        self._number = 0  # of the current phase
        self._stepped: Phase = self.rounds

    @property
    def _phase(self) -> Phase:
        return list(self._phases.values())[self._number]

    def _advanced(self) -> Phase:
        """The current phase, after those that are done."""
        while self._phase.done and self._phase is not self.polish:
            self._number += 1
            self._phase.begin()
        return self._phase

    @property
    def n_energy_evaluations(self) -> int:
        return self.state.estimator.n_energy_evaluations

    @property
    def outcome(self) -> Outcome:
        begun = list(self._phases.values())[: self._number + 1]
        return Outcome(self.rounds.reason, tuple(problem for phase in begun for problem in phase.unmet))

    @property
    def expected_steps(self) -> int:
        """All steps, if the rounds end at their largest number or have ended."""
        return sum(phase.expected_steps for phase in self._phases.values())

    @property
    def stage_done(self) -> bool:
        return self.polish.done

    @property
    def done(self) -> bool:
        return self.polish.done

    def next_stage(self) -> None:
        raise RuntimeError("there is one stage")

    def plan(self, evaluations_per_step: float) -> Plan:
        settings, stopping = self.state.settings, self.state.stopping
        n_rounds = min(stopping.max_rounds, stopping.max_evaluations / evaluations_per_step)
        # The last fit and updates of the flow alone follow, at about a third of a round's time for each of its own.
        n_last = settings.final_updates / settings.n_updates
        n_last += settings.polish_updates * stopping.max_polish_cycles / settings.flow_updates
        end = "it ends once the criteria of the stopping section are met"
        return Plan(1, math.ceil(n_rounds + n_last / 3), n_rounds, precision="at most ", end=end)

    def step(self) -> Row:
        """One step of the current phase; the row has ``nan`` for what that phase does not tell."""
        phase = self._stepped = self._advanced()
        row = phase.step()
        self.n_steps += 1
        self._advanced()
        row = {name: row.get(name, math.nan) for name in _COLUMNS} | self.anchors.compare(self.state.pmf)
        stage = {"step": self.n_steps, "stage": 0, "temperature": self.state.temperature}
        return stage | row | {"evaluations": self.n_energy_evaluations}

    def describe(self, row: Row) -> str:
        return self._stepped.describe(row)

    def density(self) -> PMFDensity:
        state = self.state
        flow = copy.deepcopy(state.flow).double()  # training runs in single precision
        return PMFDensity(state.coordinates, flow, copy.deepcopy(state.pmf), copy.deepcopy(state.response))

    def state_dict(self) -> dict[str, Any]:
        phases = {name: phase.state_dict() for name, phase in self._phases.items()}
        return {"n_steps": self.n_steps, "phase": self._number, "shared": self.state.state_dict(), **phases}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_steps, self._number = state["n_steps"], state["phase"]
        self.state.load_state_dict(state["shared"])
        for name, phase in self._phases.items():
            phase.load_state_dict(state[name])

"""Rounds: explore across barriers, measure mean forces there, fit the potential of mean force, train the flow on it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from openmm_cgflow.settings import ChainSettings
from openmm_cgflow.training.method import EvaluationBudget, Row
from openmm_cgflow.training.pmf.fits import held_out_error, squared_aim
from openmm_cgflow.training.pmf.state import FlowTest, Phase, PMFState, state_populations

__all__ = ["BARRIER_SCALES", "Rounds"]

BARRIER_SCALES = (0.005, 0.007, 0.01, 0.014, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.23, 0.32, 0.45, 0.64)
"""Those that exploration chooses from."""

_LAG = 3  # rounds over which populations must not have moved
# Of the wanted error, in the end of the rounds: switching finds free energies with fewer evaluations than forces do.
_ERROR_BEFORE_SWITCHING = 2.0
_SHARE_OF_ROUNDS = 0.6  # of all evaluations, where some are needed for switching


class Rounds(Phase):
    """Rounds of mean forces, until all criteria of the ``stopping`` section hold or a limit is reached.

    OpenMM never runs hotter than the target: with the slow atoms frozen there is no barrier to cross.

    Arguments:
        state: Shared by all phases.
        budget: Energy evaluations that may be spent.
        chains: ``n_replicas`` and ``adaptive`` are used, and what a chain costs.
        switched: Whether free energies are measured by switching afterwards, which takes a share of the budget.

    Attributes:
        reason: Why the rounds ended, with what they did not reach; empty before.
    """

    def __init__(self, state: PMFState, budget: EvaluationBudget, chains: ChainSettings, switched: bool) -> None:
        self.state, self.budget, self.chains, self.switched = state, budget, chains, switched
        self.reason = ""
        self._held_out = math.inf
        self._replica_cost = 0.0  # energy evaluations, in the last round
        self._earlier: list[dict[str, Tensor]] = []

    @property
    def done(self) -> bool:
        return bool(self.reason)

    @property
    def expected_steps(self) -> int:
        return len(self.state.buffer.rounds) if self.done else self.state.stopping.max_rounds

    @property
    def round_size(self) -> int:
        """Replicas of the next round: a quarter of all while mean forces are far from predicted, to the whole."""
        n = self.chains.n_replicas
        if not self.chains.adaptive:
            return n
        return math.ceil(n * min(1.0, max(0.25, self.state.stopping.held_out / self._held_out)))

    def step(self) -> Row:
        state, settings = self.state, self.state.settings
        z, before = self._explore(), state.estimator.n_energy_evaluations
        force = state.estimator(z, state.temperature)
        self._replica_cost = (state.estimator.n_energy_evaluations - before) / len(z)
        if not state.buffer.rounds:  # the first one pays for a pool of fast atoms as well
            self._replica_cost = min(self._replica_cost, self.chains.chain_evaluations)
        state.buffer.add(z, force, state.generator)
        noise_left = state.fit_response(settings.response_updates)
        if force.parts is not None:
            gradient, variance = state.response.mean_force(z, force.parts, force.valid)
            force = force._replace(gradient=gradient, variance=variance)
        held_out = self._held_out = held_out_error(state.pmf, z, force)
        self._tune(z[force.valid], force.variance[force.valid])
        misfit = state.fit_pmf(settings.n_updates)
        for _ in range(settings.flow_updates):
            state.flow_fitter.update(state.pmf, state.generator)
        self.choose_exploring()
        test = state.test()
        row = {
            "barrier_scale": state.exploring,
            "ess": test.samples.ess,
            "free_energy_error": test.free_energy_error,
            "moved": self._moved(test),
            "held_out": held_out,
            "misfit": misfit,
            "noise_left": noise_left,
            "invalid": int((~force.valid).sum()),
            "energy": float(force.energy[force.valid].median()),
        }
        self.reason = self.reason_to_end(row)
        return row

    def _tune(self, z: Tensor, variance: Tensor) -> None:
        _, predicted = self.state.pmf.value_and_gradient(z)
        self.state.estimator.tune(float((variance / squared_aim(predicted)).median()))

    @torch.no_grad()
    def _explore(self) -> Tensor:
        """z of the next round: three fifths at the exploring scale, a fifth at its root, a fifth of the model.

        None at a scale that the flow has not been trained at yet.
        """
        state, n = self.state, self.round_size
        scale = torch.ones(n)
        scale[: 3 * n // 5] = state.exploring
        scale[3 * n // 5 : 4 * n // 5] = math.sqrt(state.exploring)
        return state.flow.sample(n, state.generator, scale.clamp(max=state.flow_fitter.trained_up_to))[0]

    @torch.no_grad()
    def choose_exploring(self) -> None:
        """The largest scale whose samples lie ``explore_height`` kT above the model's, as far as it is trained."""
        state = self.state
        if not state.flow.n_circular:
            return

        def height(scale: float) -> float:
            samples = state.weigh(state.settings.n_probe, scale)
            return float((samples.energy + state.flow.log_prob_bounded(samples.z)).median())

        lowest = height(state.flow_fitter.trained_up_to)
        above = (s for s in reversed(BARRIER_SCALES) if height(s) - lowest > state.settings.explore_height)
        state.exploring = next(above, BARRIER_SCALES[0])

    @torch.no_grad()
    def _moved(self, test: FlowTest) -> float:
        """How far free energies of states have moved over some rounds, kT; nan while there were not as many.

        The same samples are weighed by the earlier potential: what has changed is free of their sampling error.
        """
        state, moved = self.state, math.nan
        now = copy.deepcopy(state.pmf.state_dict())
        if len(self._earlier) == _LAG:
            earlier = copy.deepcopy(state.pmf)
            earlier.load_state_dict(self._earlier[0])
            members = earlier.each(test.samples.z) - state.coordinates.log_volume(test.samples.z)
            weighed = test.samples._replace(energy=members.mean(0), members=members)
            before = state_populations(weighed, state.flow.n_circular).mean(0)
            changes = (test.populations.clamp(min=1e-9) / before.clamp(min=1e-9)).log().abs()[test.counted]
            moved = float(changes.max()) if test.counted.any() else 0.0
        self._earlier = [*self._earlier, now][-_LAG:]
        return moved

    def reason_to_end(self, row: Row) -> str:
        """Why there should be no further round after one with these metrics; empty where there should be."""
        stopping, switched = self.state.stopping, self.switched
        held_out, error, moved = row["held_out"], row["free_energy_error"], row["moved"]
        wanted = stopping.free_energy_error * (_ERROR_BEFORE_SWITCHING if switched else 1.0)
        if (
            held_out <= stopping.held_out
            and error <= wanted
            and moved <= wanted  # never so while it is nan
            and row["ess"] >= 0.9 * stopping.ess
        ):
            return (
                f"converged: held-out mean forces are predicted to {held_out:.2f} of their noise, free energies of "
                f"states to {error:.2f} kT, they moved by {moved:.2f} kT in {_LAG} rounds, and the effective "
                f"sample size is {row['ess']:.2f}"
            )
        now = (
            f"held-out error {held_out:.2f} (wanted {stopping.held_out:g}), free-energy error {error:.2f} kT, moved "
            f"{moved:.2f} kT (wanted {wanted:g}), effective sample size {row['ess']:.2f} (wanted "
            f"{0.9 * stopping.ess:.2f})"
        )
        if not self.budget.allows(self._replica_cost * self.round_size, _SHARE_OF_ROUNDS if switched else 1.0):
            left = ", less what is left for switching" if switched else ""
            return f"not converged: the next round would exceed stopping.max_evaluations{left}; {now}"
        if len(self.state.buffer.rounds) >= stopping.max_rounds:
            return f"not converged: stopping.max_rounds is reached; {now}"
        return ""

    def describe(self, row: Row) -> str:
        return (
            f"round {len(self.state.buffer.rounds)}: ESS {row['ess']:.2f}, free-energy error "
            f"{row['free_energy_error']:.2f} kT, held-out {row['held_out']:.2f}"
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "reason": self.reason,
            "held_out": self._held_out,
            "replica_cost": self._replica_cost,
            "earlier": list(self._earlier),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reason, self._held_out, self._replica_cost = state["reason"], state["held_out"], state["replica_cost"]
        self._earlier = list(state["earlier"])

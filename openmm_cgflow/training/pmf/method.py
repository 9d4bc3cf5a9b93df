"""Training on a potential of mean force that is learned on the fly: explore, measure, fit, distil, round by round.

Every round draws z across barriers from the flow at small gamma and near the basins at larger ones, measures mean
forces there at the target temperature, learns from their noise how the fast atoms follow the slow ones, which removes
most of it, fits the PMF to all of them, and trains the flow on that PMF. OpenMM never runs hotter than the target: with
the slow atoms frozen there is no barrier to cross. When the PMF has converged, free energies of some conformations are
measured by switching between them: mean forces carry what their chains remember of where they started (0.1 kT between
right- and left-handed states of alanine dipeptide), and that adds up along a path; the errors of switching do not. Then
it is fitted once more from the start to all of this, because networks keep a memory of the few and cold forces they saw
first (in one run 0.2 kT of the left-handed state), and the flow alone is trained to the end; where it gains nothing it
starts anew as well. Nothing here knows OpenMM.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.forces.estimator import ChainParts, MeanForceEstimator
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.networks.pmf import PMF
from openmm_cgflow.networks.response import FastResponse
from openmm_cgflow.networks.weights import WeightedSamples, weighted_samples
from openmm_cgflow.training.pmf.anchors import Anchors
from openmm_cgflow.training.pmf.fits import (
    AnchorValues,
    MeanForceBuffer,
    PMFFitter,
    ResponseFitter,
    held_out_error,
    squared_aim,
)
from openmm_cgflow.training.pmf.flow_fit import FlowFitter

__all__ = ["PMFTraining", "state_populations"]

_N_TEST = 16384  # flow samples behind every effective sample size and population
_N_PROBE = 512  # flow samples at each gamma of the search for the exploring one
_GAMMAS = (0.005, 0.007, 0.01, 0.014, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.23, 0.32, 0.45, 0.64)
_SMALLEST_POPULATION = 0.005  # states rarer than this do not count for convergence
_ESS_GAINED, _ESS_LOST = 0.005, 0.03  # by a cycle of updates of the flow; the noise of the test is less than the latter
_LAG = 3  # rounds over which populations must not have moved
_POLISH = 50  # flow updates of one step after the last round
_REFIT = 200  # PMF updates of one step after the last round
# Of the wanted error, in the end of the rounds: switching finds free energies with fewer evaluations than forces do.
_ERROR_BEFORE_SWITCHING = 2.0
_SHARE_OF_ROUNDS = 0.6  # of all evaluations, where some are needed for switching


def state_populations(samples: WeightedSamples, n_circular: int) -> Tensor:
    """Populations of the thirds of every torsion, (-180, -60), (-60, 60), (60, 180) degrees and so on.

    Thirds need no knowledge of the molecule, and separate the gauche and trans states of single bonds as well as
    alpha and left-handed conformations of peptides.

    Returns:
        For every member of the ensemble, shape (n_members, 6 n_circular): thirds cut at -180, -60 and 60 degrees, and
        thirds cut at -120, 0 and 120 degrees.
    """
    weights = torch.softmax(-samples.members - samples.log_q, dim=1)
    angles = samples.z[:, :n_circular]
    parts = []
    for shift in (0.0, math.pi / 3):
        third = torch.remainder(torch.floor((angles + shift + math.pi) / (2 * math.pi / 3)).long(), 3)
        parts.append(torch.nn.functional.one_hot(third, 3).flatten(1))
    return weights @ torch.cat(parts, dim=1).double()


class PMFTraining:
    """Rounds of exploration and fitting, then the flow alone; its whole state can be saved and continued bit for bit.

    Use: ``step()`` while not ``stage_done``. There is one stage, at the target temperature.

    Arguments:
        config: Sections ``pmf``, ``stopping``, ``chains.n_replicas``, ``temperature`` and ``seed`` are used.
        coordinates: Slow coordinates.
        flow: Trained in place, in float32.
        pmf: Fitted in place.
        response: Fitted in place, where the estimator tells of the fast atoms.
        estimator: Mean forces.

    Attributes:
        n_steps: Steps made so far: rounds, and blocks of updates of the flow after the last round.
        ended_by: Why the rounds ended; empty before.
    """

    stage = 0
    log_interval = 1
    joint = None

    def __init__(
        self,
        config: Config,
        coordinates: Coordinates,
        flow: CGFlow,
        pmf: PMF,
        response: FastResponse,
        estimator: MeanForceEstimator,
    ) -> None:
        self.config, self.coordinates, self.estimator = config, coordinates, estimator
        self.flow, self.pmf, self.response = flow, pmf, response
        flow.float()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.buffer = MeanForceBuffer(config.pmf.n_members)
        self._start, self._flow_start = copy.deepcopy(pmf.state_dict()), copy.deepcopy(flow.state_dict())
        self.pmf_fitter = PMFFitter(pmf, config.pmf.learning_rate)
        self.response_fitter = ResponseFitter(response)
        self.flow_fitter = self._new_flow_fitter()
        self.temperatures = [config.temperature]
        self.n_steps = self.n_refit = self.n_polish = 0
        self.values = Anchors(config)
        self.gamma = 1.0
        self._held_out = math.inf
        self._replica_cost = 0.0  # energy evaluations, in the last round
        self.ended_by = ""
        self._earlier: list[dict[str, Tensor]] = []
        self._best_ess: list[float] = []
        self._before_cycle: tuple[float, dict[str, Any]] | None = None
        self._gained = True  # by the last cycle
        self._anew_after = 0  # cycles; none where the flow is that of the rounds

    @property
    def temperature(self) -> float:
        return self.temperatures[-1]

    @property
    def unmet(self) -> list[str]:
        """What switching and the flow ended without, at a limit; ``ended_by`` tells of the rounds."""
        stopping, found = self.config.stopping, []
        error = self.values.compare(self.pmf)["value_error"]
        if self.n_refit and error > stopping.free_energy_error:  # never so where it is nan
            found.append(f"differences by switching to {error:.3g} kT (wanted {stopping.free_energy_error:g})")
        if self.n_refit and self.values.lost:
            found.append(f"{len(self.values.lost)} conformations could not be switched to")
        if self.done and self._best_ess[-1] < stopping.ess:
            found.append(f"effective sample size {self._best_ess[-1]:.3g} (wanted {stopping.ess:g})")
        return found

    @property
    def expected_steps(self) -> int:
        """All steps, if the rounds end at their largest number or have ended."""
        n_cycle = self._polish_cycle * max(1, math.ceil(self.n_polish / self._polish_cycle))
        n_rounds = len(self.buffer.rounds) if self.ended_by else self.config.stopping.max_rounds
        return n_rounds + self._refit_length + n_cycle + self.values.n_steps + self.values.wanted

    @property
    def stage_done(self) -> bool:
        if not self.ended_by or self.n_polish == 0 or self.n_polish % self._polish_cycle:
            return False
        stopping, cycles = self.config.stopping, self._best_ess
        if cycles[-1] >= stopping.ess or len(cycles) >= stopping.max_polish_cycles:
            return True
        return not self._gained and self._anew_after > 0

    @property
    def done(self) -> bool:
        return self.stage_done

    @property
    def _polish_cycle(self) -> int:
        return max(1, self.config.pmf.polish_updates // _POLISH)

    @property
    def _refit_length(self) -> int:
        return math.ceil(self.config.pmf.final_updates / _REFIT)

    def next_stage(self) -> None:
        raise RuntimeError("there is one stage")

    def step(self) -> dict[str, float]:
        """A round, and after the last one switching, then updates of the PMF, then of the flow; returns metrics."""
        if not self.ended_by:
            row = self._round()
        elif self.values.wanted:
            row = self._measure_values()
        else:
            row = self._refit() if self.n_refit < self._refit_length else self._polish()
        self.n_steps += 1
        return {"step": self.n_steps, "stage": 0, "temperature": self.temperature} | row

    def _round(self) -> dict[str, float]:
        z, before = self._explore(), self.estimator.n_energy_evaluations
        force = self.estimator(z, self.temperature)
        self._replica_cost = (self.estimator.n_energy_evaluations - before) / len(z)
        if not self.buffer.rounds:  # the first one pays for a pool of fast atoms as well
            self._replica_cost = min(self._replica_cost, self.config.chains.chain_evaluations)
        self.buffer.add(z, force, self.generator)
        noise_left = self._fit_response(self.config.pmf.response_updates)
        if force.parts is not None:
            gradient, variance = self.response.mean_force(z, force.parts, force.valid)
            force = force._replace(gradient=gradient, variance=variance)
        held_out = self._held_out = held_out_error(self.pmf, z, force)
        self._tune(z[force.valid], force.variance[force.valid])
        misfit = self._fit_pmf(self.config.pmf.n_updates)
        for _ in range(self.config.pmf.flow_updates):
            self.flow_fitter.update(self.pmf, self.generator)
        self._choose_gamma()
        row = self._test()
        row |= {"held_out": held_out, "misfit": misfit, "noise_left": noise_left, "invalid": int((~force.valid).sum())}
        row |= {"energy": float(force.energy[force.valid].median())}
        self.ended_by = self._reason_to_end(row)
        if self.ended_by:
            gamma = min(self.gamma, self.flow_fitter.reach)
            self.values.start(self.flow, self.pmf, self.coordinates, self.estimator, self.generator, gamma)
        return self._ordered(row)

    def _measure_values(self) -> dict[str, float]:
        self.values.step(self.estimator, self.temperature)
        return self._ordered({"gamma": self.gamma})

    def _refit(self) -> dict[str, float]:
        noise_left = math.nan
        if self.n_refit == 0:
            noise_left = self._fit_response(self.config.pmf.final_updates, final=True)
            self.pmf.load_state_dict(self._start)
            self.pmf_fitter = PMFFitter(self.pmf, self.config.pmf.learning_rate)
        n_updates = min(_REFIT, self.config.pmf.final_updates - self.n_refit * _REFIT)
        scale = 1 - self.n_refit / self._refit_length
        # Far from them in the beginning, their large gradients would make Adam's steps small for a long time.
        values = self.values.values() if self.n_refit >= self._refit_length // 2 else None
        misfit = self._fit_pmf(n_updates, scale, values)
        self.n_refit += 1
        return self._ordered(self._test() | {"misfit": misfit, "noise_left": noise_left})

    def _fit_pmf(self, n_updates: int, scale: float = 1.0, values: AnchorValues | None = None) -> float:
        misfit = self.pmf_fitter.fit(self._data(), n_updates, self.generator, scale, values)
        if not math.isfinite(misfit):
            raise CGFlowError(
                f"the fit of the potential of mean force diverged after round {len(self.buffer.rounds)}; the last "
                "checkpoint was written before. Try a smaller pmf.learning_rate"
            )
        return misfit

    def _tune(self, z: Tensor, variance: Tensor) -> None:
        _, predicted = self.pmf.value_and_gradient(z)
        self.estimator.tune(float((variance / squared_aim(predicted)).median()))

    @property
    def _round_size(self) -> int:
        """Replicas of the next round: a quarter of all while mean forces are far from predicted, to the whole."""
        n = self.config.chains.n_replicas
        if not self.config.chains.adaptive:
            return n
        return math.ceil(n * min(1.0, max(0.25, self.config.stopping.held_out / self._held_out)))

    def _fit_response(self, n_updates: int, final: bool = False) -> float:
        data = self.buffer.data()
        if "fast" not in data:
            return math.nan
        parts = ChainParts(data["slow"], data["fast"])
        return self.response_fitter.fit(data["z"], parts, n_updates, self.generator, final)

    def _data(self) -> dict[str, Tensor]:
        """All mean forces, with the noise removed that the response explains by now."""
        return self.response.corrected(self.buffer.data())

    def _polish(self) -> dict[str, float]:
        cycle = self._polish_cycle * _POLISH
        if self.n_polish % self._polish_cycle == 0:
            self._begin_cycle()
        for k in range(_POLISH):
            progress = (self.n_polish % self._polish_cycle * _POLISH + k) / cycle
            n_before = len(self._best_ess) - self._anew_after
            scale = (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))) * 0.5**n_before
            if self.flow_fitter.reach < 1:  # still on its way to the model
                scale = 1.0
            self.flow_fitter.update(self.pmf, self.generator, scale, self.config.pmf.polish_at_target)
        self.n_polish += 1
        row = self._test()
        return self._ordered(self._end_cycle(row) if self.n_polish % self._polish_cycle == 0 else row)

    def _new_flow_fitter(self) -> FlowFitter:
        settings = self.config.pmf
        return FlowFitter(self.flow, self.coordinates, settings.flow_learning_rate, settings.flow_batch_size)

    def _begin_cycle(self) -> None:
        """A flow that gained nothing by a whole cycle starts anew, once.

        The first and wrong PMFs that it saw leave something that more updates do not mend: of valine dipeptide, one
        with an effective sample size of 0.86 before and 0.83 after a cycle got to 0.96 from the start.
        """
        self._before_cycle = self._ess(), copy.deepcopy(self.flow_fitter.state_dict())
        if not self._gained and not self._anew_after:
            self._anew_after = len(self._best_ess)
            self.flow.load_state_dict(self._flow_start)
            self.flow_fitter = self._new_flow_fitter()

    def _end_cycle(self, row: dict[str, float]) -> dict[str, float]:
        """Takes a flow back that the cycle lost, and says how the one is that stays."""
        assert self._before_cycle is not None
        before, state = self._before_cycle
        on_the_way = self.flow_fitter.reach < 1 and state["reach"] < 1  # where no gain says nothing
        self._gained = on_the_way or row["ess"] > before + _ESS_GAINED
        # A flow of many coordinates can be lost in a few updates, what was before is not. A new one must be better.
        is_new = self._anew_after > 0 and len(self._best_ess) == self._anew_after
        kept = row["ess"] >= before - (0.0 if is_new else _ESS_LOST)  # never so where it is nan
        if not kept and state["reach"] == 1:
            self.flow_fitter.load_state_dict(state)
            row = self._test()
        self._best_ess.append(row["ess"])
        self._before_cycle = None
        return row

    def _ess(self) -> float:
        return weighted_samples(self.flow, self.pmf, self.coordinates, _N_TEST, self.generator).ess

    def _ordered(self, row: dict[str, float]) -> dict[str, float]:
        names = ("gamma", "noise_left", "held_out", "misfit", "ess", "free_energy_error", "moved", "energy", "invalid")
        row = {name: row.get(name, math.nan) for name in names} | self.values.compare(self.pmf)
        return row | {"evaluations": self.estimator.n_energy_evaluations}

    @torch.no_grad()
    def _explore(self) -> Tensor:
        """z of the next round: three fifths at the exploring gamma, a fifth at its root, a fifth of the model.

        None at a gamma that the flow has not been trained at yet.
        """
        n = self._round_size
        gamma = torch.ones(n)
        gamma[: 3 * n // 5] = self.gamma
        gamma[3 * n // 5 : 4 * n // 5] = math.sqrt(self.gamma)
        return self.flow.sample(n, self.generator, gamma.clamp(max=self.flow_fitter.reach))[0]

    @torch.no_grad()
    def _choose_gamma(self) -> None:
        """The largest gamma whose samples lie ``explore_height`` kT above the model's, as far as it is trained."""
        if not self.flow.n_circular:
            return

        def height(gamma: float) -> float:
            samples = weighted_samples(self.flow, self.pmf, self.coordinates, _N_PROBE, self.generator, gamma)
            return float((samples.energy + self.flow.log_prob_bounded(samples.z)).median())

        lowest = height(self.flow_fitter.reach)
        above = (gamma for gamma in reversed(_GAMMAS) if height(gamma) - lowest > self.config.pmf.explore_height)
        self.gamma = next(above, _GAMMAS[0])

    def _test(self) -> dict[str, float]:
        samples = weighted_samples(self.flow, self.pmf, self.coordinates, _N_TEST, self.generator)
        populations = state_populations(samples, self.flow.n_circular)
        mean = populations.mean(0)
        counted = mean > _SMALLEST_POPULATION
        error, moved = 0.0, math.nan
        if counted.any():
            error = float(populations[:, counted].log().std(0).max())
        if not self.ended_by:
            now = copy.deepcopy(self.pmf.state_dict())
            if len(self._earlier) == _LAG:
                before = state_populations(self._weighed_as(self._earlier[0], samples), self.flow.n_circular).mean(0)
                changes = (mean.clamp(min=1e-9) / before.clamp(min=1e-9)).log().abs()[counted]
                moved = float(changes.max()) if counted.any() else 0.0
            self._earlier = [*self._earlier, now][-_LAG:]
        return {"gamma": self.gamma, "ess": samples.ess, "free_energy_error": error, "moved": moved}

    @torch.no_grad()
    def _weighed_as(self, earlier: dict[str, Tensor], samples: WeightedSamples) -> WeightedSamples:
        """The same samples weighed by an earlier PMF: what has changed is free of their sampling error."""
        pmf = copy.deepcopy(self.pmf)
        pmf.load_state_dict(earlier)
        members = pmf.each(samples.z) - self.coordinates.log_volume(samples.z)
        return samples._replace(energy=members.mean(0), members=members)

    def _reason_to_end(self, row: dict[str, float]) -> str:
        stopping = self.config.stopping
        held_out, error, moved = row["held_out"], row["free_energy_error"], row["moved"]
        switched = self.values.asked_for(self.flow)
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
        n_round = self._replica_cost * self._round_size
        share = _SHARE_OF_ROUNDS if switched else 1.0
        if self.estimator.n_energy_evaluations + n_round > share * stopping.max_evaluations:
            left = ", less what is left for switching" if switched else ""
            return f"not converged: the next round would exceed stopping.max_evaluations{left}; {now}"
        if len(self.buffer.rounds) >= stopping.max_rounds:
            return f"not converged: stopping.max_rounds is reached; {now}"
        return ""

    def describe(self, row: dict[str, float]) -> str:
        """A line on a row of metrics, for the progress bar."""
        if self.values.n_steps and not self.n_refit:
            return f"switching: free energies to {row['value_error']:.2f} kT, PMF off by {row['value_misfit']:.2f} kT"
        phase = "flow" if self.n_polish else "last fit" if self.n_refit else f"round {len(self.buffer.rounds)}"
        text = f"{phase}: ESS {row['ess']:.2f}, free-energy error {row['free_energy_error']:.2f} kT"
        return text if self.n_refit else text + f", held-out {row['held_out']:.2f}"

    def state_dict(self) -> dict[str, Any]:
        """The whole state: tensors, numbers and lists only, so that ``torch.load(weights_only=True)`` reads it."""
        return {
            "flow": self.flow_fitter.state_dict(),
            "pmf": self.pmf_fitter.state_dict(),
            "response": self.response_fitter.state_dict(),
            "start": self._start,
            "flow_start": self._flow_start,
            "buffer": self.buffer.state_dict(),
            "generator": self.generator.get_state(),
            "estimator": self.estimator.state_dict(),
            "n_steps": self.n_steps,
            "values": self.values.state_dict(),
            "n_refit": self.n_refit,
            "n_polish": self.n_polish,
            "gamma": self.gamma,
            "held_out": self._held_out,
            "replica_cost": self._replica_cost,
            "ended_by": self.ended_by,
            "earlier": list(self._earlier),
            "best_ess": list(self._best_ess),
            "before_cycle": self._before_cycle,
            "gained": self._gained,
            "anew_after": self._anew_after,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        self.flow_fitter.load_state_dict(state["flow"])
        self.pmf_fitter.load_state_dict(state["pmf"])
        self.response_fitter.load_state_dict(state["response"])
        self._start, self._flow_start = state["start"], state["flow_start"]
        self.buffer.load_state_dict(state["buffer"])
        self.generator.set_state(state["generator"])
        self.estimator.load_state_dict(state["estimator"])
        self.n_steps, self.n_refit, self.n_polish = state["n_steps"], state["n_refit"], state["n_polish"]
        self.values.load_state_dict(state["values"])
        self.gamma, self.ended_by = state["gamma"], state["ended_by"]
        self._held_out, self._replica_cost = state["held_out"], state["replica_cost"]
        self._earlier, self._best_ess = list(state["earlier"]), list(state["best_ess"])
        self._before_cycle = state["before_cycle"]
        self._gained, self._anew_after = state["gained"], state["anew_after"]

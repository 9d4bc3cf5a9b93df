"""The ladder of temperatures, from where the target is easy to the target itself: stages, steps, learning rates.

It is what both trainings by reverse KL go down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.networks.weights import kl_increase, relative_ess
from openmm_cgflow.settings import TemperingSettings, TrainingSettings
from openmm_cgflow.training.method import Outcome, Plan
from openmm_cgflow.units import thermal_beta

__all__ = ["N_ENERGY_BATCHES", "Ladder", "count_stages", "log_weights", "next_temperature", "start_temperature"]

N_ENERGY_BATCHES = 4  # the last batches of a stage, which set the next temperature
_SHRINK = 0.6  # of a step that would increase the KL too much (the paper's second version)
_SMALLEST_STEP = 1e-9  # of all that is left


class Ladder:
    """Where on the ladder a training is.

    Use: ``advance`` after every update while not ``stage_done``; then ``next_stage``, until ``done``.

    Arguments:
        training: Lengths of the stages, and the learning rate.
        tempering: The temperatures.
        target: Temperature of the last stage, K.
        n_features: Number of slow coordinates, by which the stages are counted before they are known.

    Attributes:
        temperatures: Of all stages so far, K.
        n_steps: Updates made so far.
        n_stage_steps: Of them in the current stage.
    """

    log_interval = 20

    def __init__(
        self, training: TrainingSettings, tempering: TemperingSettings, target: float, n_features: int
    ) -> None:
        self.training, self.tempering, self.target, self.n_features = training, tempering, target, n_features
        self.temperatures = [start_temperature(tempering, target)]
        self.n_steps = 0
        self.n_stage_steps = 0
        self._energies: list[tuple[Tensor, Tensor]] = []

    @property
    def temperature(self) -> float:
        """Temperature of the current stage, K."""
        return self.temperatures[-1]

    @property
    def stage(self) -> int:
        return len(self.temperatures) - 1

    @property
    def at_target(self) -> bool:
        return self.temperature <= self.target

    @property
    def stage_length(self) -> int:
        """Updates of the current stage."""
        training = self.training
        if self.at_target:
            return training.n_steps_last
        return training.n_steps_first if self.stage == 0 else training.n_steps

    @property
    def stage_done(self) -> bool:
        return self.n_stage_steps >= self.stage_length

    @property
    def done(self) -> bool:
        return self.at_target and self.stage_done

    @property
    def outcome(self) -> Outcome:
        """Steps are counted, so nothing that was asked for can be missed."""
        return Outcome("the last stage's steps are done" if self.done else "")

    @property
    def expected_steps(self) -> int:
        """Updates until the end of the current stage."""
        return self.n_steps - self.n_stage_steps + self.stage_length

    def plan(self, evaluations_per_step: float) -> Plan:
        n_stages = count_stages(self.tempering, self.target, self.n_features)
        n_steps = self.training.n_steps_last
        if n_stages > 1:
            n_steps += self.training.n_steps_first + (n_stages - 2) * self.training.n_steps
        about = "about " if self.tempering.schedule == "adaptive" else ""
        course = f"{about}{n_stages} stages from {self.temperatures[0]:g} K to {self.target:g} K, "
        return Plan(n_stages, n_steps, n_steps, course, precision=about)

    @property
    def learning_rate(self) -> float:
        """Constant, but a cosine down to a twentieth over the last stage, to average the noise out."""
        rate = self.training.learning_rate
        if not self.at_target:
            return rate
        progress = self.n_stage_steps / max(self.stage_length, 1)
        return rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))

    def advance(self, energy: Tensor | None = None, variance: Tensor | None = None) -> None:
        """Counts an update, and keeps its energies at the stage's temperature, if it has any.

        Arguments:
            energy: kJ/mol, shape (n,).
            variance: Squared standard errors, shape (n,); zero by default.
        """
        if energy is not None:
            self._energies.append((energy, torch.zeros_like(energy) if variance is None else variance))
            del self._energies[:-N_ENERGY_BATCHES]
        self.n_steps += 1
        self.n_stage_steps += 1

    @property
    def kl(self) -> float | None:
        """How far the model is from its target now, nats, where that is known; see ``next_temperature``."""
        return None

    def next_stage(self) -> None:
        """Lowers the temperature: never past the target."""
        energy, variance = (torch.cat(parts) for parts in zip(*self._energies, strict=True))
        self.temperatures.append(
            next_temperature(self.tempering, self.temperature, self.target, energy, variance, self.kl)
        )
        self.n_stage_steps = 0
        self._energies = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "temperatures": list(self.temperatures),
            "n_steps": self.n_steps,
            "n_stage_steps": self.n_stage_steps,
            "energies": list(self._energies),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.temperatures = list(state["temperatures"])
        self.n_steps, self.n_stage_steps = state["n_steps"], state["n_stage_steps"]
        self._energies = [tuple(batch) for batch in state["energies"]]


def log_weights(energy: Tensor, energy_variance: Tensor, delta_beta: float) -> Tensor:
    """log of p(z; beta + delta_beta) / p(z; beta) up to a constant, from d(beta A)/dbeta = <U> at fixed z.

    The replicas' mean energies are noisy; noise would pass for a spread of weights and make the steps too short, so
    the energies are shrunk to their mean until their spread is what is left without the noise.

    Arguments:
        energy: <U> at each z, kJ/mol, shape (n,).
        energy_variance: Its squared standard error, shape (n,).
        delta_beta: mol/kJ.
    """
    away = energy - energy.mean()
    observed = away.square().mean().clamp(min=1e-300)  # equal energies
    noise = torch.nan_to_num(energy_variance).mean()
    shrink = torch.sqrt(((observed - noise) / observed).clamp(0.05, 1.0))
    return -delta_beta * away * shrink


def start_temperature(settings: TemperingSettings, target: float) -> float:
    """Temperature of the first stage, K.

    Raises:
        CGFlowError: If the ladder does not lead down to the target.
    """
    if settings.schedule == "list":
        ladder = [*settings.temperatures, target] if target not in settings.temperatures else settings.temperatures
        if ladder[-1] != target or any(hot <= cold for hot, cold in pairwise(ladder)):
            raise CGFlowError(
                f"tempering.temperatures: got {settings.temperatures}, expected falling temperatures (K) above or "
                f"at the target of {target:g} K"
            )
        return ladder[0]
    if settings.start < target:
        raise CGFlowError(f"tempering.start: got {settings.start:g} K, below the target of {target:g} K")
    return settings.start


def count_stages(settings: TemperingSettings, temperature: float, n_features: int) -> int:
    """Stages of the temperature ladder.

    The adaptive schedule finds its own; for a harmonic molecule, whose energy varies by n_features/2 kT² over the slow
    coordinates, log weights of variance s² give an effective sample size of exp(-s²) and a KL increase of s²/2.
    """
    start = start_temperature(settings, temperature)
    if start <= temperature:
        return 1
    if settings.schedule == "list":
        return len(settings.temperatures) + (temperature not in settings.temperatures)
    if settings.schedule == "linear":
        return max(settings.n_stages, 2)
    spread = math.sqrt(-math.log(settings.min_ess)) if settings.criterion == "ess" else math.sqrt(2 * settings.max_kl)
    # One step multiplies beta by 1 + s / sqrt(n/2).
    return 1 + math.ceil(math.log(start / temperature) / math.log1p(spread / math.sqrt(n_features / 2)))


def next_temperature(
    settings: TemperingSettings,
    current: float,
    target: float,
    energy: Tensor,
    energy_variance: Tensor,
    kl: float | None = None,
) -> float:
    """Temperature of the stage after the one at ``current``; never past the target.

    Adaptive steps raise beta by one part in 200 at least, but for the last.

    Arguments:
        settings: The ``tempering`` section.
        current: K.
        target: K.
        energy: <U> of recent samples of the current stage, kJ/mol, shape (n,); used by the adaptive schedule.
        energy_variance: Its squared standard error, shape (n,).
        kl: KL(model || target) now, nats, where it is known; used by the criterion ``kl``.
    """
    if settings.schedule == "list":
        return max([t for t in settings.temperatures if target < t < current], default=target)
    beta, beta_target = thermal_beta(current), thermal_beta(target)
    if settings.schedule == "linear":
        beta_start = thermal_beta(settings.start)
        step = (beta_target - beta_start) / max(settings.n_stages - 1, 1)
    else:
        step = _largest_step(settings, beta_target - beta, energy, energy_variance, kl)
        step = max(step, 0.005 * beta)
    # A last step a tenth longer than allowed is better than a stage for the rest.
    if beta_target - beta <= 1.1 * step:
        return target
    return current * beta / (beta + step)


def _largest_step(
    settings: TemperingSettings, limit: float, energy: Tensor, energy_variance: Tensor, kl: float | None
) -> float:
    def weights(step: float) -> Tensor:
        return log_weights(energy, energy_variance, step)

    if settings.criterion == "ess":

        def allowed(step: float) -> bool:
            return relative_ess(weights(step)) >= settings.min_ess

        return limit if allowed(limit) else _bisect(allowed, limit)
    # The paper's second version bounds the increase of KL(model || target) relative to the KL itself, which is near
    # zero where the model is good, so that steps would shrink to nothing there: below one nat it is bounded as it is.
    bound = settings.max_kl * max(kl or 0.0, 1.0)
    step = limit
    while kl_increase(weights(step)) > bound and step > _SMALLEST_STEP * limit:
        step *= _SHRINK
    return step


def _bisect(allowed: Callable[[float], bool], limit: float) -> float:
    low, high = 0.0, limit
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low

"""Stages of falling temperature, their lengths and learning rates: what both trainings by reverse KL go down."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from openmm_cgflow.settings import TemperingSettings, TrainingSettings
from openmm_cgflow.training.method import Outcome, Plan
from openmm_cgflow.training.tempering import count_stages, next_temperature, start_temperature

__all__ = ["N_ENERGY_BATCHES", "Ladder"]

N_ENERGY_BATCHES = 4  # the last batches of a stage, which set the next temperature


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
        """Of the current stage, K."""
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

"""Stages of falling temperature, their lengths and learning rates: what both trainings by reverse KL go down."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from openmm_cgflow.config import Config
from openmm_cgflow.training.tempering import next_temperature, start_temperature

__all__ = ["N_ENERGY_BATCHES", "Ladder"]

N_ENERGY_BATCHES = 4  # the last batches of a stage, which set the next temperature


class Ladder:
    """Where on the ladder a training is.

    Use: ``advance`` after every update while not ``stage_done``; then ``next_stage``, until ``done``.

    Arguments:
        config: Sections ``training`` and ``tempering``, and ``temperature``, are used.

    Attributes:
        temperatures: Of all stages so far, K.
        n_steps: Updates made so far.
        n_stage_steps: Of them in the current stage.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.temperatures = [start_temperature(config.tempering, config.temperature)]
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
        return self.temperature <= self.config.temperature

    @property
    def stage_length(self) -> int:
        """Updates of the current stage."""
        training = self.config.training
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
    def ended_by(self) -> str:
        """Why the training ended; empty before."""
        return "the last stage's steps are done" if self.done else ""

    @property
    def unmet(self) -> list[str]:
        """What is less than asked for: nothing is, steps are counted."""
        return []

    @property
    def expected_steps(self) -> int:
        """Updates until the end of the current stage."""
        return self.n_steps - self.n_stage_steps + self.stage_length

    @property
    def learning_rate(self) -> float:
        """Constant, but a cosine down to a twentieth over the last stage, to average the noise out."""
        rate = self.config.training.learning_rate
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
        target = self.config.temperature
        self.temperatures.append(
            next_temperature(self.config.tempering, self.temperature, target, energy, variance, self.kl)
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

"""Reverse-KL training of the flow on mean forces (paper eqs. 12-17), stage by stage down the temperature ladder.

Nothing here knows OpenMM: the training sees coordinates, a flow and a :class:`MeanForceEstimator`.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.forces.estimator import MeanForce, MeanForceEstimator
from openmm_cgflow.forces.gradients import shortened
from openmm_cgflow.model.density import FlowDensity
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.settings import TemperingSettings, TrainingSettings
from openmm_cgflow.training.ladder import Ladder
from openmm_cgflow.training.method import Row
from openmm_cgflow.training.optimisers import GradientGuard
from openmm_cgflow.units import thermal_beta

__all__ = ["ReverseKL", "reverse_kl_gradient"]


def reverse_kl_gradient(
    flow: CGFlow, coordinates: Coordinates, base: Tensor, z: Tensor, force: MeanForce, largest: float = math.inf
) -> Tensor:
    """Puts the gradient of the reverse KL into the flow's parameters.

    With z = f(base), the gradient of KL(q || p) is E[(d(beta A)/dz - d log J/dz + d log q/dz) dz/dtheta]: log q is
    differentiated through the sample alone, for its parameter part averages to zero (Roeder et al. 2017). The bracket
    vanishes at the optimum sample by sample, so the noise left is that of the mean force.

    Arguments:
        flow: Its ``.grad`` fields are replaced.
        coordinates: For log J.
        base: Base samples, shape (B, n_features).
        z: f(base), without graph, shape (B, n_features).
        force: Mean forces at z.
        largest: Mean forces longer than this multiple of the batch's median length are shortened to it. The flow's
            own part is never shortened, so its parameter part still averages to zero.

    Returns:
        The bracket, d(beta A)/dz - d log J/dz + d log q/dz, zero for invalid replicas, shape (B, n_features).
    """
    at = z.detach().requires_grad_()
    (log_volume_gradient,) = torch.autograd.grad(coordinates.log_volume(at).sum(), at)
    (score,) = torch.autograd.grad(flow.log_prob(at).sum(), at)
    valid = force.valid[:, None]
    physical = torch.zeros_like(score)
    physical[force.valid] = shortened((force.gradient - log_volume_gradient)[force.valid], largest)
    residual = torch.where(valid, physical + score, 0.0)
    flow.zero_grad()
    mapped, _ = flow(base)
    mapped.backward(residual / force.valid.sum().clamp(min=1))
    return residual


class ReverseKL(Ladder):
    """Adam on the reverse KL at falling temperatures; its whole state can be saved and continued bit for bit.

    Use: ``step()`` while not ``stage_done``; then keep the stage's model and ``next_stage()``, until ``done``.

    Arguments:
        training: Lengths of the stages, learning rate, and which gradients are clipped or skipped.
        tempering: The ladder of temperatures.
        target: Temperature of the last stage, K.
        n_replicas: Samples of one update.
        seed: Of every random number but those of the estimator.
        coordinates: Slow coordinates.
        flow: Trained in place.
        estimator: Mean forces.
    """

    def __init__(
        self,
        training: TrainingSettings,
        tempering: TemperingSettings,
        target: float,
        n_replicas: int,
        seed: int,
        coordinates: Coordinates,
        flow: CGFlow,
        estimator: MeanForceEstimator,
    ) -> None:
        super().__init__(training, tempering, target, coordinates.n_features)
        self.n_replicas = n_replicas
        self.coordinates, self.flow, self.estimator = coordinates, flow, estimator
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(flow.parameters(), lr=training.learning_rate)
        self.guard = GradientGuard(training)

    @property
    def n_energy_evaluations(self) -> int:
        return self.estimator.n_energy_evaluations

    def density(self) -> FlowDensity:
        return FlowDensity(self.coordinates, copy.deepcopy(self.flow).double())

    def step(self) -> Row:
        """One update. Returns a row of metrics.

        ``residual`` is the root mean square of d(beta A - log J + log q)/dz per unit of z, and ``noise`` the part of it
        that the mean forces' standard error explains: training is converged where they meet.
        """
        base = self.flow.draw_base(self.n_replicas, self.generator)
        with torch.no_grad():
            z, _ = self.flow(base)
        force = self.estimator(z, self.temperature)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        largest = self.training.clip_factor
        residual = reverse_kl_gradient(self.flow, self.coordinates, base, z, force, largest)
        norm, usable = self.guard(self.flow)
        if usable:
            self.optimizer.step()
        valid = force.valid
        self.advance(force.energy[valid], force.energy_variance[valid])
        # A few clashing samples would rule a plain mean; the median over the batch shows the bulk.
        return {
            "step": self.n_steps,
            "stage": self.stage,
            "temperature": self.temperature,
            "beta": thermal_beta(self.temperature),
            "residual": _typical_rms(residual[valid].square()),
            "noise": _typical_rms(force.variance[valid]),
            "gradient_norm": norm,
            "skipped": int(not usable),
            "energy": float(force.energy[valid].median()) if valid.any() else math.nan,
            "invalid": int((~valid).sum()),
            "evaluations": self.estimator.n_energy_evaluations,
        }

    def describe(self, row: Row) -> str:
        text = f"stage {row['stage']} {row['temperature']:.0f} K"
        return text + f", residual {row['residual']:.2f} (noise {row['noise']:.2f})"

    def state_dict(self) -> dict[str, Any]:
        """The whole state: tensors, numbers and lists only, so that ``torch.load(weights_only=True)`` reads it."""
        return super().state_dict() | {
            "flow": self.flow.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "estimator": self.estimator.state_dict(),
            "norms": list(self.guard.norms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.flow.load_state_dict(state["flow"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.estimator.load_state_dict(state["estimator"])
        self.guard.norms = list(state["norms"])


def _typical_rms(squares: Tensor) -> float:
    """Root of the median over the batch of the mean square per sample."""
    return float(squares.mean(dim=-1).median().sqrt()) if len(squares) else math.nan

"""The mean force on the slow coordinates from chains of the fast atoms (paper eqs. 15-17).

The contract between OpenMM and training is here: :class:`MeanForceEstimator`, and :class:`EnergyAndForces` for a
training on all atoms. OpenMM itself is not.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from openmm_cgflow.engines.engine import Evaluator, Schedule
from openmm_cgflow.forces.fast_atoms import FastAtoms
from openmm_cgflow.forces.gradients import (
    LARGEST_SPREAD,
    cartesian_gradients,
    comoving_gradients,
    mean_and_variance,
    part_means,
)
from openmm_cgflow.forces.switching import switch
from openmm_cgflow.seeds import Stream, derive_seed
from openmm_cgflow.settings import ChainSettings
from openmm_cgflow.units import thermal_beta

__all__ = [
    "ChainParts",
    "EnergyAndForces",
    "EngineEnergies",
    "EvaluationCounter",
    "MeanForce",
    "MeanForceEstimator",
    "MolecularMeanForce",
]

_LARGEST_DRIFT = 4.0  # standard errors, of the energy within chains
_LONGEST_EQUILIBRATION, _MOST_FRAMES = 8, 4  # over the settings


class ChainParts(NamedTuple):
    """Means over successive parts of every chain; zero where the replica is invalid.

    Attributes:
        slow: d(beta U)/dz at fixed fast internal coordinates y, shape (B, n_parts, n_features).
        fast: beta dU/dy - d ln J/dy, with J the volume element of y, shape (B, n_parts, 3 n_fast). Its average over
            the fast atoms is zero, so it tells of noise and of chains that are not in equilibrium yet.
    """

    slow: Tensor
    fast: Tensor


class MeanForce(NamedTuple):
    """The mean force at a batch of z.

    Attributes:
        gradient: d(beta A)/dz, dimensionless per unit of z, shape (B, n_features).
        variance: Its squared standard error, shape (B, n_features).
        energy: Mean potential energy over the fast atoms, kJ/mol, shape (B,).
        energy_variance: Its squared standard error, shape (B,).
        valid: Whether the replica may be used, shape (B,) bool; where it is False the rest is zero.
        parts: What it is the mean of, with the forces on the fast atoms; None where these are not known.
    """

    gradient: Tensor
    variance: Tensor
    energy: Tensor
    energy_variance: Tensor
    valid: Tensor
    parts: ChainParts | None = None


class MeanForceEstimator(Protocol):
    """Anything that gives mean forces, and works of switching: a molecule in OpenMM or a closed form in a test.

    Attributes:
        n_energy_evaluations: Energy evaluations so far, those before a restart included.
    """

    @property
    def n_energy_evaluations(self) -> int: ...

    def __call__(self, z: Tensor, temperature: float) -> MeanForce:
        """The mean force at slow coordinates, shape (B, n_features), and a temperature, K.

        Raises:
            ReplicaError: If too many chains fail.
        """

    def switch(self, paths: Tensor, temperature: float, slowness: int) -> tuple[Tensor, Tensor]:
        """Works along paths, and which may be used; see :func:`openmm_cgflow.forces.switching.switch`."""

    def tune(self, noise: float) -> None:
        """Told how large the squared standard errors are over what a fit to the mean forces aims at."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class EnergyAndForces(Protocol):
    """Anything that gives energies and forces of all-atom positions: OpenMM, or a closed form in a test.

    Attributes:
        n_energy_evaluations: Energy evaluations so far, those before a restart included.
    """

    @property
    def n_energy_evaluations(self) -> int: ...

    def __call__(self, xyz: Tensor) -> tuple[Tensor, Tensor]:
        """Energies, kJ/mol, shape (n,), and forces, kJ/mol/nm, of positions, nm, shape (n, n_atoms, 3)."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class EvaluationCounter:
    """Counts energy evaluations over restarts: those of the engine and of the runs that this one continues.

    Arguments:
        engine: Counts its own since it was created.
    """

    def __init__(self, engine: Evaluator) -> None:
        self._engine, self._earlier = engine, 0

    @property
    def total(self) -> int:
        """Energy evaluations so far."""
        return self._earlier + self._engine.n_energy_evaluations

    @total.setter
    def total(self, total: int) -> None:
        self._earlier = total - self._engine.n_energy_evaluations


class MolecularMeanForce:
    """Mean forces of a molecule: frozen-slow chains in OpenMM, contracted with the coordinates.

    Arguments:
        fast_atoms: Runs the chains.
        settings: The ``chains`` section of the configuration: the schedule of the chains, and which gradients
            of their frames are the mean force.
        adaptive: Whether the length of the chains follows what they show; the schedule is then the shortest.

    Attributes:
        n_equilibration: Steps after the warm start; more of them while energies drift within chains.
        n_frames: Frames of each chain.
    """

    def __init__(self, fast_atoms: FastAtoms, settings: ChainSettings, adaptive: bool = False) -> None:
        self.fast_atoms, self.settings, self.adaptive = fast_atoms, settings, adaptive
        self.n_equilibration, self.n_frames = settings.n_equilibration, settings.n_frames
        self._evaluations = EvaluationCounter(fast_atoms.engine)

    @property
    def n_energy_evaluations(self) -> int:
        """Energy evaluations so far, those before a restart included."""
        return self._evaluations.total

    def __call__(self, z: Tensor, temperature: float) -> MeanForce:
        """The mean force at slow coordinates, shape (B, n_features), and a temperature, K.

        Raises:
            ReplicaError: If too many chains fail.
            CGFlowError: If a worker process dies.
        """
        settings, all_atom, beta = self.settings, self.fast_atoms.all_atom, thermal_beta(temperature)
        schedule = Schedule(temperature, settings.n_relax, self.n_equilibration, self.n_frames, settings.stride)
        frames = self.fast_atoms.run(z, schedule)
        if self.adaptive:
            self._lengthen_equilibration(beta * frames.energy[frames.valid])
        parts = None
        if settings.estimator == "comoving":
            gradients, balance = comoving_gradients(all_atom, z, frames, beta)
            parts = ChainParts(part_means(gradients), part_means(balance))
        else:
            gradients = cartesian_gradients(all_atom, z, frames, beta)
        gradient, variance = mean_and_variance(gradients, frames.valid)
        energies = torch.where(frames.valid[:, None], frames.energy, 0.0)
        energy, energy_variance = mean_and_variance(energies[..., None], frames.valid)
        return MeanForce(gradient, variance, energy[:, 0], energy_variance[:, 0], frames.valid, parts)

    def _lengthen_equilibration(self, energy: Tensor) -> None:
        """Equilibrates half as long again where energies, kT, (B, n_frames), drift: fast atoms arrive cold or hot."""
        quarter = max(1, energy.shape[1] // 4)
        drift = energy[:, -quarter:].mean(1) - energy[:, :quarter].mean(1)
        # A few chains that leave an overlap say nothing of the others.
        drift = drift[(drift - drift.median()).abs() < LARGEST_SPREAD * drift.std()]
        if len(drift) > 1 and abs(drift.mean()) > _LARGEST_DRIFT * drift.std() / math.sqrt(len(drift)):
            longest = _LONGEST_EQUILIBRATION * self.settings.n_equilibration
            self.n_equilibration = min(longest, math.ceil(1.5 * self.n_equilibration))

    def tune(self, noise: float) -> None:
        """Chooses the number of frames that makes most of the evaluations, by at most half of it at a time.

        A chain costs its equilibration and its frames; its variance is the inverse of their number plus what the fit
        aims at anyway. The information per evaluation is largest at the geometric mean of what both say. Never fewer
        than in the settings: on alanine dipeptide six instead of eight made each round a fifth cheaper, but 24 of them
        were needed instead of a dozen.
        """
        if not self.adaptive:
            return
        overhead = (self.n_equilibration + self.settings.n_relax) / self.settings.stride
        best = math.sqrt(overhead * noise * self.n_frames)
        best = min(max(best, self.n_frames / 1.5), 1.5 * self.n_frames)
        fewest = self.settings.n_frames
        self.n_frames = round(min(max(best, fewest), _MOST_FRAMES * fewest))

    def switch(self, paths: Tensor, temperature: float, slowness: int) -> tuple[Tensor, Tensor]:
        """Works along paths in kT, and which may be used; see :func:`openmm_cgflow.forces.switching.switch`."""
        seed = derive_seed(self.fast_atoms.seed, Stream.SWITCHING, self.fast_atoms.n_calls)
        return switch(self.fast_atoms, paths, temperature, seed, slowness)

    def state_dict(self) -> dict[str, Any]:
        """Everything a later run continues from, as tensors and numbers."""
        return {
            "fast_atoms": self.fast_atoms.state_dict(),
            "n_energy_evaluations": self.n_energy_evaluations,
            "n_equilibration": self.n_equilibration,
            "n_frames": self.n_frames,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        self.fast_atoms.load_state_dict(state["fast_atoms"])
        self.n_equilibration, self.n_frames = state["n_equilibration"], state["n_frames"]
        self._evaluations.total = state["n_energy_evaluations"]


class EngineEnergies:
    """Energies and forces of a molecule from an engine: an :class:`EnergyAndForces`.

    Arguments:
        engine: Evaluates positions.
    """

    def __init__(self, engine: Evaluator) -> None:
        self.engine = engine
        self._evaluations = EvaluationCounter(engine)

    @property
    def n_energy_evaluations(self) -> int:
        """Energy evaluations so far, those before a restart included."""
        return self._evaluations.total

    def __call__(self, xyz: Tensor) -> tuple[Tensor, Tensor]:
        """Energies, kJ/mol, shape (n,), and forces, kJ/mol/nm, of positions, nm, shape (n, n_atoms, 3).

        Raises:
            CGFlowError: If a worker process dies.
        """
        energy, forces = self.engine.evaluate(xyz.numpy())
        return torch.as_tensor(energy), torch.as_tensor(forces)

    def state_dict(self) -> dict[str, Any]:
        """Everything a later run continues from."""
        return {"n_energy_evaluations": self.n_energy_evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        self._evaluations.total = state["n_energy_evaluations"]

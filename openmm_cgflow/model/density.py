"""What a training leaves of one temperature: a density of the slow coordinates, and what else was learned with it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openmm_cgflow.coordinates.all_atom import AllAtomMap
from openmm_cgflow.coordinates.harmonic import Evaluate
from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.forces.fast_atoms import Follow
from openmm_cgflow.model.free_energy import Energy, FlowPotential, PMFPotential, TorsionPotential
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.networks.joint import JointFlow
from openmm_cgflow.networks.pmf import PMF
from openmm_cgflow.networks.response import FastResponse
from openmm_cgflow.networks.weights import weighted_samples
from openmm_cgflow.units import thermal_beta

__all__ = ["FlowDensity", "JointDensity", "PMFDensity", "Proposals", "TrainedDensity"]

Proposals = dict[str, Tensor]
"""Draws of a density: ``z`` (n, n_features), ``log_q`` (n,), ``log_weight`` (n,), and where whole structures were drawn
``xyz`` (n, n_atoms, 3) in nm, ``energy`` (n,) in kJ/mol and ``valid`` (n,)."""


class TrainedDensity(ABC):
    """What every training method leaves, in double precision; a model asks it and never looks inside.

    Attributes:
        coordinates: Of z.
        flow: q(z).
        scale: At which the flow is the model of this temperature.
        weighted: Whether draws have importance weights that lead to something better than the flow.
        can_be_switched: Whether free energies of conformations can be checked by switching between them.
    """

    scale = 1.0
    weighted = False
    can_be_switched = False

    def __init__(self, coordinates: Coordinates, flow: CGFlow) -> None:
        self.coordinates, self.flow = coordinates, flow

    @property
    @abstractmethod
    def networks(self) -> Mapping[str, nn.Module]:
        """All that was learned, by name."""

    @abstractmethod
    def propose(self, n: int, generator: torch.Generator, evaluate: Evaluate, keep_chirality: bool) -> Proposals:
        """Draws, with their weights; ``log_weight`` is zero where there are none.

        Arguments:
            n: How many.
            generator: Source of all randomness.
            evaluate: Energies and forces of structures, for densities of whole structures.
            keep_chirality: Whether such structures must have the input's handedness to be valid.
        """

    @abstractmethod
    def potential(self, energy: Energy | None) -> nn.Module:
        """beta A as a function of z, (n, n_features) -> (n,); see :mod:`openmm_cgflow.model.free_energy`.

        Raises:
            CGFlowError: If this density has no such free energy.
        """

    @property
    def follow(self) -> Follow | None:
        """How fast atoms move along with slow ones, where that was learned."""
        return None

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z), shape (n, n_features) -> (n,)."""
        return self.flow.log_prob(z, self.scale)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """z and log q(z) of draws, shapes (n, n_features) and (n,)."""
        return self.flow.sample(n, generator, self.scale)

    def free_energy(self, z: Tensor) -> Tensor:
        """beta A(z) of the slow atoms' positions up to a constant, shape (n, n_features) -> (n,)."""
        return self.coordinates.log_volume(z) - self.log_prob(z)

    def log_weights(self, z: Tensor) -> Tensor:
        """Logarithms of the importance weights of z (paper eq. 18), up to a constant, shape (n,).

        Raises:
            CGFlowError: If there is no potential of mean force to weigh with.
        """
        raise CGFlowError("this model has no potential of mean force to weigh with: it was trained by another method")

    def read(self, xyz: Tensor, all_atom: AllAtomMap) -> Tensor:
        """z of all-atom positions, nm, shape (n, n_atoms, 3) -> (n, n_features)."""
        return all_atom.read_slow(xyz)

    def describe(self, labels: list[str]) -> list[str]:
        """What each slow coordinate is made of, where that was learned; a line each.

        Arguments:
            labels: Of all atoms.
        """
        return []

    def state_dict(self) -> dict[str, Any]:
        """Tensors that :meth:`load_state_dict` reads back."""
        return {name: network.state_dict() for name, network in self.networks.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, network in self.networks.items():
            network.load_state_dict(state[name])

    def _of_flow(self, energy: Energy | None) -> nn.Module:
        """What a density without a potential of mean force has."""
        if energy == "pmf":
            raise CGFlowError("energy: this model has no potential of mean force, it was trained by another method")
        return self._of_torsions(energy, FlowPotential(self.flow, self.coordinates, self.scale))

    def _of_torsions(self, energy: Energy | None, potential: nn.Module) -> nn.Module:
        """A potential with bonds and angles integrated out, if that is wanted."""
        if energy != "torsions":
            return potential
        if not self.coordinates.n_circular:
            raise CGFlowError("energy: this model has no torsions among its slow coordinates")
        return TorsionPotential(potential, self.flow, self.coordinates)


class FlowDensity(TrainedDensity):
    """The flow alone, as the reverse KL leaves it."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"flow": self.flow}

    @torch.no_grad()
    def propose(self, n: int, generator: torch.Generator, evaluate: Evaluate, keep_chirality: bool) -> Proposals:
        z, log_q = self.sample(n, generator)
        return {"log_weight": torch.zeros_like(log_q), "z": z, "log_q": log_q}

    def potential(self, energy: Energy | None) -> nn.Module:
        return self._of_flow(energy)


class PMFDensity(TrainedDensity):
    """A fitted potential of mean force, the flow on it, and the response of the fast atoms.

    Arguments:
        coordinates: Of z.
        flow: q(z), near exp(-Phi) J.
        pmf: Phi(z) = beta A(z).
        response: How the fast atoms follow.
    """

    weighted = True

    def __init__(self, coordinates: Coordinates, flow: CGFlow, pmf: PMF, response: FastResponse) -> None:
        super().__init__(coordinates, flow)
        self.pmf, self.response = pmf, response
        self.can_be_switched = coordinates.n_circular > 0

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"flow": self.flow, "pmf": self.pmf, "response": self.response}

    @torch.no_grad()
    def propose(self, n: int, generator: torch.Generator, evaluate: Evaluate, keep_chirality: bool) -> Proposals:
        drawn = weighted_samples(self.flow, self.pmf, self.coordinates, n, generator)
        return {"log_weight": drawn.log_weights, "z": drawn.z, "log_q": drawn.log_q}

    def potential(self, energy: Energy | None) -> nn.Module:
        return self._of_flow(energy) if energy == "flow" else self._of_torsions(energy, PMFPotential(self.pmf))

    @property
    def follow(self) -> Follow:
        return self.response.follow

    def free_energy(self, z: Tensor) -> Tensor:
        return self.pmf(z)

    def log_weights(self, z: Tensor) -> Tensor:
        return self.coordinates.log_volume(z) - self.pmf(z) - self.log_prob(z)


class JointDensity(TrainedDensity):
    """The density of whole structures, whose slow part is the flow; one for all temperatures of its ladder.

    Arguments:
        coordinates: Of z.
        joint: q(z, y).
        target_temperature: At which its beta ratio is 1, K.
        temperature: Of this model, K.
    """

    weighted = True

    def __init__(
        self, coordinates: Coordinates, joint: JointFlow, target_temperature: float, temperature: float
    ) -> None:
        super().__init__(coordinates, joint.flow)
        self.joint, self.temperature = joint, temperature
        self.scale = target_temperature / temperature

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"joint": self.joint}

    @torch.no_grad()
    def propose(self, n: int, generator: torch.Generator, evaluate: Evaluate, keep_chirality: bool) -> Proposals:
        joint, ratio = self.joint, self.scale
        z, r = joint(joint.draw_base(n, generator), ratio)
        log_q = joint.log_prob(z, r, ratio) - joint.log_volume(z, r, ratio)
        xyz = joint.build(z, r, ratio)
        energy = torch.as_tensor(evaluate(xyz.numpy())[0])
        valid = torch.isfinite(energy)
        if keep_chirality:
            valid &= joint.thermal_map.same_handedness(xyz)
        log_weight = torch.where(valid, -thermal_beta(self.temperature) * energy - log_q, -math.inf)
        return {"log_weight": log_weight, "xyz": xyz, "z": z, "log_q": log_q, "energy": energy, "valid": valid}

    def potential(self, energy: Energy | None) -> nn.Module:
        if self.joint.thermal_map.mixes_all:
            raise CGFlowError(
                "this model's slow coordinates are combinations of all particles (training.method: joint on a target): "
                "there is no force on slow atoms alone"
            )
        return self._of_flow(energy)

    def read(self, xyz: Tensor, all_atom: AllAtomMap) -> Tensor:
        return self.joint.read(xyz, self.scale)[0].detach()

    def describe(self, labels: list[str]) -> list[str]:
        return self.joint.thermal_map.describe(labels)

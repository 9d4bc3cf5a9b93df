"""What all phases of the default training share: networks and their fits, mean forces, and the test of the flow."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.forces.estimator import ChainParts, MeanForceEstimator
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.networks.pmf import PMF
from openmm_cgflow.networks.response import FastResponse
from openmm_cgflow.networks.weights import WeightedSamples, weighted_samples
from openmm_cgflow.settings import PMFSettings, StoppingSettings
from openmm_cgflow.training.method import Row
from openmm_cgflow.training.pmf.fits import AnchorDifferences, MeanForceBuffer, PMFFitter, ResponseFitter
from openmm_cgflow.training.pmf.flow_fit import FlowFitter

__all__ = ["FlowTest", "PMFState", "Phase", "state_populations"]

_SMALLEST_POPULATION = 0.005  # states rarer than this do not count for convergence


class Phase(ABC):
    """One phase of the default training; the next one begins where it is done."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether it needs no more steps."""

    @property
    @abstractmethod
    def expected_steps(self) -> int:
        """All of its steps, as far as that is known by now."""

    @property
    def unmet(self) -> tuple[str, ...]:
        """What it ended without, one phrase each; empty before its end."""
        return ()

    def begin(self) -> None:
        """To be called once, when the phase before is done; most have nothing to prepare."""
        return

    @abstractmethod
    def step(self) -> Row:
        """Makes one step; returns what it tells, in any order."""

    @abstractmethod
    def describe(self, row: Row) -> str:
        """A line on one of its rows."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What the phase knows beside the shared state."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""


class FlowTest(NamedTuple):
    """A test of the flow against the potential of mean force.

    Attributes:
        samples: Drawn from the flow and weighed.
        populations: Of the states of the torsions, shape (n_states,); see :func:`state_populations`.
        counted: Which of the states count for convergence, shape (n_states,) bool.
        free_energy_error: Largest standard deviation of their free energies over the ensemble, kT.
    """

    samples: WeightedSamples
    populations: Tensor
    counted: Tensor
    free_energy_error: float


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


class PMFState:
    """Networks, what they are fitted with and to, and how far both may be trusted.

    Arguments:
        settings: Sizes of batches, numbers of updates, learning rates.
        stopping: What is to be reached.
        temperature: K.
        seed: Of every random number but those of the estimator.
        coordinates: Slow coordinates.
        flow: Trained in place, in float32.
        pmf: Fitted in place.
        response: Fitted in place, where the estimator tells of the fast atoms.
        estimator: Mean forces.

    Attributes:
        buffer: All mean forces measured so far.
        generator: Source of all randomness.
        exploring: The barrier scale at which most mean forces are measured.
    """

    def __init__(
        self,
        settings: PMFSettings,
        stopping: StoppingSettings,
        temperature: float,
        seed: int,
        coordinates: Coordinates,
        flow: CGFlow,
        pmf: PMF,
        response: FastResponse,
        estimator: MeanForceEstimator,
    ) -> None:
        self.settings, self.stopping, self.temperature, self.seed = settings, stopping, temperature, seed
        self.coordinates, self.estimator = coordinates, estimator
        self.flow, self.pmf, self.response = flow, pmf, response
        flow.float()
        self.generator = torch.Generator().manual_seed(seed)
        self.buffer = MeanForceBuffer(settings.n_members)
        self._pmf_start, self._flow_start = copy.deepcopy(pmf.state_dict()), copy.deepcopy(flow.state_dict())
        self.response_fitter = ResponseFitter(response)
        self.pmf_fitter, self.flow_fitter = self._new_pmf_fitter(), self._new_flow_fitter()
        self.exploring = 1.0

    def _new_pmf_fitter(self) -> PMFFitter:
        return PMFFitter(self.pmf, self.settings.learning_rate)

    def _new_flow_fitter(self) -> FlowFitter:
        settings = self.settings
        return FlowFitter(self.flow, self.coordinates, settings.flow_learning_rate, settings.flow_batch_size)

    def restart_pmf(self) -> None:
        """Forgets all that the potential of mean force has learned."""
        self.pmf.load_state_dict(self._pmf_start)
        self.pmf_fitter = self._new_pmf_fitter()

    def restart_flow(self) -> None:
        """Forgets all that the flow has learned."""
        self.flow.load_state_dict(self._flow_start)
        self.flow_fitter = self._new_flow_fitter()

    def data(self) -> dict[str, Tensor]:
        """All mean forces, with the noise removed that the response explains by now."""
        return self.response.corrected(self.buffer.data())

    def fit_response(self, n_updates: int, final: bool = False) -> float:
        """Continues the fit of the response; returns the share of the noise that is left, nan without fast atoms."""
        data = self.buffer.data()
        if "fast" not in data:
            return math.nan
        parts = ChainParts(data["slow"], data["fast"])
        return self.response_fitter.fit(data["z"], parts, n_updates, self.generator, final)

    def fit_pmf(self, n_updates: int, rate: float = 1.0, anchors: AnchorDifferences | None = None) -> float:
        """Continues the fit of the potential of mean force; returns its misfit, about 1 where all is noise.

        Arguments:
            n_updates: Steps of Adam.
            rate: Multiplies the learning rate.
            anchors: Free-energy differences to be met as well.

        Raises:
            CGFlowError: If the fit diverges.
        """
        misfit = self.pmf_fitter.fit(self.data(), n_updates, self.generator, rate, anchors)
        if not math.isfinite(misfit):
            raise CGFlowError(
                f"the fit of the potential of mean force diverged after round {len(self.buffer.rounds)}; the last "
                "checkpoint was written before. Try a smaller pmf.learning_rate"
            )
        return misfit

    def weigh(self, n: int, scale: float = 1.0) -> WeightedSamples:
        """Draws n samples of the flow and weighs them with the potential of mean force."""
        return weighted_samples(self.flow, self.pmf, self.coordinates, n, self.generator, scale)

    def test(self) -> FlowTest:
        """Draws from the flow: how good it is, and how well populations are known."""
        samples = self.weigh(self.settings.n_test)
        populations = state_populations(samples, self.flow.n_circular)
        mean = populations.mean(0)
        counted = mean > _SMALLEST_POPULATION
        error = float(populations[:, counted].log().std(0).max()) if counted.any() else 0.0
        return FlowTest(samples, mean, counted, error)

    def tested(self) -> Row:
        """What a test says, for a row of metrics."""
        test = self.test()
        return {"barrier_scale": self.exploring, "ess": test.samples.ess, "free_energy_error": test.free_energy_error}

    def state_dict(self) -> dict[str, Any]:
        """Everything that is shared."""
        return {
            "flow": self.flow_fitter.state_dict(),
            "pmf": self.pmf_fitter.state_dict(),
            "response": self.response_fitter.state_dict(),
            "pmf_start": self._pmf_start,
            "flow_start": self._flow_start,
            "buffer": self.buffer.state_dict(),
            "generator": self.generator.get_state(),
            "estimator": self.estimator.state_dict(),
            "exploring": self.exploring,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.flow_fitter.load_state_dict(state["flow"])
        self.pmf_fitter.load_state_dict(state["pmf"])
        self.response_fitter.load_state_dict(state["response"])
        self._pmf_start, self._flow_start = state["pmf_start"], state["flow_start"]
        self.buffer.load_state_dict(state["buffer"])
        self.generator.set_state(state["generator"])
        self.estimator.load_state_dict(state["estimator"])
        self.exploring = state["exploring"]

"""A trained coarse-grained model: density of the slow coordinates, free energies and all-atom samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import openmm
import torch
from torch import Tensor, nn

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.geometry import Geometry
from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.coordinates.thermal_map import LinearMap
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.engine import Engine
from openmm_cgflow.engines.platforms import keep_platform
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.forces.fast_atoms import FastAtoms
from openmm_cgflow.model.force import CGSystem, Mechanism, bead_system, new_force
from openmm_cgflow.model.free_energy import Energy, FlowPotential, FreeEnergy, PMFPotential, TorsionPotential
from openmm_cgflow.model.sampling import Samples, draw_samples
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.molecule.topology import topology_to_table
from openmm_cgflow.networks.flow import N_GAMMA_FEATURES, CGFlow, ConditionalFlow, one_torch_thread
from openmm_cgflow.networks.joint import JointFlow
from openmm_cgflow.networks.layers import n_slow_features
from openmm_cgflow.networks.pmf import PMF
from openmm_cgflow.networks.response import FastResponse
from openmm_cgflow.seeds import derive_seed
from openmm_cgflow.units import thermal_beta

__all__ = ["CGModel", "new_flow", "new_joint", "new_pmf", "new_response"]

logger = logging.getLogger(__name__)


def new_flow(config: Config, geometry: Geometry) -> CGFlow:
    """An untrained flow, its weights from the configuration's seed."""
    coordinates = geometry.all_atom.coordinates
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, 5))
        return CGFlow(
            coordinates.n_circular,
            coordinates.n_features - coordinates.n_circular,
            coordinates.bound,
            config.flow.n_layers,
            config.flow.n_bounded_layers,
            config.flow.n_bins,
            config.flow.hidden_features,
            geometry.bounded_covariance(),
            coordinates.periodic,
        )


def new_joint(config: Config, geometry: Geometry, flow: CGFlow) -> JointFlow:
    """An untrained joint density around a flow: y given z is as wide as the energy at the start says."""
    thermal_map = geometry.thermal_map()
    n_context = n_slow_features(flow.n_circular, flow.n_bounded, flow.periodic) + N_GAMMA_FEATURES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, 14))
        conditional = ConditionalFlow(
            thermal_map.n_fast_features,
            n_context,
            config.coordinates.bound,
            config.joint.n_layers,
            config.flow.n_bins,
            config.flow.hidden_features,
            torch.eye(thermal_map.n_fast_features, dtype=torch.float64),
        ).double()
    return JointFlow(flow, conditional, thermal_map)


def new_pmf(config: Config, geometry: Geometry) -> PMF:
    """An unfitted PMF, its networks from the configuration's seed."""
    covariance = geometry.bounded_covariance()
    if covariance is None:
        raise CGFlowError("a potential of mean force needs coordinates: internal")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, 9))
        settings, coordinates = config.pmf, geometry.all_atom.coordinates
        return PMF(
            coordinates.n_circular,
            torch.linalg.inv(covariance),
            settings.hidden_features,
            settings.n_members,
            coordinates.periodic,
        )


def new_response(config: Config, geometry: Geometry) -> FastResponse:
    """A response of the fast atoms that is zero, its networks from the configuration's seed."""
    coordinates = geometry.all_atom.coordinates
    n_circular, n_bounded = coordinates.n_circular, coordinates.n_features - coordinates.n_circular
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, 10))
        widths = geometry.fast_widths(config.temperature)
        return FastResponse(n_circular, n_bounded, widths, config.pmf.hidden_features, coordinates.periodic)


_N_LOWEST = 4096  # samples, the lowest of which a ceiling is counted from


class CGModel:
    """The flow of one temperature with what turns its samples into all-atom structures.

    Get one from :func:`openmm_cgflow.train` or :func:`openmm_cgflow.load`.

    Attributes:
        geometry: Molecule, partition, coordinates.
        flow: q(z).
        pmf: The fitted potential of mean force; None after ``training.method: reverse_kl``.
        response: How the fast atoms follow the slow ones; None without a PMF.
        joint: The density of all atoms, whose slow part is the flow, after ``training.method: joint``; otherwise None.
        temperature: K.
        stage: Number in the temperature ladder.
        temperatures: The whole ladder up to this stage, K.
        platform: Name of the OpenMM platform of the training; samples are drawn on it too where it is there.
    """

    def __init__(
        self,
        geometry: Geometry,
        flow: CGFlow,
        pmf: PMF | None,
        response: FastResponse | None,
        temperatures: list[float],
        pool: list[tuple[Tensor, Tensor]],
        platform: str,
        joint: JointFlow | None = None,
    ) -> None:
        self.geometry, self.flow, self.pmf, self.response, self.joint = geometry, flow, pmf, response, joint
        self.temperatures, self.platform, self._pool = temperatures, platform, pool

    @property
    def temperature(self) -> float:
        return self.temperatures[-1]

    @property
    def stage(self) -> int:
        return len(self.temperatures) - 1

    @property
    def gamma(self) -> float:
        """Of the flow, at this stage: joint densities have one flow for all stages, other models one for each."""
        return 1.0 if self.joint is None else self.geometry.config.temperature / self.temperature

    @property
    def coordinates(self) -> Coordinates:
        return self.geometry.all_atom.coordinates

    @property
    def molecular_system(self) -> MolecularSystem:
        return self.geometry.molecular_system

    @property
    def partition(self) -> Partition:
        return self.geometry.partition

    @torch.no_grad()
    def log_prob(self, z: np.ndarray | Tensor) -> np.ndarray:
        """log q(z), shape (n, n_features) -> (n,)."""
        return self.flow.log_prob(torch.as_tensor(z, dtype=torch.float64), self.gamma).numpy()

    @torch.no_grad()
    def free_energy(self, z: np.ndarray | Tensor) -> np.ndarray:
        """Potential of mean force A(z) of the slow atoms' positions, kJ/mol, shape (n,), up to a constant.

        The fitted one where there is one, otherwise the flow's, -kT (log q(z) - log J(z)). The free energy of the
        coordinates z themselves is A(z) - kT log J(z); J is their volume (``coordinates.log_volume``).
        """
        z = torch.as_tensor(z, dtype=torch.float64)
        phi = self.coordinates.log_volume(z) - self.flow.log_prob(z, self.gamma) if self.pmf is None else self.pmf(z)
        return (phi / thermal_beta(self.temperature)).numpy()

    @torch.no_grad()
    def log_weights(self, z: np.ndarray | Tensor) -> np.ndarray:
        """Logarithm of the importance weights exp(-beta A(z)) J(z) / q(z) (paper eq. 18), shape (n,).

        They correct the flow to the fitted potential of mean force, up to a constant factor.

        Raises:
            CGFlowError: If the model has no potential of mean force.
        """
        if self.pmf is None:
            raise CGFlowError(
                "this model has no potential of mean force to weigh with: it was trained by another method"
            )
        z = torch.as_tensor(z, dtype=torch.float64)
        return (self.coordinates.log_volume(z) - self.pmf(z) - self.flow.log_prob(z)).numpy()

    def energy_of_positions(
        self, scale: float = 1.0, energy: Energy | None = None, ceiling: float | None = None
    ) -> FreeEnergy:
        """A free energy as a torch module: positions of the slow atoms, nm, shape (..., n_slow, 3) -> (...), kJ/mol.

        The atoms are in the order of ``partition.slow``, in any frame.

        Arguments:
            scale: Factor; negative for a bias.
            energy: ``pmf``, ``flow`` or ``torsions``, see :mod:`openmm_cgflow.model.free_energy`; by default the fitted
                potential of mean force where there is one, otherwise the flow's.
            ceiling: kJ/mol above the lowest of the model's samples, before ``scale``: there the energy levels off.

        Raises:
            CGFlowError: If the model has no potential of mean force or no torsions and these are asked for, or its
                slow coordinates are combinations of all particles.
        """
        if self.joint is not None and isinstance(self.joint.thermal_map, LinearMap):
            raise CGFlowError(
                "this model's slow coordinates are combinations of all particles (training.method: joint on a target): "
                "there is no force on slow atoms alone"
            )
        coordinates = self.coordinates
        if energy not in (None, "pmf", "flow", "torsions"):
            raise CGFlowError(f"energy: got {energy!r}, expected 'pmf', 'flow' or 'torsions'")
        if energy == "pmf" and self.pmf is None:
            raise CGFlowError("energy: this model has no potential of mean force, it was trained by another method")
        if energy == "torsions" and not coordinates.n_circular:
            raise CGFlowError("energy: this model has no torsions among its slow coordinates")
        potential: nn.Module
        if energy == "flow" or self.pmf is None:
            potential = FlowPotential(self.flow, coordinates, self.gamma)
        else:
            potential = PMFPotential(self.pmf)
        if energy == "torsions":
            potential = TorsionPotential(potential, self.flow, coordinates)
        beta, top = thermal_beta(self.temperature), math.inf
        if ceiling is not None:
            if not ceiling > 0:
                raise CGFlowError(f"ceiling: got {ceiling}, expected kJ/mol above the lowest free energy, or None")
            z, _ = self.flow.sample(_N_LOWEST, torch.Generator().manual_seed(0), self.gamma)
            with torch.no_grad():
                top = float(potential(z).min()) + beta * ceiling
        return FreeEnergy(coordinates, self.partition.slow, potential, scale / beta, top)

    def create_force(
        self,
        *,
        scale: float = 1.0,
        atoms: Sequence[int] | None = None,
        energy: Energy | None = None,
        mechanism: Mechanism = "python",
        ceiling: float | None = None,
    ) -> openmm.Force:
        """The coarse-grained free energy as an OpenMM force, kJ/mol, on the slow atoms of a System.

        With a negative ``scale`` and ``energy="torsions"`` it is a bias that flattens barriers; frames then have the
        weight exp(beta V) of its energy V. A ``PythonForce`` that goes through ``XmlSerializer`` holds the model as a
        pickle: reading it runs code, and needs this package.

        Arguments:
            scale: Factor of the energy.
            atoms: Indices of the slow atoms in the System, in the order of ``partition.slow``; by default the System
                is that of the training.
            energy: See :meth:`energy_of_positions`.
            mechanism: ``python`` for ``openmm.PythonForce``, ``torchforce`` for ``openmmtorch.TorchForce``; ``table``
                for splines of up to three torsions inside OpenMM, without Python and pickles, at hardly any cost.
            ceiling: kJ/mol, see :meth:`energy_of_positions`. A bias without one also lowers the walls of contacts.

        Raises:
            CGFlowError: If the atoms are not as many, the energy is not there, or openmmtorch is not.
        """
        slow = self.partition.slow
        chosen = slow if atoms is None else [int(i) for i in atoms]
        if len(set(chosen)) != len(slow) or min(chosen) < 0 or len(chosen) != len(slow):
            names = " ".join(self.molecular_system.labels[i] for i in slow)
            raise CGFlowError(f"atoms: got {list(chosen)}, expected {len(slow)} different indices, of {names}")
        return new_force(self.energy_of_positions(scale, energy, ceiling), chosen, mechanism)

    def create_cg_system(self, *, scale: float = 1.0, energy: Energy | None = None) -> CGSystem:
        """Beads in place of the slow atoms, with masses, topology and positions, under the free energy alone.

        Arguments:
            scale: Factor of the energy.
            energy: See :meth:`energy_of_positions`.
        """
        return bead_system(self.molecular_system, self.partition, self.energy_of_positions(scale, energy))

    def read(self, xyz: np.ndarray) -> np.ndarray:
        """z of all-atom positions, nm, shape (n, n_atoms, 3) -> (n, n_features)."""
        positions = torch.as_tensor(xyz, dtype=torch.float64)
        if self.joint is not None:
            return self.joint.read(positions, self.gamma)[0].detach().numpy()
        return self.geometry.all_atom.read_slow(positions).numpy()

    def describe_map(self) -> list[str]:
        """What each slow coordinate is made of, where that was learned."""
        thermal_map = self.joint.thermal_map if self.joint is not None else None
        if not isinstance(thermal_map, LinearMap) or not thermal_map.weights.requires_grad:
            return []
        order = [*self.partition.slow, *self.partition.fast]
        labels = self.molecular_system.labels
        lines = []
        for k, row in enumerate(thermal_map.slow_directions().tolist()):
            terms = [f"{weight:+.3f} {labels[i]}" for i, weight in enumerate(row)]
            lines.append(f"slow coordinate {k + 1} (started as {labels[order[k]]}) = {' '.join(terms)}")
        return lines

    def fast_atoms(self, engine: Engine) -> FastAtoms:
        """Chains of the fast atoms on an engine, warm-started from the pool that the training left."""
        fast_atoms = self.geometry.fast_atoms(engine)
        fast_atoms.pool = list(self._pool)
        fast_atoms.follow = self.response.follow if self.response is not None else None
        return fast_atoms

    def sample(
        self,
        n: int,
        *,
        seed: int | None = None,
        n_equilibration: int | None = None,
        acceptance: float | None = None,
    ) -> Samples:
        """Independent all-atom samples: z from the flow, then a chain of the fast atoms (paper section 2.3).

        A fraction of the flow's draws becomes samples, by their importance weights: they follow the fitted potential
        of mean force, or after a joint training the energy, and not the flow.

        Arguments:
            n: Number of samples.
            seed: Same seed, same samples. By default one derived from the configuration's; that itself gives the
                frames of the run's own ``samples.dcd`` once more.
            n_equilibration: Steps of each chain; ``samples.n_equilibration`` by default. Joint densities need none.
            acceptance: That fraction, ``samples.acceptance`` by default; with 1 they are the flow's as drawn.

        Raises:
            CGFlowError: If a number is out of range.
            ReplicaError: If too many chains fail.
        """
        config = self.geometry.config
        platform = keep_platform(config.chains.platform, self.platform)
        settings = config.chains.model_copy(update={"platform": platform})
        changed = {"n_equilibration": n_equilibration, "acceptance": acceptance}
        sampling = config.samples.model_copy(update={k: v for k, v in changed.items() if v is not None})
        with one_torch_thread(), create_engine(self.molecular_system, self.partition.slow, settings) as engine:
            return draw_samples(self, engine, n, derive_seed(config.seed, 16) if seed is None else seed, sampling)

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that :meth:`from_state` reads back."""
        return {
            "geometry": self.geometry.saved_arrays(),
            "flow": self.flow.state_dict(),
            "pmf": self.pmf.state_dict() if self.pmf is not None else None,
            "response": self.response.state_dict() if self.response is not None else None,
            "joint": self.joint.state_dict() if self.joint is not None else None,
            "temperatures": list(self.temperatures),
            "platform": self.platform,
            "pool": list(self._pool),
            "topology": topology_to_table(self.molecular_system.topology),
            "positions": torch.tensor(self.molecular_system.positions),
            "fingerprint": self.molecular_system.fingerprint(),
        }

    @classmethod
    def from_state(
        cls, state: dict[str, Any], config: Config, molecular_system: MolecularSystem, partition: Partition
    ) -> CGModel:
        """A model from :meth:`state` and the run directory's system."""
        geometry = Geometry.build(config, molecular_system, partition, saved=state["geometry"])
        flow = new_flow(config, geometry)
        flow.load_state_dict(state["flow"])
        pmf = response = None
        if state["pmf"] is not None:
            pmf, response = new_pmf(config, geometry), new_response(config, geometry)
            pmf.load_state_dict(state["pmf"])
            response.load_state_dict(state["response"])
        joint = None
        if state["joint"] is not None:
            joint = new_joint(config, geometry, flow)
            joint.load_state_dict(state["joint"])
        pool = [tuple(entry) for entry in state["pool"]]
        return cls(geometry, flow, pmf, response, list(state["temperatures"]), pool, state["platform"], joint)

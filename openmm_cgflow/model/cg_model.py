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
from openmm_cgflow.networks.flow import CGFlow, new_flow
from openmm_cgflow.networks.joint import JointFlow, new_joint
from openmm_cgflow.networks.pmf import PMF, new_pmf
from openmm_cgflow.networks.response import FastResponse, new_response
from openmm_cgflow.networks.threads import one_torch_thread
from openmm_cgflow.seeds import derive_seed
from openmm_cgflow.units import thermal_beta

__all__ = ["CGModel"]

logger = logging.getLogger(__name__)


_N_LOWEST = 4096  # samples, the lowest of which a ceiling is counted from


class CGModel:
    """The flow of one temperature with what turns its samples into all-atom structures.

    Get one from :func:`openmm_cgflow.train` or :func:`openmm_cgflow.load`.

    Attributes:
        config: All settings of the training.
        molecular_system: The molecule.
        partition: Slow and fast atoms.
        geometry: Coordinates, widths, map to positions.
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
        config: Config,
        molecular_system: MolecularSystem,
        partition: Partition,
        geometry: Geometry,
        flow: CGFlow,
        pmf: PMF | None,
        response: FastResponse | None,
        temperatures: list[float],
        pool: list[tuple[Tensor, Tensor]],
        platform: str,
        joint: JointFlow | None = None,
    ) -> None:
        self.config, self.molecular_system, self.partition = config, molecular_system, partition
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
        return 1.0 if self.joint is None else self.config.temperature / self.temperature

    @property
    def coordinates(self) -> Coordinates:
        return self.geometry.all_atom.coordinates

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
        if self.joint is not None and self.joint.thermal_map.mixes_all:
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
        directions = self.joint.thermal_map.learned_directions() if self.joint is not None else None
        if directions is None:
            return []
        order = [*self.partition.slow, *self.partition.fast]
        labels = self.molecular_system.labels
        lines = []
        for k, row in enumerate(directions.tolist()):
            terms = [f"{weight:+.3f} {labels[i]}" for i, weight in enumerate(row)]
            lines.append(f"slow coordinate {k + 1} (started as {labels[order[k]]}) = {' '.join(terms)}")
        return lines

    def fast_atoms(self, engine: Engine) -> FastAtoms:
        """Chains of the fast atoms on an engine, warm-started from the pool that the training left."""
        config, geometry = self.config, self.geometry
        fast_atoms = FastAtoms(engine, geometry.all_atom, geometry.draw_fast, config.chains, config.seed)
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
        config = self.config
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
        cls,
        state: dict[str, Any],
        config: Config,
        molecular_system: MolecularSystem,
        partition: Partition,
        geometry: Geometry,
    ) -> CGModel:
        """A model from :meth:`state`, the run directory's system and a geometry of the state's own arrays."""
        flow = new_flow(config.flow, geometry, config.seed)
        flow.load_state_dict(state["flow"])
        pmf = response = None
        if state["pmf"] is not None:
            pmf = new_pmf(config.pmf, geometry, config.seed)
            response = new_response(config.pmf, geometry, config.temperature, config.seed)
            pmf.load_state_dict(state["pmf"])
            response.load_state_dict(state["response"])
        joint = None
        if state["joint"] is not None:
            joint = new_joint(flow, config.joint, config.flow, geometry, config.temperature, config.seed)
            joint.load_state_dict(state["joint"])
        pool = [tuple(entry) for entry in state["pool"]]
        temperatures, platform = list(state["temperatures"]), state["platform"]
        return cls(
            config, molecular_system, partition, geometry, flow, pmf, response, temperatures, pool, platform, joint
        )

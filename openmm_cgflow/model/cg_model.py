"""A trained coarse-grained model: density of the slow coordinates, free energies and all-atom samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import openmm
import torch
from torch import Tensor

from openmm_cgflow.coordinates.geometry import Geometry
from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.engine import Engine
from openmm_cgflow.engines.platforms import keep_platform
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.forces.fast_atoms import FastAtoms
from openmm_cgflow.model.density import TrainedDensity
from openmm_cgflow.model.force import CGSystem, Mechanism, bead_system, new_force
from openmm_cgflow.model.free_energy import Energy, FreeEnergy
from openmm_cgflow.model.sampling import Samples, draw_samples
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.networks.threads import one_torch_thread
from openmm_cgflow.seeds import Stream, derive_seed
from openmm_cgflow.settings import ChainSettings, SampleSettings
from openmm_cgflow.units import thermal_beta

__all__ = ["CGModel", "SamplingDefaults"]

_N_LOWEST = 4096  # samples, the lowest of which a ceiling is counted from


@dataclass(frozen=True)
class SamplingDefaults:
    """What :meth:`CGModel.sample` does unless it is told otherwise.

    Attributes:
        chains: How fast atoms are run, and on how many replicas at once.
        samples: Steps of their chains, and which draws become samples.
        seed: The seed of the configuration.
        platform: Name of the OpenMM platform of the training; samples are drawn on it too where it is there.
    """

    chains: ChainSettings
    samples: SampleSettings
    seed: int
    platform: str


class CGModel:
    """A trained density of the slow coordinates with what turns its draws into all-atom structures.

    Get one from :func:`openmm_cgflow.train` or :func:`openmm_cgflow.load`.

    Attributes:
        molecular_system: The molecule.
        partition: Slow and fast atoms.
        geometry: Coordinates, widths, map to positions.
        density: What was learned.
        temperatures: The whole ladder up to this stage, K.
        pool: Slow and fast coordinates where chains of the training ended, from which those of samples start.
        defaults: Of :meth:`sample`.
    """

    def __init__(
        self,
        molecular_system: MolecularSystem,
        partition: Partition,
        geometry: Geometry,
        density: TrainedDensity,
        temperatures: list[float],
        pool: list[tuple[Tensor, Tensor]],
        defaults: SamplingDefaults,
    ) -> None:
        self.molecular_system, self.partition = molecular_system, partition
        self.geometry, self.density, self.defaults = geometry, density, defaults
        self.temperatures, self.pool = temperatures, pool

    @property
    def temperature(self) -> float:
        """Of this stage, in K."""
        return self.temperatures[-1]

    @property
    def stage(self) -> int:
        """Number of the temperature in the ladder, 0 the hottest."""
        return len(self.temperatures) - 1

    @property
    def flow(self) -> CGFlow:
        """The spline flow q(z)."""
        return self.density.flow

    @property
    def coordinates(self) -> Coordinates:
        """The slow coordinates z: their names, and their volume element."""
        return self.geometry.coordinates

    @torch.no_grad()
    def log_prob(self, z: np.ndarray | Tensor) -> np.ndarray:
        """Logarithm of the flow's density q(z), shape (n, n_features) -> (n,)."""
        return self.density.log_prob(torch.as_tensor(z, dtype=torch.float64)).numpy()

    @torch.no_grad()
    def free_energy(self, z: np.ndarray | Tensor) -> np.ndarray:
        """Potential of mean force A(z) of the slow atoms' positions, kJ/mol, shape (n,), up to a constant.

        The fitted one where there is one, otherwise the flow's, -kT (log q(z) - log J(z)). The free energy of the
        coordinates z themselves is A(z) - kT log J(z); J is their volume (``coordinates.log_volume``).
        """
        phi = self.density.free_energy(torch.as_tensor(z, dtype=torch.float64))
        return (phi / thermal_beta(self.temperature)).numpy()

    @torch.no_grad()
    def log_weights(self, z: np.ndarray | Tensor) -> np.ndarray:
        """Logarithm of the importance weights exp(-beta A(z)) J(z) / q(z) (paper eq. 18), shape (n,).

        They correct the flow to the fitted potential of mean force, up to a constant factor.

        Raises:
            CGFlowError: If the model has no potential of mean force.
        """
        return self.density.log_weights(torch.as_tensor(z, dtype=torch.float64)).numpy()

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
        if energy not in (None, "pmf", "flow", "torsions"):
            raise CGFlowError(f"energy: got {energy!r}, expected 'pmf', 'flow' or 'torsions'")
        potential = self.density.potential(energy)
        beta, top = thermal_beta(self.temperature), math.inf
        if ceiling is not None:
            if not ceiling > 0:
                raise CGFlowError(f"ceiling: got {ceiling}, expected kJ/mol above the lowest free energy, or None")
            z, _ = self.density.sample(_N_LOWEST, torch.Generator().manual_seed(0))
            with torch.no_grad():
                top = float(potential(z).min()) + beta * ceiling
        return FreeEnergy(self.coordinates, self.partition.slow, potential, scale / beta, top)

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
        """Slow coordinates z of all-atom positions in nm, shape (n, n_atoms, 3) -> (n, n_features)."""
        return self.density.read(torch.as_tensor(xyz, dtype=torch.float64), self.geometry.all_atom).numpy()

    def describe_map(self) -> list[str]:
        """What each slow coordinate is made of, where that was learned; a line each."""
        return self.density.describe(self.molecular_system.labels)

    def fast_atoms(self, engine: Engine) -> FastAtoms:
        """Chains of the fast atoms on an engine, warm-started from the pool that the training left."""
        geometry, defaults = self.geometry, self.defaults
        draw, follow = geometry.draw_fast, self.density.follow
        fast_atoms = FastAtoms(engine, geometry.all_atom, draw, defaults.chains, defaults.seed, follow)
        fast_atoms.pool = list(self.pool)
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
        defaults = self.defaults
        platform = keep_platform(defaults.chains.platform, defaults.platform)
        chains = defaults.chains.model_copy(update={"platform": platform})
        changed = {"n_equilibration": n_equilibration, "acceptance": acceptance}
        samples = defaults.samples.model_copy(update={k: v for k, v in changed.items() if v is not None})
        seed = derive_seed(defaults.seed, Stream.MORE_SAMPLES) if seed is None else seed
        with one_torch_thread(), create_engine(self.molecular_system, self.partition.slow, chains) as engine:
            return draw_samples(self, engine, n, seed, samples)

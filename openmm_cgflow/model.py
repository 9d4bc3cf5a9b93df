"""A trained coarse-grained model: density of the slow coordinates, free energies and all-atom samples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mdtraj
import numpy as np
import torch
from torch import Tensor

from openmm_cgflow.assembly import Assembly
from openmm_cgflow.config import Config
from openmm_cgflow.coordinates import CartesianCoordinates, Coordinates, InternalCoordinates
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.flow import CGFlow
from openmm_cgflow.harmonic import Evaluate, HarmonicReference
from openmm_cgflow.meanforce import FastChains
from openmm_cgflow.partition import Partition
from openmm_cgflow.platforms import keep_platform
from openmm_cgflow.replicas import ReplicaEngine, create_engine
from openmm_cgflow.seeds import derive_seed
from openmm_cgflow.system import MolecularSystem
from openmm_cgflow.tempering import start_temperature
from openmm_cgflow.topology import topology_to_table
from openmm_cgflow.units import thermal_beta
from openmm_cgflow.zmatrix import ZMatrix, bond_graph, fast_zmatrix, reference_triple, slow_zmatrix, stereocentres

__all__ = ["CGModel", "Samples", "Scaffold", "new_flow", "rotamer_warning"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scaffold:
    """What a molecule and a configuration determine before any training."""

    config: Config
    molecular_system: MolecularSystem
    partition: Partition
    harmonic: HarmonicReference
    assembly: Assembly

    @classmethod
    def build(
        cls,
        config: Config,
        molecular_system: MolecularSystem,
        partition: Partition,
        evaluate: Evaluate | None = None,
        saved: dict[str, Any] | None = None,
    ) -> Scaffold:
        """Z-matrices, harmonic reference, coordinates and assembly.

        Arguments:
            config: Sections ``coordinates``, ``tempering`` and ``temperature`` are used.
            molecular_system: The molecule.
            partition: Slow and fast atoms.
            evaluate: Energies and forces, to fit the harmonic reference.
            saved: :meth:`saved_arrays` of an earlier build, instead of ``evaluate``.

        Raises:
            CGFlowError: If the slow atoms contain a ring or a straight chain, or the energy is not finite.
        """
        graph = bond_graph(molecular_system.n_atoms, molecular_system.bonds)
        slow, fast = slow_zmatrix(graph, partition.slow), fast_zmatrix(graph, partition.slow)
        if config.coordinates.kind == "cartesian":
            triple = config.coordinates.reference_atoms or reference_triple(graph, partition.slow)
            if not (set(triple) <= set(partition.slow) and graph.has_edge(*triple[:2]) and graph.has_edge(*triple[1:])):
                raise CGFlowError(
                    f"coordinates.reference_atoms: got {list(triple)}, expected three slow atoms bonded in a row"
                )
        if saved is not None:
            arrays = {name: saved[name].numpy() for name in ("centre", "hessian", "scan")}
            harmonic = HarmonicReference(slow, fast, **arrays)
        else:
            assert evaluate is not None
            harmonic = HarmonicReference.fit(evaluate, slow, fast, molecular_system.positions)
        labels = [molecular_system.atom_label(i) for i in range(molecular_system.n_atoms)]
        widths = harmonic.widths(start_temperature(config.tempering, config.temperature))
        bound = config.coordinates.bound
        coordinates: Coordinates
        if config.coordinates.kind == "internal":
            n = len(slow.atoms)
            coordinates = InternalCoordinates(slow, labels, harmonic.centre[:n], widths[:n], bound)
        else:
            coordinates = _cartesian(slow, triple, labels, molecular_system.positions, graph, bound)
        centres = stereocentres(graph, molecular_system.elements)
        assembly = Assembly(coordinates, fast, centres, molecular_system.positions)
        return cls(config, molecular_system, partition, harmonic, assembly)

    def fast_rotamers(self) -> list[str]:
        """Torsions among the fast atoms that move heavy atoms, as labels of their four atoms.

        Short chains do not cross their barriers, so their populations are not sampled.
        """
        system, fast = self.molecular_system, self.harmonic.fast
        names = []
        for parent, *rest in fast.references[fast.rotatable].tolist():
            # The torsion turns all atoms on its parent together, whichever of them carries it.
            turned = fast.atoms[fast.references[:, 0] == parent].tolist()
            heavy = [atom for atom in turned if system.elements[atom] != "H"]
            names += ["-".join(map(system.atom_label, (*rest[::-1], parent, atom))) for atom in heavy[:1]]
        return names

    def saved_arrays(self) -> dict[str, Tensor]:
        """The fitted numbers, as tensors."""
        names = ("centre", "hessian", "scan")
        return {name: torch.tensor(getattr(self.harmonic, name)) for name in names}

    def draw_fast(self, z: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """Thermal draw of the fast internal coordinates at z, shape (B, n_fast, 3)."""
        slow_xyz = self.assembly.coordinates.to_xyz(z)
        order = [self.assembly.slow.index(int(atom)) for atom in self.harmonic.slow.atoms]
        return self.harmonic.draw_fast(slow_xyz[:, order], temperature, generator)

    def chains(self, engine: ReplicaEngine) -> FastChains:
        """Chains of the fast atoms on an engine, with an empty pool."""
        return FastChains(engine, self.assembly, self.draw_fast, self.config.sampler, self.config.seed)


def _cartesian(
    slow: ZMatrix, triple: tuple[int, int, int], labels: list[str], positions: np.ndarray, graph: Any, bound: float
) -> CartesianCoordinates:
    """Boxes that hold every conformation: each atom within the contour length from its nearest reference atom."""
    atoms = [*triple, *(int(i) for i in slow.atoms if int(i) not in triple)]
    local = positions[atoms] - positions[atoms[0]]
    x = local[1] / np.linalg.norm(local[1])
    y = local[2] - (local[2] @ x) * x
    y /= np.linalg.norm(y)
    local = local @ np.stack((x, y, np.cross(x, y)), axis=1)
    reach = {atom: (0.0, k) for k, atom in enumerate(triple)}
    queue = list(triple)
    for atom in queue:
        for other in sorted(graph[atom]):
            if other in atoms and other not in reach:
                reach[other] = (
                    reach[atom][0] + float(np.linalg.norm(positions[atom] - positions[other])),
                    reach[atom][1],
                )
                queue.append(other)
    centre = [local[1, 0], local[2, 0], local[2, 1]]
    half = [0.04, 0.06, 0.06]
    for atom in atoms[3:]:
        length, anchor = reach[atom]
        centre.extend(local[anchor])
        half.extend([1.15 * length] * 3)
    return CartesianCoordinates(atoms, labels, np.array(centre), np.array(half), bound)


def rotamer_warning(rotamers: list[str]) -> str:
    """What to tell the user of :meth:`Scaffold.fast_rotamers`."""
    return (
        f"{len(rotamers)} torsion(s) of heavy atoms are fast: {', '.join(rotamers)}. Short chains do not cross their "
        "barriers, so their populations stay what the hot stages left. Make their atoms slow, for example with "
        "partition.slow: heavy"
    )


def new_flow(config: Config, coordinates: Coordinates) -> CGFlow:
    """An untrained flow, its weights from the configuration's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, 5))
        return CGFlow(
            coordinates.n_circular,
            coordinates.n_features - coordinates.n_circular,
            coordinates.bound,
            config.flow.n_layers,
            config.flow.n_bins,
            config.flow.hidden_features,
        )


@dataclass(frozen=True)
class Samples:
    """Independent all-atom samples.

    Attributes:
        trajectory: All atoms; frames are independent, their time is an index.
        z: Slow coordinates, shape (n, n_features).
        log_q: log q(z), shape (n,); the density of what was drawn, before any sample was rejected.
        energy: Potential energy, kJ/mol, shape (n,).
        n_rejected: Samples drawn again because their chain diverged or changed its handedness.
    """

    trajectory: mdtraj.Trajectory
    z: np.ndarray
    log_q: np.ndarray
    energy: np.ndarray
    n_rejected: int


class CGModel:
    """The flow of one temperature with what turns its samples into all-atom structures.

    Get one from :func:`openmm_cgflow.train` or :func:`openmm_cgflow.load`.

    Attributes:
        scaffold: Molecule, partition, coordinates.
        flow: q(z).
        temperature: K.
        stage: Number in the temperature ladder.
        temperatures: The whole ladder up to this stage, K.
        platform: Name of the OpenMM platform of the training; samples are drawn on it too where it is there.
    """

    def __init__(
        self,
        scaffold: Scaffold,
        flow: CGFlow,
        temperatures: list[float],
        pool: list[tuple[Tensor, Tensor]],
        platform: str,
    ) -> None:
        self.scaffold, self.flow, self.temperatures = scaffold, flow, temperatures
        self.platform, self._pool = platform, pool

    @property
    def temperature(self) -> float:
        return self.temperatures[-1]

    @property
    def stage(self) -> int:
        return len(self.temperatures) - 1

    @property
    def coordinates(self) -> Coordinates:
        return self.scaffold.assembly.coordinates

    @property
    def molecular_system(self) -> MolecularSystem:
        return self.scaffold.molecular_system

    @property
    def partition(self) -> Partition:
        return self.scaffold.partition

    @torch.no_grad()
    def log_prob(self, z: np.ndarray | Tensor) -> np.ndarray:
        """log q(z), shape (n, n_features) -> (n,)."""
        return self.flow.log_prob(torch.as_tensor(z, dtype=torch.float64)).numpy()

    @torch.no_grad()
    def free_energy(self, z: np.ndarray | Tensor) -> np.ndarray:
        """Potential of mean force A(z) = -kT (log q(z) - log J(z)) of the slow atoms' positions, kJ/mol, shape (n,).

        Defined up to a constant. -kT log q(z) is the free energy of the coordinates z themselves; J is their volume.
        """
        z = torch.as_tensor(z, dtype=torch.float64)
        return ((self.coordinates.log_volume(z) - self.flow.log_prob(z)) / thermal_beta(self.temperature)).numpy()

    def read(self, xyz: np.ndarray) -> np.ndarray:
        """z of all-atom positions, nm, shape (n, n_atoms, 3) -> (n, n_features)."""
        return self.scaffold.assembly.read_slow(torch.as_tensor(xyz, dtype=torch.float64)).numpy()

    def sample(self, n: int, *, seed: int | None = None, n_equilibration: int | None = None) -> Samples:
        """Independent all-atom samples: z from the flow, then a chain of the fast atoms (paper section 2.3).

        Arguments:
            n: Number of samples.
            seed: Same seed, same samples; the configuration's by default.
            n_equilibration: Steps of each chain; ``sampling.n_equilibration`` by default.

        Raises:
            ReplicaError: If too many chains fail.
        """
        config = self.scaffold.config
        platform = keep_platform(config.sampler.platform, self.platform)
        settings = config.sampler.model_copy(update={"platform": platform})
        with create_engine(self.molecular_system, self.partition.slow, settings) as engine:
            return self.sample_with(
                engine,
                n,
                config.seed if seed is None else seed,
                config.sampling.n_equilibration if n_equilibration is None else n_equilibration,
            )

    def sample_with(
        self,
        engine: ReplicaEngine,
        n: int,
        seed: int,
        n_equilibration: int,
        must_stop: Callable[[], bool] | None = None,
    ) -> Samples:
        """:meth:`sample` on an engine that is there already; ``KeyboardInterrupt`` once ``must_stop()`` is true."""
        if n < 1:
            raise CGFlowError(f"number of samples: got {n}, expected at least 1")
        chains = self.scaffold.chains(engine)
        chains.pool = list(self._pool)
        generator = torch.Generator().manual_seed(derive_seed(seed, 6))
        kept: list[tuple[Tensor, ...]] = []
        n_kept = batch = n_rejected = 0
        while n_kept < n:
            if must_stop is not None and must_stop():
                raise KeyboardInterrupt
            batch += 1
            z, log_q = self.flow.sample(self.scaffold.config.sampler.n_replicas, generator)
            frames = chains.run(z, self.temperature, n_equilibration, 1, 1, derive_seed(seed, 7, batch))
            good = frames.valid
            kept.append((frames.xyz[good, 0], z[good], log_q[good], frames.energy[good, 0]))
            n_kept += int(good.sum())
            n_rejected += int((~good).sum())
        arrays = [torch.cat(parts)[:n].numpy() for parts in zip(*kept, strict=True)]
        if n_rejected:
            logger.warning("%d samples were rejected (diverged, or changed handedness) and drawn again", n_rejected)
        trajectory = mdtraj.Trajectory(arrays[0], self.molecular_system.mdtraj_topology, time=np.arange(n))
        trajectory.center_coordinates()
        return Samples(trajectory, arrays[1], arrays[2], arrays[3], n_rejected)

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that :meth:`from_state` reads back."""
        return {
            "scaffold": self.scaffold.saved_arrays(),
            "flow": self.flow.state_dict(),
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
        scaffold = Scaffold.build(config, molecular_system, partition, saved=state["scaffold"])
        flow = new_flow(config, scaffold.assembly.coordinates)
        flow.load_state_dict(state["flow"])
        pool = [tuple(entry) for entry in state["pool"]]
        return cls(scaffold, flow, list(state["temperatures"]), pool, state["platform"])

"""What a system and a configuration determine before any training: coordinates, scales, assembly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.all_atom import AllAtomMap, BoxMap, MoleculeMap
from openmm_cgflow.coordinates.harmonic import Evaluate, HarmonicReference
from openmm_cgflow.coordinates.slow import BoxCoordinates, CartesianCoordinates, Coordinates, InternalCoordinates
from openmm_cgflow.coordinates.thermal_map import InternalThermalMap, LinearMap, ThermalMap
from openmm_cgflow.coordinates.zmatrix import ZMatrix, fast_zmatrix, reference_triple, rotamers, slow_zmatrix
from openmm_cgflow.engines.engine import Engine
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.forces.fast_atoms import FastAtoms
from openmm_cgflow.molecule.bonds import amide_bonds, bond_graph, stereocentres
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.training.tempering import start_temperature
from openmm_cgflow.units import thermal_beta

__all__ = ["BoxGeometry", "Geometry", "MoleculeGeometry", "rotamer_warning"]

Saved = dict[str, Any] | None

_WIDTH_OF_SOFT_TORSIONS = 0.3  # rad, within one of their wells
_REACHES = np.geomspace(1e-4, 1e2, 61)  # nm, of scans of single particles
_FITTED = ("centre", "hessian", "scan")  # of the harmonic reference


@dataclass(frozen=True)
class Geometry(ABC):
    """What a system and a configuration determine before any training."""

    config: Config
    molecular_system: MolecularSystem
    partition: Partition
    all_atom: AllAtomMap

    @classmethod
    def build(
        cls,
        config: Config,
        molecular_system: MolecularSystem,
        partition: Partition,
        evaluate: Evaluate | None = None,
        saved: Saved = None,
    ) -> Geometry:
        """Coordinates, assembly, and what the energy says of widths.

        Arguments:
            config: Sections ``coordinates``, ``tempering`` and ``temperature`` are used.
            molecular_system: The molecule, or the particles of a target.
            partition: Slow and fast atoms.
            evaluate: Energies and forces, to measure widths with.
            saved: :meth:`saved_arrays` of an earlier build, instead of ``evaluate``.

        Raises:
            CGFlowError: If the slow atoms contain a ring or a straight chain, or the energy is not finite.
        """
        kind = BoxGeometry if config.coordinates.kind == "box" else MoleculeGeometry
        return kind._build(config, molecular_system, partition, evaluate, saved)

    @classmethod
    @abstractmethod
    def _build(
        cls, config: Config, system: MolecularSystem, partition: Partition, evaluate: Evaluate | None, saved: Saved
    ) -> Self:
        """:meth:`build` of one kind."""

    @property
    def kinds(self) -> str:
        """What the slow coordinates are, for people."""
        coordinates = self.all_atom.coordinates
        return f"{coordinates.n_circular} of them torsions" if coordinates.periodic else "positions in a box"

    @abstractmethod
    def fast_rotamers(self) -> list[str]:
        """Torsions among the fast atoms whose states differ, as labels of their four atoms.

        Short chains do not cross their barriers, so their populations are not sampled.
        """

    @abstractmethod
    def bounded_covariance(self) -> Tensor | None:
        """Harmonic covariance of the bounded features at the hottest temperature; None for Cartesian coordinates."""

    @abstractmethod
    def fast_widths(self, temperature: float) -> Tensor:
        """Thermal widths of the coordinates y of each fast atom, shape as y."""

    @abstractmethod
    def fast_centre(self) -> Tensor:
        """Where the coordinates y of each fast atom start, shape as y."""

    def thermal_map(self) -> ThermalMap:
        """The map of a joint density, untrained."""
        temperature = self.config.temperature
        return InternalThermalMap(
            self.all_atom, self.fast_centre(), lambda gamma: self.fast_widths(temperature / gamma)
        )

    @abstractmethod
    def saved_arrays(self) -> dict[str, Tensor]:
        """The fitted numbers, as tensors."""

    @abstractmethod
    def draw_fast(self, z: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """Thermal draw of the fast coordinates at z, shape (B, n_fast, 3)."""

    def fast_atoms(self, engine: Engine) -> FastAtoms:
        """Chains of the fast atoms on an engine, with an empty pool."""
        return FastAtoms(engine, self.all_atom, self.draw_fast, self.config.chains, self.config.seed)


@dataclass(frozen=True)
class BoxGeometry(Geometry):
    """Of particles without bonds: the fast ones are drawn around their starts, as widely as the energy allows.

    Attributes:
        scan: Mean energy with each coordinate of a particle moved to either side by ``_REACHES`` over the energy at the
            start, kJ/mol, shape (n_atoms, 3, n_reaches).
    """

    scan: np.ndarray

    @classmethod
    def _build(
        cls, config: Config, system: MolecularSystem, partition: Partition, evaluate: Evaluate | None, saved: Saved
    ) -> Self:
        coordinates = BoxCoordinates(partition.slow, system.labels, config.coordinates.half_edge)
        if saved is not None:
            scan = saved["scan"].numpy()
        else:
            assert evaluate is not None
            scan = _scan(evaluate, system.positions)
        return cls(config, system, partition, BoxMap(coordinates, partition.fast), scan)

    def fast_rotamers(self) -> list[str]:
        return []

    def bounded_covariance(self) -> Tensor:
        return torch.zeros((0, 0), dtype=torch.float64)

    def _widths(self, temperature: float) -> Tensor:
        """The largest displacement that costs no more than kT/2: the standard deviation, in a harmonic well."""
        energy = thermal_beta(temperature) * self.scan
        low = energy <= 0.5
        last = np.minimum(energy.shape[-1] - 1 - low[..., ::-1].argmax(-1), energy.shape[-1] - 2)[..., None]
        below, above = (np.take_along_axis(energy, k, -1)[..., 0] for k in (last, last + 1))
        # Between two reaches it rises as a square.
        square = np.clip((0.5 - below) / (above - below), 0.0, 1.0)
        near, far = _REACHES[last[..., 0]] ** 2, _REACHES[last[..., 0] + 1] ** 2
        return torch.as_tensor(np.sqrt(near + square * (far - near)))

    def fast_widths(self, temperature: float) -> Tensor:
        return self._widths(temperature)[list(self.partition.fast)]

    def fast_centre(self) -> Tensor:
        return torch.tensor(self.molecular_system.positions[list(self.partition.fast)])

    def thermal_map(self) -> ThermalMap:
        config = self.config
        return LinearMap(
            self.all_atom.coordinates,
            self.partition.fast,
            torch.tensor(self.molecular_system.positions[:, 0]),
            lambda gamma: self._widths(config.temperature / gamma)[:, 0],
            config.coordinates.bound,
            config.joint.mixing,
            config.joint.map == "linear",
        )

    def saved_arrays(self) -> dict[str, Tensor]:
        return {"scan": torch.tensor(self.scan)}

    def draw_fast(self, z: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        start = self.fast_centre()
        normal = torch.randn((len(z), *start.shape), generator=generator, dtype=torch.float64)
        return start + self.fast_widths(temperature) * normal


def _scan(evaluate: Evaluate, positions: np.ndarray) -> np.ndarray:
    n, n_reaches = len(positions), len(_REACHES)
    moved = np.broadcast_to(positions, (n, 3, n_reaches, 2, n, 3)).copy()
    for atom in range(n):
        for axis in range(3):
            moved[atom, axis, :, 0, atom, axis] += _REACHES
            moved[atom, axis, :, 1, atom, axis] -= _REACHES
    energy = evaluate(moved.reshape(-1, n, 3))[0].reshape(n, 3, n_reaches, 2).mean(-1)
    return energy - float(evaluate(positions[None])[0][0])


@dataclass(frozen=True)
class MoleculeGeometry(Geometry):
    """Of a molecule: Z-matrices, and the harmonic reference around the input structure.

    Attributes:
        harmonic: Minimum, Hessian and torsion scans.
    """

    harmonic: HarmonicReference

    @classmethod
    def _build(
        cls, config: Config, system: MolecularSystem, partition: Partition, evaluate: Evaluate | None, saved: Saved
    ) -> Self:
        graph = bond_graph(system.n_atoms, system.bonds)
        stiff = amide_bonds(graph, system.elements) if config.coordinates.peptide_bonds == "keep" else ()
        slow = slow_zmatrix(graph, partition.slow, stiff, system.elements)
        fast = fast_zmatrix(graph, partition.slow)
        if config.coordinates.kind == "cartesian":
            triple = config.coordinates.reference_atoms or reference_triple(graph, partition.slow)
            if not (set(triple) <= set(partition.slow) and graph.has_edge(*triple[:2]) and graph.has_edge(*triple[1:])):
                raise CGFlowError(
                    f"coordinates.reference_atoms: got {list(triple)}, expected three slow atoms bonded in a row"
                )
        if saved is not None:
            arrays = {name: saved[name].numpy() for name in _FITTED}
            harmonic = HarmonicReference(slow, fast, **arrays)
        else:
            assert evaluate is not None
            harmonic = HarmonicReference.fit(evaluate, slow, fast, system.positions)
        widths = harmonic.widths(_hottest(config))
        bound = config.coordinates.bound
        coordinates: Coordinates
        if config.coordinates.kind == "internal":
            n = len(slow.atoms)
            coordinates = InternalCoordinates(slow, system.labels, harmonic.centre[:n], widths[:n], bound)
        else:
            coordinates = _cartesian(slow, triple, system.labels, system.positions, graph, bound)
        centres = stereocentres(graph, system.elements)
        all_atom = MoleculeMap(coordinates, fast, centres, system.positions)
        return cls(config, system, partition, all_atom, harmonic)

    def fast_rotamers(self) -> list[str]:
        label = self.molecular_system.atom_label
        torsions = rotamers(self.harmonic.fast, self.molecular_system.elements)
        return ["-".join(map(label, torsion)) for torsion in torsions]

    def bounded_covariance(self) -> Tensor | None:
        coordinates = self.all_atom.coordinates
        if not isinstance(coordinates, InternalCoordinates):
            return None
        n = coordinates.n_circular
        slots = torch.stack((coordinates.slot_atom[n:], coordinates.slot_kind[n:]), dim=1).numpy()
        covariance = self.harmonic.covariance_of(slots, _hottest(self.config))
        scale = coordinates.scale.numpy()[n:]
        return torch.as_tensor(covariance / scale[:, None] / scale)

    def fast_widths(self, temperature: float) -> Tensor:
        widths = torch.as_tensor(self.harmonic.widths(temperature)[self.harmonic.n_slow :])
        return torch.where(widths > 0, widths, _WIDTH_OF_SOFT_TORSIONS)

    def fast_centre(self) -> Tensor:
        return torch.tensor(self.harmonic.centre[self.harmonic.n_slow :])

    def saved_arrays(self) -> dict[str, Tensor]:
        return {name: torch.tensor(getattr(self.harmonic, name)) for name in _FITTED}

    def draw_fast(self, z: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        slow_xyz = self.all_atom.coordinates.to_xyz(z)
        order = [self.all_atom.slow.index(int(atom)) for atom in self.harmonic.slow.atoms]
        return self.harmonic.draw_fast(slow_xyz[:, order], temperature, generator)


def _hottest(config: Config) -> float:
    """Highest temperature of the training, K: coordinates have its widths."""
    if config.training.method == "pmf":
        return config.temperature
    return start_temperature(config.tempering, config.temperature)


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
    """What to tell the user of :meth:`Geometry.fast_rotamers`."""
    return (
        f"{len(rotamers)} torsion(s) of fast atoms have barriers: {', '.join(rotamers)}. Short chains do not cross "
        "them, so their populations are not sampled. Make their atoms slow, for example with partition.slow: heavy"
    )

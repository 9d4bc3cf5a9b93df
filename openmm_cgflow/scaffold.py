"""What a system and a configuration determine before any training: coordinates, scales, assembly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from openmm_cgflow.assembly import Assembly, MoleculeAssembly, ParticleAssembly
from openmm_cgflow.config import Config
from openmm_cgflow.coordinates import BoxCoordinates, CartesianCoordinates, Coordinates, InternalCoordinates
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.fastchains import FastChains
from openmm_cgflow.harmonic import Evaluate, HarmonicReference
from openmm_cgflow.partition import Partition
from openmm_cgflow.replicas import ReplicaEngine
from openmm_cgflow.system import MolecularSystem
from openmm_cgflow.tempering import start_temperature
from openmm_cgflow.units import thermal_beta
from openmm_cgflow.zmatrix import (
    ZMatrix,
    amide_bonds,
    bond_graph,
    fast_zmatrix,
    reference_triple,
    slow_zmatrix,
    stereocentres,
)

__all__ = ["MoleculeScaffold", "ParticleScaffold", "Scaffold", "rotamer_warning"]

Saved = dict[str, Any] | None

_WIDTH_OF_SOFT_TORSIONS = 0.3  # rad, within one of their wells
_STEP = 1e-3  # nm, of finite differences between particles
_SOFTEST = 1e-3  # kJ/mol/nm^2
_FITTED = ("centre", "hessian", "scan")  # of the harmonic reference


@dataclass(frozen=True)
class Scaffold(ABC):
    """What a system and a configuration determine before any training."""

    config: Config
    molecular_system: MolecularSystem
    partition: Partition
    assembly: Assembly

    @classmethod
    def build(
        cls,
        config: Config,
        molecular_system: MolecularSystem,
        partition: Partition,
        evaluate: Evaluate | None = None,
        saved: Saved = None,
    ) -> Scaffold:
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
        kind = ParticleScaffold if config.coordinates.kind == "box" else MoleculeScaffold
        return kind._build(config, molecular_system, partition, evaluate, saved)

    @classmethod
    @abstractmethod
    def _build(
        cls, config: Config, system: MolecularSystem, partition: Partition, evaluate: Evaluate | None, saved: Saved
    ) -> Self:
        """:meth:`build` of one kind."""

    @abstractmethod
    def fast_rotamers(self) -> list[str]:
        """Torsions among the fast atoms that move heavy atoms, as labels of their four atoms.

        Short chains do not cross their barriers, so their populations are not sampled.
        """

    @abstractmethod
    def bounded_covariance(self) -> Tensor | None:
        """Harmonic covariance of the bounded features at the hottest temperature; None for Cartesian coordinates."""

    @abstractmethod
    def fast_widths(self) -> Tensor:
        """Thermal widths of the three coordinates of each fast atom at the target, shape (n_fast, 3)."""

    @abstractmethod
    def saved_arrays(self) -> dict[str, Tensor]:
        """The fitted numbers, as tensors."""

    @abstractmethod
    def draw_fast(self, z: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """Thermal draw of the fast coordinates at z, shape (B, n_fast, 3)."""

    def chains(self, engine: ReplicaEngine) -> FastChains:
        """Chains of the fast atoms on an engine, with an empty pool."""
        return FastChains(engine, self.assembly, self.draw_fast, self.config.sampler, self.config.seed)


@dataclass(frozen=True)
class ParticleScaffold(Scaffold):
    """Of particles without bonds: the fast ones are drawn around their starts with the widths of the energy there.

    Attributes:
        curvature: Second derivatives of the energy in the fast positions, kJ/mol/nm^2, shape (n_fast, 3).
    """

    curvature: np.ndarray

    @classmethod
    def _build(
        cls, config: Config, system: MolecularSystem, partition: Partition, evaluate: Evaluate | None, saved: Saved
    ) -> Self:
        coordinates = BoxCoordinates(partition.slow, system.labels, config.coordinates.box)
        if saved is not None:
            curvature = saved["curvature"].numpy()
        else:
            assert evaluate is not None
            curvature = _curvature(evaluate, system.positions, partition.fast)
        return cls(config, system, partition, ParticleAssembly(coordinates, partition.fast), curvature)

    def fast_rotamers(self) -> list[str]:
        return []

    def bounded_covariance(self) -> Tensor:
        return torch.zeros((0, 0), dtype=torch.float64)

    def _widths(self, temperature: float) -> Tensor:
        return torch.as_tensor((thermal_beta(temperature) * self.curvature) ** -0.5)

    def fast_widths(self) -> Tensor:
        return self._widths(self.config.temperature)

    def saved_arrays(self) -> dict[str, Tensor]:
        return {"curvature": torch.tensor(self.curvature)}

    def draw_fast(self, z: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        start = torch.tensor(self.molecular_system.positions[list(self.partition.fast)])
        normal = torch.randn((len(z), *start.shape), generator=generator, dtype=torch.float64)
        return start + self._widths(temperature) * normal


def _curvature(evaluate: Evaluate, positions: np.ndarray, atoms: Sequence[int]) -> np.ndarray:
    """Diagonal of the Hessian by central differences of forces, no softer than ``_SOFTEST``, shape (n, 3)."""
    moved = np.repeat(positions[None], 6 * len(atoms), axis=0)
    rows = [(atom, axis, sign) for atom in atoms for axis in range(3) for sign in (1, -1)]
    for k, (atom, axis, sign) in enumerate(rows):
        moved[k, atom, axis] += sign * _STEP
    forces = evaluate(moved)[1]
    along = np.array([forces[k, atom, axis] for k, (atom, axis, _) in enumerate(rows)])
    found = (along[1::2] - along[::2]) / (2 * _STEP)
    return np.maximum(found, _SOFTEST).reshape(len(atoms), 3)


@dataclass(frozen=True)
class MoleculeScaffold(Scaffold):
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
        slow, fast = slow_zmatrix(graph, partition.slow, stiff), fast_zmatrix(graph, partition.slow)
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
        assembly = MoleculeAssembly(coordinates, fast, centres, system.positions)
        return cls(config, system, partition, assembly, harmonic)

    def fast_rotamers(self) -> list[str]:
        system, fast = self.molecular_system, self.harmonic.fast
        names = []
        for parent, *rest in fast.references[fast.rotatable].tolist():
            # The torsion turns all atoms on its parent together, whichever of them carries it.
            turned = fast.atoms[fast.references[:, 0] == parent].tolist()
            heavy = [atom for atom in turned if system.elements[atom] != "H"]
            names += ["-".join(map(system.atom_label, (*rest[::-1], parent, atom))) for atom in heavy[:1]]
        return names

    def bounded_covariance(self) -> Tensor | None:
        coordinates = self.assembly.coordinates
        if not isinstance(coordinates, InternalCoordinates):
            return None
        n = coordinates.n_circular
        slots = torch.stack((coordinates.slot_atom[n:], coordinates.slot_kind[n:]), dim=1).numpy()
        covariance = self.harmonic.covariance_of(slots, _hottest(self.config))
        scale = coordinates.scale.numpy()[n:]
        return torch.as_tensor(covariance / scale[:, None] / scale)

    def fast_widths(self) -> Tensor:
        widths = torch.as_tensor(self.harmonic.widths(self.config.temperature)[self.harmonic.n_slow :])
        return torch.where(widths > 0, widths, _WIDTH_OF_SOFT_TORSIONS)

    def saved_arrays(self) -> dict[str, Tensor]:
        return {name: torch.tensor(getattr(self.harmonic, name)) for name in _FITTED}

    def draw_fast(self, z: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        slow_xyz = self.assembly.coordinates.to_xyz(z)
        order = [self.assembly.slow.index(int(atom)) for atom in self.harmonic.slow.atoms]
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
    """What to tell the user of :meth:`Scaffold.fast_rotamers`."""
    return (
        f"{len(rotamers)} torsion(s) of heavy atoms are fast: {', '.join(rotamers)}. Short chains do not cross their "
        "barriers, so their populations are not sampled. Make their atoms slow, for example with partition.slow: heavy"
    )

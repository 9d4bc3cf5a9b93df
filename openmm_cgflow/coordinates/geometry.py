"""What a molecule and its partition determine before any training: coordinates, scales, maps to positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from openmm_cgflow.coordinates.all_atom import AllAtomMap, InternalThermalMap, MoleculeMap, ThermalMap
from openmm_cgflow.coordinates.harmonic import Evaluate, HarmonicReference
from openmm_cgflow.coordinates.slow import CartesianCoordinates, Coordinates, InternalCoordinates
from openmm_cgflow.coordinates.zmatrix import ZMatrix, fast_zmatrix, reference_triple, rotamers, slow_zmatrix
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.bonds import amide_bonds, bond_graph, stereocentres
from openmm_cgflow.settings import CoordinatesSettings, JointSettings

__all__ = ["Geometry", "Molecule", "MoleculeGeometry", "Saved", "rotamer_warning"]

Saved = dict[str, Tensor] | None
"""The fitted numbers of an earlier geometry, if there are any."""

_WIDTH_OF_SOFT_TORSIONS = 0.3  # rad, within one of their wells
_FITTED = ("centre", "hessian", "scan")  # of the harmonic reference


class Molecule(Protocol):
    """What a geometry needs of a molecule.

    Attributes:
        n_atoms: Number of atoms.
        bonds: Pairs of atom indices, shape (n_bonds, 2).
        elements: Symbol of each atom.
        labels: A readable name of each atom.
        positions: Input structure, nm, shape (n_atoms, 3).
    """

    @property
    def n_atoms(self) -> int: ...

    @property
    def bonds(self) -> Iterable[Sequence[int]]: ...

    @property
    def elements(self) -> list[str]: ...

    @property
    def labels(self) -> list[str]: ...

    @property
    def positions(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Geometry(ABC):
    """What a molecule and its partition determine before any training.

    Attributes:
        settings: The ``coordinates`` section of the configuration.
        molecule: Bonds, elements, input structure.
        slow: Slow atoms, in the order of the partition.
        fast: The others, in rising order.
        all_atom: Positions from slow and fast coordinates.
    """

    settings: CoordinatesSettings
    molecule: Molecule
    slow: tuple[int, ...]
    fast: tuple[int, ...]
    all_atom: AllAtomMap

    @property
    def coordinates(self) -> Coordinates:
        """The coordinates of the slow atoms."""
        return self.all_atom.coordinates

    @property
    def kinds(self) -> str:
        """What the slow coordinates are, for people."""
        return self.coordinates.features.describe()

    @abstractmethod
    def fast_rotamers(self) -> list[str]:
        """Torsions among the fast atoms whose states differ, as labels of their four atoms.

        Short chains do not cross their barriers, so their populations are not sampled.
        """

    @abstractmethod
    def bounded_covariance(self) -> Tensor | None:
        """Harmonic covariance of the bounded features at the hottest temperature; None where it is not known.

        In units of z, shape (n_bounded, n_bounded).
        """

    @abstractmethod
    def fast_widths(self, temperature: float) -> Tensor:
        """Thermal widths of the coordinates y of each fast atom, shape as y."""

    @abstractmethod
    def fast_centre(self) -> Tensor:
        """Where the coordinates y of each fast atom start, shape as y."""

    def thermal_map(self, temperature: float, settings: JointSettings) -> ThermalMap:
        """The map of a joint density, untrained.

        Arguments:
            temperature: Of the target, K.
            settings: The ``joint`` section of the configuration.
        """
        return InternalThermalMap(
            self.all_atom, self.fast_centre(), lambda beta_ratio: self.fast_widths(temperature / beta_ratio)
        )

    @abstractmethod
    def saved_arrays(self) -> dict[str, Tensor]:
        """The fitted numbers, as tensors."""

    @abstractmethod
    def draw_fast(self, z: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """Thermal draw of the fast coordinates at z, shape (B, n_features) -> (B, n_fast, 3)."""


@dataclass(frozen=True)
class MoleculeGeometry(Geometry):
    """The geometry of a molecule: Z-matrices, and the harmonic reference around the input structure.

    Attributes:
        harmonic: Minimum, Hessian and torsion scans.
        hottest: Highest temperature of the training, K.
    """

    harmonic: HarmonicReference
    hottest: float

    @classmethod
    def build(
        cls,
        settings: CoordinatesSettings,
        molecule: Molecule,
        slow: Sequence[int],
        fast: Sequence[int],
        hottest: float,
        evaluate: Evaluate | None = None,
        saved: Saved = None,
        cartesian: bool = False,
    ) -> Self:
        """Coordinates, map to positions, and what the energy says of widths.

        Arguments:
            settings: The ``coordinates`` section of the configuration.
            molecule: Bonds, elements, input structure.
            slow: Slow atoms.
            fast: The others, in rising order.
            hottest: Highest temperature of the training, K: coordinates have its widths.
            evaluate: Energies and forces, to measure widths with.
            saved: :meth:`saved_arrays` of an earlier build, instead of ``evaluate``.
            cartesian: Whether slow coordinates are positions (the paper's choice) and not torsions, bonds and angles.

        Raises:
            CGFlowError: If the slow atoms contain a ring or a straight chain, or the energy is not finite.
        """
        graph = bond_graph(molecule.n_atoms, molecule.bonds)
        stiff = amide_bonds(graph, molecule.elements) if settings.peptide_bonds == "keep" else ()
        slow_rows, fast_rows = slow_zmatrix(graph, slow, stiff, molecule.elements), fast_zmatrix(graph, slow)
        if cartesian:
            triple = settings.reference_atoms or reference_triple(graph, slow)
            if not (set(triple) <= set(slow) and graph.has_edge(*triple[:2]) and graph.has_edge(*triple[1:])):
                raise CGFlowError(
                    f"coordinates.reference_atoms: got {list(triple)}, expected three slow atoms bonded in a row"
                )
        if saved is not None:
            arrays = {name: saved[name].numpy() for name in _FITTED}
            harmonic = HarmonicReference(slow_rows, fast_rows, **arrays)
        else:
            assert evaluate is not None
            harmonic = HarmonicReference.fit(evaluate, slow_rows, fast_rows, molecule.positions)
        coordinates: Coordinates
        if cartesian:
            coordinates = _cartesian(slow_rows, triple, molecule, graph, settings.bound)
        else:
            n, widths = harmonic.n_slow, harmonic.widths(hottest)
            centre = harmonic.centre[:n]
            coordinates = InternalCoordinates(slow_rows, molecule.labels, centre, widths[:n], settings.bound)
        centres = stereocentres(graph, molecule.elements)
        all_atom = MoleculeMap(coordinates, fast_rows, centres, molecule.positions)
        return cls(settings, molecule, tuple(slow), tuple(fast), all_atom, harmonic, hottest)

    def fast_rotamers(self) -> list[str]:
        labels = self.molecule.labels
        torsions = rotamers(self.harmonic.fast, self.molecule.elements)
        return ["-".join(labels[atom] for atom in torsion) for torsion in torsions]

    def bounded_covariance(self) -> Tensor | None:
        coordinates = self.all_atom.coordinates
        if not isinstance(coordinates, InternalCoordinates):
            return None
        n = coordinates.n_circular
        slots = torch.stack((coordinates.slot_atom[n:], coordinates.slot_kind[n:]), dim=1).numpy()
        covariance = self.harmonic.covariance_of(slots, self.hottest)
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


def _cartesian(
    slow: ZMatrix, triple: tuple[int, int, int], molecule: Molecule, graph: nx.Graph, bound: float
) -> CartesianCoordinates:
    """Boxes that hold every conformation: each atom within the contour length from its nearest reference atom."""
    positions = molecule.positions
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
    return CartesianCoordinates(atoms, molecule.labels, np.array(centre), np.array(half), bound)


def rotamer_warning(rotamers: list[str]) -> str:
    """What to tell the user of :meth:`Geometry.fast_rotamers`."""
    return (
        f"{len(rotamers)} torsion(s) of fast atoms have barriers: {', '.join(rotamers)}. Short chains do not cross "
        "them, so their populations are not sampled. Make their atoms slow, for example with partition.slow: heavy"
    )

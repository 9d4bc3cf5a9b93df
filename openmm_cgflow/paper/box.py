"""Particles in a box, without bonds: the slow coordinates, maps and features of the paper's synthetic systems.

z are positions, scaled to [-pi, pi], in the place that torsions have in a molecule: what explores and weighs the modes
of torsions then does the same for a target of several modes. But nothing passes through the walls of a box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from openmm_cgflow.coordinates.all_atom import AllAtomMap, ThermalMap
from openmm_cgflow.coordinates.features import N_HARMONICS, SlowFeatures, Support, harmonics
from openmm_cgflow.coordinates.geometry import Geometry, Molecule, Saved
from openmm_cgflow.coordinates.harmonic import Evaluate
from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.paper.linear_map import LinearMap, along_x
from openmm_cgflow.settings import CoordinatesSettings, JointSettings
from openmm_cgflow.units import thermal_beta

__all__ = ["BoxCoordinates", "BoxFeatures", "BoxGeometry", "BoxMap"]

_WALL = math.pi * (1 + 1e-6)  # single precision goes a little beyond pi
_SMALLEST_SCALE = 1e-3  # that densities in a box tell from zero
_REACHES = np.geomspace(1e-4, 1e2, 61)  # nm, of scans of single particles


class BoxFeatures(SlowFeatures):
    """Positions on [-pi, pi], whose energy is not the same at both walls: networks see half a circle, with two ends."""

    support: ClassVar[Support] = "interval"
    n_each: ClassVar[int] = 2 * N_HARMONICS + 1
    steep: ClassVar[bool] = True

    def see_first(self, first: Tensor) -> Tensor:
        return torch.cat((first, harmonics(first / 2)), dim=-1)

    def scale_features(self, scale: Tensor) -> Tensor:
        # Free energies of torsions are a few kT, in a box they may be thousands: widths follow the scale's logarithm.
        logarithm = (scale + _SMALLEST_SCALE).log() / math.log(_SMALLEST_SCALE)
        return torch.stack((scale, scale.sqrt(), logarithm, logarithm.square()), dim=-1)

    def describe(self) -> str:
        return "positions in a box"

    def embed_first(self, first: Tensor) -> Tensor:
        return first

    def wrap(self, first: Tensor) -> Tensor:
        return first  # they may lie beyond the walls

    def unwrap(self, curve: np.ndarray) -> np.ndarray:
        return curve

    def outside(self, first: Tensor) -> Tensor:
        return (first.abs() > _WALL).any(-1)


class BoxCoordinates(Coordinates):
    """The x of particles in a box; z is in [-pi, pi].

    What explores and weighs the torsions of molecules then does the same for a target of several modes. The density
    must have vanished before the walls at the target temperature. y and z of the particles are zero.

    Arguments:
        atoms: Slow particles.
        labels: A label per particle of the topology.
        half_edge: The box is [-half_edge, half_edge], nm.
    """

    def __init__(self, atoms: Sequence[int], labels: Sequence[str], half_edge: float) -> None:
        n = len(atoms)
        names = [f"x {labels[i]}" for i in atoms]
        super().__init__(
            atoms, names, np.ones(n, dtype=bool), np.full(n, -math.pi), np.full(n, math.pi), math.pi, BoxFeatures
        )
        self.half_edge = half_edge

    def to_xyz(self, z: Tensor) -> Tensor:
        return along_x(z * (self.half_edge / math.pi))

    def from_xyz(self, xyz: Tensor) -> Tensor:
        return self.from_physical(xyz[..., 0] * (math.pi / self.half_edge))

    def log_volume(self, z: Tensor) -> Tensor:
        return len(self.atoms) * math.log(self.half_edge / math.pi) + 0.0 * z.sum(-1)  # its gradient is asked for


class BoxMap(AllAtomMap):
    """Particles without bonds: y are the positions of the fast ones, nm.

    Arguments:
        coordinates: Description of the slow particles.
        fast: Indices of the others, in rising order.
    """

    to_topology: Tensor

    def __init__(self, coordinates: Coordinates, fast: Sequence[int]) -> None:
        super().__init__(coordinates)
        self.fast = list(fast)
        self.register_buffer("to_topology", torch.as_tensor(np.argsort([*coordinates.atoms, *fast])))

    def build(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.cat((self.coordinates.to_xyz(z), y), dim=-2)[..., self.to_topology, :]

    def read_fast(self, xyz: Tensor) -> Tensor:
        return xyz[..., self.fast, :]

    def log_volume_fast(self, y: Tensor) -> Tensor:
        return 0.0 * y.sum((-1, -2))  # its gradient is asked for


@dataclass(frozen=True)
class BoxGeometry(Geometry):
    """The geometry of particles without bonds: fast ones start in a cloud as wide as the energy allows.

    Attributes:
        scan: Mean energy with each coordinate of a particle moved to either side by ``_REACHES`` over the energy at the
            start, kJ/mol, shape (n_atoms, 3, n_reaches).
    """

    scan: np.ndarray

    @classmethod
    def build(
        cls,
        settings: CoordinatesSettings,
        molecule: Molecule,
        slow: Sequence[int],
        fast: Sequence[int],
        evaluate: Evaluate | None = None,
        saved: Saved = None,
    ) -> Self:
        """Coordinates, map to positions, and how far the energy lets each particle go.

        Arguments:
            settings: The ``coordinates`` section of the configuration.
            molecule: The particles.
            slow: Slow ones.
            fast: The others, in rising order.
            evaluate: Energies and forces, to measure widths with.
            saved: :meth:`saved_arrays` of an earlier build, instead of ``evaluate``.
        """
        coordinates = BoxCoordinates(slow, molecule.labels, settings.half_edge)
        if saved is not None:
            scan = saved["scan"].numpy()
        else:
            assert evaluate is not None
            scan = _scan(evaluate, molecule.positions)
        return cls(settings, molecule, tuple(slow), tuple(fast), BoxMap(coordinates, fast), scan)

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
        return self._widths(temperature)[list(self.fast)]

    def fast_centre(self) -> Tensor:
        return torch.tensor(self.molecule.positions[list(self.fast)])

    def thermal_map(self, temperature: float, settings: JointSettings) -> ThermalMap:
        return LinearMap(
            self.coordinates,
            self.fast,
            torch.tensor(self.molecule.positions[:, 0]),
            lambda beta_ratio: self._widths(temperature / beta_ratio)[:, 0],
            self.settings.bound,
            settings.mixing,
            settings.map == "linear",
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

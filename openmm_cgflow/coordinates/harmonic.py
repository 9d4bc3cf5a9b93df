"""What the force field itself says about widths: a harmonic reference around the input structure, without data.

The energy is minimised near the input structure and its Hessian taken in internal coordinates by finite differences of
forces. The stiff coordinates (bonds, angles, impropers) get their thermal widths and couplings from it; the soft fast
torsions (methyl rotors, hydroxyls) a one-dimensional energy scan each. This needs a few hundred evaluations, works for
any force field, and gives the scales of the flow's coordinates and a thermal draw of the fast atoms.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from openmm_cgflow.coordinates.placement import Placement, bond_angle_dihedral, place_first_three
from openmm_cgflow.coordinates.zmatrix import ZMatrix
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.units import thermal_beta

__all__ = ["Evaluate", "HarmonicReference"]

logger = logging.getLogger(__name__)

Evaluate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Positions (n, n_atoms, 3), nm -> energies (n,), kJ/mol, and forces (n, n_atoms, 3), kJ/mol/nm."""

_STEP = (2e-4, 2e-3, 2e-3)  # finite differences: nm, rad, rad
_WIDEST = (0.05, 0.5, 0.5)  # no stiff coordinate is taken to be wider than this at 300 K: nm, rad, rad
_SEARCH = (0.03, 0.4, 0.5)  # how far the minimisation may move bonds, angles, dihedrals: nm, rad, rad
_N_SCAN = 36


@dataclass(frozen=True)
class HarmonicReference:
    """Minimum, Hessian and torsion scans of the all-atom energy in internal coordinates.

    Attributes:
        slow: Z-matrix of the slow atoms.
        fast: Z-matrix of the fast atoms.
        centre: Bond, angle, dihedral at the minimum, slow atoms first, nm and radians, shape (n_atoms, 3).
        hessian: Second derivatives in the stiff coordinates, kJ/mol/(nm or rad)^2, shape (n_stiff, n_stiff).
        scan: Energy along each soft fast torsion, kJ/mol, shape (n_soft, 36).
    """

    slow: ZMatrix
    fast: ZMatrix
    centre: np.ndarray
    hessian: np.ndarray
    scan: np.ndarray

    @classmethod
    def fit(cls, evaluate: Evaluate, slow: ZMatrix, fast: ZMatrix, positions: np.ndarray) -> HarmonicReference:
        """Minimises near the input structure and measures curvatures there.

        Arguments:
            evaluate: The energy and its forces.
            slow: Z-matrix of the slow atoms.
            fast: Z-matrix of the fast atoms.
            positions: Input structure, nm, shape (n_atoms, 3).

        Raises:
            CGFlowError: If the energy at the input structure is not finite.
        """
        surface = _InternalSurface(evaluate, slow, fast)
        start = surface.read(positions)
        centre = _minimise(surface, start)
        hessian = _hessian(surface, centre, _stiff_slots(slow, fast))
        scan = [_torsion_scan(surface, centre, k) for k in _soft_fast_torsions(slow, fast)]
        return cls(slow, fast, centre, hessian, np.array(scan).reshape(-1, _N_SCAN))

    @property
    def n_slow(self) -> int:
        return len(self.slow.atoms)

    def widths(self, temperature: float) -> np.ndarray:
        """Thermal standard deviations of all stiff coordinates, zero elsewhere, nm and radians, (n_atoms, 3)."""
        covariance = np.linalg.inv(self.hessian) / thermal_beta(temperature)
        widths = np.zeros_like(self.centre)
        widths[tuple(_stiff_slots(self.slow, self.fast).T)] = np.sqrt(np.diag(covariance))
        return widths

    def covariance_of(self, slots: np.ndarray, temperature: float) -> np.ndarray:
        """Thermal covariance of stiff coordinates, all others integrated out, nm and radians, shape (n, n).

        Arguments:
            slots: Rows (atom in the order of ``centre``, 0 bond, 1 angle or 2 dihedral), shape (n, 2).
            temperature: K.
        """
        rows = {tuple(slot): row for row, slot in enumerate(_stiff_slots(self.slow, self.fast).tolist())}
        chosen = [rows[tuple(slot)] for slot in slots.tolist()]
        return np.linalg.inv(self.hessian)[np.ix_(chosen, chosen)] / thermal_beta(temperature)

    def draw_fast(self, slow_xyz: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        """A thermal draw of the fast internal coordinates at given slow positions.

        Stiff coordinates come from the harmonic conditional at the slow coordinates, soft torsions from their scans.

        Arguments:
            slow_xyz: Slow positions in Z-matrix order, nm, shape (B, n_slow, 3).
            temperature: K.
            generator: Source of all randomness.

        Returns:
            Bond, angle, dihedral of each fast atom, nm and radians, shape (B, n_fast, 3).
        """
        n_draws = len(slow_xyz)
        beta = thermal_beta(temperature)
        stiff = _stiff_slots(self.slow, self.fast)
        is_slow = stiff[:, 0] < self.n_slow
        slow_slots, fast_slots = stiff[is_slow], stiff[~is_slow]
        position = {int(atom): k for k, atom in enumerate(self.slow.atoms)}
        references = torch.tensor([[position.get(r, 0) for r in row] for row in self.slow.references.tolist()])
        table = bond_angle_dihedral(slow_xyz, torch.arange(self.n_slow), references).numpy()
        away = (table - self.centre[: self.n_slow])[:, slow_slots[:, 0], slow_slots[:, 1]]
        away = np.where(slow_slots[:, 1] == 2, np.remainder(away + math.pi, 2 * math.pi) - math.pi, away)
        h_ff = self.hessian[~is_slow][:, ~is_slow]
        mean = -np.linalg.solve(h_ff, self.hessian[~is_slow][:, is_slow] @ away.T).T
        noise = torch.randn((n_draws, len(fast_slots)), generator=generator, dtype=torch.float64).numpy()
        draw = mean + noise @ np.linalg.inv(np.linalg.cholesky(h_ff)) / math.sqrt(beta)
        fast = np.repeat(self.centre[None, self.n_slow :], n_draws, axis=0)
        fast[:, fast_slots[:, 0] - self.n_slow, fast_slots[:, 1]] += draw
        fast[..., 0] = np.maximum(fast[..., 0], 0.05)
        fast[..., 1] = np.clip(fast[..., 1], 0.1, math.pi - 0.1)
        for k, energies in zip(_soft_fast_torsions(self.slow, self.fast), self.scan, strict=True):
            weights = torch.softmax(torch.as_tensor(-beta * energies), dim=0)
            bins = torch.multinomial(weights, n_draws, replacement=True, generator=generator)
            jitter = torch.rand(n_draws, generator=generator, dtype=torch.float64) - 0.5
            turn = (bins + jitter) * (2 * math.pi / _N_SCAN)
            fast[:, k - self.n_slow, 2] = self.centre[k, 2] + turn.numpy()
        return torch.as_tensor(fast)


class _InternalSurface:
    """The energy as a function of all internal coordinates, slow atoms first."""

    def __init__(self, evaluate: Evaluate, slow: ZMatrix, fast: ZMatrix) -> None:
        self._evaluate = evaluate
        both = ZMatrix(
            np.concatenate((slow.atoms, fast.atoms)),
            np.concatenate((slow.references, fast.references)),
            np.concatenate((slow.improper, fast.improper)),
            np.concatenate((slow.rotatable, fast.rotatable)),
        )
        self.atoms, self.references = torch.as_tensor(both.atoms), torch.as_tensor(both.references)
        self._placement = Placement(both.without_first_three(), both.atoms[:3])
        self._to_topology = np.argsort(self._placement.order)

    def read(self, positions: np.ndarray) -> np.ndarray:
        xyz = torch.tensor(positions, dtype=torch.float64)
        table = bond_angle_dihedral(xyz, self.atoms, self.references.clamp(min=0)).numpy()
        return np.where(_exists(len(self.atoms)), table, 0.0)

    def energy_and_gradient(self, tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies (B,) and their gradients with respect to the tables (B, n_atoms, 3)."""
        internal = torch.as_tensor(tables).requires_grad_()
        first = place_first_three(internal[..., 1, 0], internal[..., 2, 0], internal[..., 2, 1])
        xyz = self._placement(first, internal[..., 3:, :])[..., self._to_topology, :]
        energy, forces = self._evaluate(xyz.detach().numpy())
        (gradient,) = torch.autograd.grad(xyz, internal, -torch.as_tensor(forces))
        return energy, gradient.numpy()


def _exists(n_atoms: int) -> np.ndarray:
    """Which entries of a table are coordinates: the first three atoms lack six, shape (n_atoms, 3) bool."""
    return np.arange(n_atoms)[:, None] > np.arange(3)


def _stiff_slots(slow: ZMatrix, fast: ZMatrix) -> np.ndarray:
    """Rows (atom, kind) of all bonds, angles and dihedrals that do not turn a bond, shape (n_stiff, 2)."""
    stiff = _exists(len(slow.atoms) + len(fast.atoms))
    stiff[np.concatenate((slow.rotatable, fast.rotatable)), 2] = False
    return np.argwhere(stiff)


def _soft_fast_torsions(slow: ZMatrix, fast: ZMatrix) -> np.ndarray:
    return np.flatnonzero(fast.rotatable) + len(slow.atoms)


def _minimise(surface: _InternalSurface, start: np.ndarray) -> np.ndarray:
    slots = np.argwhere(_exists(len(start)))
    index, scale = tuple(slots.T), np.array(_STEP)[slots[:, 1]] * 10
    reach = np.array(_SEARCH)[slots[:, 1]] / scale

    def objective(step: np.ndarray) -> tuple[float, np.ndarray]:
        table = start.copy()
        table[index] += step * scale
        energy, gradient = surface.energy_and_gradient(table[None])
        return float(energy[0]), gradient[0][index] * scale

    energy, _ = objective(np.zeros(len(slots)))
    if not math.isfinite(energy):
        raise CGFlowError("the energy of the input structure is not finite: atoms overlap. Minimise it first")
    bounds = np.stack((-reach, reach), axis=1)
    result = minimize(objective, np.zeros(len(slots)), jac=True, method="L-BFGS-B", bounds=bounds)
    logger.info("harmonic reference: %.1f -> %.1f kJ/mol in %d evaluations", energy, result.fun, result.nfev)
    centre = start.copy()
    centre[index] += result.x * scale
    return centre


def _hessian(surface: _InternalSurface, centre: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Central differences of the gradient; modes softer than ``_WIDEST`` are stiffened, and that is logged."""
    index, step = tuple(slots.T), np.array(_STEP)[slots[:, 1]]
    moved = np.repeat(centre[None], 2 * len(step), axis=0)
    rows = np.arange(len(step))
    moved[(rows, *index)] += step
    moved[(rows + len(step), *index)] -= step
    _, gradient = surface.energy_and_gradient(moved)
    columns = gradient[(slice(None), *index)]
    hessian = (columns[: len(step)] - columns[len(step) :]) / (2 * step[:, None])
    widest = np.array(_WIDEST)[slots[:, 1]]
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2 * widest[:, None] * widest)
    smallest = 1.0 / thermal_beta(300.0)
    if values[0] < smallest:
        logger.info("harmonic reference: %d soft modes were stiffened", int((values < smallest).sum()))
    return (vectors * np.maximum(values, smallest)) @ vectors.T / widest[:, None] / widest


def _torsion_scan(surface: _InternalSurface, centre: np.ndarray, k: int) -> np.ndarray:
    tables = np.repeat(centre[None], _N_SCAN, axis=0)
    tables[:, k, 2] += np.arange(_N_SCAN) * (2 * math.pi / _N_SCAN)
    energy, _ = surface.energy_and_gradient(tables)
    return np.nan_to_num(energy - energy[0], nan=1e6, posinf=1e6)

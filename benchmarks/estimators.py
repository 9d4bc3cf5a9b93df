"""Estimators that need no molecule: WHAM and MBAR, and what the scripts read off weighted angles and maps."""

from __future__ import annotations

import logging

import numpy as np
from scipy.ndimage import map_coordinates
from scipy.optimize import minimize
from scipy.special import logsumexp

from openmm_cgflow.analysis.states import RAMACHANDRAN, ROTAMER, ramachandran_basin, rotamer_state

logging.getLogger("pymbar").setLevel(logging.ERROR)  # it logs warnings for all when it is imported
from pymbar import MBAR  # noqa: E402

__all__ = [
    "bias_at",
    "bin_centres",
    "mbar",
    "populations",
    "rotamer_populations",
    "umbrella_bias",
    "wham",
]


def bin_centres(n: int) -> np.ndarray:
    """Centres of ``n`` bins on [-π, π), ``(n,)`` in radians."""
    return -np.pi + 2 * np.pi * (np.arange(n) + 0.5) / n


def umbrella_bias(angles: np.ndarray, centres: np.ndarray, strength: float) -> np.ndarray:
    """The bias ``strength * sum(1 - cos)`` of every window on every row of ``angles``.

    Arguments:
        angles: ``(n, 2)`` in radians.
        centres: ``(n_windows, 2)`` in radians.
        strength: In kT.

    Returns:
        ``(n_windows, n)`` in kT.
    """
    return strength * (1 - np.cos(angles[None] - centres[:, None])).sum(-1)


def wham(
    counts: np.ndarray, n_frames: np.ndarray, bias: np.ndarray, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The weighted histogram analysis method (WHAM), solved as the convex problem that it is.

    Its equations are those of MBAR for frames that are known up to their bin. All windows must be linked by overlap.

    Arguments:
        counts: Frames of all windows in each bin, ``(n_bins,)``.
        n_frames: Frames of each window, ``(n_windows,)``, at least one each.
        bias: Of each window at each bin, ``(n_windows, n_bins)`` in kT.
        start: Where the solver starts, free energies ``(n_windows,)`` in kT.

    Returns:
        Free energies of the windows, ``(n_windows,)`` in kT, the first one 0, and the unbiased probabilities of the
        bins, ``(n_bins,)``.

    Raises:
        ValueError: If the solver does not converge: windows that do not overlap.
    """
    seen = counts > 0
    share = counts[seen] / counts.sum()
    log_n = np.log(n_frames / n_frames.sum())[:, None]

    def responsibility(free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        exponent = log_n + np.concatenate([[0.0], free])[:, None] - bias[:, seen]
        total = logsumexp(exponent, axis=0)
        return np.exp(exponent - total), total

    def objective(free: np.ndarray) -> tuple[float, np.ndarray]:
        each, total = responsibility(free)
        expected = np.exp(log_n[1:, 0])
        return share @ total - expected @ free, (each @ share)[1:] - expected

    def hessian(free: np.ndarray) -> np.ndarray:
        each = responsibility(free)[0][1:]
        return np.diag(each @ share) - (each * share) @ each.T

    free = np.zeros(len(n_frames) - 1) if start is None else start[1:] - start[0]
    if len(free):
        options = {"gtol": 1e-10, "maxiter": 500}
        result = minimize(objective, free, jac=True, hess=hessian, method="trust-exact", options=options)
        free = result.x
        if not np.abs(objective(free)[1]).max() < 1e-8:
            raise ValueError(f"WHAM did not converge: {result.message}; do all windows overlap?")
    probability = np.zeros(len(counts))
    probability[seen] = share * np.exp(-responsibility(free)[1])
    return np.concatenate([[0.0], free]), probability / probability.sum()


def mbar(energies: np.ndarray, n_frames: np.ndarray, start: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The multistate Bennett acceptance ratio (MBAR).

    Arguments:
        energies: Of every frame in every state, ``(n_states, n_frames)`` in kT, frames in the order of their states.
        n_frames: Frames drawn in each state, ``(n_states,)``.
        start: Where the solver starts, free energies ``(n_states,)`` in kT.

    Returns:
        Free energies of the states, ``(n_states,)`` in kT, the first one 0, and the weights of the frames in the first
        state, ``(n_frames,)``, of sum 1.
    """
    # pymbar's other solvers hand options to SciPy that it warns about.
    solved = MBAR(energies, n_frames, initial_f_k=start, solver_protocol=({"method": "adaptive"},))
    return solved.f_k - solved.f_k[0], solved.W_nk[:, 0]


def bias_at(bias: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """A periodic bias, tabulated at ``n`` equidistant angles from -π without π, at the angles of frames.

    Arguments:
        bias: ``(n, n)``, any unit.
        angles: ``(n_frames, 2)`` in radians.

    Returns:
        ``(n_frames,)`` by cubic splines.
    """
    return map_coordinates(bias, (angles.T + np.pi) * len(bias) / (2 * np.pi), order=3, mode="grid-wrap")


def populations(angles: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights of the basins ``states.RAMACHANDRAN``, ``(4,)``, from frames of (φ, ψ), ``(n_frames, 2)`` in radians."""
    return np.bincount(ramachandran_basin(*angles.T), weights, len(RAMACHANDRAN)) / weights.sum()


def rotamer_populations(angle: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights of ``states.ROTAMER``, ``(3,)``, from frames of a torsion, ``(n_frames,)`` in radians."""
    return np.bincount(rotamer_state(angle), weights, len(ROTAMER)) / weights.sum()

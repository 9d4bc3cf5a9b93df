"""Ensembles of frames held against each other: densities, sizes and states.

The ensembles are ``samples``, ``weighted`` (the samples with their importance weights) and ``reference``; a gridded
reference stands beside them, because it knows the (φ, ψ) of one residue and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import wasserstein_distance

from openmm_cgflow.analysis.distances import (
    Distances,
    block_sums,
    bootstrap,
    circle_bins,
    circle_histogram,
    compare,
    effective_size,
    ks_distance,
    sampling_floor,
)
from openmm_cgflow.analysis.observables import Observables
from openmm_cgflow.analysis.reference import GridReference
from openmm_cgflow.analysis.states import RAMACHANDRAN

__all__ = [
    "Density",
    "Ensemble",
    "Grid",
    "Size",
    "State",
    "compare_densities",
    "compare_sizes",
    "compare_states",
]

_N_SIZE_BINS = 60
_N_DRAWS = 20


@dataclass(frozen=True)
class Ensemble:
    """Frames that stand for a distribution.

    Attributes:
        observables: Of each frame.
        weights: Non-negative, not necessarily normalised, shape (n_frames,).
        n_blocks: Stretches taken to be independent of each other: as many as frames for samples of a flow.
    """

    observables: Observables
    weights: np.ndarray
    n_blocks: int


@dataclass(frozen=True)
class Grid:
    """A gridded reference and the residue that it is of."""

    residue: str
    reference: GridReference


@dataclass(frozen=True)
class Density:
    """Torsions as probabilities on bins of 10°, and how far the samples' are from the reference's.

    Attributes:
        axes: Names of the torsions, one or two.
        probabilities: By ensemble, shape (36,) or (36, 36), from -180°.
        distances: By ensemble, from the reference; empty without one.
        noise_floor: By ensemble, what perfect samples would score, as many as its effective samples. ``halves``: the
            first half of a reference trajectory against the second, its own noise.
    """

    axes: tuple[str, ...]
    probabilities: dict[str, np.ndarray]
    distances: dict[str, Distances]
    noise_floor: dict[str, Distances]


@dataclass(frozen=True)
class Size:
    """Radius of gyration of all atoms (paper eq. 22) or RMSD of the slow atoms to the input structure (eq. 23).

    Attributes:
        mean_nm: By ensemble.
        std_nm: By ensemble.
        wasserstein_nm: By ensemble, from a reference trajectory; ``halves`` is the noise floor, the reference's first
            half from its second.
        ks: Kolmogorov-Smirnov distances, likewise.
        edges_nm: Bins of the histograms, shape (n_bins + 1,).
        probabilities: By ensemble, shape (n_bins,).
    """

    mean_nm: dict[str, float]
    std_nm: dict[str, float]
    wasserstein_nm: dict[str, float]
    ks: dict[str, float]
    edges_nm: np.ndarray
    probabilities: dict[str, np.ndarray]


@dataclass(frozen=True)
class State:
    """A state that some frame is in.

    Attributes:
        fractions: By ensemble; a grid knows the basins of its own residue only.
        met_by: ``both``, ``samples only``, ``reference only``, or ``samples`` where no reference can tell.
        upper_bound: Of the fraction on the side that did not meet it: 3 / n of n effective frames (95 % for
            independent ones; the frames of a trajectory are correlated, so more in truth). None for a grid.
        beyond_bound: Whether the other side's fraction is above that bound, so that chance does not explain it.
    """

    fractions: dict[str, float]
    met_by: str
    upper_bound: float | None
    beyond_bound: bool


def compare_densities(
    ensembles: Mapping[str, Ensemble], grid: Grid | None, rng: np.random.Generator
) -> tuple[dict[str, Density], dict[str, Density]]:
    """Densities of maps and of single torsions, by name."""
    observables = ensembles["samples"].observables
    n_blocks = ensembles["reference"].n_blocks if "reference" in ensembles else 0
    maps = {}
    for name, torsion_map in observables.maps.items():
        angles = {key: (e.observables.maps[name].angles, e.weights) for key, e in ensembles.items()}
        gridded = grid.reference.rebinned() if grid and grid.residue == name else None
        maps[name] = _density(torsion_map.axes, angles, gridded, n_blocks, rng)
    torsions = {}
    for name in observables.torsions:
        angles = {key: (e.observables.torsions[name][:, None], e.weights) for key, e in ensembles.items()}
        torsions[name] = _density((name,), angles, None, n_blocks, rng)
    return maps, torsions


def _density(
    axes: tuple[str, ...],
    angles: Mapping[str, tuple[np.ndarray, np.ndarray]],
    gridded: np.ndarray | None,
    n_blocks: int,
    rng: np.random.Generator,
) -> Density:
    probabilities = {key: circle_histogram(values, weights) for key, (values, weights) in angles.items()}
    if gridded is not None:
        probabilities["reference"] = gridded
    if "reference" not in probabilities:
        return Density(axes, probabilities, {}, {})
    reference = probabilities["reference"]
    redraws, floor = np.tile(reference.ravel(), (_N_DRAWS, 1)), {}
    if "reference" in angles:
        values, weights = angles["reference"]
        sums = block_sums(circle_bins(values), weights, reference.size, n_blocks)
        redraws = bootstrap(sums, rng, _N_DRAWS)
        if halves := _halves(weights):
            floor["halves"] = compare(*(circle_histogram(values[half], weights[half]) for half in halves))
    distances = {}
    for key, probability in probabilities.items():
        if key != "reference":
            distances[key] = compare(reference, probability)
            n = max(1, round(effective_size(angles[key][1])))
            floor[key] = sampling_floor(reference, n, rng, redraws)
    return Density(axes, probabilities, distances, floor)


def compare_sizes(ensembles: Mapping[str, Ensemble]) -> dict[str, Size]:
    """Radius of gyration and RMSD of all ensembles, by name."""
    return {
        name: _size({key: (e.observables.sizes[name], e.weights) for key, e in ensembles.items()})
        for name in ensembles["samples"].observables.sizes
    }


def _size(values: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Size:
    pooled = np.concatenate([value for value, _ in values.values()])
    edges = np.histogram_bin_edges(pooled, _N_SIZE_BINS)
    means = {key: float(np.average(value, weights=weights)) for key, (value, weights) in values.items()}
    wasserstein, ks = {}, {}
    if "reference" in values:
        theirs, their_weights = values["reference"]
        pairs = {key: (values[key], (theirs, their_weights)) for key in values if key != "reference"}
        halves = _halves(their_weights)
        if halves:
            first, second = ((theirs[half], their_weights[half]) for half in halves)
            pairs["halves"] = (first, second)
        for key, ((a, weights_a), (b, weights_b)) in pairs.items():
            wasserstein[key] = float(wasserstein_distance(a, b, weights_a, weights_b))
            ks[key] = ks_distance(a, weights_a, b, weights_b)
    return Size(
        mean_nm=means,
        std_nm={
            key: float(np.sqrt(np.average((value - means[key]) ** 2, weights=weights)))
            for key, (value, weights) in values.items()
        },
        wasserstein_nm=wasserstein,
        ks=ks,
        edges_nm=edges,
        probabilities={
            key: np.histogram(value, edges, weights=weights)[0] / weights.sum()
            for key, (value, weights) in values.items()
        },
    )


def compare_states(ensembles: Mapping[str, Ensemble], grid: Grid | None) -> dict[str, State]:
    """Every state that a frame of the samples or of the reference is in."""
    known_to_grid = {}
    if grid:
        populations = grid.reference.populations()
        known_to_grid = {f"{name} {grid.residue}": float(p) for name, p in zip(RAMACHANDRAN, populations, strict=True)}
    sizes = {key: effective_size(ensemble.weights) for key, ensemble in ensembles.items()}
    result = {}
    for name in ensembles["samples"].observables.states:
        fractions = {
            key: float(e.weights[e.observables.states[name]].sum() / e.weights.sum()) for key, e in ensembles.items()
        }
        if name in known_to_grid:
            fractions["reference"] = known_to_grid[name]
        if any(fractions.values()):
            result[name] = _state(fractions, sizes)
    return result


def _state(fractions: dict[str, float], sizes: Mapping[str, float]) -> State:
    ours, theirs = fractions["samples"], fractions.get("reference")
    if theirs is None:
        return State(fractions, "samples", None, False)
    if ours and theirs:
        return State(fractions, "both", None, False)
    met_by, absent = ("samples only", "reference") if ours else ("reference only", "samples")
    bound = min(1.0, 3 / sizes[absent]) if absent in sizes else None
    return State(fractions, met_by, bound, max(ours, theirs) > (bound or 0.0))


def _halves(weights: np.ndarray) -> list[slice]:
    """The first and the second half of the frames, nothing where one of them has no weight."""
    middle = len(weights) // 2
    halves = [slice(0, middle), slice(middle, None)]
    return halves if all(weights[half].sum() > 0 for half in halves) else []

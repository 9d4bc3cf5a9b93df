"""Populations of basins and free-energy differences between them, with bootstrap errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from openmm_cgflow.analysis.comparison import Ensemble, Grid
from openmm_cgflow.analysis.distances import block_sums, bootstrap
from openmm_cgflow.analysis.observables import Grouping

__all__ = ["Basin", "compare_basins"]


@dataclass(frozen=True)
class Basin:
    """A basin in one ensemble. None stands for what is not known: errors of a grid, infinite free energies.

    Attributes:
        population: Fraction of the mass.
        population_error: Bootstrap standard error.
        free_energy_kT: Above the basin most populated in the reference, or in the samples where there is none.
        free_energy_error_kT: Bootstrap standard error; rough below ten frames in the basin.
        free_energy_kJ_per_mol: The same at the run's temperature.
        free_energy_error_kJ_per_mol: Its error.
        difference_kT: This free energy less the reference's.
        difference_error_kT: Both errors combined; that of the samples alone against a grid.
    """

    population: float
    population_error: float | None
    free_energy_kT: float | None
    free_energy_error_kT: float | None
    free_energy_kJ_per_mol: float | None
    free_energy_error_kJ_per_mol: float | None
    difference_kT: float | None
    difference_error_kT: float | None


def compare_basins(
    ensembles: Mapping[str, Ensemble], grid: Grid | None, beta: float, rng: np.random.Generator
) -> dict[str, dict[str, dict[str, Basin]]]:
    """Populations and free energies by group, basin and ensemble; ``beta`` in mol/kJ."""
    # Of each ensemble and group: populations (n_basins,) and their bootstrap replicates (n_replicates, n_basins).
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray | None]]] = {}
    for key, ensemble in ensembles.items():
        groupings = ensemble.observables.groupings
        found[key] = dict(zip(groupings, _populations(groupings, ensemble, rng), strict=True))
    if grid:
        found["reference"] = {grid.residue: (grid.reference.populations(), None)}
    result: dict[str, dict[str, dict[str, Basin]]] = {}
    for group, grouping in ensembles["samples"].observables.groupings.items():
        known = {key: groups[group] for key, groups in found.items() if group in groups}
        base = int(known.get("reference", known["samples"])[0].argmax())
        energies = {key: _free_energies(*populations, base) for key, populations in known.items()}
        result[group] = {
            name: {key: _basin(k, key, known, energies, beta) for key in known}
            for k, name in enumerate(grouping.basins)
        }
    return result


def _populations(
    groupings: Mapping[str, Grouping], ensemble: Ensemble, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    if not groupings:  # such as propane, of which nothing turns
        return []
    widths = [len(grouping.basins) for grouping in groupings.values()]
    sums = np.hstack(
        [block_sums(g.labels, ensemble.weights, len(g.basins), ensemble.n_blocks) for g in groupings.values()]
    )
    columns = np.cumsum(widths)[:-1]
    replicates = np.split(bootstrap(sums, rng), columns, axis=1)
    totals = np.split(sums.sum(axis=0), columns)
    return [
        (total / total.sum(), draws / draws.sum(axis=1, keepdims=True))
        for total, draws in zip(totals, replicates, strict=True)
    ]


def _free_energies(
    populations: np.ndarray, replicates: np.ndarray | None, base: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Free energies in kT, infinite or NaN where a population is zero, and standard errors, NaN where unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        energies = 0.0 - np.log(populations / populations[base])  # no -0.0 for the base
        if replicates is None:
            return energies, None
        draws = -np.log(replicates / replicates[:, base : base + 1])
    errors = [column[np.isfinite(column)] for column in draws.T]
    return energies, np.array([np.std(finite, ddof=1) if len(finite) > 1 else np.nan for finite in errors])


def _basin(
    k: int,
    key: str,
    known: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
    energies: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
    beta: float,
) -> Basin:
    populations, replicates = known[key]
    energy, errors = energies[key]
    value = float(energy[k])
    error = None if errors is None or not np.isfinite(value) else _finite(errors[k])
    difference = difference_error = None
    if "reference" in energies and key != "reference":
        theirs, their_errors = energies["reference"]
        difference = _finite(value - float(theirs[k])) if np.isfinite((value, theirs[k])).all() else None
        if difference is not None and error is not None:
            difference_error = _finite(np.hypot(error, 0.0 if their_errors is None else their_errors[k]))
    return Basin(
        population=float(populations[k]),
        population_error=None if replicates is None else float(replicates[:, k].std(ddof=1)),
        free_energy_kT=_finite(value),
        free_energy_error_kT=error,
        free_energy_kJ_per_mol=_finite(value / beta),
        free_energy_error_kJ_per_mol=None if error is None else error / beta,
        difference_kT=difference,
        difference_error_kT=difference_error,
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

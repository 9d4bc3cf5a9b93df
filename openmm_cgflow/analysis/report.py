"""What an evaluation found, as a table, as JSON, as arrays and as figures."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openmm_cgflow.analysis import plots
from openmm_cgflow.analysis.basins import Basin
from openmm_cgflow.analysis.comparison import Density, Size, State
from openmm_cgflow.analysis.distances import Distances
from openmm_cgflow.files.atomic import atomic_path, atomic_write, writing

__all__ = ["Evaluation", "write_evaluation"]

_DISTANCES = tuple(field.name for field in dataclasses.fields(Distances))
_UNITS = {
    "kl": "nats",
    "js": "nats",
    "free_energy_kT": "kT",
    "free_energy_kJ_per_mol": "kJ/mol",
    "difference_kT": "kT",
    "*_nm": "nm",
    "temperature_K": "K",
    "tv, outside, population, fractions, ks, relative_ess": "1",
}
_ARRAYS = ("probabilities", "edges_nm")  # kept out of the JSON file


@dataclass(frozen=True)
class Evaluation:
    """What :func:`openmm_cgflow.evaluate` found.

    Attributes:
        run: The run directory.
        samples: File, number of frames, and the relative effective sample size of their weights where they have any.
        reference: File, kind and size, or None.
        settings: Temperature, bins, pseudocount, seed.
        maps: (φ, ψ) by residue; the first two slow torsions of a molecule without them.
        torsions: ω, χ1 and, of a molecule without φ and ψ, the slow torsions.
        basins: By group, basin and ensemble.
        sizes: ``Rg`` and ``RMSD``.
        states: By name, those that some frame is in.
    """

    run: str
    samples: dict[str, Any]
    reference: dict[str, Any] | None
    settings: dict[str, Any]
    maps: dict[str, Density]
    torsions: dict[str, Density]
    basins: dict[str, dict[str, dict[str, Basin]]]
    sizes: dict[str, Size]
    states: dict[str, State]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the histograms."""
        found = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {**found, "units": dict(_UNITS)}

    def table(self) -> str:
        """The evaluation as text."""
        blocks = [_heading(self), _distances(self), _basins(self), _sizes(self), _states(self)]
        return "\n\n".join(block for block in blocks if block)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.name not in _ARRAYS]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Writes ``evaluation.json``, ``evaluation.txt``, ``histograms.npz`` and PNG files to ``folder``.

    Files of an earlier evaluation are replaced.

    Raises:
        CGFlowError: If a file cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(evaluation.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(folder / "evaluation.json", text + "\n")
    atomic_write(folder / "evaluation.txt", evaluation.table() + "\n")
    compared: dict[str, Density | Size] = {**evaluation.maps, **evaluation.torsions, **evaluation.sizes}
    arrays: dict[str, Any] = {
        f"{name}/{key}": array for name, found in compared.items() for key, array in found.probabilities.items()
    }
    arrays |= {f"{name}/edges_nm": size.edges_nm for name, size in evaluation.sizes.items()}
    with atomic_path(folder / "histograms.npz") as path:
        np.savez(path, **arrays)
    temperature = evaluation.settings["temperature_K"]
    for name, density in evaluation.maps.items():
        figure = plots.compared_maps(density.probabilities, density.axes, temperature=temperature, title=name)
        plots.save(figure, folder / f"map_{re.sub(r'[^0-9A-Za-z.+-]+', '_', name)}.png")
    turn = np.linspace(-180, 180, 37)
    if evaluation.torsions:
        panels = {name: (turn, density.probabilities) for name, density in evaluation.torsions.items()}
        plots.save(plots.compared_histograms(panels, "degrees"), folder / "torsions.png")
    panels = {name: (size.edges_nm, size.probabilities) for name, size in evaluation.sizes.items()}
    plots.save(plots.compared_histograms(panels, "nm"), folder / "rg_rmsd.png")


def _heading(evaluation: Evaluation) -> str:
    samples, reference = evaluation.samples, evaluation.reference
    lines = [f"{samples['file']}: {samples['n_frames']} samples at {evaluation.settings['temperature_K']:g} K"]
    if "relative_ess" in samples:
        ess = samples["relative_ess"]
        lines.append(f"importance weights that frames still have: relative effective sample size {ess:.3f}")
    if reference is None:
        lines.append("no reference")
    elif reference["kind"] == "grid":
        n = reference["n_bins"]
        lines.append(f"reference {reference['file']}: {n} x {n} grid of {reference['residue']}")
    else:
        lines.append(
            f"reference {reference['file']}: {reference['n_frames']} frames, errors from {reference['n_blocks']} blocks"
        )
    return "\n".join(lines)


def _distances(evaluation: Evaluation) -> str:
    rows = []
    for name, density in [*evaluation.maps.items(), *evaluation.torsions.items()]:
        for key, distances in density.distances.items():
            floor = density.noise_floor[key]
            pairs = [(getattr(distances, column), getattr(floor, column)) for column in _DISTANCES]
            rows.append([f"{name}  {key}", *(f"{value:.4f} ({noise:.4f})" for value, noise in pairs)])
        if halves := density.noise_floor.get("halves"):
            rows.append(["  reference, half to half", *(f"{getattr(halves, column):.4f}" for column in _DISTANCES)])
    if not rows:
        return ""
    title = (
        f"Distances to the reference, {evaluation.settings['bins_per_turn']} bins a turn, KL and JS in nats; in "
        "brackets what as many perfect samples\nwould score. outside: mass in bins that the reference does not visit"
    )
    return _table(title, ["", "KL(ref||samples)", "JS", "TV", "outside"], rows)


def _basins(evaluation: Evaluation) -> str:
    keys = _ensembles(evaluation)
    compared = [key for key in keys if key != "reference"] if "reference" in keys else []
    header = ["", *keys, *(f"F {key}" for key in keys), *(f"F {key} - ref" for key in compared)]
    rows = []
    for group, basins in evaluation.basins.items():
        met = {name: basin for name, basin in basins.items() if any(b.population for b in basin.values())}
        if len(met) == 1:  # nothing to compare; the table of states has it
            continue
        for name, basin in met.items():
            found = [basin.get(key) for key in keys]
            row = [f"{group}  {name}"]
            row += [_with_error(b.population, b.population_error, 4) if b else "" for b in found]
            row += [_with_error(b.free_energy_kT, b.free_energy_error_kT, 2) if b else "" for b in found]
            row += [_with_error(basin[key].difference_kT, basin[key].difference_error_kT, 2) for key in compared]
            rows.append(row)
    return _table("Populations, and free energies F in kT above the main basin", header, rows) if rows else ""


def _sizes(evaluation: Evaluation) -> str:
    rows = []
    for name, size in evaluation.sizes.items():
        for key in [*size.mean_nm, *(["halves"] if "halves" in size.ks else [])]:
            label = "  reference, half to half" if key == "halves" else f"{name}  {key}"
            values = (size.mean_nm.get(key), size.std_nm.get(key), size.wasserstein_nm.get(key), size.ks.get(key))
            rows.append([label, *("" if value is None else f"{value:.4f}" for value in values)])
    title = "Radius of gyration of all atoms, RMSD of the slow atoms to the input structure, nm"
    header = ["", "mean", "spread", "Wasserstein", "KS"]
    n_columns = max(k + 1 for row in rows for k, cell in enumerate(row) if cell)
    return _table(title, header[:n_columns], [row[:n_columns] for row in rows])


def _states(evaluation: Evaluation) -> str:
    keys = _ensembles(evaluation)
    rows = []
    for name, state in evaluation.states.items():
        note = state.met_by if state.met_by.endswith("only") else ""
        if state.upper_bound is not None:
            absent = "reference" if state.met_by == "samples only" else "samples"
            note += f"; {absent} < {state.upper_bound:.1e}" + ("" if state.beyond_bound else ", may be chance")
        fractions = [state.fractions.get(key) for key in keys]
        rows.append([name, *("" if f is None else f"{f:.5f}" for f in fractions), note])
    return _table("States that some frame is in", ["", *keys, ""], rows) if rows else ""


def _ensembles(evaluation: Evaluation) -> list[str]:
    present = {key for size in evaluation.sizes.values() for key in size.mean_nm}
    if evaluation.reference is not None:
        present.add("reference")
    return [key for key in ("samples", "weighted", "reference") if key in present]


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their names, the first to the left, the others to the right but for a last one of notes."""
    everything = [header, *rows]
    widths = [max(len(row[k]) for row in everything) for k in range(len(header))]
    notes = header[-1] == ""
    lines = []
    for row in everything:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        if notes:
            cells[-1] = row[-1]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([title, *lines])

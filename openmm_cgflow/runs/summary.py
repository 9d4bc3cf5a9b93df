"""What a run directory holds, told in lines, from its small files alone: nothing is loaded or computed."""

from __future__ import annotations

from collections.abc import Iterator

from openmm_cgflow.files.log import read_rows
from openmm_cgflow.files.run_directory import RunDirectory

__all__ = ["summarise"]

_LABELS = {
    "started": "last started",
    "ended": "last ended",
    "wall_time_s": "wall time (s)",
    "seed": "seed",
    "engine": "engine",
    "energy_evaluations": "energy evaluations",
    "ended_by": "training ended by",
}
"""Entries of provenance.json that are told as they stand there, and what they are called."""


def summarise(run: RunDirectory) -> Iterator[str]:
    """Status and cost of a run, its last step, its models and the files it left, a line each.

    Raises:
        CGFlowError: If ``provenance.json`` is damaged.
    """
    record = run.read_provenance()
    yield f"{run.path}: {record.get('status', 'not started')}"
    yield from (f"{label}: {record[key]}" for key, label in _LABELS.items() if record.get(key) not in (None, ""))
    if record.get("unmet"):
        yield "not met: " + "; ".join(record["unmet"])
    if "versions" in record:
        yield "versions: " + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    rows = read_rows(run.metrics)
    if rows:
        known = {name: value for name, value in rows[-1].items() if value == value}  # nan: no such value
        yield "last step: " + ", ".join(f"{name} {value:.6g}" for name, value in known.items())
    temperatures = record.get("temperatures_K", [])
    for stage, path in run.stages().items():
        yield f"stage {stage}: " + (f"{temperatures[stage]:.1f} K, " if stage < len(temperatures) else "") + path.name
    present = (run.samples, run.colvar, *sorted(run.plots.glob("*.png")))
    yield from (str(path) for path in present if path.exists())

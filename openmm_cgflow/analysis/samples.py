"""The samples of a run, read back: frames with the importance weights that they still have."""

from __future__ import annotations

import shlex
from pathlib import Path

import mdtraj
import numpy as np

from openmm_cgflow.analysis.reference import load_frames
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.files.trajectory import read_colvar

__all__ = ["read_samples"]


def read_samples(
    run: RunDirectory, path: Path, structure: mdtraj.Trajectory
) -> tuple[mdtraj.Trajectory, np.ndarray | None]:
    """The frames, and the logarithms of their importance weights if the COLVAR table has them.

    Raises:
        CGFlowError: If a file is missing, cannot be read or does not fit.
    """
    if not path.is_file():
        raise CGFlowError(
            f"{path}: no such file, so there are no samples to evaluate. Draw some with\n"
            f"  openmm-cgflow sample {shlex.quote(str(run.path))} -n 10000 -o {shlex.quote(str(path))}"
        )
    trajectory = load_frames(path, structure)
    colvar = path.with_suffix(".colvar")
    if not colvar.is_file():
        raise CGFlowError(f"{colvar}: no such file; `openmm-cgflow sample` writes it beside {path.name}, restore it")
    columns = read_colvar(colvar)
    n_rows = len(columns["time"]) if "time" in columns else len(next(iter(columns.values()), []))
    if n_rows != trajectory.n_frames:
        raise CGFlowError(
            f"{colvar}: has {n_rows} rows, {path} has {trajectory.n_frames} frames; give files of one sampling"
        )
    log_weight = columns.get("log_weight")
    if log_weight is not None and not (np.isfinite(log_weight.max()) and not np.isnan(log_weight).any()):
        raise CGFlowError(f"{colvar}: log_weight must be numbers, -inf for no weight, and not all -inf")
    return trajectory, log_weight

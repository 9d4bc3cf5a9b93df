"""Samples as files that the field's tools read: DCD or XTC with a topology, and a PLUMED COLVAR table.

The frames are independent samples of a density, not a time series: what the formats call time is the frame's index.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

import mdtraj
import numpy as np

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.atomic import atomic_path, writing

__all__ = [
    "check_trajectory_path",
    "colvar_constants",
    "read_colvar",
    "write_colvar",
    "write_trajectory",
]

_FIELDS, _SET = "#! FIELDS ", "#! SET "


def check_trajectory_path(path: Path) -> None:
    """Refuses, before any work is done, a path that :func:`write_trajectory` could not write.

    Raises:
        CGFlowError: If the suffix is neither .dcd nor .xtc or the folder cannot be written to.
    """
    if path.suffix.lower() not in (".dcd", ".xtc"):
        raise CGFlowError(f"{path}: unknown trajectory format '{path.suffix}'; use a name that ends in .dcd or .xtc")
    if path.is_dir():
        raise CGFlowError(f"{path}: is a directory, expected a file name")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def write_trajectory(trajectory: mdtraj.Trajectory, path: Path, *, topology: Path | None = None) -> None:
    """Writes independent frames as they are, without unit cell.

    Arguments:
        trajectory: All-atom frames, nm.
        path: Ends in ``.dcd`` (single precision) or ``.xtc`` (rounded to 0.001 nm: not for energies).
        topology: A PDB file to write with the first frame, for the tools that read the trajectory.

    Raises:
        CGFlowError: If the suffix is another one or a file cannot be written.
    """
    check_trajectory_path(path)
    frames = mdtraj.Trajectory(trajectory.xyz, trajectory.topology, time=np.arange(trajectory.n_frames))
    if topology is not None:
        with atomic_path(topology) as temporary:
            frames[0].save_pdb(str(temporary))
    with atomic_path(path) as temporary:
        try:
            frames.save(str(temporary))
        except (RuntimeError, TypeError) as error:  # what MDTraj's DCD and XTC writers raise where the disk is full
            raise CGFlowError(f"{path}: cannot write: MDTraj fails to; is the disk full? ({error})") from error
        if path.suffix.lower() == ".dcd":
            _replace_dcd_title(temporary)


def _replace_dcd_title(path: Path) -> None:
    """Puts a fixed text where MDTraj writes the time of day and memory it never cleared: same seed, same file."""
    # The header: a record of 84 bytes between two markers of 4, then marker, number of titles, titles of 80 bytes.
    with path.open("r+b") as file:
        file.seek(180)
        if not file.read(80).startswith(b"REMARKS"):
            raise ValueError(f"{path}: not the DCD header that MDTraj writes")
        file.seek(180)
        file.write(b"REMARKS independent samples, their time is an index".ljust(80))


def write_colvar(path: Path, columns: Mapping[str, np.ndarray], constants: Mapping[str, float] | None = None) -> None:
    """Writes a PLUMED COLVAR file: ``#! FIELDS time ...`` and ``#! SET ...``, then one row for each sample.

    Arguments:
        path: The file.
        columns: Columns of shape (n,), angles in radians; ``time``, the index of the sample, is put before them.
        constants: Numbers that all rows have in common, such as ``temperature_K``.

    Raises:
        CGFlowError: If the file cannot be written.
        ValueError: If the columns differ in length, or a name has white space or is ``time``.
    """
    shapes = {name: np.shape(values) for name, values in columns.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
        raise ValueError(f"got columns of shapes {shapes}, expected one shape (n,)")
    wrong = [name for name in columns if len(name.split()) != 1 or name == "time"]
    if wrong:
        raise ValueError(f"got column names {wrong}, expected names without white space, other than time")
    table = np.column_stack([np.arange(len(next(iter(columns.values())))), *columns.values()])
    with atomic_path(path) as temporary, temporary.open("w") as file:
        file.write(_FIELDS + " ".join(["time", *columns]) + "\n")
        file.writelines(f"{_SET}{name} {value:.10g}\n" for name, value in (constants or {}).items())
        np.savetxt(file, table, ["%d", *["%.10g"] * len(columns)])


def colvar_constants(path: Path) -> dict[str, float]:
    """The numbers that a COLVAR file sets for all rows, in the lines before them.

    Raises:
        CGFlowError: If it cannot be read or one is not a number.
    """
    try:
        with path.open() as file:
            header = takewhile(lambda line: line.startswith("#!"), file)
            lines = [line.split()[2:] for line in header if line.startswith(_SET)]
        return {name: float(value) for name, value in lines}
    except OSError as error:
        raise CGFlowError(f"{path}: cannot read: {error.strerror}") from error
    except ValueError as error:
        raise CGFlowError(f"{path}: a line that begins with '{_SET.strip()}' needs a name and a number") from error


def read_colvar(path: Path) -> dict[str, np.ndarray]:
    """The columns of a COLVAR file, ``time`` included, each of shape (n,).

    Raises:
        CGFlowError: If it cannot be read, its first line names no fields, or a row has other numbers than these.
    """
    try:
        with path.open() as file:
            header = file.readline()
            rows = [line for line in file if not line.startswith("#")]
    except OSError as error:
        raise CGFlowError(f"{path}: cannot read: {error.strerror}") from error
    if not header.startswith(_FIELDS):
        raise CGFlowError(f"{path}: not a COLVAR file: its first line must begin with '{_FIELDS.strip()}'")
    names = header.removeprefix(_FIELDS).split()
    columns = [(name, np.float64) for name in names]
    try:
        table = np.loadtxt(rows, columns, ndmin=1) if rows else np.empty(0, columns)
    except ValueError as error:
        raise CGFlowError(
            f"{path}: not every row has the {len(names)} numbers that its first line names: {error}"
        ) from error
    return {name: table[name] for name in names}

"""The table of a training, ``metrics.csv``: one row for each step, written while it runs."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from openmm_cgflow.files.atomic import atomic_path, writing

__all__ = ["append_row", "drop_rows_after", "read_rows"]


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Adds a row; the first row fixes the columns.

    Raises:
        CGFlowError: If the file cannot be written.
        ValueError: If the row has other columns than the file.
    """
    new = not path.exists()
    with writing(path), path.open("a+", newline="") as file:
        if not new:
            file.seek(0)
            columns = next(csv.reader(file), [])
            if columns != list(row):
                raise ValueError(f"{path}: got columns {list(row)}, expected {columns}")
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows, none where there is no file; a row that a crash cut short is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
    return [{key: float(value) for key, value in row.items()} for row in rows if "" not in row.values()]


def drop_rows_after(path: Path, step: int) -> None:
    """Drops the rows after ``step``, which a resumed training will write again."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        header, *rows = [*csv.reader(file)] or [[]]
    if not header or step < 1:
        path.unlink()
        return
    column = header.index("step")
    kept = [row for row in rows if len(row) == len(header) and float(row[column]) <= step]
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([header, *kept])

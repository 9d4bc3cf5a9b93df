"""What a run tells while it goes on: the logger ``openmm_cgflow``, to file and console, and ``metrics.csv``."""

from __future__ import annotations

import csv
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from openmm_cgflow._version import __version__
from openmm_cgflow.files.atomic import atomic_path, writing

__all__ = ["append_row", "console_logging", "drop_rows_after", "file_logging", "held_back", "read_rows", "versions"]

_PACKAGES = ("openmm", "torch", "zuko", "mdtraj", "numpy")

_logger = logging.getLogger("openmm_cgflow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on, without importing them."""
    result = {"openmm_cgflow": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = "not installed"
    return result


@contextmanager
def file_logging(path: Path, *, console: bool) -> Iterator[None]:
    """Appends the logger to a file, and shows it on the console if asked.

    The file opens with versions and machine; an error that ends the block is its last line.

    Raises:
        CGFlowError: If the file cannot be written.
    """
    with writing(path):
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
    with ExitStack() as stack:
        stack.callback(handler.close)
        stack.enter_context(_attached(handler))
        if console:
            stack.enter_context(console_logging())
        _logger.info(", ".join(f"{name} {version}" for name, version in versions().items()))
        _logger.info("%s, %d cores", platform.platform(), os.cpu_count() or 1)
        try:
            yield
        except Exception as error:
            # To the file alone: whoever called tells the user.
            text = f"{type(error).__name__}: {error}"
            handler.handle(_logger.makeRecord(_logger.name, logging.ERROR, __file__, 0, text, (), None))
            raise


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Keeps what is logged before there is a file to log to; the function it yields passes it on, after the block."""
    handler = MemoryHandler(100_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)

    def release() -> None:
        for record in handler.buffer:
            _logger.handle(record)
        handler.buffer.clear()

    with _attached(handler):
        yield release


@contextmanager
def console_logging() -> Iterator[None]:
    """Sends the logger ``openmm_cgflow`` to standard error, above a progress bar if there is one."""
    handler = logging.StreamHandler()  # of standard error as it is now
    handler.setFormatter(_ConsoleFormatter("%(message)s"))
    with _attached(handler), logging_redirect_tqdm([_logger]):
        yield


class _ConsoleFormatter(logging.Formatter):
    """The message alone, after its level where that is a warning or more."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return prefix + super().format(record)


@contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    level = _logger.level
    _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        _logger.removeHandler(handler)
        _logger.setLevel(level)


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

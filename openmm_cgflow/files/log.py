"""The logger ``openmm_cgflow``: to a file, to the console, and the versions it opens with."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from openmm_cgflow._version import __version__
from openmm_cgflow.files.atomic import writing

__all__ = ["console_logging", "file_logging", "held_back", "versions"]

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

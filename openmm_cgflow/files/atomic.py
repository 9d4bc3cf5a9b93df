"""Files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openmm_cgflow.errors import CGFlowError

__all__ = ["atomic_path", "atomic_write", "writing"]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path with the same suffix beside ``path``; it replaces ``path`` when the block succeeds.

    Raises:
        CGFlowError: If the operating system refuses to write.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


def atomic_write(path: Path, text: str) -> None:
    """Writes a text file whole or not at all.

    Raises:
        CGFlowError: If it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the operating system about ``path`` into a ``CGFlowError``."""
    try:
        yield
    except OSError as error:
        raise CGFlowError(f"{path}: cannot write: {error.strerror or error}") from error

"""Starting positions from files of the kinds that OpenMM reads, matched to a topology."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openmm import app

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.topology import refuse_explicit_solvent
from openmm_cgflow.settings import SystemSettings

__all__ = ["AMBER_READERS", "CHARMM_READERS", "READERS", "positions_for", "read_positions", "reading", "structure_file"]

READERS: dict[str, Callable[[str], Any]] = {
    ".pdb": app.PDBFile,
    ".ent": app.PDBFile,
    ".cif": app.PDBxFile,
    ".mmcif": app.PDBxFile,
    ".pdbx": app.PDBxFile,
    ".gro": app.GromacsGroFile,
}
AMBER_READERS = dict.fromkeys((".inpcrd", ".rst7", ".rst", ".restrt", ".crd", ".ncrst"), app.AmberInpcrdFile)
CHARMM_READERS: dict[str, Callable[[str], Any]] = {
    ".crd": app.CharmmCrdFile,
    ".cor": app.CharmmCrdFile,
    ".rst": app.CharmmRstFile,
}


def structure_file(settings: SystemSettings) -> Path:
    """The file with the starting positions.

    Raises:
        CGFlowError: If a synthetic target is named instead.
    """
    if settings.structure is None:
        raise CGFlowError(
            "system.target names a synthetic system and no files: train takes it as it is, and "
            "openmm_cgflow.paper.targets.target_system builds it"
        )
    return settings.structure


def read_positions(path: Path, readers: dict[str, Callable[[str], Any]]) -> Any:
    """What OpenMM's reader for the suffix finds in a file: ``positions``, and ``topology`` if it holds one.

    Arguments:
        path: The file.
        readers: By suffix, beside and before those of :data:`READERS`.

    Raises:
        CGFlowError: If the suffix is unknown, the file cannot be read, or it holds no atoms.
    """
    known = READERS | readers
    reader = known.get(path.suffix.lower())
    if reader is None:
        raise CGFlowError(f"{path}: unknown kind of coordinates {path.suffix!r}; expected one of {', '.join(known)}")
    with reading(path, f"OpenMM's {reader.__name__} cannot read it; is it a complete {path.suffix} file?"):
        content = reader(str(path))
    topology = getattr(content, "topology", None)
    if topology is not None and topology.getNumAtoms() == 0:
        raise CGFlowError(f"{path}: no atoms found; is it a {path.suffix} file?")
    return content


def positions_for(topology: app.Topology, settings: SystemSettings, readers: dict[str, Callable[[str], Any]]) -> Any:
    """Positions of the structure file once its atoms match the topology's, which is one molecule without solvent."""
    refuse_explicit_solvent(topology, str(settings.topology))
    content = read_positions(structure_file(settings), readers)
    if len(content.positions) != topology.getNumAtoms():
        raise CGFlowError(
            f"{structure_file(settings)} has {len(content.positions)} atoms but {settings.topology} has "
            f"{topology.getNumAtoms()}; they must list the same atoms in the same order"
        )
    other = getattr(content, "topology", None)
    if other is not None:
        for ours, theirs in zip(topology.atoms(), other.atoms(), strict=True):
            if None not in (ours.element, theirs.element) and ours.element.symbol != theirs.element.symbol:
                raise CGFlowError(
                    f"atom {ours.index} is {ours.residue.name}:{ours.name} ({ours.element.symbol}) in "
                    f"{settings.topology} but {theirs.residue.name}:{theirs.name} ({theirs.element.symbol}) in "
                    f"{settings.structure}; they must list the same atoms in the same order"
                )
    return content.positions


@contextmanager
def reading(source: Any, what: str) -> Iterator[None]:
    """Turns whatever a third-party parser raises into one message; they raise nearly every built-in type."""
    try:
        yield
    except CGFlowError:
        raise
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # closes the files that the parser left open
        raise CGFlowError(f"{source}: {what}: {type(error).__name__}: {error}") from error

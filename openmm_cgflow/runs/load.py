"""Checkpoints and models as files: tensors and numbers only, with the format's number, read without running code."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.run_directory import load_checked
from openmm_cgflow.molecule.system import MolecularSystem

__all__ = ["load_model_state", "load_state", "save_state"]

_FORMAT = 5  # a change of it makes older files unreadable
_SAME = 1e-5  # nm


def save_state(state: dict[str, Any], path: Path) -> None:
    """Writes a state of tensors, numbers, strings, lists and dictionaries."""
    # Through memory: where the disk is full, torch's own writer hides the system's error in a RuntimeError.
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **state}, buffer)
    path.write_bytes(buffer.getbuffer())


def load_state(path: Path, molecular_system: MolecularSystem | None = None) -> dict[str, Any]:
    """Reads what :func:`save_state` wrote. Damage can make it raise anything; see ``rundir.load_checked``.

    Arguments:
        path: The file.
        molecular_system: The molecule that the state must belong to, and where its atoms were.

    Raises:
        CGFlowError: If another version wrote it, or it belongs to another molecule.
    """
    state = torch.load(path, weights_only=True)
    if state.get("format") != _FORMAT:
        raise CGFlowError(f"{path}: written by another version of openmm-cgflow (format {state.get('format')})")
    if molecular_system is None:
        return state
    changed = ""
    if state["fingerprint"] != molecular_system.fingerprint():
        changed = "another molecule or force field"
    elif not np.allclose(state["positions"].numpy(), molecular_system.positions, rtol=0, atol=_SAME):
        changed = "other positions of the atoms"  # Cartesian coordinates and handedness are relative to them
    if changed:
        raise CGFlowError(
            f"{path}: belongs to {changed} than what was loaded now. Restore the original input files, or start a new "
            "run in another directory"
        )
    return state


def load_model_state(path: Path) -> dict[str, Any]:
    """Reads the model of a stage.

    Raises:
        CGFlowError: If it is damaged, or another version wrote it.
    """
    try:
        return load_checked(path, load_state)
    except CGFlowError:
        raise
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise CGFlowError(
            f"{path}: the model is damaged ({type(error).__name__}: {error}); restore the file or choose another stage"
        ) from error

"""Checkpoints and models as files, and ``load``: tensors and numbers only, read without running code."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_cgflow.config import Config, load_config
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.run_directory import RunDirectory, load_checked
from openmm_cgflow.model.cg_model import CGModel
from openmm_cgflow.molecule.force_fields import read_system_xml
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.molecule.topology import topology_from_table, topology_to_table
from openmm_cgflow.runs.build import Setup, build_geometry, new_density, new_model

__all__ = ["load", "load_model_state", "load_state", "model_state", "save_state"]

_FORMAT = 6  # a change of it makes older files unreadable
_SAME = 1e-5  # nm


def save_state(state: dict[str, Any], path: Path) -> None:
    """Writes a state of tensors, numbers, strings, lists and dictionaries."""
    # Through memory: where the disk is full, torch's own writer hides the system's error in a RuntimeError.
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **state}, buffer)
    path.write_bytes(buffer.getbuffer())


def load_state(path: Path, molecular_system: MolecularSystem | None = None) -> dict[str, Any]:
    """Reads what :func:`save_state` wrote. Damage can make it raise anything; see ``load_checked``.

    Arguments:
        path: The file.
        molecular_system: The molecule that the state must belong to, and where its atoms were.

    Raises:
        CGFlowError: If another version wrote it, or it belongs to another molecule.
    """
    state = torch.load(path, weights_only=True)
    if state.get("format") != _FORMAT:
        raise CGFlowError(
            f"{path}: written by another version of openmm-cgflow (format {state.get('format')}, and this one reads "
            f"{_FORMAT}). Train again in another directory, or open it with the version that provenance.json names"
        )
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


def model_state(model: CGModel) -> dict[str, Any]:
    """Tensors and numbers that :func:`load` makes the model of again."""
    system = model.molecular_system
    return {
        "geometry": model.geometry.saved_arrays(),
        "density": model.density.state_dict(),
        "temperatures": list(model.temperatures),
        "platform": model.defaults.platform,
        "pool": list(model.pool),
        "topology": topology_to_table(system.topology),
        "positions": torch.tensor(system.positions),
        "fingerprint": system.fingerprint(),
    }


def load(run_directory: str | Path, stage: int | None = None) -> CGModel:
    """Opens the model of a run.

    Arguments:
        run_directory: What ``train`` wrote.
        stage: Tempering stage, 0 the hottest; the last finished one by default.

    Raises:
        CGFlowError: If there is no such run or stage.
    """
    run = RunDirectory.open(run_directory)
    stages = run.stages()
    if not stages:
        raise CGFlowError(f"{run.path}: no tempering stage was finished yet; continue the training with --resume")
    if stage is None:
        stage = max(stages)
    if stage not in stages:
        raise CGFlowError(f"{run.path}: no stage {stage}; there are {', '.join(map(str, stages))}")
    path = stages[stage]
    state = load_model_state(path)
    config = load_config(run.config)
    molecular_system = MolecularSystem(
        topology_from_table(state["topology"]), read_system_xml(run.system_xml), state["positions"].numpy()
    )
    if molecular_system.fingerprint() != state["fingerprint"]:
        raise CGFlowError(f"{run.system_xml}: is not the System that {path} was trained on; restore that file")
    partition = Partition.resolve(molecular_system, run.read_slow_atoms())
    try:
        return _model(state, config, molecular_system, partition)
    except RuntimeError as error:  # torch's, for parameters of other names or shapes
        raise CGFlowError(
            f"{path}: does not fit the settings in {run.config}, which must stay as the training wrote them; restore "
            f"that file. {str(error).splitlines()[0]}"
        ) from error


def _model(state: dict[str, Any], config: Config, molecular_system: MolecularSystem, partition: Partition) -> CGModel:
    temperatures = list(state["temperatures"])
    geometry = build_geometry(config, molecular_system, partition, temperatures[0], saved=state["geometry"])
    density = new_density(config, geometry, temperatures[-1])
    density.load_state_dict(state["density"])
    setup, pool = Setup(config, molecular_system, partition, geometry), [tuple(entry) for entry in state["pool"]]
    return new_model(setup, density, temperatures, pool, state["platform"])

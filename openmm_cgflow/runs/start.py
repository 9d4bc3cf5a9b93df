"""A configuration for a new molecule, written once the molecule was loaded and its slow atoms were found."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from openmm_cgflow.config import load_config, template, validate
from openmm_cgflow.coordinates.zmatrix import slow_zmatrix
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.atomic import atomic_write, writing
from openmm_cgflow.molecule.bonds import bond_graph
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.units import parse_quantity

__all__ = ["new_configuration"]


def new_configuration(
    output: Path,
    system: Mapping[str, str | list[str]],
    *,
    temperature: str,
    slow: str | None = None,
    overwrite: bool = False,
    command: str = "",
) -> tuple[MolecularSystem, Partition]:
    """Writes a commented configuration with which the training of a molecule can start.

    Arguments:
        output: The YAML file; folders above it are made.
        system: Settings of the ``system`` section. Paths are relative to the current folder, and in the file to its
            own.
        temperature: Such as ``300 K``.
        slow: ``partition.slow``; ``backbone`` where there is one and else ``heavy`` by default.
        overwrite: Replace the file if it exists.
        command: How the file was made, for its first line.

    Returns:
        The molecule and its slow and fast atoms.

    Raises:
        CGFlowError: If the file exists or cannot be written, a setting is wrong, the molecule cannot be loaded or is
            not supported, or its slow atoms have no internal coordinates.
    """
    if output.exists() and not overwrite:
        raise CGFlowError(f"{output}: exists already; choose another name, or give --overwrite")
    try:
        kelvin = parse_quantity(temperature, "K")
    except ValueError as error:
        raise CGFlowError(f"--temperature: {error}") from None
    here = validate({"system": dict(system), "temperature": kelvin}, source="options")
    assert here.system is not None
    molecular_system = MolecularSystem.from_files(here.system)
    slow = slow or _preset(molecular_system)
    partition = Partition.resolve(molecular_system, slow)
    slow_zmatrix(bond_graph(molecular_system.n_atoms, molecular_system.bonds), partition.slow)  # refuses rings
    folder = output.resolve().parent

    def beside(path: str) -> str:
        # A force field's name stays a name for OpenMM to find unless it is a file here.
        return os.path.relpath(Path(path).resolve(), folder) if Path(path).is_file() else path

    written = {
        name: [beside(item) for item in value] if isinstance(value, list) else beside(value)
        for name, value in system.items()
    }
    if isinstance(include_dir := system.get("include_dir"), str):
        written["include_dir"] = os.path.relpath(Path(include_dir).resolve(), folder)
    text = template({"system": written, "temperature": kelvin, "partition": {"slow": slow}}, command)
    validate(yaml.safe_load(text), source=str(output))
    with writing(output):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write(output, text)
    load_config(output)
    return molecular_system, partition


def _preset(molecular_system: MolecularSystem) -> str:
    try:
        Partition.resolve(molecular_system, "backbone")
    except CGFlowError:
        return "heavy"
    return "backbone"

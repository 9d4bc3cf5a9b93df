"""From settings to the objects of a run: the one place that looks at a configuration to choose between them."""

from __future__ import annotations

from openmm_cgflow.config import Config
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.paper.targets import new_target, target_system

__all__ = ["choose_partition", "load_molecule"]


def load_molecule(config: Config) -> MolecularSystem:
    """The molecule of ``system``'s files, or the synthetic system of its ``target``.

    Raises:
        CGFlowError: If there is no ``system`` section, or the molecule cannot be loaded or is not supported.
    """
    if config.system is None:
        raise CGFlowError("the configuration has no system section, and no molecular_system was given")
    if config.system.target is not None:
        return target_system(new_target(config.system.target))
    return MolecularSystem.from_files(config.system)


def choose_partition(config: Config, molecular_system: MolecularSystem) -> Partition:
    """The slow atoms that ``partition`` names, with the hydrogens that turn with sampled peptide bonds.

    Raises:
        CGFlowError: If the selection is not understood or does not fit the molecule.
    """
    return Partition.resolve(molecular_system, config.partition.slow, config.coordinates.peptide_bonds == "sample")

"""From settings to the objects of a run: the one place that looks at a configuration to choose between them."""

from __future__ import annotations

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.geometry import Geometry, MoleculeGeometry, Saved
from openmm_cgflow.coordinates.harmonic import Evaluate
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.paper.box import BoxGeometry
from openmm_cgflow.paper.targets import Target, new_target, target_system
from openmm_cgflow.training.tempering import start_temperature

__all__ = ["build_geometry", "choose_partition", "exact_target", "hottest_temperature", "load_molecule"]


def load_molecule(config: Config) -> MolecularSystem:
    """The molecule of ``system``'s files, or the synthetic system of its ``target``.

    Raises:
        CGFlowError: If there is no ``system`` section, or the molecule cannot be loaded or is not supported.
    """
    if config.system is None:
        raise CGFlowError("the configuration has no system section, and no molecular_system was given")
    target = exact_target(config)
    return target_system(target) if target is not None else MolecularSystem.from_files(config.system)


def exact_target(config: Config) -> Target | None:
    """The synthetic system that ``system.target`` names; None for a molecule."""
    if config.system is None or config.system.target is None:
        return None
    return new_target(config.system.target)


def choose_partition(config: Config, molecular_system: MolecularSystem) -> Partition:
    """The slow atoms that ``partition`` names, with the hydrogens that turn with sampled peptide bonds.

    Raises:
        CGFlowError: If the selection is not understood or does not fit the molecule.
    """
    return Partition.resolve(molecular_system, config.partition.slow, config.coordinates.peptide_bonds == "sample")


def build_geometry(
    config: Config,
    molecular_system: MolecularSystem,
    partition: Partition,
    evaluate: Evaluate | None = None,
    saved: Saved = None,
) -> Geometry:
    """Coordinates, map to positions, and what the energy says of widths.

    Arguments:
        config: Sections ``coordinates``, ``tempering`` and ``temperature``, and the method, are used.
        molecular_system: The molecule, or the particles of a target.
        partition: Slow and fast atoms.
        evaluate: Energies and forces, to measure widths with.
        saved: ``saved_arrays()`` of an earlier geometry, instead of ``evaluate``.

    Raises:
        CGFlowError: If the slow atoms contain a ring or a straight chain, or the energy is not finite.
    """
    settings, slow, fast = config.coordinates, partition.slow, partition.fast
    if settings.kind == "box":
        return BoxGeometry.build(settings, molecular_system, slow, fast, evaluate, saved)
    hottest, cartesian = hottest_temperature(config), settings.kind == "cartesian"
    return MoleculeGeometry.build(settings, molecular_system, slow, fast, hottest, evaluate, saved, cartesian)


def hottest_temperature(config: Config) -> float:
    """Highest temperature of the training, K."""
    if config.training.method == "pmf":
        return config.temperature
    return start_temperature(config.tempering, config.temperature)

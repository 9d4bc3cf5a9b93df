"""From settings to the objects of a run: the one place that looks at a configuration to choose between them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.geometry import Geometry, MoleculeGeometry, Saved
from openmm_cgflow.coordinates.harmonic import Evaluate
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.model.cg_model import CGModel, SamplingDefaults
from openmm_cgflow.model.density import FlowDensity, JointDensity, PMFDensity, TrainedDensity
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.networks.flow import new_flow
from openmm_cgflow.networks.joint import new_joint
from openmm_cgflow.networks.pmf import new_pmf
from openmm_cgflow.networks.response import new_response
from openmm_cgflow.paper.box import BoxGeometry
from openmm_cgflow.paper.targets import Target, new_target, target_system

__all__ = [
    "Setup",
    "build_geometry",
    "choose_partition",
    "exact_target",
    "load_molecule",
    "new_density",
    "new_model",
]


class Setup(NamedTuple):
    """What is settled before any training.

    Attributes:
        config: All settings.
        molecular_system: The molecule.
        partition: Slow and fast atoms.
        geometry: Coordinates, widths, map to positions.
    """

    config: Config
    molecular_system: MolecularSystem
    partition: Partition
    geometry: Geometry


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
    hottest: float,
    evaluate: Evaluate | None = None,
    saved: Saved = None,
) -> Geometry:
    """Coordinates, map to positions, and what the energy says of widths.

    Arguments:
        config: Its section ``coordinates`` is used.
        molecular_system: The molecule, or the particles of a target.
        partition: Slow and fast atoms.
        hottest: Highest temperature of the training, K; see :func:`openmm_cgflow.runs.loop.hottest_temperature`.
        evaluate: Energies and forces, to measure widths with.
        saved: ``saved_arrays()`` of an earlier geometry, instead of ``evaluate``.

    Raises:
        CGFlowError: If the slow atoms contain a ring or a straight chain, or the energy is not finite.
    """
    settings, slow, fast = config.coordinates, partition.slow, partition.fast
    if settings.kind == "box":
        return BoxGeometry.build(settings, molecular_system, slow, fast, evaluate, saved)
    cartesian = settings.kind == "cartesian"
    return MoleculeGeometry.build(settings, molecular_system, slow, fast, hottest, evaluate, saved, cartesian)


def new_density(config: Config, geometry: Geometry, temperature: float) -> TrainedDensity:
    """What a training by ``training.method`` leaves at a temperature in K: untrained."""
    method, coordinates, seed = config.training.method, geometry.coordinates, config.seed
    flow = new_flow(config.flow, geometry, seed)
    if method == "joint":
        joint = new_joint(flow, config.joint, config.flow, geometry, config.temperature, seed)
        return JointDensity(coordinates, joint, config.temperature, temperature)
    if method == "reverse_kl":
        return FlowDensity(coordinates, flow)
    response = new_response(config.pmf, geometry, config.temperature, seed)
    return PMFDensity(coordinates, flow, new_pmf(config.pmf, geometry, seed), response)


def new_model(
    setup: Setup,
    density: TrainedDensity,
    temperatures: list[float],
    pool: list[tuple[Tensor, Tensor]],
    platform: str,
) -> CGModel:
    """A trained model with the settings of its run.

    Arguments:
        setup: What it was trained on.
        density: What was learned.
        temperatures: The ladder down to its own, K.
        pool: Where chains of the training ended.
        platform: Name of the OpenMM platform of the training.
    """
    config, molecular_system, partition, geometry = setup
    defaults = SamplingDefaults(config.chains, config.samples, config.seed, platform)
    return CGModel(molecular_system, partition, geometry, density, temperatures, pool, defaults)

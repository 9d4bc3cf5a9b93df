"""The choice of an engine and of its platform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

from openmm_cgflow.engines.context import FrozenMolecule
from openmm_cgflow.engines.copies import NotReplicableError
from openmm_cgflow.engines.engine import Engine, Molecule
from openmm_cgflow.engines.lattice import LatticeBuilder
from openmm_cgflow.engines.platforms import PlatformChoice, choose_platform
from openmm_cgflow.engines.workers import ContextsBuilder
from openmm_cgflow.settings import ChainSettings

__all__ = ["Builder", "create_engine"]


class Builder(Protocol):
    """An engine that could run a molecule: how fast it would be, and the engine itself."""

    def seconds_per_step(self, platform: PlatformChoice) -> float:
        """Time of one Langevin step of one replica, measured.

        Raises:
            openmm.OpenMMException: If the platform does not work.
        """
        ...

    def build(self, platform: PlatformChoice) -> Engine:
        """Creates the engine on a platform; its worker processes start at once."""
        ...


# Of a frozen molecule; NotReplicableError where it is not for this engine. Names as in ``chains.engine``.
_BUILDERS: dict[str, Callable[[FrozenMolecule], Builder]] = {"contexts": ContextsBuilder, "lattice": LatticeBuilder}


def create_engine(molecular_system: Molecule, slow: Sequence[int], settings: ChainSettings) -> Engine:
    """The engine that suits platform and energy: small Contexts on the CPU, one giant System on a GPU.

    A potential that takes all replicas in one call gets the giant System everywhere. A System that cannot be copied
    gets small Contexts everywhere.

    Arguments:
        molecular_system: The molecule (a ``MolecularSystem``); it is not changed.
        slow: Indices of the atoms to freeze.
        settings: Platform, precision, engine, workers and integrator settings.

    Raises:
        CGFlowError: If the platform asked for is not available, or a fast atom has no mass.
        ValueError: If the System was not sanitised; see :func:`openmm_cgflow.engines.context.frozen_system`.
    """
    molecule = FrozenMolecule(molecular_system, slow, settings)

    @cache  # a giant System is laid out and tested once, and only if some platform asks for it
    def named(name: str) -> Builder:
        try:
            return _BUILDERS[name](molecule)
        except NotReplicableError as error:
            return ContextsBuilder(molecule, f"no {name} engine, because the System cannot be copied: {error}")

    def suited(platform: PlatformChoice) -> Builder:
        automatic = "lattice" if platform.is_gpu or molecule.batched else "contexts"
        return named(automatic if settings.engine == "auto" else settings.engine)

    def seconds_per_step(platform: PlatformChoice) -> float:
        return suited(platform).seconds_per_step(platform)

    platform = choose_platform(settings.platform, settings.precision, seconds_per_step)
    return suited(platform).build(platform)

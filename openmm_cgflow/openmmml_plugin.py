"""A trained model as a potential of openmm-ml: ``openmmml.MLPotential("cgflow", modelPath="runs/ala2")``.

openmm-ml finds it by the entry point in the group ``openmmml.potentials``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import openmm
from openmm import app
from openmmml.mlpotential import MLPotentialImpl, MLPotentialImplFactory

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.model.cg_model import CGModel
from openmm_cgflow.model.free_energy import Energy
from openmm_cgflow.runs.load import load

__all__ = ["CGFlowPotential", "CGFlowPotentialFactory"]


class CGFlowPotentialFactory(MLPotentialImplFactory):
    """What openmm-ml calls for the name ``cgflow``."""

    def createImpl(
        self,
        name: str,
        modelPath: str = "",
        scale: float = 1.0,
        energy: Energy | None = None,
        ceiling: float | None = None,
    ) -> CGFlowPotential:
        """Opens a model.

        Arguments:
            name: ``cgflow``.
            modelPath: A run directory, or what ``openmm-cgflow export --format openmmml`` wrote.
            scale: Factor of the free energy.
            energy: Which; see :meth:`openmm_cgflow.CGModel.energy_of_positions`.
            ceiling: kJ/mol; see the same.

        Raises:
            CGFlowError: If there is no model.
        """
        if not modelPath:
            raise CGFlowError(f"MLPotential('{name}'): say which model: modelPath='runs/ala2', a run directory")
        return CGFlowPotential(load(modelPath), scale, energy, ceiling)


class CGFlowPotential(MLPotentialImpl):
    """The free energy on beads, or on the slow atoms where the topology is that of the training."""

    def __init__(self, model: CGModel, scale: float, energy: Energy | None, ceiling: float | None) -> None:
        self.model, self.scale, self.energy, self.ceiling = model, scale, energy, ceiling

    def addForces(
        self, topology: app.Topology, system: openmm.System, atoms: Iterable[int] | None, forceGroup: int, **args: Any
    ) -> None:
        """Adds the force; what openmm-ml's ``createSystem`` calls.

        Raises:
            CGFlowError: If the atoms are neither the beads nor the molecule of the training, or there are options.
        """
        if args:
            raise CGFlowError(
                f"MLPotential('cgflow'): unknown options {', '.join(args)}; scale, energy and ceiling go with modelPath"
            )
        present = list(topology.atoms())
        chosen = range(len(present)) if atoms is None else list(atoms)
        slow, elements = list(self.model.partition.slow), self.model.molecular_system.elements
        found = [present[i].element.symbol if present[i].element is not None else "X" for i in chosen]
        if found == [elements[i] for i in slow]:
            beads = list(chosen)
        elif found == elements:
            beads = [chosen[i] for i in slow]
        else:
            raise CGFlowError(
                f"MLPotential('cgflow'): got the elements {' '.join(found)}, expected those of the {len(slow)} slow "
                f"atoms, {' '.join(elements[i] for i in slow)}, or of all {len(elements)} atoms of the training"
            )
        force = self.model.create_force(scale=self.scale, atoms=beads, energy=self.energy, ceiling=self.ceiling)
        force.setForceGroup(forceGroup)
        system.addForce(force)

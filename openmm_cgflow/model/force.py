"""A trained model outside of this package's own sampling: as an OpenMM force, a System of beads, or TorchScript."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import networkx as nx
import numpy as np
import openmm
import torch
from openmm import app
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.model.free_energy import FreeEnergy
from openmm_cgflow.model.torsion_table import torsion_table
from openmm_cgflow.molecule.bonds import bond_graph
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.molecule.topology import copy_topology
from openmm_cgflow.molecule.torch_force import of_all_atoms, python_force, torch_force

__all__ = ["CGSystem", "Mechanism", "bead_system", "new_force", "traced", "traced_with_forces"]

Mechanism = Literal["python", "torchforce", "table"]
"""``openmm.PythonForce``; openmmtorch's ``TorchForce``, which needs the extra [torchforce]; or splines of torsions."""


class CGSystem(NamedTuple):
    """Beads in place of the slow atoms, for ``openmm.app.Simulation(topology, system, integrator)``.

    Attributes:
        topology: The slow atoms and the bonds between them.
        system: Their masses, those of the fast atoms that hang on them included, and the free energy as a force.
        positions: Of the input structure, nm, shape (n_slow, 3).
    """

    topology: app.Topology
    system: openmm.System
    positions: np.ndarray


def new_force(energy: FreeEnergy, atoms: Sequence[int], mechanism: Mechanism) -> openmm.Force:
    """The free energy as a force on ``atoms``, in the order in which ``energy`` takes them.

    Raises:
        CGFlowError: If the mechanism is not there.
    """
    force: openmm.Force
    if mechanism == "table":
        force = torsion_table(energy, atoms)
    elif mechanism == "python":
        force = python_force(torch.jit.freeze(traced_with_forces(energy)), atoms, outputs_forces=True)
    elif mechanism == "torchforce":
        module = of_all_atoms(traced_with_forces(energy), atoms, outputs_forces=True).eval()
        force = torch_force(torch.jit.freeze(module), outputs_forces=True)
    else:
        raise CGFlowError(f"mechanism: got {mechanism!r}, expected 'python', 'torchforce' or 'table'")
    force.setName("CGFreeEnergy")
    return force


def traced(energy: FreeEnergy) -> torch.jit.ScriptModule:
    """The same energy in TorchScript, without this package.

    Tracing is exact: nothing in the energy branches on values.
    """
    return _trace(energy, _example(energy))


def traced_with_forces(energy: FreeEnergy) -> torch.jit.ScriptModule:
    """Positions -> energy and forces in TorchScript, differentiated once and for all.

    So small a network spends its time on Python and on the records that autograd keeps; without them a call takes a
    third of the time.
    """
    positions = _example(energy)

    def both(xyz: Tensor) -> tuple[Tensor, Tensor]:
        value = energy(xyz)
        (gradient,) = torch.autograd.grad(value, xyz)
        return value.detach(), -gradient

    graph = make_fx(both)(positions.clone().requires_grad_())
    with torch.no_grad():
        return _trace(graph, positions)


def _trace(module: nn.Module, positions: Tensor) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of sizes, which are constants
        return torch.jit.trace(module.eval(), positions, check_trace=False)


def _example(energy: FreeEnergy) -> Tensor:
    """Some structure of the slow atoms, nm, shape (n_slow, 3)."""
    z = torch.zeros(energy.coordinates.n_features, dtype=torch.float64)
    xyz = energy.coordinates.to_xyz(z)
    return torch.empty_like(xyz).index_copy(0, energy.order, xyz)


def bead_system(molecular_system: MolecularSystem, partition: Partition, energy: FreeEnergy) -> CGSystem:
    """A System of the slow atoms alone, under the free energy."""
    slow = list(partition.slow)
    modeller = app.Modeller(copy_topology(molecular_system.topology), molecular_system.positions)
    atoms = list(modeller.topology.atoms())
    modeller.delete([atoms[i] for i in partition.fast])
    system = openmm.System()
    for mass in _bead_masses(molecular_system, slow):
        system.addParticle(mass)
    system.addForce(new_force(energy, range(len(slow)), "python"))
    return CGSystem(modeller.topology, system, molecular_system.positions[slow])


def _bead_masses(molecular_system: MolecularSystem, slow: list[int]) -> np.ndarray:
    """Each fast atom goes with the slow atom that is the fewest bonds away; of several, with the first."""
    masses = molecular_system.masses
    graph = bond_graph(molecular_system.n_atoms, molecular_system.bonds)
    bead = {atom: k for k, atom in enumerate(slow)}
    total = masses[slow].copy()
    for atom in set(graph) - set(slow):
        distances = nx.single_source_shortest_path_length(graph, atom)
        near = [i for i in slow if i in distances]  # particles of a target have no bonds
        if near:
            total[bead[min(near, key=distances.__getitem__)]] += masses[atom]
    return total

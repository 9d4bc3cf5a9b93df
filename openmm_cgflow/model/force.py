"""A free energy as an OpenMM force: in Python, in TorchScript or as a table of torsions, and beads under it."""

from __future__ import annotations

import math
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

from openmm_cgflow.coordinates.slow import InternalCoordinates
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.model.free_energy import FreeEnergy, TorsionPotential
from openmm_cgflow.molecule.bonds import bond_graph
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.molecule.topology import copy_topology
from openmm_cgflow.molecule.torch_force import of_all_atoms, python_force, torch_force

__all__ = ["CGSystem", "Mechanism", "bead_system", "new_force", "torsion_table", "traced", "traced_with_forces"]

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
    """A free energy in TorchScript, without this package.

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


_N_POINTS = {1: 361, 2: 121, 3: 37}  # of a turn, both ends included: 1, 3 and 10 degrees


def torsion_table(energy: FreeEnergy, atoms: Sequence[int]) -> openmm.CustomCompoundBondForce:
    """Periodic cubic splines through values on a grid of the torsions; its forces are those of the splines, exactly.

    Arguments:
        energy: Of the torsions alone, of one to three of them.
        atoms: Indices of the slow atoms in the System, in the order in which ``energy`` takes them.

    Raises:
        CGFlowError: If the energy depends on more than the torsions, or on more than three.
    """
    coordinates = energy.coordinates
    n = coordinates.n_circular
    if not isinstance(energy.potential, TorsionPotential) or not isinstance(coordinates, InternalCoordinates):
        raise CGFlowError("mechanism 'table' is for energy 'torsions' of a molecule: it cannot hold bonds and angles")
    if n not in _N_POINTS:
        raise CGFlowError(f"mechanism 'table' holds up to three torsions, and there are {n}: take 'python'")
    size = _N_POINTS[n]
    turn = torch.linspace(-math.pi, math.pi, size, dtype=torch.float64)
    turn[-1] = -math.pi  # the same point, to the last bit
    # OpenMM's tables have the first argument running fastest.
    angles = torch.cartesian_prod(*[turn] * n).reshape(-1, n).flip(-1)
    z = torch.cat((angles, angles.new_zeros(len(angles), coordinates.n_features - n)), dim=-1)
    with torch.no_grad():
        values = torch.cat([energy.of_coordinates(part) for part in z.split(4096)]).tolist()
    limits = [-math.pi, math.pi] * n
    if n == 1:
        function = openmm.Continuous1DFunction(values, *limits, True)
    else:
        make = openmm.Continuous2DFunction if n == 2 else openmm.Continuous3DFunction
        function = make(*[size] * n, values, *limits, True)
    dihedrals = ", ".join(f"dihedral({', '.join(f'p{4 * k + i}' for i in range(1, 5))})" for k in range(n))
    force = openmm.CustomCompoundBondForce(4 * n, f"table({dihedrals})")
    force.addTabulatedFunction("table", function)
    # The order of the coordinates is that of placement; order says where in `atoms` each of them is.
    quadruples = torch.cat((coordinates.slot_atom[:n, None], coordinates.references[coordinates.slot_atom[:n]]), dim=1)
    force.addBond([int(atoms[k]) for k in energy.order[quadruples.flatten()].tolist()], [])
    return force

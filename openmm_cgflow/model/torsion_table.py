"""The free energy of torsions as a table inside OpenMM: no Python in the step, plain XML, every platform."""

from __future__ import annotations

import math
from collections.abc import Sequence

import openmm
import torch

from openmm_cgflow.coordinates.slow import InternalCoordinates
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.model.free_energy import FreeEnergy, TorsionPotential

__all__ = ["torsion_table"]

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

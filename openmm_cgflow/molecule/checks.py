"""Whether a System with a topology and positions is one molecule that can be simulated: structure, forces, energy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.bonds import connected_components
from openmm_cgflow.molecule.sanitize import angle_term_ends, bond_term_pairs, energy_and_forces, sanitize
from openmm_cgflow.molecule.topology import atom_labels, copy_topology, refuse_explicit_solvent

__all__ = ["check_molecule"]

_IMPLICIT_SOLVENT = (openmm.GBSAOBCForce, openmm.CustomGBForce)
_SHORTEST_PAIR = 0.03
"""nm; half the shortest bond there is, H-H."""
_LONGEST_BOND = 1.0
"""nm; longer ones mean ångström taken for nm, or a molecule cut by a box."""
_SLOPE_ERROR = 0.05
"""Relative, of forces against the energy: more than single precision does, less than any wrong unit."""


def check_molecule(
    topology: app.Topology, system: openmm.System, positions: Any, notes: Sequence[str] = (), *, source: str
) -> tuple[app.Topology, openmm.System, np.ndarray, tuple[str, ...]]:
    """Copies of the parts of a molecule, sanitised, once every check has passed.

    Arguments:
        topology: Its bonds must connect all atoms; bonds it lacks are taken from the System's bond terms.
        system: Any non-periodic System.
        positions: ``(n_atoms, 3)``: a length ``Quantity``, a list of ``Vec3``, or an array in nm.
        notes: What was noticed before.
        source: Names the input in messages.

    Returns:
        Topology without a box, sanitised System, read-only positions ``(n_atoms, 3)`` in nm, and all notes.

    Raises:
        CGFlowError: If the parts do not fit each other, it is not one whole molecule in implicit solvent or vacuum,
            or its energy and forces are not finite, not each other's, or not the same wherever the molecule is.
    """
    if not isinstance(topology, app.Topology):
        raise CGFlowError(f"{source}: topology is a {type(topology).__name__}, expected an openmm.app.Topology")
    if not isinstance(system, openmm.System):
        raise CGFlowError(f"{source}: system is a {type(system).__name__}, expected an openmm.System")
    n_atoms = topology.getNumAtoms()
    if n_atoms == 0:
        raise CGFlowError(f"{source}: the topology has no atoms")
    if system.getNumParticles() != n_atoms:
        raise CGFlowError(
            f"{source}: the topology has {n_atoms} atoms but the System has "
            f"{system.getNumParticles()} particles; they must be the same atoms in the same order"
        )
    labels = atom_labels(topology)
    xyz = _position_array(positions, n_atoms, source)
    _refuse_nonfinite(xyz, labels, source)
    refuse_explicit_solvent(topology, source)
    notes = list(notes)
    if topology.getPeriodicBoxVectors() is not None:
        notes.append("the box of the input was dropped: the molecule is treated without periodicity")
    with _located(source):
        clean, changes = sanitize(system, xyz, labels.__getitem__)
    own_topology, added = _connected_topology(topology, clean, labels, source)
    _refuse_geometry(own_topology, xyz, labels, source)
    _refuse_energy(clean, xyz, source)
    xyz.setflags(write=False)
    if not any(isinstance(force, _IMPLICIT_SOLVENT) or _is_learned(force) for force in clean.getForces()):
        added = [*added, "the System has no implicit solvent: the molecule is in vacuum"]
    return own_topology, clean, xyz, tuple([*notes, *changes, *added])


def _is_learned(force: openmm.Force) -> bool:
    """Whether a force may be learned, and so stand for solvent, too.

    What a plugin adds, such as a TorchForce, comes back as a mere Force.
    """
    return type(force) in (openmm.PythonForce, openmm.Force)


@contextmanager
def _located(source: str) -> Iterator[None]:
    try:
        yield
    except CGFlowError as error:
        raise CGFlowError(f"{source}: {error}") from error


def _position_array(positions: Any, n_atoms: int, source: str) -> np.ndarray:
    expected = f"an array, a list of Vec3 or a length Quantity of shape ({n_atoms}, 3), plain numbers in nm"
    if positions is None:
        raise CGFlowError(f"{source}: positions are missing, expected {expected}")
    try:
        if unit.is_quantity(positions):
            positions = positions.value_in_unit(unit.nanometer)
        elif isinstance(positions, (list, tuple)) and any(unit.is_quantity(row) for row in positions):
            positions = [row.value_in_unit(unit.nanometer) for row in positions]
        xyz = np.array(positions, dtype=np.float64)
    except (TypeError, ValueError, AttributeError) as error:
        raise CGFlowError(f"{source}: positions are not understood ({error}); expected {expected}") from error
    if xyz.shape != (n_atoms, 3):
        raise CGFlowError(
            f"{source}: positions have shape {xyz.shape}, expected ({n_atoms}, 3): the topology has {n_atoms} atoms"
        )
    return xyz


def _refuse_nonfinite(xyz: np.ndarray, labels: list[str], source: str) -> None:
    wrong = np.flatnonzero(~np.isfinite(xyz).all(axis=1))
    if len(wrong):
        names = ", ".join(f"{labels[i]} (atom {i})" for i in wrong[:4])
        raise CGFlowError(
            f"{source}: {len(wrong)} atom(s) have coordinates that are not finite numbers: {names}"
            f"{', ...' if len(wrong) > 4 else ''}; mend or rebuild the structure"
        )


def _connected_topology(
    topology: app.Topology, system: openmm.System, labels: list[str], source: str
) -> tuple[app.Topology, list[str]]:
    own = copy_topology(topology)
    bonds = {tuple(sorted((bond.atom1.index, bond.atom2.index))) for bond in own.bonds()}
    components = connected_components(len(labels), bonds)
    notes = []
    if len(components) > 1:
        # PDB files name bonds of standard residues only; Urey-Bradley terms are not bonds.
        missing = sorted(bond_term_pairs(system) - angle_term_ends(system) - bonds)
        atoms = list(own.atoms())
        for first, second in missing:
            own.addBond(atoms[first], atoms[second])
        if missing:
            notes.append(f"{len(missing)} bond(s) that the topology lacks were taken from the System's bond terms")
        components = connected_components(len(labels), bonds | set(missing))
    if len(components) > 1:
        parts = [f"{len(part)} atom(s) from {labels[part[0]]} to {labels[part[-1]]}" for part in components[:5]]
        listed = "; ".join(parts)
        raise CGFlowError(
            f"{source}: the atoms form {len(components)} separate molecules ({listed}"
            f"{'; ...' if len(components) > 5 else ''}); several molecules are not supported yet: keep "
            "one molecule, or add the missing bonds (CONECT records in a PDB file)"
        )
    return own, notes


def _refuse_geometry(topology: app.Topology, xyz: np.ndarray, labels: list[str], source: str) -> None:
    for bond in topology.bonds():
        first, second = bond.atom1.index, bond.atom2.index
        length = float(np.linalg.norm(xyz[first] - xyz[second]))
        if length > _LONGEST_BOND:
            raise CGFlowError(
                f"{source}: the bond {labels[first]}-{labels[second]} is {length:.2f} nm long: positions "
                "must be in nm (plain numbers in ångström?) and the molecule must be whole"
            )
    for i in range(len(xyz) - 1):
        distances = np.linalg.norm(xyz[i + 1 :] - xyz[i], axis=1)
        j = int(distances.argmin())
        if distances[j] < _SHORTEST_PAIR:
            raise CGFlowError(
                f"{source}: atoms {labels[i]} and {labels[i + 1 + j]} overlap, {distances[j]:.4f} nm "
                "apart; minimise or rebuild the structure"
            )


def _refuse_energy(system: openmm.System, xyz: np.ndarray, source: str) -> None:
    with _located(source):
        energy, forces = energy_and_forces(system, xyz)
        moved, _ = energy_and_forces(system, _moved(xyz))
    if not (np.isfinite(energy) and np.isfinite(forces).all()):
        raise CGFlowError(
            f"{source}: the energy of the starting structure is {energy:g} kJ/mol and its forces are not "
            "all finite: atoms may overlap or parameters be wrong; minimise or rebuild the structure"
        )
    if not abs(moved - energy) <= 0.01 + 1e-5 * abs(energy):
        raise CGFlowError(
            f"{source}: the energy changes by {moved - energy:.3g} kJ/mol when the whole molecule is "
            "moved and turned: remove position restraints and external fields from the System"
        )
    with _located(source):
        slope, expected = _slopes(system, xyz)
    if not abs(slope - expected) <= _SLOPE_ERROR * abs(expected):
        raise CGFlowError(
            f"{source}: the forces are not those of the energy: it changes by {slope:.4g} kJ/mol/nm where they say "
            f"{expected:.4g}. A potential in Python must give forces in kJ/mol/nm; those of another library may be in "
            "kJ/mol/angstrom, or have the other sign"
        )


def _slopes(system: openmm.System, xyz: np.ndarray) -> tuple[float, float]:
    """Slope of the energy against the forces, kJ/mol/nm, by differences and by the forces, off the minimum."""
    away = xyz + 0.005 * np.random.default_rng(0).standard_normal(xyz.shape)
    _, forces = energy_and_forces(system, away)
    length = float(np.linalg.norm(forces))
    step = 0.001 * forces / max(length, 1e-12)
    above, below = (energy_and_forces(system, away + sign * step)[0] for sign in (1, -1))
    return (above - below) / 0.002, -length


def _moved(xyz: np.ndarray) -> np.ndarray:
    """``xyz`` turned by 2 radians about (1, 1, 1) and shifted, neither a symmetry of any molecule."""
    axis = np.ones(3) / np.sqrt(3.0)
    cross = np.cross(np.eye(3), axis)
    rotation = np.eye(3) + np.sin(2.0) * cross + (1 - np.cos(2.0)) * cross @ cross
    return xyz @ rotation + np.array([0.7, -0.4, 0.5])

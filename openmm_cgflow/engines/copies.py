"""Many copies of a molecule in one System: the copying of its forces, and where the copies sit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import openmm
from openmm import unit

from openmm_cgflow.molecule.python_forces import batched_energy
from openmm_cgflow.molecule.sanitize import energy_and_forces

__all__ = ["Lattice", "NotReplicableError", "check_copies", "plan_lattice", "replicate_system"]

_HALF_WIDTH = 20.0  # nm; beyond it float32 positions are coarser than 2e-6 nm
_STRETCH = 1.25  # no bond is expected to be longer than this times its length in the input structure


class NotReplicableError(Exception):
    """The System cannot be copied into one giant System; the message says why."""


@dataclass(frozen=True)
class _Terms:
    """One list of terms of a Force.

    Attributes:
        count, getter, adder: Names of the Force's methods.
        indices: Which of the getter's values are indices, or lists of them: from the first to before the last.
        of: The method of the Force that counts what they index; None for particles.
        one_argument: Whether the adder takes all values as one list.
    """

    count: str
    getter: str
    adder: str
    indices: tuple[int, int] = (0, 0)
    of: str | None = None
    one_argument: bool = False


def _terms(name: str, n_particles: int = 0) -> _Terms:
    return _Terms(f"getNum{name}s", f"get{name}Parameters", f"add{name}", (0, n_particles))


_EXCLUSIONS = _Terms("getNumExclusions", "getExclusionParticles", "addExclusion", (0, 2))
_CUSTOM_PARTICLES = _Terms("getNumParticles", "getParticleParameters", "addParticle", one_argument=True)

# Order matters where later terms index earlier ones. Energy functions, tabulated functions, global and per-term
# parameters, CMAP maps and settings come along with the copy of the Force itself.
_COPIED: dict[type[openmm.Force], tuple[_Terms, ...]] = {
    openmm.HarmonicBondForce: (_terms("Bond", 2),),
    openmm.HarmonicAngleForce: (_terms("Angle", 3),),
    openmm.PeriodicTorsionForce: (_terms("Torsion", 4),),
    openmm.RBTorsionForce: (_terms("Torsion", 4),),
    openmm.CMAPTorsionForce: (_Terms("getNumTorsions", "getTorsionParameters", "addTorsion", (1, 9)),),
    openmm.NonbondedForce: (
        _terms("Particle"),
        _terms("Exception", 2),
        _Terms("getNumParticleParameterOffsets", "getParticleParameterOffset", "addParticleParameterOffset", (1, 2)),
        _Terms(
            "getNumExceptionParameterOffsets",
            "getExceptionParameterOffset",
            "addExceptionParameterOffset",
            (1, 2),
            of="getNumExceptions",
        ),
    ),
    openmm.GBSAOBCForce: (_terms("Particle"),),
    openmm.CustomBondForce: (_terms("Bond", 2),),
    openmm.CustomAngleForce: (_terms("Angle", 3),),
    openmm.CustomTorsionForce: (_terms("Torsion", 4),),
    openmm.CustomNonbondedForce: (_CUSTOM_PARTICLES, _EXCLUSIONS, _terms("InteractionGroup", 2)),
    openmm.CustomGBForce: (_CUSTOM_PARTICLES, _EXCLUSIONS),
    openmm.CustomCompoundBondForce: (_terms("Bond", 1),),
    openmm.CustomCentroidBondForce: (
        _terms("Group", 1),
        _Terms("getNumBonds", "getBondParameters", "addBond", (0, 1), of="getNumGroups"),
    ),
}


def replicate_system(system: openmm.System, n_copies: int, cutoff: float) -> openmm.System:
    """One System with ``n_copies`` of the molecule, copy k being atoms ``k * n_atoms`` to ``(k + 1) * n_atoms - 1``.

    Forces between all pairs of atoms are cut off at ``cutoff`` (with reaction-field dielectric 1, which leaves
    Coulomb forces unchanged below it; energies change by a constant). Copies closer than that would interact: keeping
    them apart is the caller's job.

    Arguments:
        system: The System of one molecule, unchanged by this function.
        n_copies: How many.
        cutoff: In nm, larger than the molecule ever is.

    Raises:
        NotReplicableError: If the System has a Force, constraint or virtual site that cannot be copied.
    """
    n_atoms = system.getNumParticles()
    if system.getNumConstraints():
        raise NotReplicableError("it has constraints")
    if any(system.isVirtualSite(i) for i in range(n_atoms)):
        raise NotReplicableError("it has virtual sites")
    giant = openmm.System()
    for _ in range(n_copies):
        for i in range(n_atoms):
            giant.addParticle(system.getParticleMass(i))
    for force in system.getForces():
        batched = batched_energy(force)
        if batched is not None:
            giant.addForce(openmm.PythonForce(batched.replicated(n_copies)))
            continue
        if type(force) not in _COPIED:
            raise NotReplicableError(f"its {force.getName()} ({type(force).__name__}) is of a kind that is not copied")
        replica = copy.deepcopy(force)
        _set_cutoff(replica, cutoff)
        # All terms are read before any is added: a list must not be read while it grows.
        lists = [
            (terms, _read(force, terms), getattr(force, terms.of)() if terms.of else n_atoms)
            for terms in _COPIED[type(force)]
        ]
        for k in range(1, n_copies):
            for terms, values, n_indexed in lists:
                _add(getattr(replica, terms.adder), values, terms, k * n_indexed)
        giant.addForce(replica)
    return giant


def check_copies(system: openmm.System, positions: np.ndarray, offset: np.ndarray, cutoff: float) -> None:
    """Compares the forces in a System of two copies with those on one molecule, on the Reference platform.

    This catches energies that depend on the absolute position, or in any other way not on one copy alone.

    Arguments:
        system: The System of one molecule.
        positions: ``(n_atoms, 3)`` in nm.
        offset: Displacement of the second copy, ``(3,)`` in nm.
        cutoff: In nm, as for ``replicate_system``.

    Raises:
        NotReplicableError: If they differ.
    """
    _, single = energy_and_forces(system, positions)
    _, double = energy_and_forces(replicate_system(system, 2, cutoff), np.concatenate([positions, positions + offset]))
    error = np.abs(double.reshape(2, *single.shape) - single).max()
    if not error <= 1e-6 * (1.0 + np.abs(single).max()):
        raise NotReplicableError(f"forces in a System of two copies are off by {error:.2g} kJ/mol/nm")


def _set_cutoff(force: openmm.Force, cutoff: float) -> None:
    if not hasattr(force, "getNonbondedMethod"):
        if force.usesPeriodicBoundaryConditions():
            raise NotReplicableError(f"its {force.getName()} is periodic")
        return
    if force.getNonbondedMethod() != type(force).NoCutoff:
        raise NotReplicableError(f"its {force.getName()} has a cutoff or is periodic")
    force.setNonbondedMethod(type(force).CutoffNonPeriodic)
    force.setCutoffDistance(cutoff)
    if hasattr(force, "setReactionFieldDielectric"):
        force.setReactionFieldDielectric(1.0)
    if hasattr(force, "setUseSwitchingFunction"):
        force.setUseSwitchingFunction(False)  # ignored without a cutoff, so it must stay without effect


def _read(force: openmm.Force, terms: _Terms) -> list[list[Any]]:
    getter: Callable[[int], Any] = getattr(force, terms.getter)
    return [[_plain(value) for value in getter(i)] for i in range(getattr(force, terms.count)())]


def _plain(value: Any) -> Any:
    return value.value_in_unit_system(unit.md_unit_system) if unit.is_quantity(value) else value


def _add(adder: Callable[..., Any], values: list[list[Any]], terms: _Terms, offset: int) -> None:
    for value in values:
        if terms.one_argument:
            adder(value)
            continue
        first, last = terms.indices
        moved = [item + offset if isinstance(item, int) else [i + offset for i in item] for item in value[first:last]]
        adder(*value[:first], *moved, *value[last:])


@dataclass(frozen=True)
class Lattice:
    """Where the copies of a giant System sit.

    Attributes:
        molecule: The System of one copy.
        sites: Centres of the copies, ``(n_copies, 3)`` in nm, those nearest to the origin first.
        cutoff: Cutoff of the nonbonded forces in nm, larger than the molecule can be.
        radius: No atom may be farther than this from its copy's centre along any axis, in nm.
    """

    molecule: openmm.System
    sites: np.ndarray
    cutoff: float
    radius: float

    def system(self, n_copies: int) -> openmm.System:
        """The giant System of the first so many sites."""
        return replicate_system(self.molecule, n_copies, self.cutoff)


def plan_lattice(
    system: openmm.System, positions: np.ndarray, bonds: Sequence[tuple[int, int]], slow: Sequence[int], n_copies: int
) -> Lattice:
    """Lays out copies of a molecule so that no two of them interact.

    Distances along bonds bound distances in space: with every bond at most 1.25 times as long as in ``positions``, the
    longest shortest path through the bonds is an upper bound D of the molecule's diameter, whatever its torsions do.
    The cutoff is larger than D. A copy is centred on the middle of its slow atoms' bounding box, which is at most
    the slow atoms' own bound wide, and no fast atom is farther from its nearest slow atom than the path to it.
    That bounds each copy's half width, and sites are one cutoff and two half widths apart.

    Arguments:
        system: The System of one molecule, its slow atoms frozen.
        positions: Its input structure, ``(n_atoms, 3)`` in nm.
        bonds: Pairs of bonded atoms.
        slow: The slow atoms.
        n_copies: Copies wanted; fewer are laid out if they do not fit within 20 nm of the origin.

    Raises:
        NotReplicableError: If the System cannot be copied, the bonds do not connect all atoms, or there is no room.
    """
    paths = _path_lengths(positions, bonds)
    if not np.isfinite(paths).all():
        raise NotReplicableError("its bonds do not connect all atoms, so that its size has no bound")
    cutoff = 1.05 * paths.max() + 0.05
    between_slow = paths[np.ix_(slow, slow)]
    radius = between_slow.max() / 2 + paths[:, slow].min(axis=1).max() + 0.02
    spacing = cutoff + 2 * radius + 0.02
    per_axis = int((2 * (_HALF_WIDTH - radius)) // spacing) + 1
    if radius > _HALF_WIDTH or per_axis < 2:
        raise NotReplicableError(f"it can be {paths.max():.1f} nm long, too large for a lattice")
    per_axis = min(per_axis, int(np.ceil(n_copies ** (1 / 3) - 1e-9)))
    axis = (np.arange(per_axis) - (per_axis - 1) / 2) * spacing
    sites = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    sites = sites[np.argsort((sites**2).sum(axis=1), kind="stable")][:n_copies]
    check_copies(system, positions, np.array([spacing, 0.0, 0.0]), cutoff)
    return Lattice(system, sites, cutoff, radius)


def _path_lengths(positions: np.ndarray, bonds: Sequence[tuple[int, int]]) -> np.ndarray:
    """Upper bounds of all distances in nm, ``(n_atoms, n_atoms)``, infinite where no path connects."""
    graph = nx.Graph()
    graph.add_nodes_from(range(len(positions)))
    graph.add_weighted_edges_from((i, j, _STRETCH * np.linalg.norm(positions[i] - positions[j])) for i, j in bonds)
    lengths = np.full((len(positions), len(positions)), np.inf)
    for source, reached in nx.all_pairs_dijkstra_path_length(graph):
        lengths[source, list(reached)] = list(reached.values())
    return lengths

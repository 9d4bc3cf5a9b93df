"""Named states of a molecule's frames: cis and trans peptide bonds, mirror images, Ramachandran basins, rotamers.

A state is geometry alone, so the names mean the same for samples of a flow and for molecular dynamics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import mdtraj
import networkx as nx
import numpy as np
from mdtraj.geometry.dihedral import indices_phi, indices_psi

from openmm_cgflow.coordinates.zmatrix import slow_zmatrix
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.bonds import amide_bonds, bond_graph, stereocentres

__all__ = [
    "ALPHA_PSI",
    "PEPTIDE_BOND",
    "PHI_BORDERS",
    "RAMACHANDRAN",
    "ROTAMER",
    "dihedrals",
    "find",
    "memberships",
    "mirrored",
    "peptide_bond_state",
    "peptide_bonds",
    "peptide_torsions",
    "ramachandran_basin",
    "rotamer_state",
    "rotamers",
    "slow_torsions",
]

RAMACHANDRAN = ("alphaR", "beta", "PPII", "phi > 0")
"""Basins of (φ, ψ) in the order of :func:`ramachandran_basin`."""
PHI_BORDERS = (-180.0, -100.0, 0.0, 180.0)
"""Degrees: φ of β, of PPII and of the rest, one after the other."""
ALPHA_PSI = (-120.0, 50.0)
"""Degrees: ψ of αR, which takes its part of the first two."""
ROTAMER = ("trans", "gauche+", "gauche-")
"""Thirds of a torsion in the order of :func:`rotamer_state`."""
PEPTIDE_BOND = ("trans", "cis")
"""Halves of ω in the order of :func:`peptide_bond_state`."""

_SMALL_RING = 8  # smaller rings hold no trans amide


def ramachandran_basin(phi: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """Index into ``RAMACHANDRAN`` of angles in radians, any shape.

    αR: φ < 0, -120° < ψ < 50°; β: φ < -100° at other ψ; PPII: -100° ≤ φ < 0 at other ψ; then φ ≥ 0, which holds αL.
    """
    phi, psi = _degrees(phi), _degrees(psi)
    (_, beta, right, _), (low, high) = PHI_BORDERS, ALPHA_PSI
    alpha = (psi > low) & (psi < high)
    return np.select([phi >= right, alpha, phi < beta], [3, 0, 1], default=2)


def rotamer_state(angle: np.ndarray) -> np.ndarray:
    """Index into ``ROTAMER`` of angles in radians, any shape: trans beyond ±120°, gauche+ from 0 to 120°."""
    angle = _degrees(angle)
    return np.select([np.abs(angle) > 120, angle >= 0], [0, 1], default=2)


def peptide_bond_state(omega: np.ndarray) -> np.ndarray:
    """Index into ``PEPTIDE_BOND`` of angles in radians, any shape: cis within ±90°."""
    return (np.abs(_degrees(omega)) < 90).astype(np.int64)


def peptide_torsions(trajectory: mdtraj.Trajectory) -> dict[str, np.ndarray]:
    """φ and ψ of every residue that has both, radians: ``phi_ALA2``, ``psi_ALA2``, ... each of shape (n_frames,)."""
    # MDTraj fits the torsions to the residue that holds N, CA and C; atom 1 of φ and atom 0 of ψ are its N.
    phi_atoms, phi = mdtraj.compute_phi(trajectory, periodic=False)
    psi_atoms, psi = mdtraj.compute_psi(trajectory, periodic=False)
    psi_of = {int(atoms[0]): psi[:, k] for k, atoms in enumerate(psi_atoms)}
    result = {}
    for k, atoms in enumerate(phi_atoms):
        nitrogen = int(atoms[1])
        if nitrogen in psi_of:
            residue = trajectory.topology.atom(nitrogen).residue
            result[f"phi_{residue.name}{residue.resSeq}"] = phi[:, k]
            result[f"psi_{residue.name}{residue.resSeq}"] = psi_of[nitrogen]
    return result


def peptide_bonds(topology: mdtraj.Topology) -> dict[str, tuple[int, int, int, int]]:
    """Four atoms of ω of every amide bond, those of the caps included, by name: ``ACE1-ALA2``.

    Amides with NH2, which have no cis and trans, and those in rings of fewer than eight atoms are left out.

    Raises:
        CGFlowError: If the bonds of ``topology`` do not join all its atoms.
    """
    graph, elements = _graph(topology), _elements(topology)
    found = {}
    for edge in sorted(sorted(bond) for bond in amide_bonds(graph, elements)):
        carbon, nitrogen = edge if elements[edge[0]] == "C" else reversed(edge)
        # Where a formyl group or N-H leaves nothing heavier, hydrogen stands in; oxygen is never in the chain.
        outer = [i for i in graph[carbon] if i != nitrogen and elements[i] != "O"]
        inner = [i for i in graph[nitrogen] if i != carbon]
        if not outer or all(elements[i] == "H" for i in inner) or _in_small_ring(graph, carbon, nitrogen):
            continue
        first, last = min(outer, key=_rank(topology)), min(inner, key=_rank(topology))
        residues = [topology.atom(i).residue for i in (carbon, nitrogen)]
        within = residues[0] is residues[1]
        name = _label(topology, (carbon, nitrogen)) if within else "-".join(map(_residue, residues))
        if name in found:
            name = _label(topology, (carbon, nitrogen))
        found[name] = (first, carbon, nitrogen, last)
    return found


def rotamers(topology: mdtraj.Topology) -> dict[str, tuple[int, int, int, int]]:
    """Four heavy atoms of every torsion of a bond that is neither in a ring nor φ, ψ or ω: ``SER3:N-CA-CB-OG``.

    Ends that look the same after a part of a turn, such as carboxylates, phenyl rings and tert-butyl groups, have no
    rotamers and are left out.

    Raises:
        CGFlowError: If the bonds of ``topology`` do not join all its atoms.
    """
    graph, elements = _graph(topology), _elements(topology)
    named = set(amide_bonds(graph, elements)) | _ramachandran_bonds(topology)
    nx.set_node_attributes(graph, dict(enumerate(elements)), "element")
    colours = {
        atom: tuple(hashes)
        for atom, hashes in nx.weisfeiler_lehman_subgraph_hashes(graph, node_attr="element", iterations=16).items()
    }

    def branches(atom: int, other: int) -> list[int]:
        """The heavy neighbours that tell rotamers apart, nothing where there are none."""
        around = [i for i in graph[atom] if i != other]
        symmetric = len(around) > 1 and len({colours[i] for i in around}) == 1
        straight = len(around) == 1 and elements[atom] == "C"
        return [] if symmetric or straight else [i for i in around if elements[i] != "H"]

    found = {}
    for bond in sorted(sorted(edge) for edge in nx.bridges(graph)):
        left, right = bond
        first, last = branches(left, right), branches(right, left)
        if frozenset(bond) in named or not first or not last:
            continue
        atoms = (min(first, key=_rank(topology)), left, right, min(last, key=_rank(topology)))
        found[_label(topology, atoms)] = atoms
    return found


def slow_torsions(topology: mdtraj.Topology, slow: Iterable[int]) -> dict[str, tuple[int, int, int, int]]:
    """Four atoms of every torsion that turns the slow atoms, amide bonds left out, by name: ``BUT1:C1-C2-C3-C4``.

    Arguments:
        topology: The molecule.
        slow: Slow atoms; they are bonded together and hold no ring.
    """
    graph, elements = _graph(topology), _elements(topology)
    zmatrix = slow_zmatrix(graph, list(slow), amide_bonds(graph, elements), elements)
    rows = np.column_stack((zmatrix.atoms, zmatrix.references))[zmatrix.rotatable, ::-1].tolist()
    return {_label(topology, row): tuple(row) for row in rows}


def dihedrals(trajectory: mdtraj.Trajectory, atoms: Mapping[str, tuple[int, int, int, int]]) -> dict[str, np.ndarray]:
    """Angles of named torsions in radians, each of shape (n_frames,)."""
    if not atoms:
        return {}
    values = mdtraj.compute_dihedrals(trajectory, np.array(list(atoms.values())), periodic=False)
    return {name: values[:, k] for k, name in enumerate(atoms)}


def mirrored(trajectory: mdtraj.Trajectory, structure: mdtraj.Trajectory) -> dict[str, np.ndarray]:
    """Whether each stereocentre is the mirror image of the one in ``structure``: ``ALA2:CA``, each (n_frames,) bool."""
    topology = structure.topology
    graph = _graph(topology)
    rows = stereocentres(graph, _elements(topology))
    result = {}
    for row in rows:
        (centre,) = set.intersection(*({int(i), *graph[int(i)]} for i in row))  # without hydrogens it is in the row
        name = _label(topology, (centre,))
        result[name] = _signed_volume(trajectory.xyz, row) * _signed_volume(structure.xyz[:1], row) < 0
    return result


def memberships(trajectory: mdtraj.Trajectory, structure: mdtraj.Trajectory) -> dict[str, np.ndarray]:
    """Which frames are in which state; a frame is in many at a time.

    Arguments:
        trajectory: Whole molecules, nm; unit cells are not looked at.
        structure: The same atoms; its bonds define the states and its first frame the handedness.

    Returns:
        Masks of shape (n_frames,): ``cis ACE1-ALA2`` and ``trans ...`` of each peptide bond, ``mirror image ALA2:CA``,
        ``alphaR ALA2``, ``beta ...``, ``PPII ...`` and ``phi > 0 ...`` of each residue with φ and ψ, and ``trans``,
        ``gauche+`` and ``gauche- SER3:N-CA-CB-OG`` of each other torsion of heavy atoms.

    Raises:
        CGFlowError: If the two differ in the number of atoms, or the bonds do not join all atoms.
    """
    if trajectory.n_atoms != structure.n_atoms:
        raise CGFlowError(f"states: the frames have {trajectory.n_atoms} atoms, the structure {structure.n_atoms}")
    topology = structure.topology
    frames = mdtraj.Trajectory(trajectory.xyz, topology)
    found = {}

    def add(kinds: tuple[str, ...], name: str, labels: np.ndarray) -> None:
        found.update({f"{kind} {name}": labels == k for k, kind in enumerate(kinds)})

    for name, omega in dihedrals(frames, peptide_bonds(topology)).items():
        add(PEPTIDE_BOND, name, peptide_bond_state(omega))
    found.update({f"mirror image {name}": mask for name, mask in mirrored(frames, structure).items()})
    torsions = peptide_torsions(frames)
    for name in (key.removeprefix("phi_") for key in torsions if key.startswith("phi_")):
        add(RAMACHANDRAN, name, ramachandran_basin(torsions[f"phi_{name}"], torsions[f"psi_{name}"]))
    for name, angle in dihedrals(frames, rotamers(topology)).items():
        add(ROTAMER, name, rotamer_state(angle))
    return found


def find(
    trajectory: mdtraj.Trajectory, structure: mdtraj.Trajectory, weights: np.ndarray | None = None
) -> dict[str, float]:
    """The fraction of frames in each state of :func:`memberships`, those that no frame is in included.

    Arguments:
        trajectory: Whole molecules, nm.
        structure: The same atoms; its bonds define the states and its first frame the handedness.
        weights: Non-negative weights, not necessarily normalised, shape (n_frames,).
    """
    shares = np.full(trajectory.n_frames, 1.0) if weights is None else np.asarray(weights, dtype=np.float64)
    if shares.shape != (trajectory.n_frames,):
        raise ValueError(f"got weights of shape {shares.shape}, expected ({trajectory.n_frames},)")
    masks = memberships(trajectory, structure)
    return {name: float(shares[mask].sum() / shares.sum()) for name, mask in masks.items()}


def _degrees(angle: np.ndarray) -> np.ndarray:
    return np.degrees(np.asarray(angle, dtype=np.float64))


def _elements(topology: mdtraj.Topology) -> list[str]:
    return [atom.element.symbol for atom in topology.atoms]


def _graph(topology: mdtraj.Topology) -> nx.Graph:
    graph = bond_graph(topology.n_atoms, ((a.index, b.index) for a, b in topology.bonds))
    n_joined = len(nx.node_connected_component(graph, 0))
    if n_joined < topology.n_atoms:
        raise CGFlowError(
            f"the topology's bonds join only {n_joined} of its {topology.n_atoms} atoms, so its states cannot be "
            "named; add CONECT records for the missing bonds to the PDB file"
        )
    return graph


def _rank(topology: mdtraj.Topology) -> Callable[[int], tuple[bool, int, int]]:
    """Order in which neighbours define a torsion: the α carbon, then heavy before light, then the first."""
    return lambda i: (topology.atom(i).name != "CA", -topology.atom(i).element.number, i)


def _in_small_ring(graph: nx.Graph, first: int, second: int) -> bool:
    rest = nx.restricted_view(graph, [], [(first, second)])
    return nx.has_path(rest, first, second) and nx.shortest_path_length(rest, first, second) + 1 < _SMALL_RING


def _ramachandran_bonds(topology: mdtraj.Topology) -> set[frozenset[int]]:
    """The bonds that φ and ψ of :func:`peptide_torsions` turn."""
    phi = {int(row[1]): row for row in indices_phi(topology)}  # by the residue's nitrogen
    psi = {int(row[0]): row for row in indices_psi(topology)}
    rows = [torsions[nitrogen] for nitrogen in phi.keys() & psi.keys() for torsions in (phi, psi)]
    return {frozenset((int(row[1]), int(row[2]))) for row in rows}


def _residue(residue: mdtraj.core.topology.Residue) -> str:
    return f"{residue.name}{residue.resSeq}"


def _label(topology: mdtraj.Topology, atoms: Iterable[int]) -> str:
    """``SER3:N-CA-CB-OG`` within a residue, otherwise ``ACE1:C-ALA2:N``."""
    chosen = [topology.atom(int(i)) for i in atoms]
    if len({atom.residue.index for atom in chosen}) == 1:
        return f"{_residue(chosen[0].residue)}:" + "-".join(atom.name for atom in chosen)
    return "-".join(f"{_residue(atom.residue)}:{atom.name}" for atom in chosen)


def _signed_volume(xyz: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Volume whose sign is the handedness, as in ``openmm_cgflow.coordinates.placement``; shape (n_frames,)."""
    first, second, third, fourth = np.moveaxis(xyz[:, row].astype(np.float64), 1, 0)
    return np.einsum("ij,ij->i", np.cross(first - fourth, second - fourth), third - fourth)

"""What is read from the frames of a molecule to compare them: torsions, basins, states, radius of gyration, RMSD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mdtraj
import numpy as np

from openmm_cgflow.analysis import states

__all__ = ["Grouping", "Observables", "TorsionMap", "measure", "radius_of_gyration", "residues_with_maps"]


@dataclass(frozen=True)
class TorsionMap:
    """Two torsions that are looked at together.

    Attributes:
        axes: What the two are called.
        angles: Radians, shape (n_frames, 2).
    """

    axes: tuple[str, str]
    angles: np.ndarray


@dataclass(frozen=True)
class Grouping:
    """Basins of which each frame is in exactly one.

    Attributes:
        basins: Their names.
        labels: Index of each frame's basin, shape (n_frames,).
    """

    basins: tuple[str, ...]
    labels: np.ndarray


@dataclass(frozen=True)
class Observables:
    """Everything that is compared, of one set of frames.

    Attributes:
        maps: (φ, ψ) by residue; for a molecule without them its first two slow torsions.
        torsions: ω, χ1 and, for a molecule without φ and ψ, the slow torsions: radians, each of shape (n_frames,).
        groupings: Basins of each residue and of each torsion.
        sizes: Radius of gyration of all atoms and RMSD of the slow ones, nm, each of shape (n_frames,).
        states: Masks of shape (n_frames,), see :func:`openmm_cgflow.analysis.states.memberships`.
    """

    maps: dict[str, TorsionMap]
    torsions: dict[str, np.ndarray]
    groupings: dict[str, Grouping]
    sizes: dict[str, np.ndarray]
    states: dict[str, np.ndarray]


def residues_with_maps(structure: mdtraj.Trajectory) -> list[str]:
    """The residues that have both φ and ψ, such as ``ALA2``."""
    return [name.removeprefix("phi_") for name in states.peptide_torsions(structure) if name.startswith("phi_")]


def measure(
    trajectory: mdtraj.Trajectory,
    structure: mdtraj.Trajectory,
    slow: Sequence[int],
    residues: Sequence[str] | None = None,
) -> Observables:
    """Everything that is compared, read from frames.

    Arguments:
        trajectory: Whole molecules, nm.
        structure: The input structure, one frame.
        slow: The slow atoms, which the RMSD is taken over.
        residues: Those whose (φ, ψ) to look at; all by default.
    """
    peptide = states.peptide_torsions(trajectory)
    chosen = residues_with_maps(structure) if residues is None else residues
    maps, groupings = {}, {}
    for name in chosen:
        phi, psi = peptide[f"phi_{name}"], peptide[f"psi_{name}"]
        maps[name] = TorsionMap(("φ", "ψ"), np.column_stack((phi, psi)))
        groupings[name] = Grouping(states.RAMACHANDRAN, states.ramachandran_basin(phi, psi))
    omega = states.dihedrals(trajectory, states.peptide_bonds(structure.topology))
    torsions = {f"omega {name}": angle for name, angle in omega.items()}
    groupings |= {
        name: Grouping(states.PEPTIDE_BOND, states.peptide_bond_state(angle)) for name, angle in torsions.items()
    }
    others = _chi1(trajectory)
    if not peptide:
        slow_torsions = states.dihedrals(trajectory, states.slow_torsions(structure.topology, slow))
        if len(slow_torsions) > 1:
            (first, one), (second, two), *_ = slow_torsions.items()
            maps["slow torsions"] = TorsionMap((first, second), np.column_stack((one, two)))
        others |= slow_torsions
    groupings |= {name: Grouping(states.ROTAMER, states.rotamer_state(angle)) for name, angle in others.items()}
    return Observables(
        maps,
        torsions | others,
        groupings,
        {
            "Rg": radius_of_gyration(trajectory),
            "RMSD": mdtraj.rmsd(trajectory, structure, atom_indices=list(slow)).astype(np.float64),
        },
        states.memberships(trajectory, structure),
    )


def radius_of_gyration(trajectory: mdtraj.Trajectory) -> np.ndarray:
    """sqrt(Σ m |x - x_com|² / Σ m) (paper eq. 22), nm, shape (n_frames,).

    ``mdtraj.compute_rg`` measures from the unweighted centre, which is not the centre of mass.
    """
    masses = np.array([atom.element.mass for atom in trajectory.topology.atoms])
    shares = masses / masses.sum()
    xyz = trajectory.xyz.astype(np.float64)
    away = xyz - np.einsum("a,fax->fx", shares, xyz)[:, None]
    return np.sqrt(np.einsum("a,fax,fax->f", shares, away, away))


def _chi1(trajectory: mdtraj.Trajectory) -> dict[str, np.ndarray]:
    atoms, angles = mdtraj.compute_chi1(trajectory, periodic=False)
    names = [trajectory.topology.atom(int(row[1])).residue for row in atoms]
    return {f"chi1 {residue.name}{residue.resSeq}": angles[:, k] for k, residue in enumerate(names)}

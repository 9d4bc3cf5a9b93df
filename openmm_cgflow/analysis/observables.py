"""Samples of a run read back with their weights, and what is measured of them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mdtraj
import numpy as np

from openmm_cgflow.analysis import states
from openmm_cgflow.analysis.reference import load_frames
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.files.trajectory import read_colvar

__all__ = [
    "Grouping",
    "Observables",
    "TorsionMap",
    "measure",
    "radius_of_gyration",
    "read_samples",
    "residues_with_maps",
]


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


def read_samples(
    run: RunDirectory, path: Path, structure: mdtraj.Trajectory
) -> tuple[mdtraj.Trajectory, np.ndarray | None]:
    """The frames, and the logarithms of their importance weights if the COLVAR table has them.

    Raises:
        CGFlowError: If a file is missing, cannot be read or does not fit.
    """
    if not path.is_file():
        raise CGFlowError(
            f"{path}: no such file, so there are no samples to evaluate. Draw some with\n"
            f"  openmm-cgflow sample {shlex.quote(str(run.path))} -n 10000 -o {shlex.quote(str(path))}"
        )
    trajectory = load_frames(path, structure)
    colvar = path.with_suffix(".colvar")
    if not colvar.is_file():
        raise CGFlowError(f"{colvar}: no such file; `openmm-cgflow sample` writes it beside {path.name}, restore it")
    columns = read_colvar(colvar)
    n_rows = len(columns["time"]) if "time" in columns else len(next(iter(columns.values()), []))
    if n_rows != trajectory.n_frames:
        raise CGFlowError(
            f"{colvar}: has {n_rows} rows, {path} has {trajectory.n_frames} frames; give files of one sampling"
        )
    log_weight = columns.get("log_weight")
    if log_weight is not None and not (np.isfinite(log_weight.max()) and not np.isnan(log_weight).any()):
        raise CGFlowError(f"{colvar}: log_weight must be numbers, -inf for no weight, and not all -inf")
    return trajectory, log_weight

"""What samples are compared with: a trajectory with or without weights, or a gridded PMF."""

from __future__ import annotations

import importlib.util
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import mdtraj
import numpy as np
from mdtraj.formats.registry import FormatRegistry

from openmm_cgflow.analysis.distances import N_BINS, circle_overlap
from openmm_cgflow.analysis.states import ALPHA_PSI, PHI_BORDERS
from openmm_cgflow.errors import CGFlowError

__all__ = ["GridReference", "TrajectoryReference", "load_frames", "load_reference", "load_structure"]

_LONGEST_BOND = 0.3  # nm; the longest covalent bonds, to iodine, have 0.27
# Files that bring atoms of their own: these are compared with the run's instead of being taken for them.
_WITH_TOPOLOGY = (
    ".pdb",
    ".pdbx",
    ".cif",
    ".mmcif",
    ".gro",
    ".mol2",
    ".h5",
    ".hdf5",
    ".lh5",
    ".arc",
    ".hoomdxml",
    ".gsd",
)


@dataclass(frozen=True)
class GridReference:
    """Probability of (φ, ψ) on a grid.

    Attributes:
        path: Its file.
        probability: Sums to one, first index φ, shape (n, n).
        centers: Centres of the bins of both angles, radians, shape (n,).
    """

    path: Path
    probability: np.ndarray
    centers: np.ndarray

    def rebinned(self) -> np.ndarray:
        """Probabilities on the bins of comparisons by overlap of areas, which keeps the mass, shape (36, 36)."""
        edges = np.linspace(-np.pi, np.pi, N_BINS + 1)
        overlap = circle_overlap(self.centers, np.column_stack((edges[:-1], edges[1:])))
        return overlap @ self.probability @ overlap.T

    def populations(self) -> np.ndarray:
        """Populations of ``states.RAMACHANDRAN``, bins on a border shared by area, shape (4,)."""
        phi = circle_overlap(self.centers, np.radians([*pairwise(PHI_BORDERS)]))
        alpha = circle_overlap(self.centers, np.radians([ALPHA_PSI]))[0]
        far, near, right = phi @ self.probability
        return np.array([(far + near) @ alpha, far @ (1 - alpha), near @ (1 - alpha), right.sum()])


@dataclass(frozen=True)
class TrajectoryReference:
    """Frames with weights.

    Attributes:
        path: Its file.
        trajectory: Whole molecules, with the atoms of the run.
        weights: Non-negative, not all zero, shape (n_frames,).
    """

    path: Path
    trajectory: mdtraj.Trajectory
    weights: np.ndarray


def load_reference(
    path: Path, structure: mdtraj.Trajectory, *, topology: Path | None = None, weights: Path | None = None
) -> GridReference | TrajectoryReference:
    """Reads what samples are compared with: a grid of (φ, ψ) or a trajectory.

    Arguments:
        path: An ``.npz`` file with the arrays P (n, n), probability of (φ, ψ), and centers (n,) in radians; or a
            trajectory in any format MDTraj reads.
        structure: The run's molecule.
        topology: Of the trajectory, if its format has none; the run's by default.
        weights: One number for each frame, text or ``.npy``.

    Raises:
        CGFlowError: If a file is missing, cannot be read, or does not fit the others.
    """
    if path.suffix.lower() != ".npz":
        trajectory = load_frames(path, structure, topology=topology)
        _refuse_broken(path, trajectory)
        n = trajectory.n_frames
        return TrajectoryReference(path, trajectory, np.ones(n) if weights is None else _load_weights(weights, n))
    for file, what in ((topology, "topology"), (weights, "weights")):
        if file is not None:
            raise CGFlowError(f"{file}: a gridded reference ({path}) takes no {what}; leave it out")
    return _load_grid(path)


def load_structure(path: Path) -> mdtraj.Trajectory:
    """The first frame of a structure file.

    Raises:
        CGFlowError: If it cannot be read.
    """
    _require(path)
    try:
        return mdtraj.load_frame(str(path), 0)
    except Exception as error:  # MDTraj's readers raise many unrelated types
        raise CGFlowError(f"{path}: cannot be read as a structure: {_first_line(error)}") from error


def _load_topology(path: Path) -> mdtraj.Topology:
    _require(path)
    try:
        return mdtraj.load_topology(str(path))
    except Exception as error:  # MDTraj's readers raise many unrelated types
        raise CGFlowError(f"{path}: cannot be read as a topology: {_first_line(error)}") from error


def load_frames(path: Path, structure: mdtraj.Trajectory, *, topology: Path | None = None) -> mdtraj.Trajectory:
    """Frames with the atoms of ``structure``, made whole where the file has a unit cell.

    Arguments:
        path: Any format MDTraj reads.
        structure: The molecule that the frames must be of.
        topology: A file with the atoms of the trajectory; those of ``structure`` by default.

    Raises:
        CGFlowError: If a file is missing, of an unknown format or damaged, or the atoms are not those of ``structure``.
    """
    _require(path)
    suffix = next((s for s in FormatRegistry.loaders if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise CGFlowError(
            f"{path}: unknown format; use a trajectory that MDTraj reads, such as .dcd, .xtc or .h5, or a grid as .npz"
        )
    if suffix in (".h5", ".hdf5", ".lh5") and importlib.util.find_spec("tables") is None:
        raise CGFlowError(f"{path}: HDF5 needs PyTables: pip install tables, or conda install pytables")
    own = suffix.removesuffix(".gz") in _WITH_TOPOLOGY
    atoms = structure.topology if topology is None else _load_topology(topology)
    try:
        frames = mdtraj.load(str(path)) if own and topology is None else mdtraj.load(str(path), top=atoms)
    except Exception as error:  # MDTraj's readers raise many unrelated types
        if (n_atoms := _n_atoms(path)) not in (None, atoms.n_atoms):
            raise _wrong_number(path, n_atoms, atoms.n_atoms, "the run" if topology is None else topology) from error
        raise CGFlowError(f"{path}: cannot be read as a trajectory: {_first_line(error)}") from error
    if frames.n_atoms != structure.n_atoms:
        raise _wrong_number(path, frames.n_atoms, structure.n_atoms, "the run")
    _refuse_other_elements(topology or path, frames.topology, structure.topology)
    if frames.n_frames == 0:
        raise CGFlowError(f"{path}: holds no frame")
    if not np.isfinite(frames.xyz).all():
        n_bad = int((~np.isfinite(frames.xyz)).any(axis=(1, 2)).sum())
        raise CGFlowError(f"{path}: {n_bad} of {frames.n_frames} frames hold positions that are not finite")
    frames.topology = structure.topology
    if frames.unitcell_vectors is not None:
        frames.make_molecules_whole(inplace=True)
    return frames


def _require(path: Path) -> None:
    if not path.is_file():
        raise CGFlowError(f"{path}: no such file")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _n_atoms(path: Path) -> int | None:
    """Number of atoms in the first frame, None where the file cannot tell."""
    try:
        with mdtraj.open(str(path)) as file:
            read = file.read(n_frames=1)
        return int(np.shape(read[0] if isinstance(read, tuple) else read)[1])
    except Exception:  # only asked after a failure, to tell more about it
        return None


def _wrong_number(path: Path, n_atoms: int | None, expected: int, owner: str | Path) -> CGFlowError:
    return CGFlowError(
        f"{path}: has {n_atoms} atoms, {owner} has {expected}; save the molecule alone, with its atoms in the order of "
        "the run's topology.pdb"
    )


def _refuse_other_elements(path: Path, atoms: mdtraj.Topology, expected: mdtraj.Topology) -> None:
    for ours, theirs in zip(expected.atoms, atoms.atoms, strict=True):
        # Some formats leave elements open; atoms in another order then show by their bonds.
        if theirs.element is not None and theirs.element.number and theirs.element is not ours.element:
            raise CGFlowError(
                f"{path}: atom {ours.index} (0-based) is {theirs}, in the run it is {ours}; bring the atoms into the "
                "order of the run's topology.pdb"
            )


def _refuse_broken(path: Path, frames: mdtraj.Trajectory) -> None:
    """Refuses atoms in another order and molecules cut by a box: bonded atoms are then far apart."""
    pairs = np.array([(a.index, b.index) for a, b in frames.topology.bonds]).reshape(-1, 2)
    lengths = mdtraj.compute_distances(frames, pairs, periodic=False)
    if lengths.max(initial=0.0) > _LONGEST_BOND:
        frame, pair = np.unravel_index(lengths.argmax(), lengths.shape)
        first, second = (frames.topology.atom(int(i)) for i in pairs[pair])
        raise CGFlowError(
            f"{path}: {first} and {second}, which are bonded in the run, are {lengths[frame, pair]:.2f} nm apart in "
            f"frame {frame}. Are the atoms in the order of the run's topology.pdb, and is the molecule whole?"
        )


def _load_weights(path: Path, n_frames: int) -> np.ndarray:
    _require(path)
    try:
        raw = np.load(path, allow_pickle=False) if path.suffix.lower() == ".npy" else np.loadtxt(path)
        weights = np.atleast_1d(np.squeeze(raw)).astype(np.float64)
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise CGFlowError(f"{path}: cannot be read as numbers: {_first_line(error)}") from error
    if weights.shape != (n_frames,):
        got = " x ".join(map(str, weights.shape))
        raise CGFlowError(f"{path}: holds {got} weights, the reference has {n_frames} frames; give one for each")
    if not np.isfinite(weights).all() or weights.min() < 0:
        wrong = int(np.argmax(~np.isfinite(weights) | (weights < 0)))
        raise CGFlowError(
            f"{path}: weight {wrong} (0-based) is {weights[wrong]:g}; weights must be finite, not negative"
        )
    if weights.sum() == 0:
        raise CGFlowError(f"{path}: all weights are zero")
    return weights


def _load_grid(path: Path) -> GridReference:
    _require(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive)
            arrays = {name: np.asarray(archive[name], dtype=np.float64) for name in ("P", "centers") if name in names}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise CGFlowError(f"{path}: cannot be read as an .npz file of numbers: {_first_line(error)}") from error
    if len(arrays) < 2:
        held = ", ".join(names) or "nothing"
        raise CGFlowError(
            f"{path}: holds {held}; a gridded reference needs P (n, n), the probability of (φ, ψ), and centers (n,) in "
            "radians"
        )
    probability, centers = arrays["P"], arrays["centers"]
    n = len(centers) if centers.ndim == 1 else 0
    if n < 2 or probability.shape != (n, n):
        raise CGFlowError(
            f"{path}: P has shape {probability.shape} and centers {centers.shape}; (n, n) and (n,) needed"
        )
    if not np.isfinite(probability).all() or probability.min() < 0 or probability.sum() == 0:
        raise CGFlowError(f"{path}: P must be finite, not negative and not all zero")
    width = 2 * np.pi / n
    if not np.allclose(np.diff(centers), width, rtol=0, atol=0.01 * width) or np.abs(centers).max() > np.pi + width:
        raise CGFlowError(
            f"{path}: centers must be {n} angles in radians from -π to π, {width:.4g} apart; they go from "
            f"{centers[0]:g} to {centers[-1]:g} (in degrees?)"
        )
    return GridReference(path, probability / probability.sum(), centers)

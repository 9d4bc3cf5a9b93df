"""References in many formats are read as they are, and what does not fit is refused with one clear message."""

import importlib.util

import mdtraj
import numpy as np
import pytest
from conformers import atoms_of, basin_frames
from molecules import ALANINE, BUTANE, frame

from openmm_cgflow.analysis.reference import (
    GridReference,
    TrajectoryReference,
    load_frames,
    load_reference,
    load_structure,
)
from openmm_cgflow.errors import CGFlowError

COUNTS = {"alphaR": 4, "beta": 3, "PPII": 2, "phi > 0": 1}


@pytest.fixture(scope="module")
def structure():
    return load_structure(ALANINE)


@pytest.fixture(scope="module")
def frames(structure):
    return basin_frames(structure, COUNTS)


@pytest.mark.parametrize("suffix", [".dcd", ".xtc", ".trr", ".pdb", ".pdb.gz", ".h5"])
def test_formats(tmp_path, structure, frames, suffix):
    if suffix == ".h5" and importlib.util.find_spec("tables") is None:
        pytest.skip("PyTables is not installed")
    path = tmp_path / f"md{suffix}"
    frames.save(str(path))
    reference = load_reference(path, structure)
    assert isinstance(reference, TrajectoryReference)
    assert np.abs(reference.trajectory.xyz - frames.xyz).max() < 6e-4
    assert reference.trajectory.topology is structure.topology
    assert np.array_equal(reference.weights, np.ones(10))


def test_hdf5_without_pytables(tmp_path, structure, monkeypatch):
    (tmp_path / "md.h5").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CGFlowError, match="PyTables: pip install tables"):
        load_reference(tmp_path / "md.h5", structure)


def test_a_topology_of_its_own(tmp_path, structure, frames):
    frames.save(str(tmp_path / "md.dcd"))
    frames[0].save(str(tmp_path / "md.gro"))
    reference = load_reference(tmp_path / "md.dcd", structure, topology=tmp_path / "md.gro")
    assert np.abs(reference.trajectory.xyz - frames.xyz).max() < 1e-5


def test_molecules_cut_by_a_box_are_made_whole(tmp_path, structure, frames):
    inside = frames.xyz % 1.2  # a box that the molecule fits into, but not all copies of it do uncut
    boxed = mdtraj.Trajectory(
        inside, structure.topology, unitcell_lengths=np.full((10, 3), 1.2), unitcell_angles=np.full((10, 3), 90.0)
    )
    boxed.save(str(tmp_path / "boxed.dcd"))
    whole = load_frames(tmp_path / "boxed.dcd", structure)
    assert np.abs(inside - frames.xyz).max() > 1
    assert np.allclose(mdtraj.rmsd(whole, frames[0]), mdtraj.rmsd(frames, frames[0]), atol=2e-3)
    boxed.unitcell_vectors = None
    boxed.save(str(tmp_path / "cut.dcd"))
    with pytest.raises(CGFlowError, match=r"which are bonded in the run, are \d\.\d\d nm apart.*whole"):
        load_reference(tmp_path / "cut.dcd", structure)


@pytest.mark.parametrize("name", ["w.txt", "w.npy"])
def test_weights(tmp_path, structure, frames, name):
    frames.save(str(tmp_path / "md.dcd"))
    weights = np.arange(10.0)
    save = np.save if name.endswith("npy") else np.savetxt
    save(tmp_path / name, weights)
    reference = load_reference(tmp_path / "md.dcd", structure, weights=tmp_path / name)
    assert np.array_equal(reference.weights, weights)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.ones(9), "holds 9 weights, the reference has 10 frames"),
        (np.ones((10, 2)), "holds 10 x 2 weights"),
        (np.array([1.0] * 9 + [-0.5]), "weight 9 (0-based) is -0.5"),
        (np.array([np.nan] + [1.0] * 9), "weight 0 (0-based) is nan"),
        (np.zeros(10), "all weights are zero"),
    ],
)
def test_wrong_weights(tmp_path, structure, frames, values, says):
    frames.save(str(tmp_path / "md.dcd"))
    np.savetxt(tmp_path / "w.txt", values)
    with pytest.raises(CGFlowError) as caught:
        load_reference(tmp_path / "md.dcd", structure, weights=tmp_path / "w.txt")
    assert says in str(caught.value)
    assert "w.txt" in str(caught.value)


def test_unreadable_weights(tmp_path, structure, frames):
    frames.save(str(tmp_path / "md.dcd"))
    (tmp_path / "w.txt").write_text("1\nmany\n")
    for name, says in (("w.txt", "cannot be read as numbers"), ("v.txt", "no such file")):
        with pytest.raises(CGFlowError, match=says):
            load_reference(tmp_path / "md.dcd", structure, weights=tmp_path / name)


def test_wrong_trajectories(tmp_path, structure, frames):
    butane = frame(BUTANE)
    butane.save(str(tmp_path / "butane.dcd"))
    butane.save(str(tmp_path / "butane.pdb"))
    swapped = frames.atom_slice(range(22))
    oxygen, carbon = atoms_of(structure.topology, "ACE1-O", "ALA2-CB")
    swapped.xyz[:, [oxygen, carbon]] = frames.xyz[:, [carbon, oxygen]]
    swapped.save(str(tmp_path / "swapped.dcd"))
    bad = frames.atom_slice(range(22))
    bad.xyz[3, 5, 1] = np.nan
    bad.save(str(tmp_path / "nan.dcd"))
    (tmp_path / "md.traj").touch()
    (tmp_path / "broken.dcd").write_bytes(b"not a trajectory" * 20)
    (tmp_path / "broken.txt").write_text("")
    frames.save(str(tmp_path / "md.dcd"))
    for name, topology, says in (
        ("none.dcd", None, "none.dcd: no such file"),
        ("md.traj", None, "unknown format"),
        ("butane.dcd", None, "has 14 atoms, the run has 22"),
        ("butane.pdb", None, "has 14 atoms, the run has 22"),
        ("butane.dcd", "butane.pdb", "has 14 atoms, the run has 22"),
        ("md.dcd", "butane.pdb", "md.dcd: has 22 atoms"),
        ("md.dcd", "none.pdb", "none.pdb: no such file"),
        ("md.dcd", "broken.txt", "broken.txt: cannot be read as a topology"),
        ("swapped.dcd", None, "bonded in the run"),
        ("nan.dcd", None, "1 of 10 frames hold positions that are not finite"),
        ("broken.dcd", None, "cannot be read as a trajectory"),
    ):
        with pytest.raises(CGFlowError) as caught:
            load_reference(tmp_path / name, structure, topology=tmp_path / topology if topology is not None else None)
        assert says in str(caught.value), name
        assert "\n" not in str(caught.value)


def test_atoms_in_another_order(tmp_path, structure, frames):
    """A file with atoms of its own tells by their elements."""
    order = np.arange(22)
    first, second = atoms_of(structure.topology, "ACE1-O", "ACE1-C")
    order[[first, second]] = second, first
    other = mdtraj.Topology()
    chain = other.add_chain()
    residues = [other.add_residue(residue.name, chain, residue.resSeq) for residue in structure.topology.residues]
    for index in order:
        atom = structure.topology.atom(index)
        other.add_atom(atom.name, atom.element, residues[atom.residue.index])
    mdtraj.Trajectory(frames.xyz[:, order], other).save(str(tmp_path / "md.pdb"))
    with pytest.raises(CGFlowError, match=r"atom \d+ \(0-based\) is ACE1-., in the run it is ACE1-."):
        load_reference(tmp_path / "md.pdb", structure)


def _grid(path, n=100, **changes):
    centers = -np.pi + (np.arange(n) + 0.5) * 2 * np.pi / n
    arrays = {"P": np.random.default_rng(0).uniform(size=(n, n)), "centers": centers, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_grids_keep_mass_and_axes(tmp_path, structure):
    P = np.zeros((100, 100))
    P[80, 30] = 3.0  # φ = 109.8, ψ = -70.2
    P[20, 60] = 1.0  # φ = -106.2, ψ = 37.8
    grid = load_reference(_grid(tmp_path / "grid.npz", P=P), structure)
    assert isinstance(grid, GridReference)
    rebinned = grid.rebinned()
    assert np.isclose(rebinned.sum(), 1)
    assert np.isclose(rebinned[28:30, 10:12].sum(), 0.75)
    assert np.isclose(rebinned[7:9, 21:23].sum(), 0.25)
    assert np.allclose(grid.populations(), [0.25, 0, 0, 0.75])


def test_populations_of_a_flat_grid_are_areas(tmp_path, structure):
    grid = load_reference(_grid(tmp_path / "grid.npz", n=45, P=np.ones((45, 45))), structure)
    psi = 170 / 360
    assert np.allclose(grid.populations(), [psi / 2, (1 - psi) * 80 / 360, (1 - psi) * 100 / 360, 0.5])
    assert np.allclose(grid.rebinned(), 1 / 36**2)


def test_the_shared_reference(structure, root):
    path = root.parent / "shared" / "reference" / "ala2_amber99sbildn_obc2_300K.npz"
    if not path.is_file():
        pytest.skip("the gridded reference does not lie beside the checkout")
    grid = load_reference(path, structure)
    # What is said to go with it counts bins by their centres; shared by area, β and PPII differ by 0.003.
    assert np.allclose(grid.populations(), [0.406, 0.316, 0.258, 0.0203], atol=0.005)
    assert np.isclose(grid.rebinned().sum(), 1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"P": None}, "holds centers; a gridded reference needs P (n, n)"),
        ({"P": None, "centers": None, "x": np.ones(2)}, "holds x; a gridded reference needs P (n, n)"),
        ({"P": np.ones((100, 99))}, "P has shape (100, 99) and centers (100,)"),
        ({"centers": np.zeros((2, 50))}, "centers (2, 50)"),
        ({"P": -np.ones((100, 100))}, "not negative"),
        ({"P": np.zeros((100, 100))}, "not all zero"),
        ({"P": np.full((100, 100), np.nan)}, "finite"),
        ({"centers": np.linspace(-178.2, 178.2, 100)}, "in degrees?"),
        ({"centers": np.linspace(-np.pi, np.pi, 100)}, "0.06283 apart"),
        ({"centers": 4 + np.arange(100) * 2 * np.pi / 100}, "from -π to π"),
        ({"P": np.array([["a"] * 100] * 100)}, "cannot be read as an .npz file of numbers"),
    ],
)
def test_wrong_grids(tmp_path, structure, changes, says):
    path = _grid(tmp_path / "grid.npz", **changes)
    with pytest.raises(CGFlowError) as caught:
        load_reference(path, structure)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_a_grid_does_not_take(tmp_path, structure):
    path = _grid(tmp_path / "grid.npz")
    for option in ("topology", "weights"):
        with pytest.raises(CGFlowError, match=f"takes no {option}"):
            load_reference(path, structure, **{option: tmp_path / "file"})
    path.write_text("no archive")
    with pytest.raises(CGFlowError, match=r"cannot be read as an \.npz"):
        load_reference(path, structure)
    with pytest.raises(CGFlowError, match="no such file"):
        load_reference(tmp_path / "none.npz", structure)

import mdtraj
import numpy as np
import pytest
from molecules import ALANINE, frame

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.trajectory import (
    check_trajectory_path,
    colvar_constants,
    read_colvar,
    write_colvar,
    write_trajectory,
)


@pytest.fixture(scope="module")
def peptide():
    return frame(ALANINE)


@pytest.fixture(scope="module")
def trajectory(peptide):
    noise = 0.02 * np.random.default_rng(0).standard_normal((20, peptide.n_atoms, 3)) + [3.0, -2.0, 7.0]
    return mdtraj.Trajectory(peptide.xyz[0] + noise, peptide.topology, time=np.full(20, 5.0))


@pytest.mark.parametrize(("suffix", "tolerance"), [(".dcd", 1e-5), (".xtc", 6e-4)])
def test_frames_read_back_as_they_are_and_without_cell(tmp_path, trajectory, suffix, tolerance):
    path = tmp_path / f"samples{suffix}"
    topology = tmp_path / "samples.topology.pdb"
    write_trajectory(trajectory, path, topology=topology)
    back = mdtraj.load(str(path), top=str(topology))
    assert np.abs(back.xyz - trajectory.xyz).max() < tolerance
    assert back.unitcell_vectors is None
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted((path.name, "samples.topology.pdb"))


@pytest.mark.parametrize("name", ["alanine_dipeptide", "butane"])
def test_the_topology_keeps_atoms_and_bonds(tmp_path, systems, name):
    frame = mdtraj.load(str(systems / name / f"{name}.pdb"))
    write_trajectory(frame, tmp_path / "a.dcd", topology=tmp_path / "a.pdb")
    back = mdtraj.load(str(tmp_path / "a.pdb")).topology
    assert [str(atom) for atom in back.atoms] == [str(atom) for atom in frame.topology.atoms]
    assert {(a.index, b.index) for a, b in back.bonds} == {(a.index, b.index) for a, b in frame.topology.bonds}


def test_no_clock_in_the_file(tmp_path, trajectory):
    write_trajectory(trajectory, tmp_path / "a.dcd")
    header = (tmp_path / "a.dcd").read_bytes()[100:260]
    assert header[80:] == b"REMARKS independent samples, their time is an index".ljust(80)
    assert b" at " not in header


def test_same_frames_same_file(tmp_path, trajectory):
    for name in ("a.dcd", "b.dcd"):
        write_trajectory(trajectory, tmp_path / name)
    first, second = (bytearray((tmp_path / name).read_bytes()) for name in ("a.dcd", "b.dcd"))
    assert first == second


def test_bad_paths_are_refused(tmp_path, trajectory):
    (tmp_path / "file").touch()
    (tmp_path / "folder.dcd").mkdir()
    for path, word in (
        (tmp_path / "a.trr", "unknown trajectory format '.trr'"),
        (tmp_path / "a", "ends in .dcd or .xtc"),
        (tmp_path / "file" / "a.dcd", "cannot write"),
        (tmp_path / "folder.dcd", "is a directory"),
    ):
        with pytest.raises(CGFlowError, match=word):
            check_trajectory_path(path)
        with pytest.raises(CGFlowError):
            write_trajectory(trajectory, path)


def test_check_leaves_nothing_behind(tmp_path):
    check_trajectory_path(tmp_path / "a.dcd")
    assert not list(tmp_path.iterdir())


def test_colvar_round_trip(tmp_path):
    path = tmp_path / "a.colvar"
    columns = {"log_q": np.linspace(-1e3, 1e-7, 5), "phi": np.array([np.nan, 1, 2, 3, -np.pi])}
    write_colvar(path, columns, {"temperature_K": 512.5})
    assert path.read_text().splitlines()[:2] == ["#! FIELDS time log_q phi", "#! SET temperature_K 512.5"]
    assert colvar_constants(path) == {"temperature_K": 512.5}
    back = read_colvar(path)
    assert list(back) == ["time", "log_q", "phi"]
    assert np.array_equal(back["time"], np.arange(5))
    for name, values in columns.items():
        assert np.allclose(back[name], values, rtol=1e-9, atol=0, equal_nan=True)


def test_colvar_refusals(tmp_path):
    path = tmp_path / "a.colvar"
    two = np.zeros(2)
    for columns in ({"a": two, "b": np.zeros(3)}, {"a b": two}, {"time": two}, {"a": np.zeros((2, 2))}):
        with pytest.raises(ValueError, match="got"):
            write_colvar(path, columns)
    with pytest.raises(CGFlowError, match="cannot read"):
        read_colvar(path)
    for text, word in (
        ("1 2\n", "not a COLVAR"),
        ("#! FIELDS time a\n0 1\n1\n", "not every row"),
        ("#! FIELDS time a\n0 warm\n", "numbers"),
    ):
        path.write_text(text)
        with pytest.raises(CGFlowError, match=word):
            read_colvar(path)
    path.write_text("#! FIELDS time a\n#! SET temperature_K warm\n")
    with pytest.raises(CGFlowError, match="needs a name and a number"):
        colvar_constants(path)


def test_a_table_without_rows(tmp_path):
    path = tmp_path / "a.colvar"
    write_colvar(path, {"a": np.empty(0)})
    assert {name: values.shape for name, values in read_colvar(path).items()} == {"time": (0,), "a": (0,)}

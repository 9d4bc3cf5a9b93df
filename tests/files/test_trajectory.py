import mdtraj
import numpy as np
import pytest

from openmm_cgflow.analysis import plots
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.trajectory import (
    check_trajectory_path,
    colvar_columns,
    colvar_constants,
    peptide_torsions,
    read_colvar,
    write_colvar,
    write_trajectory,
)


@pytest.fixture(scope="module")
def peptide(systems):
    return mdtraj.load(str(systems / "alanine_dipeptide" / "alanine_dipeptide.pdb"))


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
    for text, word in (("1 2\n", "not a COLVAR"), ("#! FIELDS time a\n0 1\n1\n", "not every row")):
        path.write_text(text)
        with pytest.raises(CGFlowError, match=word):
            read_colvar(path)
    path.write_text("#! FIELDS time a\n#! SET temperature_K warm\n")
    with pytest.raises(CGFlowError, match="needs a name and a number"):
        colvar_constants(path)


def test_peptide_torsions(peptide, systems):
    torsions = peptide_torsions(peptide)
    assert list(torsions) == ["phi_ALA2", "psi_ALA2"]
    assert np.allclose(np.degrees([torsions["phi_ALA2"][0], torsions["psi_ALA2"][0]]), [-80, 80], atol=0.5)
    assert peptide_torsions(mdtraj.load(str(systems / "butane" / "butane.pdb"))) == {}


class Samples:
    """What a model returns, with or without importance weights."""

    def __init__(self, trajectory, log_weight=None):
        self.trajectory, self.log_weight = trajectory, log_weight
        self.z = np.arange(40.0).reshape(20, 2)
        self.log_q, self.energy = np.zeros(20), np.ones(20)


def test_colvar_columns(trajectory):
    columns = colvar_columns(Samples(trajectory), ["dihedral A-B", "bond C"])
    assert list(columns) == ["log_q", "energy", "phi_ALA2", "psi_ALA2", "z.dihedral_A-B", "z.bond_C"]
    assert np.array_equal(columns["z.bond_C"], np.arange(1.0, 40.0, 2))


def test_importance_weights_are_a_column_where_there_are_any(trajectory):
    weights = np.linspace(-2, 1, 20)
    columns = colvar_columns(Samples(trajectory, weights), ["dihedral A-B", "bond C"])
    assert list(columns)[:3] == ["log_q", "log_weight", "energy"]
    assert np.array_equal(columns["log_weight"], weights)


def test_torsion_density_normalises_and_wraps():
    rng = np.random.default_rng(1)
    angles = rng.uniform(-10, 10, 1000)
    weights = rng.uniform(0, 1, 1000)
    density, centres = plots.torsion_density(angles, weights=weights, n_bins=36)
    assert np.isclose(density.sum() * 2 * np.pi / 36, 1)
    assert np.allclose(plots.torsion_density(angles + 2 * np.pi, weights=weights, n_bins=36)[0], density)
    spike, _ = plots.torsion_density(np.full(5, centres[3] + 4 * np.pi), n_bins=36)
    assert spike.argmax() == 3


def test_free_energy_map_normalises_weighs_and_keeps_its_axes():
    phi, psi = np.array([-2.0, -2.0, 1.0]), np.array([0.5, 0.5, 2.0])
    density, energy = plots.free_energy_map(phi, psi, weights=np.array([1.0, 1.0, 2 * np.exp(-1.5)]), n_bins=60)
    assert np.isclose(density.sum() * (2 * np.pi / 60) ** 2, 1)
    index = [int((angle + np.pi) / (2 * np.pi) * 60) for angle in (-2.0, 0.5, 1.0, 2.0)]
    assert energy[index[0], index[1]] == 0
    assert np.isclose(energy[index[2], index[3]], 1.5)
    assert np.isinf(energy).sum() == 3598


def _rows(n):
    constant = {"temperature": 900.0, "noise": 0.1, "energy": float("nan"), "gradient_norm": 2.0, "invalid": 0}
    return [{"step": k + 1, "stage": k // 5, "residual": 1.0 / (k + 1), **constant} for k in range(n)]


def _pmf_rows(n):
    """Rounds, then the flow alone, where nothing is measured."""
    nan = float("nan")
    rows = []
    for k in range(n):
        last = k >= n - 2
        row = {"step": k + 1, "stage": 0, "temperature": 300.0, "gamma": 0.08, "ess": 1 - 1 / (k + 2), "energy": -70.0}
        row |= {"held_out": nan if last else 1 + 1 / (k + 1), "misfit": nan if last else 1.0, "invalid": 0}
        rows.append(row | {"free_energy_error": 1 / (k + 1), "moved": nan if last or k < 3 else 0.2})
    return rows


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plots.convergence(_rows(12)),
        lambda: plots.convergence(_pmf_rows(9)),
        lambda: plots.convergence(_pmf_rows(2)),
        lambda: plots.convergence(_rows(1)),
        lambda: plots.convergence([]),
        lambda: plots.ramachandran(np.linspace(-3, 3, 50), np.linspace(-3, 3, 50), temperature=300, title="ALA2"),
        lambda: plots.torsion_marginals(["a", "b", "c", "d"], np.random.default_rng(0).normal(size=(50, 4))),
    ],
    ids=["convergence", "rounds", "two rounds", "one step", "no step", "ramachandran", "marginals"],
)
def test_figures_are_pictures(tmp_path, figure):
    path = tmp_path / "figure.png"
    plots.save(figure(), path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 3000
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


def test_marginals_want_one_name_a_torsion():
    with pytest.raises(ValueError, match="expected"):
        plots.torsion_marginals(["a"], np.zeros((3, 2)))

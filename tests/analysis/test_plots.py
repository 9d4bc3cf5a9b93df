"""Figures that compare ensembles show what they are given."""

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from openmm_cgflow.analysis import plots


def _maps():
    rng = np.random.default_rng(0)
    found = {}
    for name in ("samples", "weighted", "reference"):
        values = rng.uniform(0.5, 1.5, (36, 36))
        values[:5] = 0
        found[name] = values / values.sum()
    found["samples"][:, :9] = 0
    return found


def _meshes(figure):
    return {axis.get_title(): mesh for axis in figure.axes for mesh in axis.collections if isinstance(mesh, QuadMesh)}


def test_maps_are_free_energies_on_one_scale(tmp_path):
    maps = _maps()
    maps["reference"][20, 20] = 1e-30  # a grid knows what samples never see
    figure = plots.compared_maps(maps, ("φ", "ψ"), temperature=300, title="ALA2")
    meshes = {name: mesh for name, mesh in _meshes(figure).items() if name}
    assert list(meshes) == ["reference", "samples", "weighted", "samples - reference", "weighted - reference"]
    for name, probability in maps.items():
        drawn = meshes[name].get_array().reshape(36, 36)
        expected = -np.log(probability / probability.max(), where=probability > 0, out=np.zeros((36, 36))).T
        assert np.array_equal(np.ma.getmaskarray(drawn), probability.T == 0)
        assert np.allclose(drawn.filled(0.0), expected)
    assert {meshes[name].get_clim() for name in maps} == {(0.0, 10.0)}
    difference = meshes["samples - reference"].get_array().reshape(36, 36)
    visited = (maps["samples"] > 0) & (maps["reference"] > 0)
    assert np.array_equal(np.ma.getmaskarray(difference), ~visited.T)
    expected = np.log(maps["reference"][visited] / maps["samples"][visited])
    assert np.allclose(difference.T[visited], expected)
    low, high = meshes["samples - reference"].get_clim()
    assert low == -high
    plots.save(figure, tmp_path / "map.png")
    assert len((tmp_path / "map.png").read_bytes()) > 3000


def test_maps_without_a_reference_and_of_nothing_in_common(tmp_path):
    maps = _maps()
    del maps["reference"]
    assert [name for name in _meshes(plots.compared_maps(maps, ("a", "b"))) if name] == ["samples", "weighted"]
    one, other = np.zeros((36, 36)), np.zeros((36, 36))
    one[0, 0] = other[5, 5] = 1.0
    plots.save(plots.compared_maps({"samples": one, "reference": other}, ("a", "b")), tmp_path / "map.png")


@pytest.mark.parametrize("n_panels", [1, 2, 4])
def test_histograms_are_densities(tmp_path, n_panels):
    edges = np.array([0.0, 1.0, 3.0])
    ensembles = {"reference": np.array([0.5, 0.5]), "samples": np.array([0.2, 0.8]), "weighted": np.array([0.4, 0.6])}
    figure = plots.compared_histograms({f"q{k}": (edges, ensembles) for k in range(n_panels)}, "nm")
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == [f"q{k}" for k in range(n_panels)]
    for axis in shown:
        drawn = {patch.get_label(): patch.get_data().values for patch in axis.patches}
        assert set(drawn) == set(ensembles)
        for name, probability in ensembles.items():
            assert np.allclose(drawn[name], probability / [1, 2])
    plots.save(figure, tmp_path / "histograms.png")
    assert len((tmp_path / "histograms.png").read_bytes()) > 3000


def test_convergence_shows_what_changes():
    """A row lacks what its phase does not measure; what never changes is not drawn; few steps are not smoothed."""
    nan = float("nan")
    rows = [
        {
            "step": k,
            "ess": 0.1 * k,
            "temperature": 300.0,
            "invalid": 0,
            "barrier_scale": nan,
            "anchor_error": 1 / k if k > 4 else nan,
        }
        for k in range(1, 10)
    ]
    axes = plots.convergence(rows).axes
    assert [axis.get_ylabel().split("\n")[0] for axis in axes] == ["relative effective", "differences by switching"]
    every, smooth = (line.get_ydata() for line in axes[0].lines)
    np.testing.assert_array_equal(every, smooth)
    assert axes[1].get_yscale() == "log"
    many = [{"step": k, "ess": k % 5 == 0} for k in range(500)]
    every, smooth = (line.get_ydata() for line in plots.convergence(many).axes[0].lines)
    assert every.std() > 0 and not smooth.any()


def test_a_panel_is_there_if_any_of_its_columns_changes():
    """Switching may be done in one step, from which on its error is what it is, and the fit still moves."""
    nan = float("nan")
    rows = [
        {"step": k, "ess": 0.9, "anchor_error": 0.1 if k > 2 else nan, "anchor_misfit": 1 / k if k > 2 else nan}
        for k in range(1, 10)
    ]
    (axis,) = plots.convergence(rows).axes
    assert axis.get_ylabel().startswith("differences by switching") and axis.get_yscale() == "log"
    assert [line.get_label() for line in axis.lines if not line.get_label().startswith("_")] == [
        "anchor error",
        "anchor misfit",
    ]


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
        row = {
            "step": k + 1,
            "stage": 0,
            "temperature": 300.0,
            "barrier_scale": 0.08,
            "ess": 1 - 1 / (k + 2),
            "energy": -70.0,
        }
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

"""The synthetic targets: OpenMM's energies, exact samples and normalisers; a run on one and its exact evaluation."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from scipy.integrate import cumulative_simpson
from scipy.stats import kstest
from settings import TINY_TARGET

from openmm_cgflow import MolecularSystem, evaluate, evaluate_exactly, load
from openmm_cgflow.cli import main
from openmm_cgflow.config import Config, validate
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.paper.exact import compare_exactly
from openmm_cgflow.paper.targets import DoubleWell, GaussianMixture, new_target, target_system
from openmm_cgflow.runs import exact
from openmm_cgflow.settings import SystemSettings, TargetSettings

TARGETS = [DoubleWell(), GaussianMixture(2, 1), GaussianMixture(10, 1)]
NAMES = ["double well", "mixture 2", "mixture 10"]
BETAS = (0.03, 0.3, 1.0)
UNIT = 120.27236  # K: kT is 1 kJ/mol


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_openmm_has_the_energy_that_the_exact_answers_are_of(target):
    n, step = target.n_slow + target.n_fast, 1e-5
    x = target.sample(4, 0.1, rng())
    z, y = x[:, : target.n_slow], x[:, target.n_slow :]
    mean, spread = target.fast_moments(z, 1.0)
    expected = target.slow_energy(z) + 0.5 * (((y - mean) / spread) ** 2).sum(1)
    xyz = np.zeros((4, n, 3))
    xyz[..., 0] = x
    plus, minus = xyz[:1].repeat(n, 0), xyz[:1].repeat(n, 0)
    plus[range(n), range(n), 0] += step
    minus[range(n), range(n), 0] -= step
    aside = xyz + np.array([0.0, 0.3, -0.2])  # the unused coordinates have springs of their own
    chains = Config().chains.model_copy(update={"platform": "Reference", "n_workers": 1, "engine": "contexts"})
    with create_engine(target_system(target), range(target.n_slow), chains) as engine:
        energy, forces = engine.evaluate(np.concatenate((xyz, plus, minus, aside)))
    assert energy[:4] == pytest.approx(expected, rel=1e-9, abs=1e-9)
    numerical = (energy[4 + n : 4 + 2 * n] - energy[4 : 4 + n]) / (2 * step)
    assert forces[0, :, 0] == pytest.approx(numerical, rel=1e-5, abs=1e-5 * np.abs(numerical).max())
    assert energy[-4:] - energy[:4] == pytest.approx(np.full(4, 0.5 * target.spring * 0.13 * n))
    # In equilibrium no later than the fast coordinates, or switching would start from what is not.
    assert target.spring == pytest.approx(1 / target.fast_moments(z, 1.0)[1][0] ** 2)


@pytest.mark.parametrize("beta", BETAS)
def test_samples_of_the_double_well_have_its_density(beta):
    well = DoubleWell()

    x = np.linspace(-12, 12, 48001)
    density = np.exp(-beta * well.slow_energy(x[:, None]))
    cumulative = cumulative_simpson(density, x=x, initial=0)
    assert well.log_normaliser(beta, rng()) == pytest.approx(math.log(cumulative[-1]), abs=1e-6)
    barrier = 0.16758
    above = 1 - np.interp(barrier, x, cumulative) / cumulative[-1]
    assert well.populations(beta, rng())[1] == pytest.approx(above, rel=1e-3)
    z = well.sample_slow(20_000, beta, rng(1))[:, 0]
    exact = functools.partial(np.interp, xp=x, fp=cumulative / cumulative[-1])
    assert kstest(z, exact).pvalue > 1e-3
    assert kstest(z + 0.2, exact).pvalue < 1e-3
    assert (z > barrier).mean() == pytest.approx(above, abs=4 * math.sqrt(above / len(z)))


@pytest.mark.parametrize("beta", [*BETAS, 1.00002, 2.0])
def test_samples_of_the_mixture_have_its_density(beta):
    mixture = GaussianMixture(2, 1)
    reach = 1 + 6 * mixture.spread / math.sqrt(beta)
    axis = np.linspace(-reach, reach, 801)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(-beta * mixture.slow_energy(grid)) * (axis[1] - axis[0]) ** 2
    assert mixture.log_normaliser(beta, rng()) == pytest.approx(math.log(density.sum()), abs=0.01)
    z, density = mixture.sample_slow(40_000, beta, rng(1)), density / density.sum()
    assert len(z) == 40_000
    for function in (lambda z: z[:, 0], lambda z: z[:, 1] ** 2, lambda z: mixture.modes(z) == 0):
        values = function(z).astype(float)
        exact = (density * function(grid)).sum()
        assert values.mean() == pytest.approx(exact, abs=4 * values.std() / math.sqrt(len(z)))


def test_fast_coordinates_are_gaussian_around_b_z():
    mixture = GaussianMixture(2, 1)
    x = mixture.sample(50_000, 0.5, rng())
    away = x[:, 2:] - x[:, :2] @ mixture.matrix.T
    assert np.abs(away.mean(0)).max() < 4 * 0.1 / math.sqrt(0.5 * len(x))
    assert away.std(0) == pytest.approx(0.1 / math.sqrt(0.5), rel=0.02)


def test_a_mixture_is_the_same_whatever_the_seed_of_the_run():
    first, second = (new_target(TargetSettings(name="gaussian_mixture", dimensions=3, seed=4)) for _ in range(2))
    assert np.array_equal(first.means, second.means) and np.array_equal(first.matrix, second.matrix)
    assert np.abs(first.means).max() <= 1
    other = new_target(TargetSettings(name="gaussian_mixture", dimensions=3, seed=5))
    assert not np.array_equal(first.means, other.means)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"system": {"target": "double_well", "structure": "x.pdb"}}, ("takes no files",)),
        ({"system": {"target": "triple_well"}}, ("target", "double_well")),
        ({"system": {"target": "double_well"}}, ("coordinates.kind box",)),
        ({"system": {"structure": "x.pdb", "forcefield": ["a.xml"]}, "coordinates": "box"}, ("coordinates.kind box",)),
    ],
)
def test_settings_that_do_not_go_together(tree, words):
    with pytest.raises(CGFlowError) as refused:
        validate(tree)
    assert all(word in str(refused.value) for word in words)


# ---------------------------------------------------------------- a run


@pytest.fixture
def few_draws(monkeypatch):
    """What neither the command nor `evaluate` lets its user choose."""
    monkeypatch.setattr(exact, "compare_exactly", functools.partial(compare_exactly, n_draws=2000))


@pytest.mark.parametrize("method", ["pmf", "reverse_kl", "joint"])
def test_a_target_is_trained_and_evaluated_by_the_commands(method, systems, tmp_path, capsys, few_draws):
    ladder = ["tempering.start=500", "training.n_steps_first=5", "training.n_steps=5", "training.n_steps_last=5"]
    settings = [*TINY_TARGET, f"training.method={method}", *(ladder if method != "pmf" else [])]
    run = tmp_path / "run"
    config = str(systems / "double_well" / "double_well.yaml")
    assert main(["train", config, "-o", str(run), *(word for item in settings for word in ("--set", item))]) == 0
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "x1 > top of the barrier" in printed and "KL(exact || model)" in printed
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert sum(mode["population"] for mode in found["modes"].values()) == pytest.approx(1)
    weighted = [mode["population"] for mode in found["weighted_modes"].values()]
    assert not weighted if method == "reverse_kl" else sum(weighted) == pytest.approx(1)
    assert list(found["modes"].values())[1]["exact"] == pytest.approx(0.00835, abs=1e-5)
    assert list(found["levels"])[-1] == "1" and len(found["levels"]) > 1
    assert all(level["kl"] > -3 * level["kl_error"] and level["outside"] < 0.05 for level in found["levels"].values())
    for level in found["levels"].values():
        assert len(level["weighted"]) == (0 if method == "reverse_kl" else 2)
        if method == "joint":  # the weights are those of the energies: exact, whatever was learned
            assert level["weighted"] == pytest.approx(level["exact"], abs=0.15)
    if method == "joint":  # nothing is said of temperatures that it was not trained at
        assert min(map(float, found["levels"])) > 0.999 * UNIT / 500
    assert json.dumps(evaluate(run).to_dict()) == json.dumps(found)  # as text: nan is equal to nan
    (run / "provenance.json").unlink()
    with pytest.raises(CGFlowError, match=r"provenance\.json: missing"):
        evaluate_exactly(run)
    model = load(run)
    samples = model.sample(20, seed=1)
    read = torch.as_tensor(model.read(samples.trajectory.xyz))
    torch.testing.assert_close(read, torch.as_tensor(samples.z), rtol=1e-5, atol=1e-5)
    with pytest.raises(CGFlowError, match="exact answers"):
        evaluate(run, "x.dcd")
    assert main(["evaluate", str(run), "--reference", "x.dcd"]) == 2
    assert "exact answers" in capsys.readouterr().err


def test_benchmark_of_the_targets(systems, root, tmp_path, monkeypatch, capsys, few_draws):
    """Its command, at a size that says nothing but that it runs."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import synthetic

    words = [str(systems / "gmm_2d" / "gmm_2d.yaml"), "--seeds", "3", "--samples", "300", "-o", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["synthetic.py", *words, "--set", *TINY_TARGET])
    synthetic.main()
    printed = capsys.readouterr().out
    assert printed.startswith("seed 3, pmf:") and "300 samples" in printed and "mode 3" in printed
    header, drawn, weighted = printed.splitlines()[-3:]
    assert header.split()[:3] == ["seed", "modes", "found"] and weighted.endswith("weighted")
    assert all(row.split()[0] == "3" and " of 3" in row for row in (drawn, weighted))


def test_a_target_is_no_file():
    with pytest.raises(CGFlowError, match="target_system builds it"):
        MolecularSystem.from_files(SystemSettings(target="double_well"))

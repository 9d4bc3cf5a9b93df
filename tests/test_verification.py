"""Nonequilibrium switching: works of Gaussians and of a quadratic bath, whose free energies are known exactly."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from analytic import QuadraticBath, assembly_of, random_structure
from pymbar.other_estimators import bar

from openmm_cgflow import CGFlowError, verification
from openmm_cgflow.config import SamplerConfig
from openmm_cgflow.flow import CGFlow
from openmm_cgflow.meanforce import FastChains
from openmm_cgflow.units import thermal_beta
from openmm_cgflow.verification import Verification, acceptance_ratio, verify

TEMPERATURE = 420.0  # not the usual one: the works must be in kT of what they are made at
BETA = thermal_beta(TEMPERATURE)

# A slow chain A-B-C-D with one torsion, a fast atom E bound to C and a fast atom F bound to E.
A, B, C, D, E, F = 1, 4, 0, 3, 2, 5
BONDS = [(A, B), (B, C), (C, D), (C, E), (E, F)]
SLOW = [0, 1, 3, 4]
# Soft enough that exponential averages converge; A-D makes the difference in free energy several kT.
SPRINGS = [(C, E, 1.2e3), (D, E, -3e2), (B, E, -3e2), (E, F, 750.0), (C, F, -150.0), (A, F, 450.0), (A, D, 2e3)]


class MovingBath(QuadraticBath):
    """A quadratic bath whose frames after few steps remember where they started: what moves them must be right."""

    def __init__(self, memory=0.7):
        super().__init__(6, SPRINGS, SLOW)
        self.memory = memory
        self.broken = {}  # replicas that come back as nan, by the number of the call
        self.unbounded = {}  # replicas whose structures have no energy
        self.n_runs = self.n_evaluated = 0

    def energy(self, xyz):
        return 0.5 * (xyz * (self.laplacian @ xyz)).sum((-1, -2))

    def evaluate(self, xyz):
        at = torch.as_tensor(xyz)
        self.n_energy_evaluations += len(xyz)
        energy = self.energy(at)
        energy[self.unbounded.get(self.n_evaluated, [])] = math.nan
        self.n_evaluated += 1
        return energy.numpy(), -(self.laplacian @ at).numpy()

    def run(self, xyz, temperature, *, n_equilibration, **others):
        assert np.isfinite(xyz).all()  # also where a replica broke before
        frames = super().run(xyz, temperature, n_equilibration=n_equilibration, **others)
        if not n_equilibration:
            start = torch.as_tensor(xyz)
            ff, fs = self._block(self.fast, self.fast), self._block(self.fast, self.slow)
            mean = -torch.linalg.solve(ff, fs @ start[:, self.slow])
            fresh = frames.xyz[:, 0, self.fast] - mean
            mixed = self.memory * (start[:, self.fast] - mean) + math.sqrt(1 - self.memory**2) * fresh
            frames.xyz[:, 0, self.fast] = mean + mixed
            frames = frames._replace(forces=-self.laplacian @ frames.xyz, energy=self.energy(frames.xyz))
        broken = self.broken.get(self.n_runs, [])
        for part in (frames.xyz, frames.forces, frames.energy):
            part[broken] = math.nan
        frames.valid[broken] = False
        self.n_runs += 1
        return frames


def molecule():
    return assembly_of(BONDS, SLOW, random_structure(BONDS, 4))


def chains_of(engine, assembly=None):
    def draw(z, temperature, generator):
        return torch.tensor([0.1, 1.5, 0.5], dtype=torch.float64).expand(len(z), 2, 3)

    settings = SamplerConfig(keep_chirality=False, max_invalid=0.5)
    return FastChains(engine, assembly or molecule(), draw, settings, 0)


def exact(engine, assembly, z):
    """beta A of the quadratic bath, shape (...,)."""
    order = [list(assembly.slow).index(atom) for atom in engine.slow]
    return BETA * engine.free_energy(assembly.coordinates.to_xyz(z)[..., order, :])


def line(n_steps, start=(0.4, 0.4), end=(1.6, -0.4)):
    """A path of z that turns the torsion and moves every bond and angle, shape (n_steps, 6)."""
    share = torch.linspace(0, 1, n_steps, dtype=torch.float64)[:, None]
    first, last = (torch.tensor([torsion] + [other] * 5, dtype=torch.float64) for torsion, other in (start, end))
    return first + share * (last - first)


def switched(path, n, engine, assembly, seed=1, follow=None):
    """Works along a path and back, and the exact free-energy difference."""
    both = torch.stack((path, path.flip(0))).repeat_interleave(n, 0)
    chains = chains_of(engine, assembly)
    chains.follow = follow
    work, valid = verification._switch(chains, both, TEMPERATURE, seed)
    ends = exact(engine, assembly, path[[0, -1]])
    return work.reshape(2, n), valid.reshape(2, n), float(ends[1] - ends[0])


def in_standard_errors(work, difference):
    """How far <exp(-W)> is from exp(-difference)."""
    weight = torch.exp(difference - work)
    return float((weight.mean() - 1) / (weight.std() / math.sqrt(len(weight))))


# ---------------------------------------------------------------- the acceptance ratio


def gaussian_works(n_forward, n_backward, difference=2.5, spread=2.0, seed=0):
    """Works that obey Crooks' theorem: both Gaussian, of one spread, which is what gives them their means."""
    rng = np.random.default_rng(seed)
    half = spread**2 / 2
    return rng.normal(half + difference, spread, n_forward), rng.normal(half - difference, spread, n_backward)


@pytest.mark.parametrize(("n_forward", "n_backward"), [(300, 300), (600, 60), (40, 800)])
def test_acceptance_ratio_of_gaussian_works(n_forward, n_backward):
    found = np.array([acceptance_ratio(*gaussian_works(n_forward, n_backward, seed=k)) for k in range(400)])
    error = found.std(ddof=1) / math.sqrt(len(found))
    assert error < 0.02
    assert abs(found.mean() - 2.5) < 4 * error + 1 / min(n_forward, n_backward)  # and a bias of order 1/n
    # It does better than the exponential average of one direction with as many works.
    one_sided = [-np.log(np.exp(-gaussian_works(300, 1, seed=k)[0]).mean()) for k in range(400)]
    if n_forward == n_backward:
        assert found.std() < 0.7 * np.std(one_sided)


def test_acceptance_ratio_is_the_other_directions_negative():
    forward, backward = gaussian_works(50, 17)
    assert acceptance_ratio(backward, forward) == pytest.approx(-acceptance_ratio(forward, backward), abs=1e-9)


def test_acceptance_ratio_moves_with_the_works():
    forward, backward = gaussian_works(50, 17)
    before = acceptance_ratio(forward, backward)
    for shift in (-2000.0, 3.0, 70.0):
        assert acceptance_ratio(forward + shift, backward - shift) == pytest.approx(before + shift, abs=1e-7)


def test_acceptance_ratio_without_dissipation_is_the_work():
    assert acceptance_ratio(np.full(3, 4.0), np.full(90, -4.0)) == pytest.approx(4.0, abs=1e-9)


def test_acceptance_ratio_agrees_with_pymbar():
    forward, backward = gaussian_works(80, 25, seed=3)
    found = bar(forward, backward, compute_uncertainty=False)["Delta_f"]
    assert acceptance_ratio(forward, backward) == pytest.approx(found, abs=1e-6)


# ---------------------------------------------------------------- switching


@pytest.mark.parametrize("n_steps", [2, 3, 9])
def test_switching_is_exact_however_fast(n_steps):
    assembly, engine = molecule(), MovingBath()
    (forward, backward), valid, difference = switched(line(n_steps), 5000, engine, assembly)
    assert valid.all() and abs(difference) > 2
    for work, expected in ((forward, difference), (backward, -difference)):
        assert abs(in_standard_errors(work, expected)) < 4
        # It dissipates: the mean of the works would not do.
        assert float(work.mean()) - expected > 10 * float(work.std()) / math.sqrt(len(work))
    blocks = zip(forward.numpy().reshape(20, -1), backward.numpy().reshape(20, -1), strict=True)
    found = np.array([acceptance_ratio(there, back) for there, back in blocks])
    error = found.std(ddof=1) / math.sqrt(20)
    assert error < 0.03
    assert abs(found.mean() - difference) < 4 * error


def escort(y, start, end):
    """Bonds, angles and dihedrals of the fast atoms follow the torsion."""
    turned = (end[:, 0] - start[:, 0])[:, None, None]
    return y + turned * torch.tensor([[0.01, 0.05, 0.3], [-0.01, 0.1, -0.2]], dtype=torch.float64)


def test_switching_is_exact_with_any_escort(monkeypatch):
    """Whatever takes the fast atoms along; without the change of their volume element it would not be."""
    assembly = molecule()

    def errors():
        (forward, backward), valid, difference = switched(line(4), 8000, MovingBath(), assembly, follow=escort)
        assert float(valid.double().mean()) > 0.99
        return [in_standard_errors(forward[valid[0]], difference), in_standard_errors(backward[valid[1]], -difference)]

    assert max(map(abs, errors())) < 4
    monkeypatch.setattr(assembly, "log_volume_fast", lambda y: torch.zeros(len(y), dtype=torch.float64))
    assert max(map(abs, errors())) > 5


@pytest.mark.parametrize("factor", [-1.0, 0.95, 1.05])
def test_a_wrong_sign_or_beta_is_noticed(factor, monkeypatch):
    """The same comparison fails where the code would be wrong."""
    monkeypatch.setattr(verification, "thermal_beta", lambda temperature: factor * thermal_beta(temperature))
    (forward, backward), _, difference = switched(line(3), 5000, MovingBath(), molecule())
    errors = [in_standard_errors(forward, difference), in_standard_errors(backward, -difference)]
    assert max(map(abs, errors)) > 8


def test_slower_switching_dissipates_less():
    means = []
    for n_steps in (2, 5, 20):
        (forward, backward), _, _ = switched(line(n_steps), 1000, MovingBath(), molecule())
        means.append(float(forward.mean() + backward.mean()) / 2)
    assert means[0] > 1.3 * means[1] > 1.3**2 * means[2] > 0


def test_a_path_that_stays_costs_nothing():
    path = line(1).repeat(4, 1)
    work, valid, difference = switched(path, 50, MovingBath(), molecule())
    assert valid.all() and difference == 0
    assert float(work.abs().max()) < 1e-8


def test_invalid_replicas_are_left_out_and_touch_no_others():
    path, n = line(5), 40
    clean, _, _ = switched(path, n, MovingBath(), molecule())
    engine = MovingBath()
    # Call 0 fills the pool, call 1 equilibrates, call k + 2 follows step k + 1.
    engine.broken = {1: [3], 4: [0, 41], 5: [77]}
    engine.unbounded = {1: [10], 3: [79]}
    work, valid, _ = switched(path, n, engine, molecule())
    assert (~valid).flatten().nonzero().flatten().tolist() == [0, 3, 10, 41, 77, 79]
    assert torch.equal(work[valid], clean[valid])
    assert torch.isfinite(work[valid]).all()


def test_same_seed_same_works():
    first, again, other = (switched(line(4), 20, MovingBath(), molecule(), seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not (first == other).any()


# ---------------------------------------------------------------- paths


def test_farthest_first():
    points = np.array([[0.0], [1.0], [4.0], [10.0], [7.0]])
    assert verification._farthest_first(points, np.array([4, 1, 2, 3]), 0, 4) == [3, 2, 4, 1]
    assert verification._farthest_first(points, np.array([4, 1, 2]), 0, 2) == [4, 2]  # 10 is no candidate
    assert verification._farthest_first(points, np.array([1, 2, 3]), 4, 1) == [1]


def two_torsions(pmf):
    """A model of nothing but two torsions, its flow untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = CGFlow(2, 0, 5.0, 2, 2, 8, [8])
    coordinates = SimpleNamespace(n_circular=2, log_volume=lambda z: torch.zeros(len(z), dtype=torch.float64))
    return SimpleNamespace(pmf=pmf, coordinates=coordinates, flow=flow)


def test_paths_go_around_barriers(monkeypatch):
    """Minima at (0, 0) and (pi, 0), a wall between them on one side: the path takes the other, also across pi."""
    monkeypatch.setattr(verification, "_N_POINTS", 1500)

    def energy(z):
        wall = 25 * torch.exp(4 * (torch.cos(z[:, 0] - math.pi / 2) - 1))
        return (1 - torch.cos(2 * z[:, 0])) + 0.5 * (1 - torch.cos(z[:, 0])) + wall + 5 * (1 - torch.cos(z[:, 1]))

    paths = verification._paths(two_torsions(energy), 6, torch.Generator().manual_seed(1))
    assert paths.shape[0] == 6 and paths.shape[2] == 2
    assert (paths.abs() <= math.pi + 1e-12).all()
    assert (paths[:, 0] == paths[0, 0]).all()
    assert float(paths[0, 0].abs().max()) < 0.4  # the lowest of 1500 points
    steps = torch.remainder(paths.diff(dim=1) + math.pi, 2 * math.pi) - math.pi
    assert float(steps.norm(dim=-1).max()) < 1.001 * verification._SPACING
    assert len(torch.unique(paths[:, -1], dim=0)) == 6
    assert (energy(paths[:, -1]) < energy(paths[:, 0]) + verification._HIGHEST).all()
    over = paths[:, -1, 0].cos() < -0.7
    assert over.any()
    assert float(energy(paths.flatten(0, 1)).max()) < 8  # the wall is 25


def test_too_few_low_conformations(monkeypatch):
    monkeypatch.setattr(verification, "_N_POINTS", 300)
    deep = two_torsions(lambda z: 1e4 * (2 - torch.cos(z).sum(-1)))
    with pytest.raises(CGFlowError, match=r"found only \d+ conformations to check, expected 50"):
        verification._paths(deep, 50, torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- the whole check


@pytest.fixture
def few_points(monkeypatch):
    monkeypatch.setattr(verification, "_N_POINTS", 600)
    monkeypatch.setattr(verification, "_N_BOOTSTRAP", 50)


def model_of(engine, scale=1.0):
    """A model whose PMF is the quadratic bath's own, times a number; its flow is untrained."""
    assembly = molecule()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = CGFlow(1, 5, 5.0, 2, 2, 8, [8])
    return SimpleNamespace(
        pmf=lambda z: scale * exact(engine, assembly, z),
        coordinates=assembly.coordinates,
        flow=flow,
        temperature=TEMPERATURE,
        chains=lambda given: chains_of(given, assembly),
    )


def check(seed=4, scale=1.0, n_replicas=40, **broken):
    engine = MovingBath()
    vars(engine).update(broken)
    engine.n_energy_evaluations = 1000  # of what was done before
    found = verify(model_of(engine, scale), engine, 3, n_replicas, seed)
    return found, engine


def test_the_exact_pmf_passes_and_a_wrong_one_does_not(few_points):
    found, engine = check()
    assert len(found.torsions) == len(found.pmf) == len(found.switching) == len(found.error) == 3
    assert len(found.dissipation) == 3 and all(len(row) == 1 for row in found.torsions)
    assert max(map(abs, found.pmf)) > 1
    pull = (np.array(found.pmf) - found.switching) / found.error
    assert np.abs(pull).max() < 4
    assert 0 < max(found.error) < 0.3 and 0 < max(found.dissipation) < 4
    assert found.rms_difference < 4 * found.rms_error
    wrong, _ = check(scale=2.0)
    assert wrong.rms_difference > 8 * wrong.rms_error
    # Counted are this check's own evaluations: 150 + 1 steps at the start, an evaluation and 10 steps per move.
    n_chains = 2 * 3 * 40
    assert found.n_evaluations == engine.n_energy_evaluations - 1000
    assert found.n_evaluations > n_chains * (151 + 11 * engine.n_evaluated)


def test_its_errors_are_those_of_repeated_checks(few_points):
    """Over seeds, with the same paths: differences in units of their errors have the spread of one."""
    pulls = []
    for seed in range(30):
        found, _ = check(seed, n_replicas=30)
        pulls.append((np.array(found.switching) - found.pmf) / found.error)
    mean_square = float(np.square(pulls).mean())
    assert abs(mean_square - 1) < 4 * math.sqrt(2 / 90)


def test_same_seed_same_result(few_points):
    assert check()[0] == check()[0]
    assert check()[0].switching != check(seed=5)[0].switching


def test_the_check_leaves_invalid_replicas_out(few_points):
    clean, _ = check()
    # Conformations in order, 40 replicas each, there and then back: two of the second, one of each direction.
    found, _ = check(broken={6: [45, 120 + 41]})
    assert [a == b for a, b in zip(found.switching, clean.switching, strict=True)] == [True, False, True]
    assert abs(found.switching[1] - clean.switching[1]) < 3 * clean.error[1]
    assert np.isfinite(found.error).all() and np.isfinite(found.dissipation).all()


def test_what_cannot_be_checked_is_refused():
    model = model_of(MovingBath())
    model.pmf = None
    with pytest.raises(CGFlowError, match="needs a potential of mean force"):
        verify(model, MovingBath(), 2, 2, 0)
    model = model_of(MovingBath())
    model.coordinates = SimpleNamespace(n_circular=0)
    with pytest.raises(CGFlowError, match="at least one slow torsion"):
        verify(model, MovingBath(), 2, 2, 0)


# ---------------------------------------------------------------- its summary


def summary(pmf, switching, error):
    rows = [[0.0]] * len(pmf)
    return Verification(rows, list(pmf), list(switching), list(error), [1.0] * len(pmf), 7)


def test_summary_of_equal_errors():
    found = summary([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5])
    assert found.rms_difference == pytest.approx(math.sqrt(5 / 3))
    assert found.rms_error == pytest.approx(0.5)
    wrong_start = replace(found, pmf=[value + 40 for value in found.pmf])
    assert wrong_start.rms_difference > 39


def test_summary_of_unequal_errors():
    found = summary([0.0, 7.0], [0.0, 2.0], [1.0, 0.5])  # weights 1 and 4, differences 0 and 5
    assert found.rms_difference == pytest.approx(math.sqrt(20))
    assert found.rms_error == pytest.approx(math.sqrt(2 / 5))


def test_the_expected_difference_is_that_of_the_errors():
    rng = np.random.default_rng(2)
    error = np.array([0.1, 0.4, 0.2, 1.0])
    squares = [summary(rng.normal(0.0, error), np.zeros(4), error).rms_difference ** 2 for _ in range(3000)]
    expected = summary(np.zeros(4), np.zeros(4), error).rms_error ** 2
    assert abs(np.mean(squares) - expected) < 4 * np.std(squares) / math.sqrt(3000)


def test_summary_as_plain_data():
    found = summary([1.0, 2.0], [1.5, 2.0], [0.5, 0.5])
    data = json.loads(json.dumps(found.to_dict()))
    assert data["pmf"] == [1.0, 2.0] and data["n_evaluations"] == 7 and data["unit"] == "kT"
    assert data["rms_difference"] == found.rms_difference and data["rms_error"] == found.rms_error

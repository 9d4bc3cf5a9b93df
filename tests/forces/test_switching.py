"""Nonequilibrium switching: works of Gaussians and of a quadratic bath, whose free energies are known exactly."""

import math

import numpy as np
import pytest
import torch
from moving import TEMPERATURE, MovingBath, chains_of, exact, line, molecule
from pymbar.other_estimators import bar

from openmm_cgflow.engines.engine import Schedule
from openmm_cgflow.errors import ReplicaError
from openmm_cgflow.forces import switching
from openmm_cgflow.forces.switching import Switches, acceptance_ratio, slower, switch
from openmm_cgflow.units import thermal_beta


def switched(path, n, engine, all_atom, seed=1, follow=None, slowness=1):
    """Works along a path and back, and the exact free-energy difference."""
    both = torch.stack((path, path.flip(0))).repeat_interleave(n, 0)
    fast_atoms = chains_of(engine, all_atom, follow)
    work, valid = switch(fast_atoms, both, TEMPERATURE, seed, slowness)
    ends = exact(engine, all_atom, path[[0, -1]])
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
    all_atom, engine = molecule(), MovingBath()
    (forward, backward), valid, difference = switched(line(n_steps), 5000, engine, all_atom)
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
    all_atom = molecule()

    def errors():
        (forward, backward), valid, difference = switched(line(4), 8000, MovingBath(), all_atom, follow=escort)
        assert float(valid.double().mean()) > 0.99
        return [in_standard_errors(forward[valid[0]], difference), in_standard_errors(backward[valid[1]], -difference)]

    assert max(map(abs, errors())) < 4
    monkeypatch.setattr(all_atom, "log_volume_fast", lambda y: torch.zeros(len(y), dtype=torch.float64))
    assert max(map(abs, errors())) > 5


@pytest.mark.parametrize("factor", [-1.0, 0.95, 1.05])
def test_a_wrong_sign_or_beta_is_noticed(factor, monkeypatch):
    """The same comparison fails where the code would be wrong."""
    monkeypatch.setattr(switching, "thermal_beta", lambda temperature: factor * thermal_beta(temperature))
    (forward, backward), _, difference = switched(line(3), 5000, MovingBath(), molecule())
    errors = [in_standard_errors(forward, difference), in_standard_errors(backward, -difference)]
    assert max(map(abs, errors)) > 8


def test_slower_switching_dissipates_less():
    means = []
    for n_steps in (2, 5, 20):
        (forward, backward), _, _ = switched(line(n_steps), 1000, MovingBath(), molecule())
        means.append(float(forward.mean() + backward.mean()) / 2)
    assert means[0] > 1.3 * means[1] > 1.3**2 * means[2] > 0


def test_more_steps_after_each_move_dissipate_less():
    means = []
    for slowness in (1, 4, 16):
        (forward, backward), _, difference = switched(line(5), 2000, MovingBath(), molecule(), slowness=slowness)
        assert abs(in_standard_errors(forward, difference)) < 4
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


def test_no_switch_at_all_is_an_error():
    engine = MovingBath()
    engine.unbounded = {2: range(4)}
    with pytest.raises(ReplicaError, match="no switch was usable after step 3 of 4"):
        switched(line(5), 2, engine, molecule())


def test_energies_met_on_the_way_cancel_unless_they_are_infinite(monkeypatch):
    """A wall of 1e5 kT of slow atoms alone is left again; from an infinite one nothing comes back, and it counts."""
    path, n, height = line(5), 40, 1e5 / thermal_beta(TEMPERATURE)
    clean, _, _ = switched(path, n, MovingBath(), molecule())
    engine, middle, energy = MovingBath(), molecule(), MovingBath.energy
    at_wall = middle.coordinates.to_xyz(path[2])

    def with_wall(self, xyz):
        slow = xyz[..., engine.slow, :]
        order = [list(middle.slow).index(atom) for atom in engine.slow]
        return energy(self, xyz) + torch.where((slow - at_wall[order]).abs().amax((-1, -2)) < 1e-9, height, 0.0)

    monkeypatch.setattr(MovingBath, "energy", with_wall)
    work, valid, _ = switched(path, n, engine, molecule())
    assert valid.all()
    torch.testing.assert_close(work, clean, atol=1e-6, rtol=0)
    height = math.inf
    work, valid, _ = switched(path, n, MovingBath(), molecule())
    assert valid.all() and (work == switching._LARGEST_WORK).all()


def test_same_seed_same_works():
    first, again, other = (switched(line(4), 20, MovingBath(), molecule(), seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not (first == other).any()


def test_switching_leaves_the_pool_alone():
    """Its ends lie on a few paths: what starts from the pool later must not descend from them."""
    engine, all_atom = MovingBath(), molecule()
    fast_atoms = chains_of(engine, all_atom)
    fast_atoms.run(line(20), Schedule(TEMPERATURE, 5, 10))
    before = [z.clone() for z, _ in fast_atoms.pool]
    switch(fast_atoms, line(3)[None].expand(6, -1, -1), TEMPERATURE, 1)
    assert len(before) == len(fast_atoms.pool) == 2
    assert all(torch.equal(first, second[0]) for first, second in zip(before, fast_atoms.pool, strict=True))


# ---------------------------------------------------------------- collected works


def crooks(differences, spread=1.0, seed=0, broken=()):
    """Works of paths whose ends' free energies are known: the first feature of each is its number, the second time."""
    generator = torch.Generator().manual_seed(seed)
    asked = []

    def run(paths, slowness):
        number, forward = paths[:, 0, 0].long(), paths[:, 0, 1] < paths[:, -1, 1]
        asked.append((number, forward))
        difference = torch.tensor(differences, dtype=torch.float64)[number] * (2 * forward.double() - 1)
        noise = torch.randn(len(paths), generator=generator, dtype=torch.float64)
        valid = torch.ones(len(paths), dtype=torch.bool)
        valid[list(broken)] = False
        lost = spread**2 / 2 / slowness
        return difference + lost + math.sqrt(2 * lost) * noise, valid

    return run, asked


def numbered(n, n_points=4):
    paths = torch.zeros((n, n_points, 2), dtype=torch.float64)
    paths[..., 0] = torch.arange(n)[:, None]
    paths[..., 1] = torch.arange(n_points)
    return paths


def test_works_add_up_path_by_path():
    switches, expected = Switches(numbered(3)), [2.0, -1.0, 5.0]
    run, asked = crooks(expected)
    switches.add(run, [0, 1, 2], 30)
    first = switches.differences(0)
    for _ in range(9):
        switches.add(run, [2], 30)
    last = switches.differences(0)
    assert [number.unique().tolist() for number, _ in asked] == [[0, 1, 2]] + 9 * [[2]]
    assert all(int(forward.sum()) == len(forward) // 2 for _, forward in asked)
    assert [len(there) for there, _ in switches.works] == [len(back) for _, back in switches.works] == [30, 30, 300]
    assert first.value[:2] == pytest.approx(last.value[:2], abs=1e-12)
    assert np.abs((last.value - expected) / last.error).max() < 4
    assert last.error[2] == pytest.approx(first.error[2] / math.sqrt(10), rel=0.3)
    assert last.dissipation == pytest.approx([0.5, 0.5, 0.5], abs=0.5)


def test_paths_without_works_are_not_known():
    switches = Switches(numbered(2))
    run, _ = crooks([1.0, 1.0])
    switches.add(run, [1], 10)
    found = switches.differences(0)
    assert math.isnan(found.value[0]) and math.isinf(found.error[0]) and math.isfinite(found.error[1])
    assert Switches(numbered(0)).differences(0).error.shape == (0,)


def test_unusable_switches_are_left_out_or_too_many():
    switches = Switches(numbered(2))
    run, _ = crooks([1.0, 1.0], broken=[0, 3, 9])  # of 2 paths, 4 switches each, there and then back
    assert switches.add(run, [0, 1], 4) == []
    assert [(len(there), len(back)) for there, back in switches.works] == [(2, 3), (4, 4)]
    run, _ = crooks([1.0, 1.0], broken=[4, 5, 6])
    assert switches.add(run, [0, 1], 4) == [1]  # one there
    assert [(len(there), len(back)) for there, back in switches.works] == [(6, 7), (4, 4)]
    run, _ = crooks([1.0, 1.0], broken=[0, 1, 2, 3])
    assert switches.add(run, [1], 4) == [1]  # none there


def test_collected_works_survive_a_restart():
    switches = Switches(numbered(2))
    run, _ = crooks([1.0, 3.0])
    switches.add(run, [0, 1], 10)
    again = Switches.from_state(switches.state_dict())
    switches.add(run, [1], 10)
    assert len(again.works[1][0]) == 10  # the state does not change with what comes later
    assert torch.equal(again.paths, switches.paths)
    assert again.differences(3).value[0] == switches.differences(3).value[0]


def test_works_of_one_slowness_are_kept():
    """Those of slower switches take the place of earlier ones, and are more precise."""
    switches = Switches(numbered(2))
    run, asked = crooks([1.0, 3.0], spread=4.0)  # 8 kT
    switches.add(run, [0, 1], 20)
    fast = switches.differences(0)
    switches.add(run, [0, 1], 20, [1, 8])
    assert [len(number) for number, _ in asked] == [80, 40, 40]
    assert [len(there) for there, _ in switches.works] == [40, 20] and switches.slowness == [1, 8]
    slow = switches.differences(0)
    assert slow.dissipation == pytest.approx([8.0, 1.0], abs=1.5) and slow.error[1] < 0.5 * fast.error[1]
    switches.add(run, [1], 20, [8])
    assert [len(there) for there, _ in switches.works] == [40, 40]
    assert Switches.from_state(switches.state_dict()).slowness == [1, 8]


@pytest.mark.parametrize(
    ("before", "dissipation", "after"),
    [(1, 0.5, 1), (1, 2.0, 1), (1, 2.1, 2), (1, 7.9, 4), (2, 7.9, 8), (4, 1.0, 4), (1, 1e3, 16), (2, math.nan, 2)],
)
def test_slower_where_much_is_dissipated(before, dissipation, after):
    assert slower(before, dissipation) == after


@pytest.mark.parametrize("slowness", [1, 3])
def test_cost_is_an_upper_limit(slowness):
    engine, all_atom = MovingBath(), molecule()
    fast_atoms = chains_of(engine, all_atom)
    fast_atoms.run(line(20), Schedule(TEMPERATURE, 5, 10))
    run = engine.run

    def counting(*arguments):  # an engine evaluates the frames, too
        frames = run(*arguments)
        engine.n_energy_evaluations += frames.xyz.shape[0] * frames.xyz.shape[1]
        return frames

    engine.run = counting
    switches, before = Switches(torch.stack((line(40), line(40)))), engine.n_energy_evaluations
    switches.add(lambda paths, slow: switch(fast_atoms, paths, TEMPERATURE, 1, slow), [0, 1], 5, [1, slowness])
    cost = switches.cost(5) + switches.cost(5, slowness)
    assert 0.6 * cost < engine.n_energy_evaluations - before <= cost

"""Training: the gradient is that of the reverse KL, it converges on a known density, and it continues bit for bit."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from analytic import AnalyticMeanForce, Uninterrupted, advance, assert_identical, loaded
from methods import reverse_kl

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.features import Torsions
from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.forces.estimator import MeanForce
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.training.optimisers import GradientGuard
from openmm_cgflow.training.reverse_kl import reverse_kl_gradient
from openmm_cgflow.units import thermal_beta

BOUND = 4.0
BETA = thermal_beta(300.0)


class Plane(Coordinates):
    """One torsion and one bounded feature whose volume element is far from flat."""

    def __init__(self):
        low, high = np.array([-math.pi, -BOUND]), np.array([math.pi, BOUND])
        super().__init__((0, 1, 2, 3), ("dihedral", "bond"), np.array([True, False]), low, high, BOUND)

    def log_volume(self, z):
        return 3 * torch.log(5 + z[..., 1])


def free_energy(z):
    """Two unequal basins in the torsion, with the bounded feature following it, kJ/mol."""
    torsion, bounded = z.unbind(-1)
    away = bounded - 0.7 * torch.cos(torsion)
    return 2.5 * torch.cos(2 * torsion) + 1.5 * torch.sin(torsion) + 1.6 * away.square() + 0.15 * away**3


def new_flow(seed=0, roughness=0.0, n_layers=4, hidden=(16,), n_bins=6):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = CGFlow(Torsions(1, 1), BOUND, n_layers, n_layers, n_bins, hidden)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(roughness * torch.randn_like(parameter))
    return flow


def config(training=None, tempering=None, **values):
    return Config(
        **{
            "temperature": 300.0,
            "training": {"method": "reverse_kl", **(training or {})},
            "tempering": tempering or {},
            "chains": {"n_replicas": 64},
            **values,
        }
    )


# ---------------------------------------------------------------- the gradient


def gradient_of(flow):
    return torch.cat([parameter.grad.flatten() for parameter in flow.parameters()])


def gradient_pairs(coordinates=None, sign=1.0, n_batches=60, n=400):
    """Rows: ours minus autograd of the plain estimator mean(log q + beta A - log J), and the plain gradient."""
    flow = new_flow(roughness=0.2, n_layers=2, hidden=(6,), n_bins=4)
    plane, generator = Plane(), torch.Generator().manual_seed(1)
    estimator = AnalyticMeanForce(free_energy, noise=0.3)
    differences, plain = [], []
    for _ in range(n_batches):
        base = flow.draw_base(n, generator)
        z, ladj = flow(base)
        loss = flow.log_base(base) - ladj + BETA * free_energy(z) - plane.log_volume(z)
        flow.zero_grad()
        loss.mean().backward()
        plain.append(gradient_of(flow))
        force = estimator(z, 300.0)
        force = force._replace(gradient=sign * force.gradient)
        reverse_kl_gradient(flow, coordinates or plane, base, z.detach(), force)
        differences.append(gradient_of(flow) - plain[-1])
    return torch.stack(differences), torch.stack(plain)


def sigmas(rows):
    return (rows.mean(0) / (rows.std(0) / math.sqrt(len(rows))).clamp(min=1e-12)).abs()


def test_gradient_is_that_of_the_plain_reverse_kl_in_expectation():
    differences, plain = gradient_pairs()
    assert float(sigmas(differences).max()) < 5
    assert float(sigmas(differences).square().mean()) < 2
    assert float(sigmas(plain).max()) > 30  # the gradient itself is seen clearly
    assert (plain != 0).any(0).all()


class Flat(Plane):
    def log_volume(self, z):
        return 0.0 * z.sum(-1)


@pytest.mark.parametrize("fault", ["no volume element", "wrong sign"])
def test_a_wrong_gradient_is_noticed(fault):
    differences, _ = gradient_pairs(Flat()) if fault == "no volume element" else gradient_pairs(sign=-1.0)
    assert float(sigmas(differences).max()) > 10


def test_gradient_vanishes_sample_by_sample_where_the_flow_is_the_target():
    plane, flow, target = Plane(), new_flow(3, 0.3), new_flow(3, 0.3)
    estimator = AnalyticMeanForce(lambda z: (plane.log_volume(z) - target.log_prob(z)) / BETA)
    base = flow.draw_base(200, torch.Generator().manual_seed(0))
    z, _ = flow(base)
    residual = reverse_kl_gradient(flow, plane, base, z.detach(), estimator(z, 300.0))
    assert float(residual.abs().max()) < 1e-10
    assert float(gradient_of(flow).abs().max()) < 1e-10
    other = new_flow(4, 0.3)
    z, _ = other(base)
    assert float(reverse_kl_gradient(other, plane, base, z.detach(), estimator(z, 300.0)).abs().max()) > 0.1


def test_gradients_are_replaced_not_added():
    flow, plane = new_flow(roughness=0.2), Plane()
    base = flow.draw_base(50, torch.Generator().manual_seed(0))
    z = flow(base)[0].detach()
    force = AnalyticMeanForce(free_energy)(z, 300.0)
    reverse_kl_gradient(flow, plane, base, z, force)
    first = gradient_of(flow)
    reverse_kl_gradient(flow, plane, base, z, force)
    assert torch.equal(gradient_of(flow), first)


def test_invalid_replicas_are_as_if_never_drawn():
    """Masked before anything is multiplied: even nan where valid is False."""
    flow, plane = new_flow(roughness=0.2), Plane()
    base = flow.draw_base(50, torch.Generator().manual_seed(0))
    z = flow(base)[0].detach()
    force = AnalyticMeanForce(free_energy)(z, 300.0)
    good = torch.ones(50, dtype=torch.bool)
    good[[0, 17, 30]] = False
    for largest in (math.inf, 1.0):
        alone = MeanForce(*(tensor[good] for tensor in force[:5]))
        expected = reverse_kl_gradient(flow, plane, base[good], z[good], alone, largest)
        gradient = gradient_of(flow)
        spoilt = torch.where(good[:, None], force.gradient, math.nan)
        residual = reverse_kl_gradient(flow, plane, base, z, force._replace(gradient=spoilt, valid=good), largest)
        torch.testing.assert_close(gradient_of(flow), gradient)
        torch.testing.assert_close(residual[good], expected)
        assert (residual[~good] == 0).all()


def test_no_valid_replica_means_no_gradient():
    flow, plane = new_flow(roughness=0.2), Plane()
    base = flow.draw_base(5, torch.Generator().manual_seed(0))
    z = flow(base)[0].detach()
    force = AnalyticMeanForce(free_energy, invalid=range(5))(z, 300.0)
    assert (reverse_kl_gradient(flow, plane, base, z, force, 5.0) == 0).all()
    assert (gradient_of(flow) == 0).all()


def test_overlapping_atoms_cannot_be_the_whole_gradient():
    flow, plane = new_flow(roughness=0.2), Plane()
    base = flow.draw_base(51, torch.Generator().manual_seed(0))
    z = flow(base)[0].detach()
    force = AnalyticMeanForce(free_energy)(z, 300.0)
    calm = reverse_kl_gradient(flow, plane, base, z, force)
    at = z.clone().requires_grad_()
    (score,) = torch.autograd.grad(flow.log_prob(at).sum(), at)
    physical = calm - score
    median = physical.norm(dim=1).median()
    clash = force.gradient.clone()
    clash[7] *= 1e9
    residual = reverse_kl_gradient(flow, plane, base, z, force._replace(gradient=clash), 5.0)
    assert float((residual - score)[7].norm()) == pytest.approx(5 * float(median), rel=0.2)
    short = physical.norm(dim=1) < 4 * median
    short[7] = False
    torch.testing.assert_close(residual[short], calm[short])
    assert int(short.sum()) > 40
    everything = reverse_kl_gradient(flow, plane, base, z, force._replace(gradient=clash))
    assert float(everything.abs().max()) > 1e6  # without a limit


# ---------------------------------------------------------------- the guard


def guarded(values, **settings):
    guard = GradientGuard(config(training=settings).training)
    module = torch.nn.Linear(1, 1).double()
    rows = []
    for value in values:
        for parameter, part in zip(module.parameters(), (0.6, 0.8), strict=True):
            parameter.grad = torch.full_like(parameter, part * value)
        norm, usable = guard(module)
        after = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in module.parameters()))
        rows.append((norm, usable, after))
    return rows, guard


def test_small_gradients_pass_large_ones_are_clipped_and_very_large_ones_skipped():
    rows, _ = guarded([1.0, 1.2, 0.9, 4.9, 7.0, 11.0, 1.0], clip_factor=5, skip_factor=10)
    norms, usable, after = zip(*rows, strict=True)
    assert norms == pytest.approx([1.0, 1.2, 0.9, 4.9, 7.0, 11.0, 1.0])
    assert usable == (True, True, True, True, True, True, True)
    # medians before each: 1 (its own), 1, 1.1, 1, 1.1, 1.2, 3.05
    assert after == pytest.approx([1.0, 1.2, 0.9, 4.9, 5.5, 6.0, 1.0])
    rows, _ = guarded([1.0, 1.0, 10.1, 9.9], clip_factor=5, skip_factor=10)
    assert [row[1] for row in rows] == [True, True, False, True]
    assert rows[3][2] == pytest.approx(5.0)


def test_nan_is_skipped_and_not_remembered():
    rows, guard = guarded([1.0, math.nan, math.inf, 2.0])
    assert [row[1] for row in rows] == [True, False, False, True]
    assert guard.norms == pytest.approx([1.0, 2.0])


def test_the_median_runs():
    _, guard = guarded(range(1, 20), median_window=5, skip_factor=100, clip_factor=100)
    assert guard.norms == pytest.approx([15, 16, 17, 18, 19])
    rows, _ = guarded([1.0] * 5 + [50.0] * 5, median_window=4, clip_factor=5, skip_factor=10)
    assert [row[1] for row in rows[5:]] == [False, False, True, True, True]  # a lasting change is accepted


# ---------------------------------------------------------------- the trainer


def grid(n=100):
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1
    return torch.cartesian_prod(math.pi * middle, BOUND * middle), (2 * math.pi / n) * (2 * BOUND / n)


@torch.no_grad()
def kl_to_target(flow, temperature, log_volume=None):
    """KL(q || p) in nats by quadrature, with p = J exp(-beta A) normalised."""
    z, cell = grid()
    log_p = (log_volume or Plane().log_volume)(z) - thermal_beta(temperature) * free_energy(z)
    log_p = log_p - torch.logsumexp(log_p, 0) - math.log(cell)
    log_q = flow.log_prob(z)
    return float((log_q.exp() * (log_q - log_p)).sum() * cell)


@pytest.mark.slow
def test_training_reaches_a_known_density():
    settings = config(
        training={"learning_rate": 1e-2, "n_steps_first": 60, "n_steps": 20, "n_steps_last": 150},
        tempering={"start": 900, "min_ess": 0.8},
        chains={"n_replicas": 128},
    )
    flow = new_flow()
    trainer = reverse_kl(settings, Plane(), flow, AnalyticMeanForce(free_energy, noise=0.1))
    before = kl_to_target(flow, 300.0)
    rows, at_stage_end = [], {}
    while not trainer.done:
        if trainer.stage_done:
            at_stage_end[trainer.temperature] = kl_to_target(flow, trainer.temperature)
            trainer.next_stage()
        rows.append(trainer.step())
    after = kl_to_target(flow, 300.0)
    assert before > 0.5 and after < 0.01
    assert kl_to_target(flow, 300.0, Flat().log_volume) > 0.1  # J is in what was learnt
    assert kl_to_target(flow, 350.0) > 2 * after  # and so is the temperature
    assert all(kl < 0.1 for kl in at_stage_end.values())  # every stage follows its own target

    assert trainer.temperatures[0] == 900 and trainer.temperatures[-1] == 300
    assert all(hot > cold for hot, cold in pairwise(trainer.temperatures))
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["evaluations"] for row in rows] == [128 * row["step"] for row in rows]
    lengths = [60, *[20] * (len(trainer.temperatures) - 2), 150]
    assert [row["stage"] for row in rows] == [s for s, length in enumerate(lengths) for _ in range(length)]
    assert [row["temperature"] for row in rows] == [trainer.temperatures[row["stage"]] for row in rows]
    assert all(row["beta"] == thermal_beta(row["temperature"]) for row in rows)
    # The residual falls to where the noise of the mean forces explains it.
    first, last = rows[0], rows[-1]
    assert first["residual"] > 4 * first["noise"]
    assert last["residual"] < 3 * last["noise"]
    assert last["noise"] == pytest.approx(0.1)


@pytest.mark.parametrize("tempering", [
    {"start": 700}, {"start": 300}, {"start": 700, "criterion": "kl"},
    {"schedule": "linear", "start": 700, "n_stages": 4}, {"schedule": "list", "temperatures": [700, 400]},
])  # fmt: skip
def test_every_ladder_ends_at_the_target(tempering):
    settings = config(training={"n_steps_first": 2, "n_steps": 1, "n_steps_last": 3}, tempering=tempering)
    trainer = reverse_kl(settings, Plane(), new_flow(), AnalyticMeanForce(free_energy, invalid=[0]))
    temperatures = []
    while not trainer.done:
        if trainer.stage_done:
            trainer.next_stage()
        temperatures.append(trainer.step()["temperature"])
    assert temperatures[-3:] == [300.0] * 3 and temperatures.count(300.0) == 3
    assert all(hot >= cold for hot, cold in pairwise(temperatures))
    assert trainer.temperatures[0] == tempering.get("start", 700)


def test_learning_rate_falls_over_the_last_stage_only():
    settings = config(
        training={"learning_rate": 2e-3, "n_steps_first": 5, "n_steps": 4, "n_steps_last": 20},
        tempering={"schedule": "list", "temperatures": [500, 400]},
    )
    trainer = reverse_kl(settings, Plane(), new_flow(), AnalyticMeanForce(free_energy))
    rates = []
    while not trainer.done:
        if trainer.stage_done:
            trainer.next_stage()
        trainer.step()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[:10] == [2e-3] * 10
    assert all(earlier > later for earlier, later in pairwise(rates[9:]))
    half = 2e-3 * (0.05 + 0.95 / 2)
    assert rates[19] == pytest.approx(half)
    assert 0.05 * 2e-3 < rates[-1] < 0.06 * 2e-3


def test_skipped_updates_leave_the_flow_alone():
    flow = new_flow()
    force = AnalyticMeanForce(free_energy)
    trainer = reverse_kl(config(), Plane(), flow, force)
    assert trainer.step()["skipped"] == 0
    trainer.guard.norms = [1e-9]
    before = [parameter.detach().clone() for parameter in flow.parameters()]
    assert trainer.step()["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))
    assert trainer.n_steps == 2


def test_invalid_replicas_are_reported():
    trainer = reverse_kl(config(), Plane(), new_flow(), AnalyticMeanForce(free_energy, invalid=[3, 9]))
    row = trainer.step()
    assert row["invalid"] == 2
    assert all(math.isfinite(value) for value in row.values())


# ---------------------------------------------------------------- restart


def restart_settings(**values):
    return config(
        training={
            "n_steps_first": 6,
            "n_steps": 3,
            "n_steps_last": 5,
            "median_window": 4,
            "clip_factor": 0.9,
            "skip_factor": 1.5,
        },
        tempering={"start": 600, "min_ess": 0.97},
        **values,
    )


def restart_trainer(seed=0, **values):
    estimator = AnalyticMeanForce(free_energy, noise=0.5, invalid=[2], seed=11 + seed)
    return reverse_kl(restart_settings(**values), Plane(), new_flow(seed), estimator)


@pytest.fixture(scope="module")
def uninterrupted():
    return Uninterrupted(restart_trainer())


@pytest.mark.parametrize("stop", [1, 4, 6, 7, 9, 13])
def test_restart_equals_uninterrupted_bit_for_bit(stop, uninterrupted):
    """In the middle of stages, at their ends and after the first step; another seed in what is overwritten."""
    straight, rows = uninterrupted.trainer, uninterrupted.rows
    assert len(straight.temperatures) > 3 and len(rows) > 14
    assert 0 < sum(row["skipped"] for row in rows) < 8  # the guard has work to do

    second = restart_trainer(seed=5)
    second.load_state_dict(loaded(uninterrupted.files[stop]))
    assert advance(second) == rows[stop:]
    assert_identical(second.state_dict(), straight.state_dict())


def test_a_forgotten_part_of_the_state_is_noticed(uninterrupted):
    """Each part matters: leave one out and the continuation differs."""
    fresh = restart_trainer(seed=5).state_dict()
    fresh["optimizer"] = restart_trainer().state_dict()["optimizer"]
    for part in ("flow", "optimizer", "generator", "estimator", "norms", "temperatures", "n_steps", "n_stage_steps"):
        state = loaded(uninterrupted.files[7])
        state[part] = fresh[part]
        second = restart_trainer()
        second.load_state_dict(state)
        assert advance(second, 4) != uninterrupted.rows[7:11], part


def test_the_same_seed_gives_the_same_run_and_another_another():
    rows = advance(restart_trainer(), 5)
    assert advance(restart_trainer(), 5) == rows
    assert advance(restart_trainer(**{"seed": 7}), 5) != rows

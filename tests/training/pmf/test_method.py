"""Training on a learned potential of mean force: right populations, named ends, limits, and bitwise restarts."""

import copy
import math

import numpy as np
import pytest
import torch
from analytic import (
    BONDS,
    AnalyticMeanForce,
    Uninterrupted,
    advance,
    assert_identical,
    internal_coordinates,
    loaded,
    random_structure,
    saved,
)
from methods import pmf_training

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.features import Torsions
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.forces.estimator import ChainParts
from openmm_cgflow.forces.gradients import mean_and_variance
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.networks.pmf import PMF
from openmm_cgflow.networks.response import FastResponse
from openmm_cgflow.networks.weights import WeightedSamples, weighted_samples
from openmm_cgflow.training.pmf import flow_fit as distillation
from openmm_cgflow.training.pmf.fits import PMFFitter
from openmm_cgflow.training.pmf.flow_fit import FlowFitter
from openmm_cgflow.training.pmf.rounds import BARRIER_SCALES
from openmm_cgflow.training.pmf.state import state_populations
from openmm_cgflow.units import thermal_beta

BETA = thermal_beta(300.0)
CHAIN = [(0, 1), (1, 2), (2, 3)]
COORDINATES = internal_coordinates(CHAIN, random_structure(CHAIN, 1))
N_BOUNDED = 5
FIRST_ANGLE = 4  # in z: a torsion, three bonds, two angles


def precision():
    """Couplings of bonds and angles, in the units of z."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.eye(N_BOUNDED).double() + 0.15 * torch.randn((5, 5), generator=generator, dtype=torch.float64)
    return mixed @ mixed.T


def torsion_energy(torsion):
    """Two basins, 11 kT high, the smaller of about an eighth, kT."""
    return 5.0 * torch.cos(2 * torsion) + 1.0 * torch.sin(torsion)


def free_energy(z):
    """A(z) of the chain, kJ/mol: an angle follows the torsion."""
    away = z[..., 1:].clone()
    away[..., FIRST_ANGLE - 1] = away[..., FIRST_ANGLE - 1] - 0.8 * torch.cos(z[..., 0])
    return (torsion_energy(z[..., 0]) + 0.5 * ((away @ precision()) * away).sum(-1)) / BETA


def exact_population():
    """Of positive torsions. The bounded features integrate out but for the sine of the angle that follows."""
    torsion = (torch.arange(4000, dtype=torch.float64) + 0.5) / 2000 * math.pi - math.pi
    z = torch.zeros((4000, 6), dtype=torch.float64)
    z[:, FIRST_ANGLE] = 0.8 * torch.cos(torsion)
    density = torch.exp(-torsion_energy(torsion)) * torch.sin(COORDINATES.to_physical(z)[:, FIRST_ANGLE])
    return float(density[torsion > 0].sum() / density.sum())


class Recorder(AnalyticMeanForce):
    """Keeps every z that it is asked about."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.asked = []

    def __call__(self, z, temperature):
        self.asked.append(z.clone())
        return super().__call__(z, temperature)


def settings(pmf=None, stopping=None, n_replicas=32, seed=0, adaptive=False):
    quick = {
        "n_updates": 3,
        "final_updates": 3,
        "flow_updates": 2,
        "flow_batch_size": 32,
        "hidden_features": [8],
        "polish_updates": 6,
        "polish_block": 3,
        "n_test": 256,
        "n_probe": 64,
        "n_switched": 0,
    }
    return Config(
        temperature=300.0,
        seed=seed,
        pmf={**quick, **(pmf or {})},
        stopping={"free_energy_error": 1e-3, **(stopping or {})},  # never
        chains={"n_replicas": n_replicas, "adaptive": adaptive},
    )


class Followed(Recorder):
    """Adds noise that a fast atom makes which follows the torsion: all of it can be known from the atom's forces."""

    def __call__(self, z, temperature):
        force = super().__call__(z, temperature)
        balance = torch.randn((len(z), 4, 3), generator=self.generator, dtype=torch.float64)
        slow = force.gradient[:, None].expand(-1, 4, -1).clone()
        slow[..., 0] -= 10 * (balance * torch.tensor([0.3, 0.5, 0.0])).sum(-1) * torch.cos(z[:, :1])
        parts = ChainParts(*(torch.where(force.valid[:, None, None], part, 0.0) for part in (slow, balance)))
        gradient, variance = mean_and_variance(parts.slow, force.valid)
        return force._replace(gradient=gradient, variance=variance + force.variance, parts=parts)


def no_response(n_circular, n_bounded):
    """A closed form has no fast atoms."""
    return FastResponse(Torsions(n_circular, n_bounded), torch.zeros((0, 3)), (8,))


def new_method(config, noise=0.7, invalid=(), seed=0, hidden=(8,), estimator_seed=11, followed=False):
    """The flow and the PMF know the widths of bonds and angles, but none of their couplings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        diagonal = torch.diag(precision().diagonal())
        flow = CGFlow(Torsions(1, N_BOUNDED), COORDINATES.bound, 3, 2, 8, hidden, torch.linalg.inv(diagonal))
        pmf = PMF(Torsions(1, N_BOUNDED), diagonal, config.pmf.hidden_features, config.pmf.n_members)
        response = (
            FastResponse(Torsions(1, N_BOUNDED), torch.ones((1, 3)), (16,)) if followed else no_response(1, N_BOUNDED)
        )
    estimator = (Followed if followed else Recorder)(free_energy, noise=noise, invalid=invalid, seed=estimator_seed)
    return pmf_training(config, COORDINATES, flow, pmf, response, estimator)


# ---------------------------------------------------------------- a whole training


LIKE_CONVERGED = {"n_probe": 512, "hidden_features": [24, 24]}


@pytest.fixture(scope="module")
def converged():
    config = settings(
        pmf={
            "n_updates": 60, "final_updates": 300, "flow_updates": 20, "flow_batch_size": 256,
            "hidden_features": [24, 24],
            "learning_rate": 1e-2, "flow_learning_rate": 5e-3, "polish_updates": 150, "explore_height": 4.0,
            "n_switched": 3, "n_test": 8192, "n_probe": 512, "polish_block": 50,
        },
        stopping={"max_rounds": 25, "max_polish_cycles": 1, "ess": 0.9, "free_energy_error": 0.2, "held_out": 1.2},
        n_replicas=256,
    )  # fmt: skip
    trainer = new_method(config, hidden=(16, 16))
    return trainer, advance(trainer)


@pytest.mark.slow
def test_populations_of_a_known_molecule(converged):
    trainer, _ = converged
    exact = exact_population()
    assert 0.1 < exact < 0.15
    n = 40000
    samples = weighted_samples(trainer.state.flow, trainer.state.pmf, COORDINATES, n, torch.Generator().manual_seed(5))
    assert samples.ess > 0.9
    positive = (samples.z[:, 0] > 0).double()
    of_members = torch.softmax(-samples.members - samples.log_q, 1) @ positive
    # The ensemble's own error, and that of so many samples.
    error = math.hypot(float(of_members.log().std()), 1 / math.sqrt(n * exact))
    assert error < 0.15
    weighted = float(torch.softmax(samples.log_weights, 0) @ positive)
    assert abs(math.log(weighted / exact)) < 4 * error
    assert abs(math.log(float(positive.mean()) / exact)) < 4 * error + 0.1  # the flow without weights
    # The mean of the angle that follows the torsion, in both basins.
    for sign in (-1, 1):
        basin = samples.z[sign * samples.z[:, 0] > 0]
        expected = 0.8 * torch.cos(basin[:, 0])
        away = basin[:, FIRST_ANGLE] - expected
        assert float(away.mean().abs()) < 0.15


@pytest.mark.slow
def test_the_rounds_end_for_a_named_reason(converged):
    trainer, rows = converged
    assert trainer.outcome.reason.startswith("converged: ")
    for word in ("held-out mean forces", "of their noise", "kT", "effective sample size"):
        assert word in trainer.outcome.reason
    last = [row for row in rows if math.isfinite(row["held_out"])][-1]
    assert last["held_out"] <= 1.2 and last["free_energy_error"] <= 0.2 and last["moved"] <= 0.2
    assert last["ess"] >= 0.9 * 0.9


@pytest.mark.slow
def test_rows_tell_the_course(converged):
    trainer, rows = converged
    n_rounds = len(trainer.state.buffer.rounds)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert {row["temperature"] for row in rows} == {300.0} and trainer.temperatures == [300.0]
    assert [math.isfinite(row["held_out"]) for row in rows] == [k < n_rounds for k in range(len(rows))]
    assert [row["evaluations"] for row in rows[:n_rounds]] == [256 * (k + 1) for k in range(n_rounds)]
    n_switched = trainer.anchors.n_steps
    assert n_switched >= 1 and [math.isfinite(row["anchor_error"]) for row in rows].index(True) == n_rounds
    alone = rows[n_rounds + n_switched :]
    assert {row["evaluations"] for row in alone} == {trainer.state.estimator.n_energy_evaluations}  # no more are needed
    assert rows[n_rounds - 1]["evaluations"] < rows[n_rounds]["evaluations"]
    assert len(alone) == 2 + 3  # 300 updates of the PMF in blocks of 200, 150 of the flow in blocks of 50
    assert alone[-1]["anchor_error"] <= 0.2 and alone[-1]["anchor_misfit"] < 0.3
    assert all(math.isnan(row["moved"]) for row in rows[:3])  # not known yet, so it cannot end here
    assert all(math.isnan(row["moved"]) for row in rows[n_rounds:])
    assert rows[0]["held_out"] > rows[n_rounds - 1]["held_out"]
    assert rows[0]["ess"] < rows[-1]["ess"]
    assert trainer.done and trainer.stage_done
    assert trainer.expected_steps == trainer.n_steps == len(rows)
    assert "ESS" in trainer.describe(rows[0]) and "flow" in trainer.describe(rows[-1])
    with pytest.raises(RuntimeError, match="one stage"):
        trainer.next_stage()


@pytest.mark.slow
def test_every_round_measures_on_the_barrier_and_in_the_basins(converged):
    trainer, _ = converged
    later = torch.cat(trainer.state.estimator.asked[3:])
    height = torsion_energy(later[:, 0]) - float(torsion_energy(torch.linspace(-3, 3, 100)).min())
    assert float((height > 8).double().mean()) > 0.05
    assert float((height < 2).double().mean()) > 0.15
    model, _ = trainer.state.flow.sample(20000, torch.Generator().manual_seed(0))
    own = torsion_energy(model[:, 0]) - float(torsion_energy(torch.linspace(-3, 3, 100)).min())
    assert float((own > 8).double().mean()) < 0.02  # the model itself hardly goes there


@pytest.mark.slow
@pytest.mark.parametrize("height", [1.0, 2.0, 3.0])
def test_the_scale_is_chosen_so_that_samples_climb(converged, height):
    """The largest barrier scale whose samples lie so high above the model's: the next larger one's do not."""
    trainer, _ = converged
    flow, pmf = trainer.state.flow, trainer.state.pmf
    chosen = new_method(settings(pmf={"explore_height": height, **LIKE_CONVERGED}), hidden=(16, 16))
    chosen.state.flow.load_state_dict(flow.state_dict())
    chosen.state.pmf.load_state_dict(pmf.state_dict())
    chosen.state.flow_fitter.trained_up_to = 1.0
    chosen.rounds.choose_exploring()

    def median_height(scale):
        samples = weighted_samples(flow, pmf, COORDINATES, 20000, torch.Generator().manual_seed(1), scale)
        return float((samples.energy + flow.log_prob_bounded(samples.z).detach()).median())

    def climb(scale):
        return median_height(scale) - median_height(1.0)

    tried = BARRIER_SCALES
    assert chosen.state.exploring in tried and 0.02 < chosen.state.exploring < 0.64
    assert climb(chosen.state.exploring) > height - 0.3  # the choice is made from 512 samples
    assert climb(tried[tried.index(chosen.state.exploring) + 1]) < height + 0.3


@pytest.mark.slow
def test_a_higher_goal_means_a_smaller_scale(converged):
    trainer, _ = converged
    scales = []
    for height in (1.0, 2.0, 4.0, 100.0):
        other = new_method(settings(pmf={"explore_height": height, **LIKE_CONVERGED}), hidden=(16, 16))
        other.state.flow.load_state_dict(trainer.state.flow.state_dict())
        other.state.pmf.load_state_dict(trainer.state.pmf.state_dict())
        other.state.flow_fitter.trained_up_to = 1.0
        other.rounds.choose_exploring()
        scales.append(other.state.exploring)
    assert scales[0] > scales[1] > scales[2] >= scales[3] == BARRIER_SCALES[0]


# ---------------------------------------------------------------- ends and limits


def test_the_largest_number_of_rounds_is_kept():
    limits = {"max_rounds": 3, "max_polish_cycles": 1, "held_out": 1.3, "ess": 0.8}
    trainer = new_method(settings(stopping=limits))
    rows = advance(trainer)
    assert trainer.outcome.reason.startswith("not converged: stopping.max_rounds is reached")
    for word in ("held-out error", "free-energy error", "effective sample size", "wanted 1.3", "wanted 0.72"):
        assert word in trainer.outcome.reason, trainer.outcome.reason
    assert len(trainer.state.buffer.rounds) == 3
    assert len(rows) == 3 + 1 + 2
    assert trainer.state.estimator.n_energy_evaluations == 96


@pytest.mark.slow
def test_what_the_steps_after_the_rounds_did_not_reach_is_named(converged, monkeypatch):
    trainer, rows = converged
    assert trainer.outcome.unmet == ()
    known = rows[-1]["anchor_error"]
    assert 0 < known < 0.2
    asked = settings(stopping={"ess": 0.999, "free_energy_error": known / 2, "max_polish_cycles": 1})
    monkeypatch.setattr(trainer.state, "stopping", asked.stopping)
    switching, flow = trainer.outcome.unmet
    assert switching == f"differences by switching to {known:.3g} kT (wanted {known / 2:g})"
    assert flow == f"effective sample size {trainer.polish.cycles[-1]:.3g} (wanted 0.999)"
    monkeypatch.setattr(trainer, "_number", 0)
    assert trainer.outcome.unmet == ()  # not yet


@pytest.mark.parametrize(("n_switched", "largest"), [(0, 0.02), (4, 0.04)])
def test_rounds_leave_half_of_the_error_to_switching(n_switched, largest):
    given = settings(stopping={"free_energy_error": 0.02, "held_out": 1.3, "ess": 0.9}, pmf={"n_switched": n_switched})
    trainer = new_method(given)

    def ends(error, moved):
        row = {"held_out": 1.0, "ess": 0.9, "free_energy_error": error, "moved": moved}
        return trainer.rounds.reason_to_end(row).startswith("converged")

    assert ends(0.99 * largest, 0.99 * largest)
    assert not ends(1.01 * largest, 0.0) and not ends(0.0, 1.01 * largest) and not ends(0.0, math.nan)


@pytest.mark.parametrize(("limit", "n_rounds"), [(32, 1), (127, 3), (128, 4), (129, 4)])
def test_energy_evaluations_never_exceed_their_limit(limit, n_rounds):
    trainer = new_method(settings(stopping={"max_evaluations": limit, "max_polish_cycles": 1}))
    rows = advance(trainer)
    assert trainer.outcome.reason.startswith("not converged: the next round would exceed stopping.max_evaluations")
    assert len(trainer.state.buffer.rounds) == n_rounds
    assert max(row["evaluations"] for row in rows) <= limit


def test_the_pool_of_fast_atoms_that_the_first_round_fills_is_paid_for_once(monkeypatch):
    """3200 evaluations that no other round takes; as if every one did, a training of 3600 would end with one round."""
    given = settings(stopping={"max_evaluations": 3600, "max_polish_cycles": 1})
    fast_atoms = given.chains.model_copy(update={"n_relax": 0, "n_equilibration": 0, "n_frames": 2, "stride": 1})
    trainer = new_method(given.model_copy(update={"chains": fast_atoms}))
    measure = type(trainer.state.estimator).__call__

    def with_pool(self, z, temperature):
        self.n_energy_evaluations += 0 if trainer.state.buffer.rounds else 3200
        return measure(self, z, temperature)

    monkeypatch.setattr(type(trainer.state.estimator), "__call__", with_pool)
    rows = advance(trainer)
    assert len(trainer.state.buffer.rounds) == 12
    assert max(row["evaluations"] for row in rows) <= 3600


@pytest.mark.parametrize("reach", [1.0, 0.5])
def test_the_flow_is_trained_on_until_it_gains_no_more(monkeypatch, reach):
    """With an effective sample size that it cannot reach: whole cycles, at most so many.

    All of them where what is trained is not the model yet: there, no gain says nothing.
    """
    monkeypatch.setattr(FlowFitter, "_widen_or_narrow", lambda fitter, ess: None)
    trainer = new_method(settings(stopping={"max_rounds": 2, "max_polish_cycles": 4, "ess": 0.999}))
    trainer.state.flow_fitter.trained_up_to = reach
    rows = advance(trainer)
    cycle = 2  # six updates in blocks of three
    ends = [row["ess"] for row in rows[3 + cycle - 1 :: cycle]]
    assert len(rows) == 3 + cycle * len(ends) and 2 <= len(ends) <= 4
    if reach == 1:
        assert len(ends) == 4 or (trainer.polish.anew_after and not trainer.polish.gained)
    else:
        assert len(ends) == 4 and not trainer.polish.anew_after


def test_a_flow_that_gains_nothing_starts_anew_once(monkeypatch):
    """Its first cycle has no updates; the second one starts with the flow of the very start, and is spoiled."""
    trainer = new_method(settings(stopping={"max_rounds": 2, "max_polish_cycles": 4, "ess": 0.999}))
    start = copy.deepcopy(trainer.state.flow.state_dict())
    trainer.state.flow_fitter.trained_up_to = 1.0
    rows = advance(trainer, 3)
    before, first, seen = copy.deepcopy(trainer.state.flow.state_dict()), trainer.state.flow_fitter, []

    def equal(state):
        return all(torch.equal(value, state[name]) for name, value in trainer.state.flow.state_dict().items())

    def update(fitter, *_, **__):
        if fitter is not first and not seen:
            seen.append((equal(start), fitter.trained_up_to))
        if fitter is not first:
            with torch.no_grad():
                for parameter in fitter.networks.average.parameters():
                    parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr(FlowFitter, "update", update)
    assert not equal(start)
    rows += advance(trainer)
    assert len(rows) == 3 + 2 + 2  # after the second one without a gain there is no third
    assert seen == [(True, distillation._FIRST_SCALE)]
    assert equal(before) and trainer.state.flow_fitter.trained_up_to == 1


@pytest.mark.parametrize(("reach", "kept"), [(1.0, True), (0.5, False)])
def test_a_flow_that_is_lost_is_taken_back(monkeypatch, reach, kept):
    """Unless it is not trained as the model yet, where its effective sample size says nothing."""
    monkeypatch.setattr(FlowFitter, "_widen_or_narrow", lambda fitter, ess: None)
    trainer = new_method(settings(stopping={"max_rounds": 2, "max_polish_cycles": 2, "ess": 0.999}))
    trainer.state.flow_fitter.trained_up_to = reach
    rows = advance(trainer, 3)
    before = copy.deepcopy(trainer.state.flow.state_dict())

    def spoil(fitter, *_, **__):
        with torch.no_grad():
            for parameter in fitter.networks.average.parameters():
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        fitter.trained_up_to *= 0.9  # as it does where it is lost

    monkeypatch.setattr(FlowFitter, "update", spoil)
    last = advance(trainer)[-1]
    same = all(torch.equal(value, before[name]) for name, value in trainer.state.flow.state_dict().items())
    assert same == kept and (trainer.state.flow_fitter.trained_up_to == 1) == kept
    assert (last["ess"] > rows[-1]["ess"] - 0.05) == kept  # nan where it is lost


def test_a_reached_effective_sample_size_ends_the_training():
    trainer = new_method(settings(stopping={"max_rounds": 2, "max_polish_cycles": 4, "ess": 0.01}))
    assert len(advance(trainer)) == 2 + 1 + 2


def test_expected_steps_are_an_upper_bound_until_the_rounds_end():
    trainer = new_method(settings(stopping={"max_evaluations": 100, "max_rounds": 50, "max_polish_cycles": 1}))
    expected = []
    while not trainer.done:
        trainer.step()
        expected.append(trainer.expected_steps)
    assert expected[0] == 53 and expected[-1] == trainer.n_steps == 6


def test_rounds_grow_while_mean_forces_become_predictable():
    config = settings(
        pmf={"n_updates": 60, "learning_rate": 1e-2}, stopping={"max_rounds": 8}, n_replicas=64, adaptive=True
    )
    trainer = new_method(config, noise=0.5)
    rows = advance(trainer, 8)
    sizes = [len(asked) for asked in trainer.state.estimator.asked]
    assert sizes[0] == 16  # nothing is known yet
    for size, row in zip(sizes[1:], rows[:-1], strict=True):
        assert size == math.ceil(64 * min(1.0, max(0.25, 1.5 / row["held_out"])))
    assert sizes[-1] == 64
    assert [row["evaluations"] for row in rows] == np.cumsum(sizes).tolist()


def test_the_estimator_is_told_of_noise_over_what_the_fit_aims_at():
    told = []
    for noise in (0.2, 2.0):
        trainer = new_method(settings(), noise=noise)
        trainer.state.estimator.tune = told.append
        trainer.step()
    assert len(told) == 2 and told[1] == pytest.approx(100 * told[0], rel=0.2)


def test_invalid_replicas_are_counted_and_left_out():
    trainer = new_method(settings(), invalid=[3, 9])
    row = trainer.step()
    assert row["invalid"] == 2
    assert len(trainer.state.buffer.data()["z"]) == 30
    assert math.isfinite(row["held_out"]) and math.isfinite(row["misfit"]) and math.isfinite(row["energy"])


def test_a_fit_that_diverges_ends_the_training():
    trainer = new_method(settings())
    trainer.state.pmf_fitter.fit = lambda *_: math.nan
    with pytest.raises(CGFlowError, match=r"diverged after round 1.*learning_rate"):
        trainer.step()


def test_a_last_fit_that_diverges_ends_the_training(monkeypatch):
    trainer = restart_trainer()
    while not trainer.outcome.reason or not trainer.anchors.done:
        trainer.step()
    monkeypatch.setattr(PMFFitter, "fit", lambda *_: math.nan)
    with pytest.raises(CGFlowError, match=r"diverged after round \d+.*learning_rate"):
        trainer.step()


def test_noise_of_the_fast_atoms_is_taken_out():
    """From rounds that were measured before it was known, too; the rows tell how much is left."""
    config = settings(pmf={"response_updates": 150}, stopping={"max_rounds": 4}, n_replicas=128)
    trainer = new_method(config, noise=0.1, followed=True)
    rows = advance(trainer, 4)
    left = [row["noise_left"] for row in rows]
    assert left[0] > 3 * left[3] and left[3] < 0.1
    data, raw = trainer.state.data(), trainer.state.buffer.data()
    at = data["z"].double().requires_grad_()
    (exact,) = torch.autograd.grad(BETA * free_energy(at).sum(), at)
    before, after = ((one["gradient"] - exact)[:, 0].square().mean().sqrt() for one in (raw, data))
    assert float(before) > 1.5 and float(after) < 0.5
    assert float(data["variance"][:, 0].median()) < 0.1 * float(raw["variance"][:, 0].median())


def test_molecules_without_torsions_are_trained_too():
    bonds = BONDS["three"]
    coordinates = internal_coordinates(bonds, random_structure(bonds))
    assert coordinates.n_circular == 0
    config = settings(stopping={"max_rounds": 5, "max_polish_cycles": 1})
    estimator = AnalyticMeanForce(lambda z: 0.7 * z.square().sum(-1) / BETA, noise=0.1)
    flow = CGFlow(coordinates.features, coordinates.bound, 2, 2, 4, (8,), torch.eye(3).double())
    trainer = pmf_training(
        config, coordinates, flow, PMF(coordinates.features, torch.eye(3), (8,)), no_response(0, 3), estimator
    )
    rows = advance(trainer)
    assert {row["free_energy_error"] for row in rows} == {0.0}
    assert rows[-1]["ess"] > 0.5


def test_without_torsions_a_flow_that_gains_nothing_starts_anew():
    bonds = BONDS["three"]
    coordinates = internal_coordinates(bonds, random_structure(bonds))
    config = settings(stopping={"max_rounds": 3, "max_polish_cycles": 3, "ess": 0.9999})
    estimator = AnalyticMeanForce(lambda z: 0.7 * z.square().sum(-1) / BETA, noise=0.1)
    flow = CGFlow(coordinates.features, coordinates.bound, 2, 2, 4, (8,), torch.eye(3).double())
    trainer = pmf_training(
        config, coordinates, flow, PMF(coordinates.features, torch.eye(3), (8,)), no_response(0, 3), estimator
    )
    trainer.polish.smallest_gain = 2.0  # nothing is a gain
    advance(trainer)
    assert trainer.polish.anew_after == 1


# ---------------------------------------------------------------- populations


def weighed(torsions, log_weights):
    """Samples with given torsions in degrees, shape (n, n_circular), and log weights by member, (n_members, n)."""
    z = torch.tensor(torsions, dtype=torch.float64) * math.pi / 180
    members = -torch.tensor(log_weights, dtype=torch.float64)
    log_q = torch.linspace(-1, 1, len(z), dtype=torch.float64)
    return WeightedSamples(z, log_q, members.mean(0) - log_q, members - log_q)


def test_populations_of_hand_made_samples():
    weights = [[math.log(w) for w in row] for row in ([1, 1, 1, 1], [1, 2, 3, 4])]
    found = state_populations(weighed([[-170], [-70], [10], [170]], weights), 1)
    assert found.shape == (2, 6)
    # Cut at -180, -60 and 60 degrees; then at -120, 0 and 120.
    expected = [[1 / 2, 1 / 4, 1 / 4, 1 / 2, 1 / 4, 1 / 4], [0.3, 0.3, 0.4, 0.5, 0.2, 0.3]]
    for row, want in zip(found.tolist(), expected, strict=True):
        assert sorted(row[:3]) == pytest.approx(sorted(want[:3])) and sorted(row[3:]) == pytest.approx(sorted(want[3:]))
    assert found[1, :3].tolist() == pytest.approx([0.3, 0.3, 0.4])


def test_populations_of_each_torsion_sum_to_one():
    generator = torch.Generator().manual_seed(0)
    torsions = (360 * torch.rand((50, 3), generator=generator, dtype=torch.float64) - 180).tolist()
    log_weights = torch.randn((4, 50), generator=generator, dtype=torch.float64).tolist()
    found = state_populations(weighed(torsions, log_weights), 3)
    assert found.shape == (4, 18)
    for part in (found[:, :9], found[:, 9:]):
        torch.testing.assert_close(part.reshape(4, 3, 3).sum(2), torch.ones((4, 3)).double())


def test_thirds_tell_the_states_of_a_single_bond_apart():
    """Gauche and trans of a single bond: the first kind of thirds, shifted by half a third, holds trans as one."""
    found = state_populations(weighed([[-65], [-55], [65], [55], [175], [-175]], [[0.0] * 6]), 1)[0].tolist()
    assert sorted(found[3:]) == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert sorted(found[:3]) == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_edges_of_the_circle_belong_to_one_state():
    angles = [-180.0, 180.0 - 1e-9, -60.0, 60.0, 120.0, 0.0]
    assert state_populations(weighed([[a] for a in angles], [[0.0] * 6]), 1).sum().item() == pytest.approx(2)


# ---------------------------------------------------------------- restart


def restart_trainer(seed=0):
    stopping = {"max_rounds": 5, "max_polish_cycles": 2, "ess": 0.999, "free_energy_error": 0.15}
    config = settings(pmf={"n_switched": 2}, stopping=stopping, seed=3)
    return new_method(config, invalid=[2], seed=seed, estimator_seed=11 + seed, followed=True)


def same_rows(first, second):
    """Equal, nan included."""
    return [list(row.items()) for row in map(readable, first)] == [list(row.items()) for row in map(readable, second)]


def readable(row):
    return {name: "nan" if math.isnan(value) else value for name, value in row.items()}


@pytest.fixture(scope="module")
def uninterrupted():
    return Uninterrupted(restart_trainer())


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6, 8, 9, 10])
def test_restart_equals_uninterrupted_bit_for_bit(stop, uninterrupted):
    """After rounds, after the last one, between switches, and in the last fit and training of the flow alone; another
    seed in what is overwritten."""
    straight, rows = uninterrupted.trainer, uninterrupted.rows
    assert len(straight.state.buffer.rounds) == 5 and straight.anchors.n_steps == 2 and len(rows) >= 11

    second = restart_trainer(seed=5)
    second.load_state_dict(loaded(uninterrupted.files[stop]))
    assert second.n_steps == stop
    assert same_rows(advance(second), rows[stop:])
    assert_identical(second.state_dict(), straight.state_dict())
    assert second.outcome.reason == straight.outcome.reason


def test_restart_of_a_flow_that_is_to_start_anew():
    first = restart_trainer()
    while not first.polish.cycles:
        first.step()
    first.polish.gained = False
    file = saved(first)
    second = restart_trainer(seed=5)
    second.load_state_dict(loaded(file))
    assert same_rows(advance(first), advance(second))
    assert first.polish.anew_after == 1
    assert_identical(second.state_dict(), first.state_dict())


FORGOTTEN = {
    4: (
        "shared/flow/networks", "shared/flow/optimizer", "shared/pmf/networks", "shared/pmf/optimizer",
        "shared/pmf/networks/average", "shared/generator", "shared/estimator", "shared/buffer", "shared/exploring",
        "shared/response", "rounds/earlier", "shared/pmf_start",
    ),
    6: ("anchors", "shared/estimator"),
    9: (
        "shared/flow/networks", "shared/flow/optimizer", "shared/flow/networks/average", "shared/pmf",
        "shared/generator", "n_steps", "polish", "phase",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stop", FORGOTTEN)
def test_a_forgotten_part_of_the_state_is_noticed(stop, uninterrupted):
    file, expected = uninterrupted.files[stop], uninterrupted.rows
    fresh = saved(restart_trainer(seed=5))
    for part in FORGOTTEN[stop]:
        state, other = loaded(file), loaded(fresh)
        *above, name = part.split("/")
        place, source = state, other
        for key in above:
            place, source = place[key], source[key]
        place[name] = source[name]
        second = restart_trainer(seed=5)
        second.load_state_dict(state)
        # Up to the first row that differs; what comes after it says nothing more.
        assert not all(same_rows(advance(second, 1), [row]) for row in expected[stop:]) or not second.done, part


def test_the_same_seed_gives_the_same_run_and_another_another(uninterrupted):
    rows = uninterrupted.rows[:3]
    assert same_rows(advance(restart_trainer(), 3), rows)
    assert not same_rows(advance(restart_trainer(seed=5), 3), rows)

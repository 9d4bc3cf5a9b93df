"""Training of the joint density: nothing to learn at the optimum, a known density, the slow direction, restarts."""

import math
from types import SimpleNamespace

import pytest
import torch
from analytic import Uninterrupted, advance, assert_identical, loaded
from joint_models import joint_flow, linear
from methods import joint_training

from openmm_cgflow.config import Config
from openmm_cgflow.errors import ReplicaError
from openmm_cgflow.training.ladder import N_ENERGY_BATCHES
from openmm_cgflow.units import thermal_beta

UNIT = 120.27236  # K, where kT is 1 kJ/mol


class ClosedForm:
    """Energy and forces of positions along x; replicas named in ``broken`` have none."""

    def __init__(self, energy, broken=()):
        self.energy, self.broken = energy, list(broken)
        self.n_energy_evaluations = 0

    def __call__(self, xyz):
        at = xyz.clone().requires_grad_()
        energy = self.energy(at[..., 0])
        (gradient,) = torch.autograd.grad(energy.sum(), at)
        self.n_energy_evaluations += len(xyz)
        energy = energy.detach()
        energy[self.broken] = math.nan
        return energy, -gradient

    def state_dict(self):
        return {"n_energy_evaluations": self.n_energy_evaluations}

    def load_state_dict(self, state):
        self.n_energy_evaluations = state["n_energy_evaluations"]


def two_wells(x):
    """Minima of the second particle at -1.2 and 1.2, about 4 kT high, one of them rarer; the first is Gaussian."""
    slow, fast = x[:, 1], x[:, 0]
    return 2.0 * (slow**2 - 1.44) ** 2 + 0.5 * slow + 0.5 * ((fast - 0.4) / 0.3) ** 2


def exact_population(beta=1.0):
    axis = torch.linspace(-4, 4, 4001).double()
    density = torch.exp(-beta * (2.0 * (axis**2 - 1.44) ** 2 + 0.5 * axis))
    return float(density[axis > 0].sum() / density.sum())


def config(training=None, tempering=None, seed=0, n_replicas=128):
    short = {"method": "joint", "learning_rate": 5e-3, "n_steps_first": 4, "n_steps": 2, "n_steps_last": 4}
    return Config(
        temperature=UNIT,
        seed=seed,
        training={**short, **(training or {})},
        tempering={"start": 5 * UNIT, "min_ess": 0.7, **(tempering or {})},
        chains={"n_replicas": n_replicas},
    )


def trainer_of(settings, energy=two_wells, broken=(), roughness=0.0, **thermal_map):
    joint = joint_flow(linear(widths=torch.tensor([0.3, 1.5]).double(), **thermal_map), roughness=roughness)
    return joint_training(settings, joint, SimpleNamespace(n_features=1), ClosedForm(energy, broken))


def test_nothing_is_learned_where_the_density_is_right(monkeypatch):
    """A flat box and a Gaussian of the thermal width, at every temperature: no gradient, sample by sample."""
    trainer = trainer_of(config(), lambda x: 0.5 * ((x[:, 0] - 0.4) / 0.3) ** 2, learned=False)
    monkeypatch.setattr(trainer, "_measure", lambda *_: None)  # the thermal widths are exact
    joint = trainer.networks.trained
    with torch.no_grad():
        for parameter in (*joint.flow.parameters(), *joint.conditional.parameters()):
            parameter.zero_()  # the identity
    row = trainer.step()
    assert row["residual"] < 1e-4 and row["gradient_norm"] < 1e-4
    assert row["ess"] > 0.9999 and abs(row["kl"]) < 1e-5


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_wrong_temperature_is_noticed(factor, monkeypatch):
    from openmm_cgflow.training import joint as joint_training

    monkeypatch.setattr(joint_training, "thermal_beta", lambda temperature: factor * thermal_beta(temperature))
    trainer = trainer_of(config(), lambda x: 0.5 * ((x[:, 0] - 0.4) / 0.3) ** 2, learned=False)
    monkeypatch.setattr(trainer, "_measure", lambda *_: None)
    assert advance(trainer, 1)[0]["residual"] > 0.02


@pytest.fixture(scope="module")
def trained():
    settings = config(training={"n_steps_first": 40, "n_steps": 40, "n_steps_last": 100}, tempering={"min_ess": 0.5})
    trainer = trainer_of(settings, mixing=0.8)
    return trainer, advance(trainer)


@pytest.mark.slow
def test_populations_are_found(trained):
    """From a slow coordinate that is a mixture of both particles, 0.6 of one and 0.4 of the other."""
    trainer, rows = trained
    joint = trainer.joint
    exact = exact_population()
    assert 0.2 < exact < 0.35
    with torch.no_grad():
        z, r = joint(joint.draw_base(40_000, torch.Generator().manual_seed(1)))
        xyz = joint.build(z, r)
        weights = torch.softmax(-two_wells(xyz[..., 0]) - joint.log_prob_xyz(xyz), 0)
    above = (xyz[:, 1, 0] > 0).double()
    assert abs(float(above.mean()) - exact) < 0.05
    assert abs(float(weights @ above) - exact) < 0.005
    assert float(1 / (len(weights) * weights.square().sum())) > 0.95
    of_fast, _ = joint.thermal_map.slow_directions()[0].tolist()
    assert abs(of_fast) < 0.25  # on its way: the density is so good that little is left to gain
    assert torch.linalg.cond(joint.thermal_map.matrix.detach()) < 20
    assert rows[-1]["ess"] > 0.85


@pytest.mark.slow
def test_one_model_knows_all_temperatures(trained):
    trainer, _ = trained
    joint = trainer.joint
    for beta_ratio in (0.3, 0.6):
        with torch.no_grad():
            z, r = joint(joint.draw_base(20_000, torch.Generator().manual_seed(1)), beta_ratio)
            xyz = joint.build(z, r, beta_ratio)
            logs = -beta_ratio * two_wells(xyz[..., 0]) - joint.log_prob_xyz(xyz, beta_ratio)
        weights = torch.softmax(logs, 0)
        assert float(weights @ (xyz[:, 1, 0] > 0).double()) == pytest.approx(exact_population(beta_ratio), abs=0.02)
        assert float(1 / (len(weights) * weights.square().sum())) > 0.8


@pytest.mark.slow
def test_rows_tell_the_course(trained):
    trainer, rows = trained
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["evaluations"] == 128 * (len(rows) + N_ENERGY_BATCHES)
    assert {row["temperature"] for row in rows} == set(trainer.temperatures)
    assert all(row["beta_ratio"] <= UNIT / row["temperature"] + 1e-12 for row in rows)
    assert rows[0]["beta_ratio"] == pytest.approx(0.2) and min(row["beta_ratio"] for row in rows) == pytest.approx(0.2)
    assert "ESS" in trainer.describe(rows[-1]) and "KL" in trainer.describe(rows[-1])


def test_the_step_down_follows_the_criterion():
    for tempering in ({"criterion": "ess"}, {"criterion": "kl"}, {"schedule": "linear", "n_stages": 4},
                      {"schedule": "list", "temperatures": [5 * UNIT, 2 * UNIT]}):  # fmt: skip
        trainer = trainer_of(config(tempering=tempering))
        advance(trainer)
        ladder = trainer.temperatures
        assert ladder[0] == pytest.approx(5 * UNIT) and ladder[-1] == UNIT and ladder == sorted(ladder, reverse=True)


def test_broken_energies_are_left_out():
    trainer = trainer_of(config(), broken=[3, 7])
    row = trainer.step()
    assert row["invalid"] == 2 and math.isfinite(row["kl"]) and math.isfinite(row["gradient_norm"])
    trainer = trainer_of(config(), broken=range(60))
    with pytest.raises(ReplicaError, match="60 of 128 samples have no finite energy"):
        trainer.step()
    lenient = config()
    lenient = lenient.model_copy(update={"chains": lenient.chains.model_copy(update={"max_invalid": 1.0})})
    with pytest.raises(ReplicaError, match="of 128 samples have no finite energy"):
        trainer_of(lenient, broken=range(128)).step()


def test_too_few_samples_measure_no_covariance():
    """Of two particles, three samples, or one that has all the weight: widths stay what they were."""
    trainer = trainer_of(config())
    thermal_map, xyz = (
        trainer.joint.thermal_map,
        torch.randn((200, 2, 3), generator=torch.Generator().manual_seed(0)).double(),
    )
    energy = torch.zeros(200).double()
    trainer._measure(xyz[:3], energy[:3], energy[:3])
    one = torch.cat((torch.full((1,), -50.0).double(), energy[1:]))
    trainer._measure(xyz, energy, one)
    assert len(thermal_map.get_extra_state()["means"]) == 0
    trainer._measure(xyz, energy, energy)
    assert len(thermal_map.get_extra_state()["means"]) == 1


def restart_trainer(seed=0):
    return trainer_of(config(tempering={"min_ess": 0.95}, seed=seed), roughness=0.02 * (1 + seed))


@pytest.fixture(scope="module")
def uninterrupted():
    return Uninterrupted(restart_trainer())


@pytest.mark.parametrize("stop", [1, 4, 5, 9])
def test_restart_equals_uninterrupted_bit_for_bit(stop, uninterrupted):
    straight, rows = uninterrupted.trainer, uninterrupted.rows
    assert len(straight.temperatures) > 2 and len(rows) > 10
    second = restart_trainer(seed=5)
    second.load_state_dict(loaded(uninterrupted.files[stop]))
    assert advance(second) == rows[stop:]
    assert_identical(second.state_dict(), straight.state_dict())


def test_a_ladder_may_take_steps_so_large_that_no_earlier_sample_is_near():
    """Ten equal steps of beta from a hundredth begin with one to eleven hundredths."""
    trainer = trainer_of(config(tempering={"schedule": "linear", "n_stages": 2, "start": 100 * UNIT}))
    rows = advance(trainer)
    assert [row["stage"] for row in rows][-1] == 1 and trainer.done

"""The flow learns a known density on a potential of mean force, weights of separated modes included."""

import copy
import math

import numpy as np
import pytest
import torch
from analytic import AnalyticMeanForce
from methods import reverse_kl

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.features import Torsions
from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.networks.weights import WeightedSamples, relative_ess, weighted_samples
from openmm_cgflow.paper.box import BoxCoordinates
from openmm_cgflow.training.pmf.flow_fit import FlowFitter
from openmm_cgflow.units import thermal_beta

BOUND = 5.0
MINORITY = 0.02
MODES = torch.tensor([[-1.4, -0.6], [1.2, 1.0]], dtype=torch.float64)
SHARPNESS = 13.0
COVARIANCE = torch.tensor([[0.8, 0.3], [0.3, 0.6]], dtype=torch.float64)


class Space(Coordinates):
    """Two torsions and two bounded features; the volume element is far from flat and nothing exists below -4."""

    def __init__(self):
        high = np.array([math.pi, math.pi, BOUND, BOUND])
        super().__init__((0, 1, 2, 3), tuple("abcd"), np.arange(4) < 2, -high, high, BOUND)

    def log_volume(self, z):
        exists = z[..., 2] > -4
        return torch.where(exists, 2 * torch.log(torch.where(exists, 8 + z[..., 2], 1.0)), -math.inf)


class Known:
    """A potential of mean force in closed form, with what the flow's training asks of one."""

    def __init__(self, log_density, coordinates):
        self.log_density, self.coordinates = log_density, coordinates

    def __call__(self, z):
        log_volume = self.coordinates.log_volume(z)
        return torch.where(log_volume > -math.inf, log_volume, 0.0) - self.log_density(z)

    def each(self, z):
        return self(z)[None]

    def value_and_gradient(self, z):
        with torch.enable_grad():
            at = z.detach().requires_grad_()
            value = self(at)
            (gradient,) = torch.autograd.grad(value.sum(), at)
        return value.detach(), gradient


def log_of_torsions(torsions):
    """Log density of two von Mises modes with 15 kT between them, the smaller with weight 0.02."""
    weights = torch.tensor([1 - MINORITY, MINORITY], dtype=torch.float64)
    log_norm = 2 * math.log(2 * math.pi * float(torch.special.i0e(torch.tensor(SHARPNESS).double())))
    modes = SHARPNESS * (torch.cos(torsions[..., None, :] - MODES) - 1).sum(-1)
    return torch.logsumexp(modes + weights.log(), dim=-1) - log_norm


def log_density(z):
    """The bounded features are normal around a middle that follows the torsions."""
    torsions, bounded = z[..., :2], z[..., 2:]
    middle = torch.stack((0.6 * torch.cos(torsions[..., 0]), 0.5 * torch.sin(torsions[..., 1])), dim=-1)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2).double(), COVARIANCE)
    return log_of_torsions(torsions) + normal.log_prob(bounded - middle)


SPACE = Space()
TARGET = Known(log_density, SPACE)


def new_flow(seed=0, roughness=0.0, covariance=COVARIANCE):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = CGFlow(Torsions(2, 2), BOUND, 4, 2, 8, (32, 32), covariance)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(roughness * torch.randn_like(parameter))
    return flow


def population(values):
    """Of the minority mode."""
    return (values[:, 0] > -0.1).double()


@pytest.fixture(scope="module")
def trained():
    flow, generator = new_flow().float(), torch.Generator().manual_seed(1)
    fitter = FlowFitter(flow, SPACE, 5e-3, 512)
    n = 400
    for k in range(n):
        fitter.update(TARGET, generator, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * k / n)))
    return flow


@pytest.fixture(scope="module")
def samples(trained):
    return weighted_samples(trained, TARGET, SPACE, 30000, torch.Generator().manual_seed(2))


# ---------------------------------------------------------------- the target itself


def test_the_target_is_what_the_tests_mean():
    middle = (torch.arange(600, dtype=torch.float64) + 0.5) / 300 * math.pi - math.pi
    grid = torch.cartesian_prod(middle, middle)
    density = log_of_torsions(grid).exp() * (math.pi / 300) ** 2
    assert float(density.sum()) == pytest.approx(1, abs=1e-6)
    assert float((density * population(grid)).sum()) == pytest.approx(MINORITY, abs=1e-4)
    # The lowest way from one mode to the other, by flooding.
    free_energy = -log_of_torsions(grid).reshape(600, 600)[::6, ::6]
    reached = free_energy == free_energy.min()
    height = float(free_energy.min())
    goal = tuple(((MODES[1] + math.pi) / (2 * math.pi) * 100).long().tolist())
    while not reached[goal]:
        height += 0.1
        grown = None
        while grown is None or not torch.equal(grown, reached):
            grown = reached
            around = sum(reached.roll(shift, axis).int() for shift in (-1, 1) for axis in (0, 1)) > 0
            reached = (reached | around) & (free_energy <= height)
            reached = reached | grown
    assert 13 < height - float(free_energy.min()) < 17


# ---------------------------------------------------------------- training on a potential of mean force


@pytest.mark.slow
def test_separated_modes_get_their_weights(samples):
    assert samples.ess > 0.9
    own = population(samples.z)
    assert abs(math.log(float(own.mean()) / MINORITY)) < 0.35
    weights = torch.softmax(samples.log_weights, 0)
    error = math.sqrt(float((weights * (own - MINORITY)).square().sum()))
    assert float((weights * own).sum()) == pytest.approx(MINORITY, abs=4 * error)
    assert error < 0.1 * MINORITY


@pytest.mark.slow
def test_weights_give_the_normalisation(samples):
    """The mean weight is the integral of exp(-energy), which is one."""
    weights = samples.log_weights.exp()
    error = float(weights.std()) / math.sqrt(len(weights))
    assert float(weights.mean()) == pytest.approx(1, abs=4 * error)
    assert error < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.3, 0.6])
def test_weights_are_right_wherever_the_samples_come_from(trained, scale):
    samples = weighted_samples(trained, TARGET, SPACE, 60000, torch.Generator().manual_seed(3), scale)
    assert samples.ess < 0.8
    weights = samples.log_weights.exp()
    n, own = len(weights), population(samples.z)
    assert float(weights.mean()) == pytest.approx(1, abs=4 * float(weights.std()) / math.sqrt(n))
    share = weights / weights.sum()
    error = math.sqrt(float((share * (own - MINORITY)).square().sum()))
    assert float((share * own).sum()) == pytest.approx(MINORITY, abs=4 * error)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_a_barrier_scale_lowers_the_free_energy_of_torsions_and_nothing_else(trained, scale):
    """q(torsions | scale) is near exp(-scale F), normalised; that is what explores."""
    z, _ = trained.sample(30000, torch.Generator().manual_seed(4), scale)
    log_q = trained.log_prob_torsions(z, scale).detach().double()
    assert relative_ess(scale * log_of_torsions(z[:, :2]) - log_q) > 0.8
    middle = (torch.arange(200, dtype=torch.float64) + 0.5) / 100 * math.pi - math.pi
    grid = torch.cartesian_prod(middle, middle)
    exact = torch.softmax(scale * log_of_torsions(grid), 0)
    assert float(population(z).mean()) == pytest.approx(float((exact * population(grid)).sum()), abs=0.05)
    barrier = z[:, 0].abs() < 0.4
    model, _ = trained.sample(30000, torch.Generator().manual_seed(4))
    assert int(barrier.sum()) > 10 * int((model[:, 0].abs() < 0.4).sum())


@pytest.mark.slow
def test_the_bounded_features_follow_the_torsions(trained):
    """The mean of the conditional, which the linear map starts with at zero, has been learned at every torsion."""
    generator = torch.Generator().manual_seed(5)
    for first, second in ((-1.4, -0.6), (1.2, 1.0), (0.0, 0.0)):
        torsions = torch.tensor([[first, second]]).double().expand(4000, -1)
        bounded = trained.map_bounded(torsions, trained.draw_base(4000, generator)[:, 2:]).detach().double()
        expected = torch.tensor([0.6 * math.cos(first), 0.5 * math.sin(second)]).double()
        assert float((bounded.mean(0) - expected).abs().max()) < 0.15
        assert float((torch.cov(bounded.T) - COVARIANCE).abs().max()) < 0.15


@pytest.mark.slow
def test_plain_reverse_kl_gets_the_weights_of_the_modes_wrong():
    """The contrast: slopes alone do not see the mass behind a barrier. Here it is a third of what it should be."""
    beta = thermal_beta(300.0)
    settings = Config(
        temperature=300.0,
        seed=1,
        training={"method": "reverse_kl", "n_steps_last": 120, "learning_rate": 5e-3},
        tempering={"schedule": "list"},
        chains={"n_replicas": 256},
    )
    flow = new_flow(1)
    trainer = reverse_kl(settings, SPACE, flow, AnalyticMeanForce(lambda z: TARGET(z) / beta))
    while not trainer.done:
        row = trainer.step()
    assert row["residual"] < 2  # it converges, to something else
    z, _ = flow.sample(30000, torch.Generator().manual_seed(2))
    found = float(population(z).mean())
    assert abs(math.log(max(found, 1e-5) / MINORITY)) > 0.7


def sharp(z):
    """Log density of two narrow modes, up to a constant: a flat proposal hits one of them once in 100,000 times."""
    middle = torch.tensor([[-1.4, -0.6, 0.5, 1.5], [1.2, 1.0, -0.5, -1.0]], dtype=torch.float64)
    modes = 80 * (torch.cos(z[..., None, :] - middle) - 1).sum(-1)
    return torch.logsumexp(modes + torch.tensor([0.8, 0.2]).double().log(), dim=-1)


def narrow_modes():
    """An untrained flow of four torsions, the narrow modes it is to learn, and random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = CGFlow(Torsions(4, 0), BOUND, 6, 2, 8, (32, 32), torch.zeros((0, 0))).float()
    target = Known(sharp, BoxCoordinates(range(4), "abcd", math.pi))
    return flow, target, torch.Generator().manual_seed(1)


@pytest.mark.slow
def test_narrow_modes_of_many_torsions_are_reached_by_and_by():
    flow, target, generator = narrow_modes()
    fitter = FlowFitter(flow, target.coordinates, 5e-3, 256)
    reached = []
    for _ in range(250):
        fitter.update(target, generator)
        reached.append(fitter.trained_up_to)
    samples = weighted_samples(flow, target, target.coordinates, 20000, generator)
    assert reached[0] < 0.1 and reached[-1] == 1.0
    assert samples.ess > 0.5
    assert float((samples.z[:, 0] > -0.1).double().mean()) == pytest.approx(0.2, abs=0.05)


def test_narrow_modes_have_no_weight_in_a_batch_of_the_start_but_at_the_scale_it_starts_with():
    """At scale = 1 a few of 20,000 flat draws have all the weight; what a training there finds is a matter of luck."""
    flow, target, generator = narrow_modes()
    samples = weighted_samples(flow, target, target.coordinates, 20000, generator)
    assert samples.ess * 20000 < 20
    start = FlowFitter(flow, target.coordinates, 5e-3, 256).trained_up_to
    assert relative_ess(-start * samples.energy - samples.log_q) > 0.1  # below that the scale would fall further


def test_the_largest_scale_falls_where_even_its_start_is_too_far():
    """Energies of thousands of kT, as in ten dimensions: a flat flow has no weight at the scale of the start."""
    steep = Known(lambda z: -400 * z.square().sum(-1), BoxCoordinates(range(4), "abcd", math.pi))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = CGFlow(Torsions(4, 0), BOUND, 2, 2, 4, (8,), torch.zeros((0, 0))).float()
    fitter, generator = FlowFitter(flow, steep.coordinates, 1e-6, 128), torch.Generator().manual_seed(1)
    start = fitter.trained_up_to
    for _ in range(40):
        fitter.update(steep, generator)
    samples = weighted_samples(flow, steep, steep.coordinates, 4000, generator)
    assert fitter.trained_up_to < 0.5 * start
    assert relative_ess(-fitter.trained_up_to * samples.energy) > 3 * relative_ess(-start * samples.energy)


def test_a_fitter_continues_from_its_largest_scale():
    fitter = FlowFitter(new_flow(), SPACE, 1e-3, 64)
    fitter.trained_up_to = 0.37
    other = FlowFitter(new_flow(1), SPACE, 1e-3, 64)
    other.load_state_dict(fitter.state_dict())
    assert other.trained_up_to == 0.37


# ---------------------------------------------------------------- weights


class Everywhere(Space):
    """The same volume element without an end."""

    def log_volume(self, z):
        return 2 * torch.log(8 + z[..., 2])


def test_a_flow_weighed_with_itself_has_equal_weights():
    flow, space = new_flow(roughness=0.1), Everywhere()
    samples = weighted_samples(flow, Known(flow.log_prob, space), space, 500, torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples.log_weights, torch.zeros(500).double(), rtol=0, atol=1e-7)
    assert samples.ess == pytest.approx(1, abs=1e-6)


def test_what_is_no_structure_has_no_weight():
    """Neither in an estimate nor in an update."""
    flow, generator = new_flow(covariance=9 * COVARIANCE), torch.Generator().manual_seed(0)
    samples = weighted_samples(flow, TARGET, SPACE, 2000, generator)
    outside = samples.z[:, 2] <= -4
    assert outside.sum() > 50
    assert (samples.energy[outside] == math.inf).all() and (samples.members[:, outside] == math.inf).all()
    assert torch.softmax(samples.log_weights, 0)[outside].sum() == 0
    assert 0 < samples.ess < 1
    before = copy.deepcopy(flow.state_dict())
    fitter = FlowFitter(flow, SPACE, 1e-3, 256)
    for _ in range(5):
        fitter.update(TARGET, generator)
    assert all(torch.isfinite(parameter).all() for parameter in flow.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def test_members_have_energies_of_their_own():
    class Ensemble:
        def each(self, z):
            return torch.stack((TARGET(z), TARGET(z) + 1, TARGET(z) + 2 * torch.sin(z[:, 0])))

    flow = new_flow()
    samples = weighted_samples(flow, Ensemble(), SPACE, 200, torch.Generator().manual_seed(0))
    assert isinstance(samples, WeightedSamples) and samples.members.shape == (3, 200)
    torch.testing.assert_close(samples.energy, samples.members.mean(0))
    torch.testing.assert_close(samples.members[0], TARGET(samples.z) - SPACE.log_volume(samples.z))
    torch.testing.assert_close(samples.log_weights, -samples.energy - samples.log_q)
    assert samples.ess == relative_ess(samples.log_weights)
    torch.testing.assert_close(samples.log_q, flow.log_prob(samples.z).detach(), rtol=0, atol=1e-7)


# ---------------------------------------------------------------- single updates


def parameters_of(flow, *blocks):
    return torch.cat([p.detach().flatten() for block in blocks for p in getattr(flow, block).parameters()])


@pytest.mark.parametrize("steepness", [3.0, 300.0])
def test_an_exact_conditional_stays_where_it_is(steepness):
    """The path gradient of q(bounded | torsions) vanishes sample by sample, however steep the torsions are."""
    space, flow = Everywhere(), new_flow()

    exact = copy.deepcopy(flow)

    def log_p(z):
        return steepness * torch.cos(z[..., 0]) ** 9 + exact.log_prob_bounded(z)

    fitter, generator = FlowFitter(flow, space, 1e-3, 128), torch.Generator().manual_seed(0)
    blocks = (("conditional",), ("torsions",))
    before = [parameters_of(flow, *names) for names in blocks]
    for _ in range(3):
        fitter.update(Known(log_p, space), generator)
    after = [parameters_of(flow, *names) for names in blocks]
    assert float((after[0] - before[0]).abs().max()) < 1e-6
    assert float((after[1] - before[1]).abs().max()) > 1e-4


def gradients_of_torsions(flow, target, scale, scale_from, n_draws, expected):
    """Of the surrogate, with or without what the flow expects of its own samples, shape (n_draws, n_parameters)."""
    space, rows = Everywhere(), []
    fitter = FlowFitter(flow, space, 1e-3, 128)
    flow = fitter.networks.trained
    for seed in range(n_draws):
        z, log_old = flow.sample(1000, torch.Generator().manual_seed(seed), scale_from)
        log_bounded = flow.log_prob_bounded(z).detach()
        free_energy = target(z) - space.log_volume(z) + log_bounded
        if expected:
            loss = fitter._forward_kl_of_torsions(z, free_energy, scale, scale_from)
        else:
            weights = torch.softmax(-scale * free_energy - (log_old - log_bounded), 0)
            loss = -(weights * flow.log_prob_torsions(z, scale)).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(flow.torsions.parameters()))]))
    return torch.stack(rows)


def test_an_exact_model_has_no_gradient_and_no_noise():
    flow = new_flow(roughness=0.1)
    gradients = gradients_of_torsions(flow, Known(flow.log_prob, Everywhere()), 1.0, 1.0, 3, True)
    assert float(gradients.abs().max()) < 1e-10


@pytest.mark.parametrize(("scale", "scale_from"), [(1.0, 1.0), (1.0, 0.8)])
def test_what_the_flow_expects_changes_the_noise_and_not_the_gradient(scale, scale_from):
    flow = new_flow(roughness=0.1)

    def near(z):
        return flow.log_prob(z).detach() + 0.2 * torch.cos(z[:, 0] - 1)

    arguments = (flow, Known(near, Everywhere()), scale, scale_from, 60)
    plain, less_noisy = (gradients_of_torsions(*arguments, expected) for expected in (False, True))
    assert float(plain.var(0).sum() / less_noisy.var(0).sum()) > 10
    difference = plain - less_noisy
    squares = difference.mean(0).square().sum() / (difference.var(0).sum() / len(difference))
    assert 0.3 < float(squares) < 3  # 1 where they agree; the parameters' errors are correlated
    shifted = difference + less_noisy.mean(0)  # were the gradient doubled, it would show
    assert float(shifted.mean(0).square().sum() / (shifted.var(0).sum() / len(shifted))) > 3


def test_a_gradient_that_is_not_finite_changes_nothing():
    flow, generator = new_flow(), torch.Generator().manual_seed(0)
    fitter = FlowFitter(flow, SPACE, 1e-3, 64)
    fitter.update(TARGET, generator)
    before = copy.deepcopy(flow.state_dict())
    broken = Known(lambda z: log_density(z) * math.nan, SPACE)
    fitter.update(broken, generator)
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    fitter.update(TARGET, generator)
    assert any(not torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def test_the_rate_multiplies_the_learning_rate():
    fitter = FlowFitter(new_flow(), SPACE, 2e-3, 16)
    for scale in (1.0, 0.25):
        fitter.update(TARGET, torch.Generator().manual_seed(0), scale)
        assert fitter.optimizer.param_groups[0]["lr"] == scale * 2e-3


def test_same_generator_same_updates():
    states = []
    for seed in (1, 1, 2):
        flow, generator = new_flow(), torch.Generator().manual_seed(seed)
        fitter = FlowFitter(flow, SPACE, 1e-3, 32)
        for _ in range(2):
            fitter.update(TARGET, generator)
        states.append(parameters_of(flow, "torsions", "conditional"))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_without_torsions_the_reverse_kl_alone_trains():
    class Line(Coordinates):
        def __init__(self):
            super().__init__((0, 1), ("a", "b"), np.zeros(2, dtype=bool), np.full(2, -BOUND), np.full(2, BOUND), BOUND)

        def log_volume(self, z):
            return torch.log(8 + z[..., 0])

    def log_p(z):
        normal = torch.distributions.MultivariateNormal(torch.tensor([0.5, -0.3]).double(), 0.5 * COVARIANCE)
        return normal.log_prob(z)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = CGFlow(Torsions(0, 2), BOUND, 2, 2, 4, (8,), COVARIANCE)
    space, generator = Line(), torch.Generator().manual_seed(0)
    fitter = FlowFitter(flow, space, 2e-2, 128)
    assert fitter.trained_up_to == 1  # it is that of torsions: there is nowhere to get to
    for k in range(100):
        fitter.update(Known(log_p, space), generator, 1 - 0.95 * k / 100)
    assert weighted_samples(flow, Known(log_p, space), space, 5000, generator).ess > 0.98

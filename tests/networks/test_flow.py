"""The flow is a density: invertible, normalised, periodic where it should be, bounded where it should be."""

import math

import pytest
import torch
from analytic import largest_sigma

from openmm_cgflow.coordinates.features import Torsions
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.paper.box import BoxFeatures

BOUND = 4.0
SIZES = [(1, 0), (0, 1), (1, 1), (2, 0), (0, 3), (1, 3), (3, 2), (4, 11)]
SCALES = [0.0, 0.3, 1.0, "rows"]


def covariance_of(n, seed=3):
    """Widths from 0.5 to 1.5 and correlations that matter, shape (n, n)."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.eye(n).double() + 0.4 * torch.randn((n, n), generator=generator, dtype=torch.float64) / math.sqrt(n)
    width = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
    return (mixed @ mixed.T) * width[:, None] * width


def make(n_circular, n_bounded, roughness=0.3, n_layers=4, n_bounded_layers=4, linear=False, seed=0, of=Torsions):
    """A flow whose parameters all differ from zero; ``linear`` adds the linear map after the bounded splines."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        covariance = covariance_of(n_bounded) if linear else None
        flow = CGFlow(of(n_circular, n_bounded), BOUND, n_layers, n_bounded_layers, 6, (16,), covariance)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(roughness * torch.randn_like(parameter))
    return flow


def scale_of(kind, n):
    """A number, or another one for each row."""
    return kind if kind != "rows" else torch.linspace(0, 1, n, dtype=torch.float64)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(11)


@pytest.fixture(
    params=[(size, {}) for size in SIZES]
    + [(size, {"linear": True}) for size in SIZES if size[1] > 1]
    + [(size, {"of": BoxFeatures}) for size in [(1, 0), (2, 0), (3, 2)]],
    ids=str,
)
def flow(request):
    size, kind = request.param
    return make(*size, **kind)


def angle_distance(a, b):
    return torch.remainder(a - b + math.pi, 2 * math.pi) - math.pi


def assert_same(flow, a, b, atol):
    n = flow.n_circular
    torch.testing.assert_close(angle_distance(a[:, :n], b[:, :n]), torch.zeros_like(a[:, :n]), rtol=0, atol=atol)
    torch.testing.assert_close(a[:, n:], b[:, n:], rtol=0, atol=atol)


@pytest.mark.parametrize("kind", SCALES)
def test_round_trip(flow, kind, generator):
    scale = scale_of(kind, 200)
    base = flow.draw_base(200, generator)
    z, ladj = flow(base, scale)
    again, back = flow.inverse(z, scale)
    assert_same(flow, again, base, 1e-8)
    torch.testing.assert_close(back, -ladj, rtol=0, atol=1e-7)
    assert_same(flow, flow(again, scale)[0], z, 1e-8)
    assert float((z - base).detach().abs().max()) > 0.05  # not the identity


@pytest.mark.parametrize("kind", SCALES)
def test_ladj_is_the_jacobian(flow, kind, generator):
    scale = scale_of(kind, 5)
    base = flow.draw_base(5, generator)
    _, ladj = flow(base, scale)
    for k, (point, expected) in enumerate(zip(base, ladj, strict=True)):
        own = scale[k : k + 1] if kind == "rows" else scale
        jacobian = torch.autograd.functional.jacobian(lambda b, own=own: flow(b[None], own)[0][0], point)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", SCALES)
def test_log_prob_is_base_minus_ladj(flow, kind, generator):
    scale = scale_of(kind, 100)
    base = flow.draw_base(100, generator)
    z, ladj = flow(base, scale)
    torch.testing.assert_close(flow.log_prob(z, scale), flow.log_base(base) - ladj, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", SCALES)
def test_log_prob_is_that_of_torsions_and_of_bounded_features_given_them(flow, kind, generator):
    scale = scale_of(kind, 100)
    z, log_q = flow.sample(100, generator, scale)
    parts = flow.log_prob_torsions(z, scale) + flow.log_prob_bounded(z)
    torch.testing.assert_close(parts.detach(), log_q, rtol=0, atol=1e-7)
    n = flow.n_circular
    if n:  # the density of torsions does not see the others
        elsewhere = torch.cat((z[:, :n], 0.3 * torch.ones_like(z[:, n:])), dim=1)
        assert torch.equal(flow.log_prob_torsions(elsewhere, scale), flow.log_prob_torsions(z, scale))
    else:
        assert (flow.log_prob_torsions(z, scale) == 0).all()


def test_the_scale_changes_torsions_and_nothing_else(generator):
    flow = make(2, 2, linear=True)
    z, _ = flow.sample(50, generator)
    for first, second in ((0.0, 0.05), (0.3, 1.0)):
        assert (flow.log_prob_torsions(z, first) != flow.log_prob_torsions(z, second)).all()
        difference = flow.log_prob(z, first) - flow.log_prob(z, second)
        torsions = flow.log_prob_torsions(z, first) - flow.log_prob_torsions(z, second)
        torch.testing.assert_close(difference, torsions, rtol=0, atol=1e-10)
    torch.testing.assert_close(flow.log_prob(z), flow.log_prob(z, 1.0), rtol=0, atol=0)  # the model is scale = 1


def test_each_row_has_its_own_scale(generator):
    flow = make(2, 1, linear=True)
    scale = torch.tensor([0.0, 0.3, 1.0, 0.02], dtype=torch.float64)
    base = flow.draw_base(4, generator)
    z, ladj = flow(base, scale)
    for k in range(4):
        one, change = flow(base[k : k + 1], float(scale[k]))
        torch.testing.assert_close(one[0], z[k], rtol=0, atol=1e-12)
        torch.testing.assert_close(change[0], ladj[k], rtol=0, atol=1e-11)


def test_sample_gives_its_own_density(flow, generator):
    z, log_q = flow.sample(100, generator)
    assert z.shape == (100, flow.n_features) and z.dtype == torch.float64 and not z.requires_grad
    torch.testing.assert_close(flow.log_prob(z).detach(), log_q, rtol=0, atol=1e-7)
    again, log_q_again = flow.sample(100, torch.Generator().manual_seed(11))
    assert torch.equal(z, again) and torch.equal(log_q, log_q_again)
    other, _ = flow.sample(100, generator)  # the generator moves on
    assert not torch.equal(z, other)


def test_global_random_state_is_left_alone(flow, generator):
    before = torch.get_rng_state()
    flow.sample(10, generator)
    assert torch.equal(before, torch.get_rng_state())


def test_samples_stay_in_their_intervals(flow, generator):
    z, _ = flow.sample(5000, generator)
    n = flow.n_circular
    assert (z[:, :n] >= -math.pi).all() and (z[:, :n] < math.pi).all()
    if flow.conditional.linear is None:
        assert (z[:, n:].abs() <= flow.bound).all()


def test_density_is_zero_outside_the_bounds():
    flow = make(1, 2)
    z = torch.tensor([[0.3, 0.0, 0.0], [0.3, BOUND + 1e-6, 0.0], [0.3, 0.0, -BOUND - 1.0]], dtype=torch.float64)
    assert torch.isfinite(flow.log_prob(z)).tolist() == [True, False, False]
    assert flow.log_prob(z)[1:].tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("size", [(1, 0), (2, 0), (1, 1), (4, 11)], ids=str)
def test_torsions_are_periodic(size, generator):
    flow = make(*size)
    z, log_q = flow.sample(50, generator)
    for k in range(flow.n_circular):
        for turn in (-1, 1):
            moved = z.clone()
            moved[:, k] += 2 * math.pi * turn
            torch.testing.assert_close(flow.log_prob(moved).detach(), log_q, rtol=0, atol=1e-6)
        left, right = z.clone(), z.clone()
        left[:, k], right[:, k] = -math.pi + 1e-9, math.pi - 1e-9
        torch.testing.assert_close(flow.log_prob(left), flow.log_prob(right), rtol=0, atol=1e-5)


@torch.no_grad()
def test_density_is_continuous_around_the_circle():
    """No jump anywhere: neither at +-pi nor where a rotation has moved the ends of a spline."""
    flow = make(2, 1, roughness=0.25)
    for other in (-2.0, 0.5):
        jumps = []
        for n in (4000, 16000):
            angles = torch.linspace(-math.pi, math.pi, n + 1, dtype=torch.float64)
            z = torch.stack((angles, torch.full_like(angles, other), torch.zeros_like(angles)), dim=1)
            log_q = flow.log_prob(z)
            jumps.append(float(log_q.diff().abs().max()))
            base, _ = flow.inverse(z)
            turned = angle_distance(base[1:, 0], base[:-1, 0])  # the map turns the circle once
            assert math.isclose(float(turned.sum()), 2 * math.pi, rel_tol=1e-6)
        assert float(log_q.max() - log_q.min()) > 0.1
        assert jumps[1] < 0.3 * jumps[0]  # a quarter; a jump would stay


@torch.no_grad()
def test_nothing_passes_through_the_walls_of_a_box(generator):
    """They stay where they are, the density differs from one to the other, and beyond there is none."""
    flow = make(2, 0, of=BoxFeatures, roughness=0.6)
    for k in range(2):
        base = flow.draw_base(20, generator)
        for wall in (-math.pi, math.pi):
            base[:, k] = wall
            torch.testing.assert_close(flow(base)[0][:, k], base[:, k], rtol=0, atol=1e-9)
        left, right = flow.draw_base(20, generator), base
        left[:, k], right[:, 1 - k] = -math.pi, left[:, 1 - k]
        assert float((flow.log_prob(left) - flow.log_prob(right)).abs().median()) > 0.1
        beyond = base.clone()
        beyond[:, k] = math.pi + 1e-3
        assert (flow.log_prob(beyond) == -math.inf).all()


def test_slopes_along_the_path_of_samples_are_right_where_the_energy_jumps_at_the_walls(generator):
    """d<x>/d(parameters) by autograd is that of finite differences in a box, and is not on a circle."""
    uniform = (torch.arange(50_000, dtype=torch.float64)[:, None] + 0.5) / 50_000 * 2 - 1
    for of in (BoxFeatures, Torsions):
        flow = make(1, 0, roughness=0.5, of=of)

        def mean(flow=flow):
            return flow(math.pi * uniform)[0].mean()

        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in flow.parameters()]
        by_path = sum(
            (a * b).sum() for a, b in zip(torch.autograd.grad(mean(), list(flow.parameters())), direction, strict=True)
        )
        values = []
        with torch.no_grad():
            for step in (1e-3, -1e-3):
                for parameter, change in zip(flow.parameters(), direction, strict=True):
                    parameter.add_(step * change)
                values.append(float(mean()))
                for parameter, change in zip(flow.parameters(), direction, strict=True):
                    parameter.sub_(step * change)
        by_difference = (values[0] - values[1]) / 2e-3
        assert math.isclose(float(by_path), by_difference, rel_tol=1e-2) == (of is BoxFeatures)


@pytest.mark.parametrize("kind", [{}, {"linear": True}, {"of": BoxFeatures}], ids=str)
@torch.no_grad()
def test_density_integrates_to_one_on_a_grid(kind):
    """At every scale; and the parts, the torsion's density and the other's given it, do so as well."""
    linear = "linear" in kind
    flow = make(1, 1, roughness=0.2, **kind)
    n = 1000 if "of" in kind else 500  # splines in a box may be steeper
    m, reach = 240, 2 * BOUND if linear else BOUND

    def middles(count):
        return (torch.arange(count, dtype=torch.float64) + 0.5) / count * 2 - 1

    grid = torch.cartesian_prod(math.pi * middles(n), reach * middles(m))
    of_torsions, of_bounded = 2 * math.pi / n, 2 * reach / m
    for scale in (0.0, 0.3, 1.0):
        mass = flow.log_prob(grid, scale).exp().sum() * of_torsions * of_bounded
        assert abs(float(mass) - 1) < 5e-4
        density = flow.log_prob_torsions(grid[::m], scale).exp()
        assert abs(float(density.sum() * of_torsions) - 1) < 5e-4
        assert float(density.max() / density.min()) > 1.2  # something was integrated
    given = flow.log_prob_bounded(grid).exp().reshape(n, m).sum(1) * of_bounded
    assert float((given - 1).square().mean().sqrt()) < 5e-3


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_density_integrates_to_one_by_sampling(size, generator):
    """E_base[q/base] = 1 = E_q[base/q], within four standard errors."""
    flow = make(*size, roughness=0.1)
    base = flow.draw_base(8000, generator)
    forward = (flow.log_prob(base) - flow.log_base(base)).exp()
    z, log_q = flow.sample(8000, generator)
    backward = (flow.log_base(z) - log_q).exp()
    for ratio in (forward, backward):
        assert largest_sigma(ratio[:, None], 1.0) < 4
        assert float(ratio.std()) > 1e-3  # something was tested


def test_base_density_integrates_to_one():
    flow = make(1, 1)
    n = 400
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1
    grid = torch.cartesian_prod(math.pi * middle, BOUND * middle)
    mass = flow.log_base(grid).exp().sum() * (2 * math.pi / n) * (2 * BOUND / n)
    assert abs(float(mass) - 1) < 1e-5


def test_base_samples_have_the_base_density(generator):
    """Uniform angles and truncated normals: moments of a narrow truncation, where a plain normal would show."""
    flow = CGFlow(Torsions(1, 1), 1.0, 2, 2, 4, (4,))
    base = flow.draw_base(40000, generator)
    angles, normals = base.unbind(1)
    assert largest_sigma(torch.stack((angles.cos(), angles.sin(), (2 * angles).cos()), dim=1)) < 4
    assert largest_sigma(angles[:, None].square(), math.pi**2 / 3) < 4
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * density / math.erf(math.sqrt(0.5))
    assert largest_sigma(torch.stack((normals, normals.square() - variance), dim=1)) < 4
    assert float(normals.abs().max()) <= 1


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_new_flow_is_close_to_its_base(size, generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = CGFlow(Torsions(*size), BOUND)
    base = flow.draw_base(500, generator)
    away = (flow.log_prob(base) - flow.log_base(base)).detach()
    assert float(away.square().mean().sqrt()) < 0.1 * math.sqrt(flow.n_features)


@pytest.mark.parametrize("direction", ["samples", "density"])
def test_every_parameter_gets_a_gradient(flow, direction, generator):
    z, _ = flow.sample(64, generator)
    if direction == "density":
        (flow.log_prob(z) * torch.sin(z.sum(-1))).sum().backward()
    else:
        mapped, _ = flow(flow.draw_base(64, generator))
        torch.sin(mapped + 0.3).sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.dtype == torch.float64
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


def test_score_is_the_derivative_of_log_prob(generator):
    flow = make(2, 2)
    z, _ = flow.sample(3, generator)
    for point in z:
        assert torch.autograd.gradcheck(lambda q: flow.log_prob(q[None]), point.clone().requires_grad_())


@pytest.mark.parametrize("block", ["torsions", "bounded"])
def test_all_pairs_of_features_can_depend_on_each_other(block, generator):
    """With enough layers no feature is left to itself: d z_i / d base_j is nowhere zero."""
    flow = make(*((5, 0) if block == "torsions" else (0, 5)), roughness=0.5, n_layers=6, n_bounded_layers=6)
    seen = torch.zeros(5, 5)
    for point in flow.draw_base(5, generator):
        seen += torch.autograd.functional.jacobian(lambda b: flow(b[None])[0][0], point).abs().float()
    assert (seen > 0).all()


@pytest.mark.parametrize(("n", "n_layers"), [(2, 2), (3, 4), (4, 4), (11, 8), (15, 8)])
def test_every_pair_of_features_meets_in_one_layer(n, n_layers):
    """For each pair some layer moves the one given the other, both ways; and no layer moves everything or nothing."""
    flow = CGFlow(Torsions(n, n), BOUND, n_layers, n_layers, 4, (4,))
    for block in (flow.torsions, flow.conditional.splines):
        masks = torch.stack([layer.mask for layer in block])
        given = (masks[:, :, None] & ~masks[:, None, :]).any(0)
        assert torch.equal(given, ~torch.eye(n, dtype=torch.bool))
        assert masks.any(1).all() and (~masks).any(1).all()


def test_bounded_features_depend_on_torsions_and_not_the_other_way(generator):
    flow = make(2, 2)
    point = flow.draw_base(1, generator)[0]
    jacobian = torch.autograd.functional.jacobian(lambda b: flow(b[None])[0][0], point)
    assert (jacobian[2:, :2] != 0).all() and (jacobian[:2, 2:] == 0).all()


def test_result_does_not_depend_on_the_batch(flow, generator):
    base = flow.draw_base(8, generator)
    whole, ladj = flow(base)
    for k in range(8):
        one, change = flow(base[k : k + 1])
        torch.testing.assert_close(one[0], whole[k], rtol=0, atol=1e-12)
        torch.testing.assert_close(change[0], ladj[k], rtol=0, atol=1e-11)
        torch.testing.assert_close(flow.log_prob(whole[k : k + 1])[0], flow.log_prob(whole)[k])


# ---------------------------------------------------------------- the linear map


def straighten(flow):
    """Makes every spline the identity and leaves the linear map where it starts."""
    with torch.no_grad():
        for layer in (*flow.torsions, *flow.conditional.splines, flow.conditional.linear):
            last = [layer.constant] if layer.conditioner is None else list(layer.conditioner[-1].parameters())
            for parameter in last:
                parameter.zero_()


def truncated_normal(covariance, z):
    """Log density of a normal cut off where one of its whitened coordinates passes the bound."""
    n = len(covariance)
    normal = torch.distributions.MultivariateNormal(torch.zeros(n).double(), covariance)
    return normal.log_prob(z) - n * math.log(math.erf(BOUND / math.sqrt(2)))


@pytest.mark.parametrize("n_circular", [0, 2])
@torch.no_grad()
def test_a_known_covariance_is_exact_from_the_start(n_circular, generator):
    flow, covariance = make(n_circular, 4, linear=True), covariance_of(4)
    straighten(flow)
    z, _ = flow.sample(20000, generator)
    bounded = z[:, n_circular:]
    torch.testing.assert_close(flow.log_prob_bounded(z), truncated_normal(covariance, bounded), rtol=0, atol=1e-9)
    products = bounded[:, :, None] * bounded[:, None, :] - covariance
    assert largest_sigma(products.flatten(1)) < 4.5
    assert float((covariance - torch.diag(covariance.diagonal())).abs().max()) > 0.1
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), bounded.T, upper=False).T
    assert float(white.abs().max()) <= BOUND
    outside = z.clone()
    outside[:, n_circular:] = (white + 9.0) @ torch.linalg.cholesky(covariance).T
    assert (flow.log_prob_bounded(outside) == -math.inf).all()


@torch.no_grad()
def test_a_new_flow_is_close_to_the_known_covariance(generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = CGFlow(Torsions(2, 4), BOUND, covariance=covariance_of(4))
    z, _ = flow.sample(500, generator)
    away = flow.log_prob_bounded(z) - truncated_normal(covariance_of(4), z[:, 2:])
    assert 0 < float(away.square().mean().sqrt()) < 0.2


@torch.no_grad()
def test_shift_and_covariance_can_depend_on_the_torsions(generator):
    """With straight splines the conditional is a normal at each torsion, another one at another."""
    flow = make(1, 2, linear=True)
    trained = [parameter.clone() for parameter in flow.conditional.linear.parameters()]
    straighten(flow)
    for parameter, value in zip(flow.conditional.linear.parameters(), trained, strict=True):
        parameter.copy_(value)
    found = []
    for angle in (-1.0, 2.0):
        normals = flow.draw_base(40000, generator)[:, 1:]
        bounded = flow.map_bounded(torch.full((40000, 1), angle, dtype=torch.float64), normals)
        z = torch.cat((torch.full((40000, 1), angle, dtype=torch.float64), bounded), dim=1)
        covariance = torch.cov(bounded.T)
        normal = torch.distributions.MultivariateNormal(bounded.mean(0), covariance)
        away = flow.log_prob_bounded(z) - normal.log_prob(bounded)
        assert float(away.abs().mean()) < 0.03
        found.append((bounded.mean(0), covariance))
    assert float((found[0][0] - found[1][0]).abs().max()) > 0.05
    assert float((found[0][1] - found[1][1]).abs().max()) > 0.05


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("kind", SCALES)
@torch.no_grad()
def test_single_and_double_precision_agree(kind):
    """Training is single, everything after it double: the same samples, the same densities, and double at the door."""
    double, single = make(2, 3, roughness=0.15, linear=True), make(2, 3, roughness=0.15, linear=True).float()
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    scale = scale_of(kind, 500)
    (z, log_q), (coarse, coarse_log_q) = (
        flow.sample(500, torch.Generator().manual_seed(4), scale) for flow in (double, single)
    )
    assert coarse.dtype == coarse_log_q.dtype == torch.float64
    assert_same(double, coarse, z, 1e-4)
    torch.testing.assert_close(coarse_log_q, log_q, rtol=0, atol=1e-3)
    torch.testing.assert_close(single.log_prob(z, scale).double(), double.log_prob(z, scale), rtol=0, atol=1e-3)
    base, _ = single.inverse(z, scale)
    assert_same(double, base.double(), double.inverse(z, scale)[0], 1e-4)

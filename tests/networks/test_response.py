"""The fast atoms' response: any of them leaves mean forces unbiased, a fitted one takes their noise out."""

import io
import math

import pytest
import torch
from analytic import QuadraticBath, assembly_of, assert_identical, random_structure, random_z

from openmm_cgflow.coordinates.features import Torsions
from openmm_cgflow.engines.engine import Schedule
from openmm_cgflow.forces.estimator import ChainParts
from openmm_cgflow.forces.gradients import comoving_gradients, mean_and_variance
from openmm_cgflow.networks.response import FastResponse
from openmm_cgflow.training.pmf.fits import ResponseFitter
from openmm_cgflow.units import thermal_beta

TEMPERATURE = 300.0
BETA = thermal_beta(TEMPERATURE)

# A slow chain A-B-C-D with one torsion, a fast atom E bound to C and a fast atom F bound to E, which feels A.
A, B, C, D, E, F = 1, 4, 0, 3, 2, 5
BONDS = [(A, B), (B, C), (C, D), (C, E), (E, F)]
SLOW = [0, 1, 3, 4]
SPRINGS = [(C, E, 2e4), (D, E, -5e3), (B, E, -5e3), (E, F, 1e4), (C, F, -3e3), (A, F, 2e3), (A, E, 5e2)]
ASSEMBLY = assembly_of(BONDS, SLOW, random_structure(BONDS, 4))
N_FEATURES, N_FAST = 6, 2


def response_of(roughness=0.0, seed=0, hidden=(24,)):
    """With last layers of random weights if ``roughness`` is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        response = FastResponse(Torsions(1, N_FEATURES - 1), torch.tensor([[0.003, 0.1, 0.3]] * N_FAST), hidden)
        if roughness:
            torch.nn.init.normal_(response.output, std=roughness)
    return response


def measured(n, n_frames=4, seed=1, distinct=True):
    """z, frames of the quadratic bath there and its exact mean forces."""
    engine = QuadraticBath(6, SPRINGS, SLOW)
    z = random_z(ASSEMBLY.coordinates, n if distinct else 1, torch.Generator().manual_seed(seed), 0.5).expand(n, -1)
    xyz = ASSEMBLY.build(z, torch.tensor([0.1, 1.5, 0.5], dtype=torch.float64).expand(n, N_FAST, 3))
    frames = engine.run(xyz.numpy(), Schedule(TEMPERATURE, n_frames=n_frames), seed=100 + seed)
    at = z.clone().requires_grad_()
    order = [list(ASSEMBLY.slow).index(atom) for atom in engine.slow]
    free_energy = BETA * engine.free_energy(ASSEMBLY.coordinates.to_xyz(at)[:, order])
    (expected,) = torch.autograd.grad(free_energy.sum(), at)
    return z, frames, expected


def sigmas(values, expected=0.0):
    """Deviations of the batch's mean from what is expected, in standard errors, per column."""
    away = (values - expected).double()
    return away.mean(0) / (away.std(0) / math.sqrt(len(away)))


def parts_of(z, frames):
    return ChainParts(*comoving_gradients(ASSEMBLY, z, frames, BETA))


# ---------------------------------------------------------------- the force balance


def test_chains_in_close_contact_are_left_alone():
    """Neither their forces nor the fit of the response know of each other."""
    z, frames, _ = measured(200)
    parts = parts_of(z, frames)
    clashing = torch.arange(200) % 10 == 0
    broken = ChainParts(*(torch.where(clashing[:, None, None], 1e6 * part, part) for part in parts))
    response, valid = response_of(0.3), torch.ones(200, dtype=torch.bool)
    assert torch.equal(response.thermal(broken.fast), ~clashing)
    gradient, _ = response.mean_force(z, broken, valid)
    torch.testing.assert_close(gradient[clashing], broken.slow[clashing].float().mean(1))
    torch.testing.assert_close(gradient[~clashing], response.mean_force(z, parts, valid)[0][~clashing])
    fits = []
    for data, rows in ((parts, ~clashing), (broken, torch.ones(200, dtype=torch.bool))):
        fitted = response_of()
        chosen = ChainParts(*(part[rows] for part in data))
        ResponseFitter(fitted).fit(z[rows], chosen, 5, torch.Generator().manual_seed(0))
        fits.append(fitted.output.detach())
    torch.testing.assert_close(fits[0], fits[1])


def test_the_balance_of_the_fast_atoms_averages_to_zero():
    z, frames, _ = measured(3000)
    _, balance = comoving_gradients(ASSEMBLY, z, frames, BETA)
    assert balance.shape == (3000, 4, 3 * N_FAST)
    assert float(sigmas(balance.mean(1)).abs().max()) < 4


@pytest.mark.parametrize("fault", ["no volume element", "temperature"])
def test_a_wrong_balance_is_noticed(fault):
    z, frames, _ = measured(3000)
    _, balance = comoving_gradients(ASSEMBLY, z, frames, BETA * (1.2 if fault == "temperature" else 1.0))
    if fault == "no volume element":
        y = ASSEMBLY.read_fast(frames.xyz)
        balance = balance + torch.stack((2 / y[..., 0], 1 / torch.tan(y[..., 1]), 0 * y[..., 0]), -1).flatten(2)
    assert float(sigmas(balance.mean(1)).abs().max()) > 8


def test_the_volume_element_is_that_of_the_placement():
    """log J against the determinant of d(position)/d(bond, angle, dihedral), atom by atom."""
    z, frames, _ = measured(3, 1)
    y = ASSEMBLY.read_fast(frames.xyz[:, 0])
    fast = [atom for atom in range(6) if atom not in SLOW]
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda one, row=row: ASSEMBLY.build(z[row], one)[fast].flatten(), y[row]
        ).reshape(3 * N_FAST, 3 * N_FAST)
        expected = float(torch.linalg.slogdet(jacobian)[1])
        assert float(ASSEMBLY.log_volume_fast(y[row])) == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------- the correction


def test_the_correction_is_the_transposed_jacobian_of_the_displacement():
    response = response_of(0.5)
    generator = torch.Generator().manual_seed(0)
    z = random_z(ASSEMBLY.coordinates, 4, generator, 0.5)
    balance = torch.randn((4, 3, 3 * N_FAST), generator=generator)
    found = response.correction(z, balance)
    assert found.shape == (4, 3, N_FEATURES)
    for row in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda at: response(at) * response.widths, z[row].float())
        torch.testing.assert_close(found[row], balance[row] @ jacobian, rtol=1e-4, atol=1e-4)


def test_before_it_is_fitted_nothing_is_corrected():
    z, frames, _ = measured(20)
    parts = parts_of(z, frames)
    assert float(response_of().correction(z, parts.fast).abs().max()) == 0
    gradient, variance = response_of().mean_force(z, parts, frames.valid)
    mean, squared = mean_and_variance(parts.slow.float(), frames.valid)
    assert torch.equal(gradient, mean) and torch.equal(variance, squared.float())


@pytest.mark.parametrize("seed", [0, 1])
def test_any_response_leaves_the_mean_force_what_it_is(seed):
    z, frames, expected = measured(3000)
    parts = parts_of(z, frames)
    gradient, _ = response_of(0.5, seed).mean_force(z, parts, frames.valid)
    assert float((gradient - parts.slow.mean(1)).abs().max()) > 2  # it does something
    assert float(sigmas(gradient, expected).abs().max()) < 4


# ---------------------------------------------------------------- the fit
# Fast coordinates harmonic about a mean m*(z), whose forces and best response are known in closed form.

STIFFNESS = torch.tensor([[1.0e5, 300.0, 0.0], [300.0, 120.0, 20.0], [0.0, 20.0, 15.0]])


def true_displacement(z):
    """m*(z) of one fast atom, nm and radians, shape (..., 3)."""
    torsion, angle = z[..., 0], z[..., 4]
    parts = (0.002 * torch.sin(torsion), 0.15 * torch.cos(torsion + 0.5) + 0.05 * angle, 0.4 * torch.sin(2 * torsion))
    return torch.stack(parts, dim=-1)


def free_energy(z):
    return 3.0 * torch.cos(2 * z[..., 0]) + 0.5 * z[..., 1:].square().sum(-1)


def harmonic(n, seed, n_parts=4, shifted=0.0):
    """z, parts of chains there, and the exact mean forces; ``shifted``: chains that have not come to rest, widths."""
    generator = torch.Generator().manual_seed(seed)
    z = random_z(ASSEMBLY.coordinates, n, generator, 0.3).float()
    noise = torch.randn((n, n_parts, 3), generator=generator) @ torch.linalg.inv(torch.linalg.cholesky(STIFFNESS))
    away = noise + shifted * torch.linalg.inv(STIFFNESS).diagonal().sqrt()
    at = z[:, None].expand(-1, n_parts, -1).clone().requires_grad_()
    balance = away @ STIFFNESS
    (slow,) = torch.autograd.grad(free_energy(at).sum() - (true_displacement(at) * balance).sum(), at)
    once = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(free_energy(once).sum(), once)
    return z, ChainParts(slow, balance), expected


def fitted(parts_changed=None, n_updates=1500):
    widths = torch.linalg.inv(STIFFNESS).diagonal().sqrt()[None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        response = FastResponse(Torsions(1, N_FEATURES - 1), widths, (32, 32))
    z, parts, _ = harmonic(4000, 2)
    if parts_changed is not None:
        parts = parts_changed(parts)
    left = ResponseFitter(response).fit(z, parts, n_updates, torch.Generator().manual_seed(0), final=True)
    return response, left


@pytest.fixture(scope="module")
def known():
    return fitted()


@pytest.mark.slow
def test_a_fitted_response_takes_the_noise_out(known):
    """Of the same mean force, at other z than it was fitted to, with standard errors that know it."""
    response, left = known
    assert left < 0.1
    z, parts, expected = harmonic(2000, 3)
    valid = torch.ones(2000, dtype=torch.bool)
    gradient, variance = response.mean_force(z, parts, valid)
    plain, plain_variance = mean_and_variance(parts.slow, valid)
    assert float(sigmas(gradient, expected).abs().max()) < 4
    for feature in (0, 4):  # what the fast atoms follow
        ratio = (plain - expected)[:, feature].square().mean() / (gradient - expected)[:, feature].square().mean()
        assert float(ratio) > 10
        told = plain_variance[:, feature].mean() / variance[:, feature].mean()
        assert float((told / ratio).log().abs()) < 0.3


@pytest.mark.slow
def test_it_corrects_chains_that_have_not_come_to_rest(known):
    response, _ = known
    z, parts, expected = harmonic(2000, 3, shifted=1.0)
    gradient, _ = response.mean_force(z, parts, torch.ones(2000, dtype=torch.bool))
    before = (parts.slow.mean(1) - expected)[:, 0].square().mean()
    after = (gradient - expected)[:, 0].square().mean()
    assert float(before / after) > 10


@pytest.mark.slow
def test_it_points_where_the_fast_atoms_go(known):
    response, _ = known
    z, _, _ = harmonic(2000, 5)
    start, end = z[:1000], z[1000:]
    moved = true_displacement(end) - true_displacement(start)
    followed = response.follow(torch.zeros(1000, 1, 3), start, end)[:, 0]
    # As far as it may: three widths are the most.
    within = (moved / response.widths).abs() < 2.5
    for k in range(3):
        rows = within[:, k]
        error = (followed - moved)[rows, k].square().mean() / moved[rows, k].square().mean()
        assert float(error) < 0.1


def test_chains_in_contact_do_not_rule_the_fit():
    def contacts(parts):
        noisy = parts.slow.clone()
        noisy[::50] *= 300
        return parts._replace(slow=noisy)

    response, _ = fitted(contacts)
    z, parts, expected = harmonic(2000, 3)
    gradient, _ = response.mean_force(z, parts, torch.ones(2000, dtype=torch.bool))
    ratio = (parts.slow.mean(1) - expected)[:, 0].square().mean() / (gradient - expected)[:, 0].square().mean()
    assert float(ratio) > 5


def test_nothing_is_learned_where_all_chains_are_in_contact():
    response = FastResponse(Torsions(1, N_FEATURES - 1), torch.linalg.inv(STIFFNESS).diagonal().sqrt()[None], (8,))
    before = [parameter.clone() for parameter in response.parameters()]
    z, parts, _ = harmonic(20, 3)
    parts = parts._replace(fast=1e6 * parts.fast)
    left = ResponseFitter(response).fit(z, parts, 10, torch.Generator().manual_seed(0))
    assert left == 1.0
    assert all(torch.equal(*pair) for pair in zip(before, response.parameters(), strict=True))


def test_a_fitter_continues_from_its_state():
    z, frames, _ = measured(100)
    parts = parts_of(z, frames)
    first, second = ResponseFitter(response_of()), ResponseFitter(response_of(seed=3))
    first.fit(z, parts, 5, torch.Generator().manual_seed(1))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    left = [fitter.fit(z, parts, 5, torch.Generator().manual_seed(2)) for fitter in (first, second)]
    assert left[0] == left[1]
    assert_identical(first.state_dict(), second.state_dict())


# ---------------------------------------------------------------- following


def test_fast_coordinates_follow_by_the_difference_of_displacements():
    response = response_of(0.2)
    z = random_z(ASSEMBLY.coordinates, 8, torch.Generator().manual_seed(0), 0.5)
    y = torch.rand((4, N_FAST, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start, end = z[:4], z[4:]
    shift = ((response(end) - response(start)) * response.widths).detach().double().reshape(4, N_FAST, 3)
    torch.testing.assert_close(response.follow(y, start, end), y + shift)
    torch.testing.assert_close(response.follow(response.follow(y, start, end), end, start), y)
    assert torch.equal(response.follow(y, start, start), y)


def test_nothing_follows_farther_than_three_widths():
    response = response_of(100.0)
    z = random_z(ASSEMBLY.coordinates, 8, torch.Generator().manual_seed(0), 0.5)
    y = torch.zeros((4, N_FAST, 3), dtype=torch.float64)
    shift = response.follow(y, z[:4], z[4:]).flatten(1) / response.widths
    assert float(shift.abs().max()) == pytest.approx(3.0)

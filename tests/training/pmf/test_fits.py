"""Fits of the potential of mean force: right free energies from noisy forces, honest errors."""

import io
import math

import pytest
import torch
from analytic import assert_identical, largest_sigma
from pmf_models import PRECISION, in_a_box, new_pmf, pmf_of, random_z

from openmm_cgflow.coordinates.features import Torsions
from openmm_cgflow.forces.estimator import MeanForce
from openmm_cgflow.paper.box import BoxFeatures
from openmm_cgflow.training.pmf.fits import AnchorDifferences, MeanForceBuffer, PMFFitter, held_out_error


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


# ---------------------------------------------------------------- the function


def mixture(z):
    """Two modes of widths 0.16 and unequal weights, 40 kT apart from each other and a thousand from the walls, kT."""
    means = torch.tensor([[-1.2, 0.4], [1.2, 0.9]], dtype=z.dtype)
    exponents = -20.0 * (z[..., None, :] - means).square().sum(-1)
    return -torch.logsumexp(exponents + torch.tensor([0.2, 0.8]).log(), dim=-1)


def mixture_forces(n, generator):
    """Mean forces everywhere and near the modes, with their variance."""
    z = in_a_box(n, generator)
    z[n // 2 :] *= 0.5
    at = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture(at).sum(), at)
    data = {"z": z, "gradient": gradient, "variance": torch.full_like(gradient, 0.01)}
    return {name: tensor.float() for name, tensor in data.items()} | {"weights": torch.ones(n, 2)}


def test_forces_of_hundreds_of_kt_in_a_box_are_fitted(generator):
    """Networks that must be equal at both walls spend all they have on the walls."""
    data, modes, misfit = mixture_forces(3000, generator), torch.tensor([[-1.2, 0.4], [1.2, 0.9]]).double(), {}
    for features in (BoxFeatures, Torsions):
        pmf = pmf_of(features)
        fitter = PMFFitter(pmf, 1e-2, batch_size=512)
        for k in range(4):
            misfit[features] = fitter.fit(data, 100, generator, 1 - k / 4)
        if features is BoxFeatures:
            away = pmf(modes).detach() - mixture(modes)
            assert float((away[1] - away[0]).abs()) < 1
    assert misfit[BoxFeatures] < 0.3 * misfit[Torsions]


# ---------------------------------------------------------------- a closed form to fit


def free_energy(z):
    """Two unequal basins of a torsion, 6 kT apart, with two coupled bounded features that follow it, kT."""
    torsion = z[..., 0]
    middle = torch.stack((0.8 * torch.cos(torsion), -0.5 * torch.sin(2 * torsion)), dim=-1)
    away = z[..., 1:] - middle
    return 3.0 * torch.cos(2 * torsion) + 0.8 * torch.sin(torsion) + 0.5 * ((away @ PRECISION) * away).sum(-1)


def exact_difference():
    """-ln of the population of positive over that of negative torsions; the bounded features integrate out."""
    torsion = (torch.arange(2000, dtype=torch.float64) + 0.5) / 1000 * math.pi - math.pi
    logs = -3.0 * torch.cos(2 * torsion) - 0.8 * torch.sin(torsion)
    return float(torch.logsumexp(logs[torsion < 0], 0) - torch.logsumexp(logs[torsion > 0], 0))


@torch.no_grad()
def differences(pmf):
    """The same of every member, by quadrature."""
    torsion = (torch.arange(72, dtype=torch.float64) + 0.5) / 36 * math.pi - math.pi
    bounded = torch.linspace(-4, 4, 21, dtype=torch.float64)
    grid = torch.cartesian_prod(torsion, bounded, bounded)
    logs = -pmf.each(grid)
    return torch.logsumexp(logs[:, grid[:, 0] < 0], 1) - torch.logsumexp(logs[:, grid[:, 0] > 0], 1)


def measured(n, generator, noise=2.0, contacts=0.0):
    """Mean forces with Gaussian noise, and with skewed noise of mean zero around torsion 0 if ``contacts`` > 0."""
    z = random_z(n, generator)
    at = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(free_energy(at).sum(), at)
    gradient = gradient + noise * torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
    variance = torch.full_like(gradient, noise**2)
    size = contacts * torch.exp(-0.5 * (z[:, 0] / 0.35) ** 2)
    gradient[:, 0] += size * (torch.empty(n, dtype=torch.float64).exponential_(generator=generator) - 1)
    variance[:, 0] += size**2
    energy = torch.zeros(n, dtype=torch.float64)
    return z, MeanForce(gradient, variance, energy, energy, torch.ones(n, dtype=torch.bool))


def fitted(seed, n, n_updates=300, **noise):
    generator = torch.Generator().manual_seed(100 + seed)
    pmf, buffer = new_pmf(hidden=(24, 24), seed=seed), MeanForceBuffer(4)
    for _ in range(2):
        buffer.add(*measured(n // 2, generator, **noise), generator)
    misfit = PMFFitter(pmf, 1e-2, batch_size=256).fit(buffer.data(), n_updates, generator)
    return pmf, misfit


@pytest.fixture(scope="module")
def repeated():
    """Errors of the free-energy difference, and the ensembles' spreads, of twelve fits to fresh data each."""
    fits = [fitted(seed, 1000) for seed in range(12)]
    found = torch.stack([differences(pmf) for pmf, _ in fits])
    return found.mean(1) - exact_difference(), found.std(1), fits


@pytest.mark.slow
def test_free_energies_of_separated_basins_are_recovered(repeated):
    errors, spreads, _ = repeated
    assert abs(exact_difference()) > 1.5
    typical = float(spreads.square().mean().sqrt())
    assert 0.05 < typical < 0.5  # the data say something, and not everything
    assert float(errors.abs().max()) < 4 * typical
    assert abs(float(errors.mean())) < 4 * typical / math.sqrt(len(errors))


@pytest.mark.slow
def test_the_spread_of_the_ensemble_is_the_error(repeated):
    """Of the order of the true error, over repetitions; less would stop a training too early, more never."""
    errors, spreads, _ = repeated
    assert 0.5 < float((errors.square().mean() / spreads.square().mean()).sqrt()) < 2.2


def leaning(n=2000, seed=4):
    """Mean forces with an error in common on the way from one basin to the other, which no number of them removes."""
    z, force = measured(n, torch.Generator().manual_seed(seed), noise=0.5)
    gradient = force.gradient.clone()
    # Half of the circle, from the middle of the negative basin to that of the positive one, leans to one side, half
    # to the other: 0.4 kT between the basins.
    gradient[:, 0] += 0.4 / math.pi * torch.cos(z[:, 0]).sign()
    return z, force._replace(gradient=gradient)


def test_known_differences_mend_errors_that_mean_forces_have_in_common():
    generator = torch.Generator().manual_seed(7)
    buffer = MeanForceBuffer(4)
    buffer.add(*leaning(), generator)
    basins = torch.tensor([[-math.pi / 2, 0.0, 0.0], [math.pi / 2, 0.0, 0.0]], dtype=torch.float64)
    start, end = basins[[0, 0, 0]], basins[[1, 1, 1]] + torch.tensor([[0.0], [0.3], [-0.3]])
    noise = torch.tensor([0.05, -0.03, 0.02])
    known = (free_energy(end) - free_energy(start)).float() + noise
    values = AnchorDifferences(start.float(), end.float(), known, torch.full((3,), 0.05), torch.ones((3, 4)))
    errors, misfits = {}, {}
    for name, given in {"without": None, "with": values}.items():
        pmf = new_pmf(hidden=(24, 24), seed=3)
        fitter = PMFFitter(pmf, 1e-2, batch_size=256)
        fitter.fit(buffer.data(), 200, torch.Generator().manual_seed(1))
        misfits[name] = fitter.fit(buffer.data(), 300, torch.Generator().manual_seed(2), 0.3, given)
        errors[name] = float(differences(pmf).mean()) - exact_difference()
    assert abs(errors["without"]) > 0.3
    assert abs(errors["with"]) < 0.1
    assert misfits["with"] < misfits["without"] + 0.02  # and the mean forces are still fitted


@pytest.mark.slow
def test_more_data_mean_a_smaller_error(repeated):
    _, spreads, _ = repeated
    few = float(spreads.square().mean().sqrt())
    many = torch.stack([differences(fitted(seed, 8000)[0]).std() for seed in range(3)])
    assert float(many.square().mean().sqrt()) < 0.6 * few


@pytest.mark.slow
def test_what_is_left_after_the_fit_is_noise(repeated):
    _, _, fits = repeated
    assert sum(misfit for _, misfit in fits) / len(fits) == pytest.approx(1.0, abs=0.15)
    z, force = measured(4000, torch.Generator().manual_seed(9))
    for pmf, _ in fits[:3]:
        assert held_out_error(pmf, z, force) == pytest.approx(1.0, abs=0.1)
    assert held_out_error(new_pmf(), z, force) > 1.3


def test_skewed_noise_near_contacts_does_not_bias_the_fit():
    """Weights by the size of what was measured, and a Huber loss on the residual, are both 0.85 kT off here."""
    found = torch.stack([differences(fitted(seed, 6000, 400, noise=1.0, contacts=12.0)[0]) for seed in range(3)])
    spread = float(found.std(1).square().mean().sqrt())
    assert spread < 0.2
    assert abs(float(found.mean()) - exact_difference()) < 3 * spread


def test_contacts_do_not_rule_the_fit():
    """Forces of 200 kT in a corner: elsewhere the fit is good. Without the relative error it is three times worse."""
    generator = torch.Generator().manual_seed(1)
    z, force = measured(4000, generator, noise=0.5)
    buffer, pmf = MeanForceBuffer(4), new_pmf(hidden=(24, 24))
    force.gradient[:, 0] -= 100 * z[:, 0] / 0.3**2 * torch.exp(-0.5 * (z[:, 0] / 0.3) ** 2)
    assert float(force.gradient.abs().max()) > 200
    buffer.add(z, force, generator)
    PMFFitter(pmf, 1e-2, 256).fit(buffer.data(), 400, generator)
    far = z[z[:, 0].abs() > 1.2]
    _, predicted = pmf.value_and_gradient(far)
    at = far.clone().requires_grad_()
    (exact,) = torch.autograd.grad(free_energy(at).sum(), at)
    assert float((predicted - exact).square().mean().sqrt()) < 0.35
    assert float(exact.square().mean().sqrt()) > 2


@pytest.mark.parametrize("size", [1e3, 1e12])
def test_overlaps_of_slow_atoms_do_not_rule_the_fit(size, generator):
    """Their forces say: not here. What they are is of no matter."""
    z = random_z(400, generator)
    gradient = torch.randn((400, 3), generator=generator, dtype=torch.float64)
    overlap = torch.arange(400) % 8 == 0
    gradient[overlap] *= 1e5
    fits = []
    for factor in (1.0, size):
        pmf = new_pmf()
        data = {"z": z, "gradient": torch.where(overlap[:, None], factor * gradient, gradient)}
        data |= {"variance": torch.ones_like(z), "weights": torch.ones((400, 4))}
        PMFFitter(pmf, 1e-3).fit({name: tensor.float() for name, tensor in data.items()}, 20, generator.manual_seed(1))
        fits.append(pmf(z).detach())
    assert torch.isfinite(fits[1]).all()
    torch.testing.assert_close(fits[0], fits[1], rtol=1e-3, atol=1e-3)


def test_a_fit_is_steadier_than_its_last_step():
    """The PMF is the average of what is trained: from update to update its free energies move far less."""
    generator = torch.Generator().manual_seed(1)
    buffer, pmf = MeanForceBuffer(4), new_pmf(hidden=(24, 24))
    buffer.add(*measured(1000, generator), generator)
    fitter = PMFFitter(pmf, 1e-2, batch_size=256)
    fitter.fit(buffer.data(), 200, generator)
    found = []
    for _ in range(15):
        fitter.fit(buffer.data(), 1, generator)
        found.append((differences(pmf).mean(), differences(fitter.networks.trained).mean()))
    average, trained = torch.tensor(found).diff(dim=0).square().mean(0).sqrt().tolist()
    assert average < 0.4 * trained


def test_a_fitter_continues_from_its_state():
    generator = torch.Generator().manual_seed(1)
    buffer = MeanForceBuffer(4)
    buffer.add(*measured(100, generator), generator)
    first = PMFFitter(new_pmf(), 1e-2, 32)
    first.fit(buffer.data(), 5, torch.Generator().manual_seed(2))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = PMFFitter(new_pmf(seed=5), 1e-2, 32)
    second.load_state_dict(torch.load(file, weights_only=True))
    misfits = [fitter.fit(buffer.data(), 5, torch.Generator().manual_seed(3)) for fitter in (first, second)]
    assert misfits[0] == misfits[1]
    assert_identical(first.state_dict(), second.state_dict())
    assert torch.equal(differences(first.pmf), differences(second.pmf))


def test_same_generator_same_fit():
    results = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        buffer, pmf = MeanForceBuffer(4), new_pmf()
        buffer.add(*measured(100, torch.Generator().manual_seed(0)), generator)
        PMFFitter(pmf, 1e-2, 32).fit(buffer.data(), 5, generator)
        results.append(differences(pmf))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


# ---------------------------------------------------------------- error of what was not fitted


def noise_around(pmf, factor, n=4000, seed=2):
    """Measurements around the prediction, ``factor`` times as noisy as they say, another noise for each."""
    generator = torch.Generator().manual_seed(seed)
    z = random_z(n, generator)
    _, gradient = pmf.value_and_gradient(z)
    sigma = torch.rand(z.shape, generator=generator, dtype=torch.float64) + 0.1
    gradient = gradient + factor * sigma * torch.randn(z.shape, generator=generator, dtype=torch.float64)
    energy = torch.zeros(n, dtype=torch.float64)
    return z, MeanForce(gradient, sigma**2, energy, energy, torch.ones(n, dtype=torch.bool))


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_held_out_error_of_pure_noise_is_one(factor):
    pmf = new_pmf(roughness=0.3)
    z, force = noise_around(pmf, factor)
    assert held_out_error(pmf, z, force) == pytest.approx(factor, rel=0.03)


def test_held_out_error_sees_what_is_not_learned():
    pmf = new_pmf(roughness=0.3)
    z, force = noise_around(pmf, 1.0)
    shifted = force._replace(gradient=force.gradient + 3 * force.variance.sqrt())
    assert held_out_error(pmf, z, shifted) > 3


def test_held_out_error_leaves_invalid_replicas_out():
    pmf = new_pmf(roughness=0.3)
    z, force = noise_around(pmf, 1.0)
    valid = torch.arange(len(z)) % 3 != 0
    gradient = torch.where(valid[:, None], force.gradient, math.nan)
    alone = MeanForce(*(part[valid] for part in force[:5]))
    spoilt = force._replace(gradient=gradient, valid=valid)
    assert held_out_error(pmf, z, spoilt) == held_out_error(pmf, z[valid], alone)


# ---------------------------------------------------------------- the buffer


def test_the_first_third_of_the_rounds_counts_no_more(generator):
    buffer = MeanForceBuffer(4)
    rounds = [measured(10, generator) for _ in range(7)]
    for n, (z, force) in enumerate(rounds, start=1):
        buffer.add(z, force, generator)
        kept = rounds[{1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2}[n] : n]
        found = buffer.data()
        assert torch.equal(found["z"], torch.cat([z for z, _ in kept]).float())
        assert torch.equal(found["gradient"], torch.cat([force.gradient for _, force in kept]).float())
        assert torch.equal(found["variance"], torch.cat([force.variance for _, force in kept]).float())
        assert found["weights"].shape == (len(found["z"]), 4)
    assert len(buffer.rounds) == 7  # all are remembered


def test_invalid_replicas_are_not_remembered(generator):
    z, force = measured(10, generator)
    valid = torch.arange(10) != 4
    buffer = MeanForceBuffer(4)
    buffer.add(
        z, force._replace(gradient=torch.where(valid[:, None], force.gradient, math.nan), valid=valid), generator
    )
    found = buffer.data()
    assert torch.equal(found["z"], z[valid].float()) and len(found["weights"]) == 9
    assert torch.isfinite(found["gradient"]).all()


def test_bootstrap_weights_have_mean_and_variance_one(generator):
    buffer = MeanForceBuffer(3)
    buffer.add(*measured(20000, generator), generator)
    weights = buffer.data()["weights"].double()
    assert (weights > 0).all()
    assert largest_sigma(weights, 1.0) < 4
    assert largest_sigma((weights - 1).square(), 1.0) < 4
    assert float((torch.corrcoef(weights.T) - torch.eye(3)).abs().max()) < 4 / math.sqrt(20000)
    assert torch.equal(buffer.data()["weights"].double(), weights)  # drawn once


def test_a_buffer_continues_from_its_state(generator):
    first = MeanForceBuffer(4)
    for _ in range(3):
        first.add(*measured(10, generator), generator)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = MeanForceBuffer(4)
    second.load_state_dict(torch.load(file, weights_only=True))
    later = measured(10, generator)
    for buffer in (first, second):
        buffer.add(*later, torch.Generator().manual_seed(7))
    assert len(second.rounds) == 4
    assert_identical(first.data(), second.data())

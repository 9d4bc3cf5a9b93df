"""Mean forces against a quadratic bath in closed form, and their standard errors."""

import math

import pytest
import torch
from analytic import (
    AnalyticMeanForce,
    EchoEngine,
    QuadraticBath,
    assembly_of,
    assert_identical,
    chain_settings,
    chiral_chains,
    random_structure,
    random_z,
    some_z,
)

from openmm_cgflow.engines.engine import Frames, Schedule
from openmm_cgflow.forces.estimator import MolecularMeanForce
from openmm_cgflow.forces.fast_atoms import FastAtoms
from openmm_cgflow.forces.gradients import cartesian_gradients, comoving_gradients, mean_and_variance
from openmm_cgflow.units import thermal_beta

TEMPERATURE = 300.0
BETA = thermal_beta(TEMPERATURE)

# A slow chain A-B-C-D, a fast atom E bound to C and a fast atom F bound to E: both move with the torsion.
A, B, C, D, E, F = 1, 4, 0, 3, 2, 5  # neither sorted along the chain nor slow before fast
BONDS = [(A, B), (B, C), (C, D), (C, E), (E, F)]
SLOW, FAST = [0, 1, 3, 4], [2, 5]
# Negative constants push the fast atoms out of the chain; F feels the far end A, so every torsion and angle matters.
SPRINGS = [(C, E, 2e4), (D, E, -5e3), (B, E, -5e3), (E, F, 1e4), (C, F, -3e3), (A, F, 2e3), (A, E, 5e2)]

GRADIENTS = {"comoving": lambda *given: comoving_gradients(*given)[0], "cartesian": cartesian_gradients}


def bath(correlation=0.0):
    return QuadraticBath(6, SPRINGS, SLOW, correlation)


def molecule(kind="internal"):
    return assembly_of(BONDS, SLOW, random_structure(BONDS, 4), kind=kind)


def spread_of(kind):
    """How much of the intervals the tests use: Cartesian ones also hold conformations with atoms on each other."""
    return 0.5 if kind == "internal" else 0.3


def exact(all_atom, engine, z, beta=BETA):
    at = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(beta * engine.free_energy(slow_positions(all_atom, engine, at)).sum(), at)
    return gradient


def slow_positions(all_atom, engine, z):
    order = [list(all_atom.slow).index(atom) for atom in engine.slow]
    return all_atom.coordinates.to_xyz(z)[:, order]


def run(all_atom, engine, z, n_frames, seed=1):
    xyz = all_atom.build(z, torch.zeros(len(z), 2, 3, dtype=torch.float64) + torch.tensor([0.1, 1.5, 0.5]))
    return engine.run(xyz.numpy(), Schedule(TEMPERATURE, n_frames=n_frames), seed)


def pulls(gradients, expected):
    """Deviations of the batch mean from the exact mean force in their own standard errors, per feature."""
    mean, variance = mean_and_variance(gradients, torch.ones(len(gradients), dtype=torch.bool))
    return (mean - expected).mean(0) / (variance.mean(0) / len(mean)).sqrt()


def chi_square(gradients, expected):
    """Mean squared deviation of each replica in units of its own standard error, per feature."""
    mean, variance = mean_and_variance(gradients, torch.ones(len(gradients), dtype=torch.bool))
    return ((mean - expected).square() / variance).mean(0)


# ---------------------------------------------------------------- the quadratic bath


def test_the_bath_has_the_free_energy_it_claims():
    """exp(-beta A) = integral of exp(-beta U) over the fast atoms, by quadrature in one dimension."""
    engine = QuadraticBath(3, [(0, 2, 300.0), (1, 2, 150.0), (0, 1, 40.0)], [0, 1])
    a = []
    for x in (0.1, 0.25):
        xyz = torch.tensor([[0, 0, 0], [x, 0, 0]], dtype=torch.float64)
        grid = torch.linspace(-2, 2, 40001, dtype=torch.float64)
        energy = 150.0 * grid**2 + 75.0 * (grid - x) ** 2 + 20.0 * x**2  # the other axes are the same integrals
        other = 150.0 * grid**2 + 75.0 * grid**2
        logs = [torch.logsumexp(-BETA * e, 0) for e in (energy, other, other)]
        a.append(float(engine.free_energy(xyz) + sum(logs) / BETA))
    assert a[0] == pytest.approx(a[1], abs=1e-9)


def test_the_bath_draws_what_it_claims():
    engine = bath(correlation=0.6)
    all_atom = molecule()
    z = random_z(all_atom.coordinates, 1, torch.Generator().manual_seed(0))
    frames = run(all_atom, engine, z.repeat(4000, 1), 2)
    fast = frames.xyz[:, :, engine.fast]
    start = frames.xyz[0, 0, SLOW]
    ff, fs = engine._block(engine.fast, engine.fast), engine._block(engine.fast, engine.slow)
    sigma = torch.linalg.inv(ff).diagonal().sqrt()[:, None] / math.sqrt(BETA)
    scaled = (fast + torch.linalg.solve(ff, fs @ start)) / sigma
    assert float(scaled[:, 0].mean(0).abs().max()) < 4.5 / math.sqrt(4000)
    assert float((scaled[:, 1].square().mean(0) - 1).abs().max()) < 4.5 * math.sqrt(2 / 4000)
    assert float((scaled[:, 0] * scaled[:, 1]).mean() - 0.6) == pytest.approx(0, abs=0.05)
    energy = engine.mean_energy(start, TEMPERATURE)
    assert float((frames.energy[:, 0].mean() - energy) / frames.energy[:, 0].std() * math.sqrt(4000)) < 4


@pytest.mark.parametrize("kind", ["internal", "cartesian"])
@pytest.mark.parametrize("estimator", ["comoving", "cartesian"])
def test_mean_force_of_the_quadratic_bath(kind, estimator):
    """Both estimators, in both coordinate systems, agree with the closed form within four standard errors."""
    all_atom, engine = molecule(kind), bath()
    z = random_z(all_atom.coordinates, 150, torch.Generator().manual_seed(2), spread_of(kind))
    frames = run(all_atom, engine, z, 40)
    expected = exact(all_atom, engine, z)
    gradients = GRADIENTS[estimator](all_atom, z, frames, BETA)
    assert gradients.shape == (150, 40, 6)
    assert float(pulls(gradients, expected).abs().max()) < 4
    # The standard errors themselves: squared deviations in their units average to one.
    assert float((chi_square(gradients, expected) - 1 - 2 / 40).abs().max()) < 5 * math.sqrt(2 / 150)
    # This could have failed: the mean forces are many standard errors away from zero.
    assert float(chi_square(gradients, torch.zeros(6)).min()) > 20


def test_estimators_agree_with_each_other_frame_by_frame():
    all_atom, engine = molecule(), bath()
    z = random_z(all_atom.coordinates, 200, torch.Generator().manual_seed(3), 0.5)
    frames = run(all_atom, engine, z, 30)
    one, other = (GRADIENTS[e](all_atom, z, frames, BETA) for e in ("comoving", "cartesian"))
    assert float(pulls(one - other, torch.zeros(6)).abs().max()) < 4
    assert float((one - other).abs().max()) > 1


@pytest.mark.parametrize("fault", ["temperature", "slow atom dropped", "frames of another z", "wrong sign"])
def test_a_wrong_mean_force_is_noticed(fault):
    """The same comparison fails where the code would be wrong."""
    all_atom, engine = molecule(), bath()
    z = random_z(all_atom.coordinates, 150, torch.Generator().manual_seed(2), 0.5)
    frames = run(all_atom, engine, z, 40)
    beta, forces = BETA, frames.forces.clone()
    if fault == "temperature":
        beta = BETA * 1.1
    elif fault == "slow atom dropped":
        forces[:, :, D] = 0
    elif fault == "frames of another z":
        z = z.roll(1, 0)
    else:
        forces = -forces
    for estimator in ("comoving", "cartesian"):
        gradients = GRADIENTS[estimator](all_atom, z, frames._replace(forces=forces), beta)
        assert float(chi_square(gradients, exact(all_atom, engine, z)).max()) > 1 + 10 * math.sqrt(2 / 150)


def test_comoving_without_the_fast_atoms_forces_is_the_cartesian_estimator():
    """An identity of single frames: moving fast atoms rigidly has no divergence, so their forces add noise or remove
    it, never a mean."""
    all_atom, engine = molecule(), bath()
    z = random_z(all_atom.coordinates, 20, torch.Generator().manual_seed(2), 0.5)
    frames = run(all_atom, engine, z, 4)
    forces = frames.forces.clone()
    forces[:, :, engine.fast] = 0
    without = GRADIENTS["comoving"](all_atom, z, frames._replace(forces=forces), BETA)
    torch.testing.assert_close(without, cartesian_gradients(all_atom, z, frames, BETA))


def test_comoving_is_less_noisy_where_fast_atoms_are_stiff():
    """Atoms bound to the frame that carries them: held in that frame they say nothing, held in space they do."""
    all_atom = molecule()
    stiff = [(C, E, 2e5), (D, E, -5e4), (B, E, -5e4), (E, F, 1e5), (C, F, -3e4), (A, F, 50.0)]
    engine = QuadraticBath(6, stiff, SLOW)
    z = random_z(all_atom.coordinates, 100, torch.Generator().manual_seed(2), 0.5)
    frames = run(all_atom, engine, z, 20)
    expected = exact(all_atom, engine, z)
    variance = {}
    for estimator in ("comoving", "cartesian"):
        gradients = GRADIENTS[estimator](all_atom, z, frames, BETA)
        assert float(pulls(gradients, expected).abs().max()) < 4
        variance[estimator] = mean_and_variance(gradients, frames.valid)[1].mean(0)
    ratio = variance["cartesian"] / variance["comoving"]
    # The torsion, the bond A-B and the angle A-B-C carry the atoms that E and F are bound to as one body.
    assert all_atom.coordinates.names[4] == f"angle A{A}-A{B}-A{C}"
    assert (ratio[[0, 1, 4]] > 1000).all() and (ratio > 0.8).all()


def test_same_mean_force_from_correlated_frames():
    all_atom, engine = molecule(), bath(correlation=0.7)
    z = random_z(all_atom.coordinates, 400, torch.Generator().manual_seed(5), 0.5)
    frames = run(all_atom, engine, z, 12)
    expected = exact(all_atom, engine, z)
    for estimator in ("comoving", "cartesian"):
        gradients = GRADIENTS[estimator](all_atom, z, frames, BETA)
        mean, variance = mean_and_variance(gradients, frames.valid)
        assert float(pulls(gradients, expected).abs().max()) < 4
        size = ((mean - expected).square().mean(0) / variance.mean(0)).sqrt()
        assert float((size - 1).abs().max()) < 0.2


def test_gradient_of_a_frame_is_a_derivative_of_the_energy():
    """d(beta U)/dz by finite differences of the rebuilt structure: no statistics."""
    all_atom, engine = molecule(), bath()
    z = random_z(all_atom.coordinates, 3, torch.Generator().manual_seed(6), 0.5)
    frames = run(all_atom, engine, z, 2)
    y = all_atom.read_fast(frames.xyz)

    def energy(moved, comoving):
        xyz = all_atom.build(moved[:, None].expand(-1, 2, -1), y)
        if not comoving:
            xyz = xyz.clone()
            xyz[:, :, FAST] = frames.xyz[:, :, FAST]
        return 0.5 * (xyz * (engine.laplacian @ xyz)).sum((-1, -2))

    for estimator in ("comoving", "cartesian"):
        found = GRADIENTS[estimator](all_atom, z, frames, BETA)
        for k in range(6):
            step = 1e-5 * torch.eye(6).double()[k]
            difference = energy(z + step, estimator == "comoving") - energy(z - step, estimator == "comoving")
            torch.testing.assert_close(found[..., k], BETA * difference / 2e-5, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------- invalid replicas


def test_invalid_frames_do_not_leak():
    all_atom, engine = molecule(), bath()
    z = random_z(all_atom.coordinates, 12, torch.Generator().manual_seed(2), 0.5)
    frames = run(all_atom, engine, z, 5)
    xyz, forces, energy = frames.xyz.clone(), frames.forces.clone(), frames.energy.clone()
    xyz[3], forces[3], energy[3] = math.nan, math.nan, math.nan
    xyz[7], forces[7] = 0.0, math.inf
    valid = frames.valid.clone()
    valid[[3, 7]] = False
    broken = Frames(xyz, forces, energy, valid)
    for estimator in ("comoving", "cartesian"):
        clean = GRADIENTS[estimator](all_atom, z, frames, BETA)
        found = GRADIENTS[estimator](all_atom, z, broken, BETA)
        assert (found[~valid] == 0).all()
        assert torch.equal(found[valid], clean[valid])


# ---------------------------------------------------------------- every estimator keeps the contract


def molecular(estimator):
    engine = bath()
    xyz = random_structure(BONDS, 4)
    all_atom = assembly_of(BONDS, SLOW, xyz)
    y = all_atom.read_fast(xyz)
    chains = FastAtoms(engine, all_atom, lambda z, t, g: y.expand(len(z), -1, -1), chain_settings(), 3)
    return MolecularMeanForce(chains, chain_settings(estimator=estimator)), all_atom


def with_failures(estimator):
    engine = EchoEngine()
    force = MolecularMeanForce(chiral_chains(engine, max_invalid=0.5), chain_settings(estimator=estimator))
    force(some_z(force.fast_atoms, 8), TEMPERATURE)
    engine.broken, engine.mirrored = [1], [5]
    return force


ESTIMATORS = {
    "analytic": lambda: AnalyticMeanForce(lambda z: 2 * torch.cos(z).sum(-1), noise=0.1, invalid=[1, 5]),
    "comoving": lambda: molecular("comoving")[0],
    "cartesian": lambda: molecular("cartesian")[0],
    "comoving with failures": lambda: with_failures("comoving"),
    "cartesian with failures": lambda: with_failures("cartesian"),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_keep_the_contract(name):
    estimator = ESTIMATORS[name]()
    z = random_z(molecule().coordinates, 8, torch.Generator().manual_seed(0), 0.5).requires_grad_()
    before = z.detach().clone()
    evaluations = [estimator.n_energy_evaluations]
    force = estimator(z, TEMPERATURE)
    evaluations.append(estimator.n_energy_evaluations)
    assert force.gradient.shape == force.variance.shape == (8, 6)
    assert force.energy.shape == force.energy_variance.shape == force.valid.shape == (8,)
    assert force.valid.dtype == torch.bool
    assert (force.parts is not None) == name.startswith("comoving")
    if force.parts is not None:  # three frames
        assert force.parts.slow.shape == (8, 3, 6) and force.parts.fast.shape == (8, 3, 6)
        torch.testing.assert_close(force.parts.slow.mean(1), force.gradient)
        assert (force.parts.fast[~force.valid] == 0).all() and torch.isfinite(force.parts.fast).all()
    assert torch.equal(z.detach(), before)
    for tensor in force[:4]:
        assert tensor.dtype == torch.float64 and not tensor.requires_grad
        assert torch.isfinite(tensor).all()
        assert (tensor[~force.valid] == 0).all()
    if name == "analytic" or "failures" in name:
        assert torch.nonzero(~force.valid).flatten().tolist() == [1, 5]
    assert (force.variance >= 0).all()

    again = ESTIMATORS[name]()
    again.load_state_dict(estimator.state_dict())
    assert again.n_energy_evaluations == estimator.n_energy_evaluations
    assert_identical(again(z, TEMPERATURE)._asdict(), estimator(z, TEMPERATURE)._asdict())
    evaluations.append(estimator.n_energy_evaluations)
    assert evaluations == sorted(set(evaluations))


@pytest.mark.parametrize("estimator", ["comoving", "cartesian"])
def test_the_whole_estimator_on_the_quadratic_bath(estimator):
    """Through the chains, the pool and the defaults: gradient, energy and both standard errors."""
    force, all_atom = molecular(estimator)
    temperature = 420.0
    beta = thermal_beta(temperature)
    engine = force.fast_atoms.engine
    z = random_z(all_atom.coordinates, 1500, torch.Generator().manual_seed(8), 0.5)
    found = force(z, temperature)
    expected = exact(all_atom, engine, z, beta)
    away = (found.gradient - expected).mean(0) / (found.variance.mean(0) / 1500).sqrt()
    assert float(away.abs().max()) < 4
    energy = engine.mean_energy(slow_positions(all_atom, engine, z), temperature)
    away = (found.energy - energy).mean() / (found.energy_variance.mean() / 1500).sqrt()
    assert abs(float(away)) < 4
    spread = ((found.energy - energy).square().mean() / found.energy_variance.mean()).sqrt()
    assert float(spread) == pytest.approx(1, abs=0.1)
    # The first pool takes every fifth z: at least chains.n_pool = 256 of them.
    assert force.n_energy_evaluations == 300 * (100 + 500 + 1) + 1500 * (11 + 7 + 3 * 2)


# ---------------------------------------------------------------- adaptive chains


def adaptive(n_equilibration=40, n_frames=8, n_relax=5):
    values = {"n_equilibration": n_equilibration, "n_frames": n_frames, "n_relax": n_relax, "stride": 4}
    return MolecularMeanForce(chiral_chains(), chain_settings(**values), adaptive=True)


def information(n_frames, noise_of_a_frame):
    """Per evaluation, of chains of 45 steps and four for each frame; the fit aims at a squared error of one."""
    return 1 / ((45 + 4 * n_frames) * (noise_of_a_frame / n_frames + 1))


@pytest.mark.parametrize("noise_of_a_frame", [0.5, 5.0, 20.0, 60.0])
def test_the_number_of_frames_makes_most_of_the_evaluations(noise_of_a_frame):
    force = adaptive()
    for _ in range(12):
        force.tune(noise_of_a_frame / force.n_frames)
    best = max(range(8, 33), key=lambda n: information(n, noise_of_a_frame))
    assert information(force.n_frames, noise_of_a_frame) > 0.98 * information(best, noise_of_a_frame)


def test_the_number_of_frames_changes_slowly_and_within_limits():
    force = adaptive()
    force.tune(1e6)
    assert force.n_frames == 12
    for _ in range(10):
        force.tune(1e6)
    assert force.n_frames == 32
    for _ in range(10):
        force.tune(0.0)
    assert force.n_frames == 8
    fixed = MolecularMeanForce(chiral_chains(), chain_settings())
    fixed.tune(1e6)
    assert fixed.n_frames == 3


@pytest.mark.parametrize(("drift", "longer"), [(0.0, False), (0.1, True), (-0.1, True)])
def test_equilibration_grows_while_energies_drift(drift, longer):
    force = adaptive()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        energy = torch.randn((2000, 8), generator=generator).double() + drift * torch.arange(8)
        energy[5] += 1e9 * torch.arange(8)  # one that leaves an overlap
        force._lengthen_equilibration(energy)
    assert (force.n_equilibration > 40) == longer
    for _ in range(20):
        force._lengthen_equilibration(energy)
    assert force.n_equilibration == (320 if longer else 40)


def test_chains_have_the_length_that_was_chosen():
    force = adaptive()
    force.n_equilibration, force.n_frames = 70, 6
    force(some_z(force.fast_atoms, 4), TEMPERATURE)
    last = force.fast_atoms.engine.calls[-1]
    assert last["n_equilibration"] == 70 and last["n_frames"] == 6
    again = adaptive()
    again.load_state_dict(force.state_dict())
    assert again.n_equilibration == force.n_equilibration and again.n_frames == force.n_frames

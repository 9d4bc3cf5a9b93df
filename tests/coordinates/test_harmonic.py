"""The harmonic reference against an energy that is exactly harmonic in internal coordinates."""

import logging
import math

import numpy as np
import pytest
import torch
from analytic import random_rotation, random_structure

from openmm_cgflow.coordinates.harmonic import HarmonicReference
from openmm_cgflow.coordinates.placement import Placement, bond_angle_dihedral, place_first_three
from openmm_cgflow.coordinates.zmatrix import fast_zmatrix, slow_zmatrix
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.bonds import bond_graph
from openmm_cgflow.units import thermal_beta

# A slow chain 0-1-2-3 with a torsion, a fast atom 4 on 1, and a rotor 5, 6 on 3.
BONDS = [(0, 1), (1, 2), (2, 3), (1, 4), (3, 5), (3, 6)]
N_SLOW, N_ATOMS = 4, 7
SLOW, FAST = slow_zmatrix(bond_graph(7, BONDS), range(4)), fast_zmatrix(bond_graph(7, BONDS), range(4))
ATOMS = torch.as_tensor(np.concatenate((SLOW.atoms, FAST.atoms)))
REFERENCES = torch.as_tensor(np.concatenate((SLOW.references, FAST.references))).clamp(min=0)
ROTATABLE = np.concatenate((SLOW.rotatable, FAST.rotatable))
STIFF = np.argwhere((np.arange(7)[:, None] > np.arange(3)) & ~(ROTATABLE[:, None] & (np.arange(3) == 2)))
TORSIONS = np.flatnonzero(ROTATABLE)
TEMPERATURE = 320.0


class Energy:
    """U = 1/2 dq H dq over stiff coordinates + sum V (1 - cos(n phi)) and V' sin(phi) over torsions."""

    def __init__(self, softness=1.0):
        rng = np.random.default_rng(1)
        scale = np.array([math.sqrt(2e5), math.sqrt(400.0), math.sqrt(300.0)])[STIFF[:, 1]]
        coupling = rng.uniform(-0.25, 0.25, (len(STIFF), len(STIFF)))
        matrix = np.eye(len(STIFF)) + (coupling + coupling.T) / 2
        self.hessian = matrix * scale[:, None] * scale * softness
        self.minimum = bond_angle_dihedral(random_structure(BONDS, 2), ATOMS, REFERENCES)
        self.n_evaluations = 0

    def torsion_energy(self, k, phi):
        """phi from the minimum, which must stay a minimum."""
        return {3: 4.0, 5: 3.0}[k] * (1 - torch.cos(3 * phi)) + (2.0 * (1 - torch.cos(phi)) if k == 5 else 0.0)

    def __call__(self, positions):
        self.n_evaluations += len(positions)
        xyz = torch.tensor(positions, requires_grad=True)
        away = bond_angle_dihedral(xyz, ATOMS, REFERENCES) - self.minimum
        dihedral = torch.remainder(away[..., 2] + math.pi, 2 * math.pi) - math.pi
        away = torch.cat((away[..., :2], dihedral[..., None]), dim=-1)
        stiff = away[:, STIFF[:, 0], STIFF[:, 1]]
        energy = 0.5 * torch.einsum("bi,ij,bj->b", stiff, torch.as_tensor(self.hessian), stiff)
        for k in TORSIONS:
            energy = energy + self.torsion_energy(int(k), away[:, k, 2])
        (gradient,) = torch.autograd.grad(energy.sum(), xyz)
        return energy.detach().numpy(), -gradient.numpy()


@pytest.fixture(scope="module")
def energy():
    return Energy()


@pytest.fixture(scope="module")
def reference(energy):
    rng = np.random.default_rng(0)
    start = random_structure(BONDS, 2).numpy()
    return HarmonicReference.fit(energy, SLOW, FAST, start + rng.normal(0, 0.004, start.shape))


def stiff_of(table):
    return table[..., STIFF[:, 0], STIFF[:, 1]]


def test_the_molecule_is_what_the_tests_mean():
    assert TORSIONS.tolist() == [3, 5]  # one slow, one fast
    assert len(STIFF) == 3 * N_ATOMS - 6 - 2


def test_minimum(reference, energy):
    sigma = 1 / np.sqrt(thermal_beta(300) * np.diag(energy.hessian))
    away = stiff_of(reference.centre) - stiff_of(energy.minimum.numpy())
    assert np.abs(away / sigma).max() < 1e-2
    torsion = reference.centre[TORSIONS, 2] - energy.minimum.numpy()[TORSIONS, 2]
    assert np.abs(torsion).max() < 1e-2


def test_hessian_and_widths_are_exact(reference, energy):
    scale = np.sqrt(np.diag(energy.hessian))
    found, exact = (hessian / scale[:, None] / scale for hessian in (reference.hessian, energy.hessian))
    np.testing.assert_allclose(found, exact, atol=1e-5)
    expected = np.sqrt(np.diag(np.linalg.inv(energy.hessian)) / thermal_beta(TEMPERATURE))
    widths = reference.widths(TEMPERATURE)
    np.testing.assert_allclose(stiff_of(widths), expected, rtol=1e-4)
    assert np.count_nonzero(widths) == len(STIFF)  # nothing where no stiff coordinate is
    np.testing.assert_allclose(reference.widths(4 * TEMPERATURE), 2 * widths)
    # Not the diagonal alone: a width without the couplings would be narrower.
    assert (expected > 1.02 / np.sqrt(np.diag(energy.hessian) * thermal_beta(TEMPERATURE))).any()


def test_covariance_of_some_coordinates_has_the_others_integrated_out(reference, energy):
    """A block of the inverse, in the order asked for; not the inverse of a block."""
    rng = np.random.default_rng(4)
    chosen = rng.permutation(len(STIFF))[:5]
    exact = np.linalg.inv(energy.hessian) / thermal_beta(TEMPERATURE)
    scale = np.sqrt(np.diag(exact)[chosen])
    found = reference.covariance_of(STIFF[chosen], TEMPERATURE)
    np.testing.assert_allclose(
        found / scale[:, None] / scale, exact[np.ix_(chosen, chosen)] / scale[:, None] / scale, atol=1e-4
    )
    frozen = np.linalg.inv(energy.hessian[np.ix_(chosen, chosen)]) / thermal_beta(TEMPERATURE)
    assert (np.diag(frozen) < 0.99 * np.diag(found)).any()
    widths = reference.widths(TEMPERATURE)
    np.testing.assert_allclose(np.sqrt(np.diag(found)), widths[tuple(STIFF[chosen].T)])
    np.testing.assert_allclose(reference.covariance_of(STIFF[chosen], 2 * TEMPERATURE), 2 * found)
    assert reference.covariance_of(STIFF[:0], TEMPERATURE).shape == (0, 0)


def test_scan_is_the_torsion_energy(reference, energy):
    assert reference.scan.shape == (1, 36)
    angles = torch.arange(36).double() * (2 * math.pi / 36)
    np.testing.assert_allclose(reference.scan[0], energy.torsion_energy(5, angles).numpy(), atol=0.05)


def test_cost_is_a_few_hundred_evaluations(reference, energy):
    assert energy.n_evaluations < 1000


def thermal_slow(energy, n, generator):
    """Slow positions away from the minimum, the same in every row, and how far away, stiff coordinates."""
    table = energy.minimum[:4].clone()
    table[1:, 0] += torch.tensor([0.006, -0.007, 0.005], dtype=torch.float64)
    table[2:, 1] += torch.tensor([0.15, -0.12], dtype=torch.float64)
    table[3, 2] = 2.0
    placement = Placement(SLOW.without_first_three(), SLOW.atoms[:3])
    xyz = placement(place_first_three(table[1, 0], table[2, 0], table[2, 1]), table[3:])
    away = (table - energy.minimum[:4]).numpy()
    return (xyz @ random_rotation(generator).T + 0.3).expand(n, -1, -1), away


def test_draw_of_stiff_coordinates_is_the_conditional(reference, energy):
    """Mean and covariance of the fast coordinates given the slow ones, within five standard errors."""
    n = 20000
    generator = torch.Generator().manual_seed(5)
    xyz, away = thermal_slow(energy, n, generator)
    draw = reference.draw_fast(xyz, TEMPERATURE, generator).numpy()
    assert draw.shape == (n, 3, 3)
    is_slow = STIFF[:, 0] < N_SLOW
    h_ff, h_fs = energy.hessian[~is_slow][:, ~is_slow], energy.hessian[~is_slow][:, is_slow]
    shift = -np.linalg.solve(h_ff, h_fs @ away[STIFF[is_slow][:, 0], STIFF[is_slow][:, 1]])
    covariance = np.linalg.inv(h_ff) / thermal_beta(TEMPERATURE)
    sigma = np.sqrt(np.diag(covariance))
    slots = STIFF[~is_slow] - [N_SLOW, 0]
    scaled = (draw[:, slots[:, 0], slots[:, 1]] - stiff_of(energy.minimum.numpy())[~is_slow]) / sigma
    assert np.abs(shift / sigma).max() > 0.2  # leaving the slow atoms' pull out would be seen
    assert np.abs(scaled.mean(0) - shift / sigma).max() < 5 / math.sqrt(n)
    found, expected = np.cov(scaled.T), covariance / sigma[:, None] / sigma
    error = np.sqrt((1 + expected**2) / n)
    assert (np.abs(found - expected) / error).max() < 5
    assert np.abs(expected - np.eye(len(expected))).max() > 20 * error.max()  # couplings are large enough to matter


def test_draw_of_a_soft_torsion_follows_the_scan(reference, energy):
    n = 20000
    generator = torch.Generator().manual_seed(6)
    xyz, _ = thermal_slow(energy, n, generator)
    draw = reference.draw_fast(xyz, TEMPERATURE, generator)[:, 1, 2].numpy()
    turned = np.remainder(draw - reference.centre[5, 2] + math.pi / 36, 2 * math.pi)
    counts = np.bincount((turned / (2 * math.pi / 36)).astype(int), minlength=36)
    angles = torch.arange(36).double() * (2 * math.pi / 36)
    expected = n * torch.softmax(-thermal_beta(TEMPERATURE) * energy.torsion_energy(5, angles), 0).numpy()
    assert expected.max() / expected.min() > 5
    some = expected > 5
    chi_square = ((counts - expected)[some] ** 2 / expected[some]).sum()
    assert chi_square < some.sum() + 5 * math.sqrt(2 * some.sum())
    cold = n * torch.softmax(-1.2 * thermal_beta(TEMPERATURE) * energy.torsion_energy(5, angles), 0).numpy()
    assert ((counts - cold)[some] ** 2 / cold[some]).sum() > 3 * chi_square  # a wrong temperature is seen


def test_same_generator_same_draw(reference, energy):
    draws = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(9)
        xyz, _ = thermal_slow(energy, 5, generator)
        draws.append(reference.draw_fast(xyz, TEMPERATURE, generator))
    assert torch.equal(*draws)
    assert float(draws[0].std(0).min()) > 0


def test_soft_modes_are_stiffened_and_said(caplog):
    energy = Energy(softness=2e-4)
    with caplog.at_level(logging.INFO, logger="openmm_cgflow"):
        reference = HarmonicReference.fit(energy, SLOW, FAST, random_structure(BONDS, 2).numpy())
    assert "soft modes were stiffened" in caplog.text
    widths = reference.widths(300.0)
    assert (widths <= np.array([0.05, 0.5, 0.5]) * (1 + 1e-6)).all()


def test_a_saddle_gives_finite_positive_widths():
    """A negative curvature must end as a wide coordinate, not as nan."""

    def inverted(positions):
        energy, forces = Energy()(positions)
        return -energy, -forces

    reference = HarmonicReference.fit(inverted, SLOW, FAST, random_structure(BONDS, 2).numpy())
    widths = stiff_of(reference.widths(300.0))
    assert np.isfinite(widths).all() and (widths > 0).all()


def test_overlapping_atoms_are_a_clear_error():
    def broken(positions):
        return np.full(len(positions), np.nan), np.full(positions.shape, np.nan)

    with pytest.raises(CGFlowError, match="not finite"):
        HarmonicReference.fit(broken, SLOW, FAST, random_structure(BONDS, 2).numpy())

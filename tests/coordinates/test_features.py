"""What networks, searches and paths see of torsions."""

import math

import numpy as np
import pytest
import torch

from openmm_cgflow.coordinates.features import N_SCALE_FEATURES, Torsions, on_circle
from openmm_cgflow.paper.box import BoxFeatures


@pytest.fixture
def z():
    return torch.randn((5, 6), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("kind", [Torsions, BoxFeatures])
def test_sizes_are_those_of_what_is_seen(kind, z):
    features = kind(2, 4)
    assert features.n_features == 6
    assert features(z).shape == (5, features.size)
    assert features(z[None])[0].equal(features(z))
    assert features.see_first(z[:, :2]).shape == (5, features.size_first)
    assert features(z)[:, : features.size_first].equal(features.see_first(z[:, :2]))
    assert features.scale_features(torch.rand(5)).shape == (5, N_SCALE_FEATURES)


def test_a_turn_of_a_torsion_is_not_seen(z):
    features, turned = Torsions(2, 4), z.clone()
    turned[:, :2] += 2 * math.pi
    torch.testing.assert_close(features(turned), features(z))
    torch.testing.assert_close(features.embed(turned), features.embed(z))
    torch.testing.assert_close(features.embed_first(turned[:, :2]), features.embed_first(z[:, :2]))
    torch.testing.assert_close(features.wrap(turned[:, :2]), on_circle(z[:, :2]))
    assert not features.outside(turned[:, :2]).any()


def test_bounded_features_hardly_count_beside_torsions(z):
    """Where there are none, they are all there is."""
    moved = z.clone()
    moved[:, 2:] += 1
    for features, distance in ((Torsions(2, 4), 0.1), (Torsions(0, 6), 2.0)):
        apart = (features.embed(moved) - features.embed(z)).norm(dim=1)
        torch.testing.assert_close(apart, torch.full_like(apart, distance))


def test_curves_do_not_jump():
    curve = np.array([[3.0, 0.1], [-3.1, 0.2], [-2.9, 0.3]])
    assert np.abs(np.diff(Torsions(2, 0).unwrap(curve), axis=0)).max() < 0.3

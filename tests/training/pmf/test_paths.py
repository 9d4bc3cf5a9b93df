"""Paths of low free energy between conformations."""

import math
from types import SimpleNamespace

import numpy as np
import torch

from openmm_cgflow.coordinates.features import Torsions
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.paper.box import BoxFeatures
from openmm_cgflow.training.pmf import anchors as paths
from openmm_cgflow.training.pmf.anchors import low_paths


def test_conformations_are_far_from_each_other_and_low():
    points = np.array([[0.0], [1.0], [4.0], [10.0], [7.0]])
    low = np.zeros(5)
    assert paths._far_and_low(points, low, np.array([4, 1, 2, 3]), 0, 4) == [3, 2, 4, 1]
    assert paths._far_and_low(points, low, np.array([4, 1, 2]), 0, 2) == [4, 2]  # 10 is no candidate
    assert paths._far_and_low(points, low, np.array([1, 2, 3]), 4, 1) == [1]
    # 7 comes before 10 where that is so high that a quarter of its distance counts.
    high = np.array([0.0, 0.0, 0.0, 0.75 * paths._HIGHEST, 0.0])
    assert paths._far_and_low(points, high, np.array([4, 1, 2, 3]), 0, 4) == [4, 2, 1, 3]


def two_torsions(features=Torsions):
    """Flow and coordinates of nothing but two torsions, or positions in a box, its flow untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = CGFlow(Torsions(2, 0), 5.0, 2, 2, 8, [8])
    coordinates = SimpleNamespace(
        features=features(2, 0), log_volume=lambda z: torch.zeros(len(z), dtype=torch.float64)
    )
    return flow, coordinates


def test_paths_go_around_barriers():
    """Minima at (0, 0) and (pi, 0), a wall between them on one side: the path takes the other, also across pi."""

    def energy(z):
        wall = 25 * torch.exp(4 * (torch.cos(z[:, 0] - math.pi / 2) - 1))
        return (1 - torch.cos(2 * z[:, 0])) + 0.5 * (1 - torch.cos(z[:, 0])) + wall + 5 * (1 - torch.cos(z[:, 1]))

    flow, coordinates = two_torsions()
    found = low_paths(flow, energy, coordinates, 6, torch.Generator().manual_seed(1), n_vertices=1500)
    assert found.shape[0] == 6 and found.shape[2] == 2
    assert (found.abs() <= math.pi + 1e-12).all()
    assert (found[:, 0] == found[0, 0]).all()
    assert float(found[0, 0].abs().max()) < 0.4  # the lowest of 1500 points
    steps = torch.remainder(found.diff(dim=1) + math.pi, 2 * math.pi) - math.pi
    assert float(steps.norm(dim=-1).max()) < 1.001 * paths._SPACING
    assert len(torch.unique(found[:, -1], dim=0)) == 6
    assert (energy(found[:, -1]) < energy(found[:, 0]) + paths._HIGHEST).all()
    over = found[:, -1, 0].cos() < -0.7
    assert over.any()
    assert float(energy(found.flatten(0, 1)).max()) < 8  # the wall is 25


def test_paths_do_not_pass_through_the_walls_of_a_box():
    """Minima near both walls, and a barrier between them that a torsion would go around."""

    def energy(z):
        return 4 * (1 + torch.cos(z[:, 0])) + 5 * (1 - torch.cos(z[:, 1]))

    for features in (Torsions, BoxFeatures):
        flow, coordinates = two_torsions(features)
        periodic = features is Torsions
        found = low_paths(flow, energy, coordinates, 6, torch.Generator().manual_seed(1), n_vertices=1500)
        other_side = found[found[:, 0, 0].sign() != found[:, -1, 0].sign()]
        assert len(other_side)
        jumps = float(other_side.diff(dim=1).abs().max()) > math.pi
        assert jumps == periodic
        assert (float(other_side[..., 0].abs().min()) > 1.5) == periodic  # the barrier is at 0


def test_fewer_conformations_than_wanted():
    flow, coordinates = two_torsions()

    def deep(z):
        return 1e4 * (2 - torch.cos(z).sum(-1))

    found = low_paths(flow, deep, coordinates, 50, torch.Generator().manual_seed(1), n_vertices=300)
    assert found.shape[0] < 50 and found.shape[2] == 2


def test_no_path_ends_where_it_starts():
    """All candidates are asked for, the lowest point among them, from which no path leads to itself."""
    flow, coordinates = two_torsions()
    found = low_paths(
        flow, lambda z: 1 - torch.cos(z).mean(-1), coordinates, 200, torch.Generator().manual_seed(1), n_vertices=90
    )
    assert 20 < len(found) <= 30  # a third of the points
    assert torch.isfinite(found).all()
    assert (found[:, 0] != found[:, -1]).any(1).all()
    points = np.zeros((4, 2))
    assert paths._far_and_low(points, np.zeros(4), np.arange(4), 0, 3) == []


def test_single_and_double_precision_are_both_welcome():
    flow, coordinates = two_torsions()

    def energy(z):
        assert z.dtype == torch.float64
        return 2 * torch.cos(z).sum(-1)

    low_paths(flow.float(), energy, coordinates, 3, torch.Generator().manual_seed(1), n_vertices=300)
    assert next(flow.parameters()).dtype == torch.float32  # unchanged

"""Paths of low free energy between conformations, along which slow atoms are switched."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.interpolate import interp1d
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree
from torch import Tensor

from openmm_cgflow.coordinates.features import on_circle
from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.networks.flow import SlowDensity

__all__ = ["low_paths"]

_N_POINTS = 4000  # of the graph in which paths are sought
_N_NEIGHBOURS = 12
_HIGHEST = 9.0  # kT above the lowest free energy, of conformations at the ends
_SPACING = math.radians(8.0)  # of the torsions, between two points of a path


@torch.no_grad()
def low_paths(
    flow: SlowDensity,
    pmf: Callable[[Tensor], Tensor],
    coordinates: Coordinates,
    n_conformations: int,
    generator: torch.Generator,
    scale: float = 0.1,
) -> Tensor:
    """Paths of equally many points from the lowest conformation to others that are low and unlike it and each other.

    Fewer than asked for where there are fewer conformations.

    They follow the flow's samples at several barrier scales along the least resistance, length times exp(free energy).
    Bounded coordinates are those that the flow gives to its base's centre.

    Arguments:
        flow: Has at least one torsion.
        pmf: Phi(z).
        coordinates: For log J, and for what is near along the torsions.
        n_conformations: How many paths at most.
        generator: Source of all randomness.
        scale: Of a third of the samples, another third has its root: barriers must be low there.

    Returns:
        Shape (n_paths, n_points, n_features), float64.
    """
    flow, n, features = copy.deepcopy(flow).double(), coordinates.features.n_circular, coordinates.features
    scales = torch.ones(_N_POINTS, dtype=torch.float64)
    scales[_N_POINTS // 3 :] = math.sqrt(scale)
    scales[2 * _N_POINTS // 3 :] = scale
    torsions = flow.sample(_N_POINTS, generator, scales)[0][:, :n]
    z = _centre(flow, torsions)
    energy = (pmf(z) - coordinates.log_volume(z) + flow.log_prob_bounded(z)).numpy()
    points = features.embed_first(torsions).numpy()
    distance, neighbour = cKDTree(points).query(points, _N_NEIGHBOURS + 1)
    rows = np.repeat(np.arange(_N_POINTS), _N_NEIGHBOURS)
    columns = neighbour[:, 1:].ravel()
    above = np.minimum(energy - energy.min(), 50.0)
    resistance = distance[:, 1:].ravel() * np.exp(np.maximum(above[rows], above[columns]))
    graph = coo_matrix((np.maximum(resistance, 1e-12), (rows, columns)), shape=(_N_POINTS, _N_POINTS))
    start = int(energy.argmin())
    cost, previous = dijkstra(graph.tocsr(), directed=False, indices=start, return_predecessors=True)
    candidates = np.flatnonzero((above[: _N_POINTS // 3] < _HIGHEST) & np.isfinite(cost[: _N_POINTS // 3]))
    targets = _far_and_low(points, above, candidates, start, n_conformations)
    if not targets:
        return z.new_zeros((0, 1, z.shape[1]))
    curves = []
    for target in targets:
        vertices = [target]
        while vertices[-1] != start:
            vertices.append(int(previous[vertices[-1]]))
        curves.append(features.unwrap(torsions.numpy()[vertices[::-1]]))
    lengths = [np.linalg.norm(np.diff(curve, axis=0), axis=1) for curve in curves]
    n_steps = 1 + max(math.ceil(length.sum() / _SPACING) for length in lengths)
    resampled = []
    for curve, length in zip(curves, lengths, strict=True):
        arc = np.concatenate(([0.0], np.cumsum(np.maximum(length, 1e-9))))
        resampled.append(interp1d(arc, curve, axis=0)(np.linspace(0.0, arc[-1], n_steps)))
    flat = torch.as_tensor(np.array(resampled)).flatten(0, 1)
    return _centre(flow, on_circle(flat)).unflatten(0, (len(targets), n_steps))


def _centre(flow: SlowDensity, torsions: Tensor) -> Tensor:
    middle = torsions.new_zeros((len(torsions), flow.features.n_bounded))
    return torch.cat((torsions, flow.map_bounded(torsions, middle)), dim=-1)


def _far_and_low(points: np.ndarray, above: np.ndarray, candidates: np.ndarray, start: int, n: int) -> list[int]:
    """At most n candidates, each with the largest distance from the start and all before it times depth.

    None twice, and not the start. By distance alone, they would lie on the rims of basins; by depth alone, all in the
    deepest one.
    """
    chosen: list[int] = []
    depth = 1 - above[candidates] / _HIGHEST
    nearest = np.linalg.norm(points[candidates] - points[start], axis=1)
    while len(chosen) < n and (nearest > 0).any():
        best = int((nearest * depth).argmax())
        chosen.append(int(candidates[best]))
        nearest = np.minimum(nearest, np.linalg.norm(points[candidates] - points[candidates[best]], axis=1))
    return chosen

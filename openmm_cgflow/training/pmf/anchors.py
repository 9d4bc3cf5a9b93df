"""Anchors: conformations whose free energies are measured by switching along paths of low free energy between them."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.interpolate import interp1d
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree
from torch import Tensor

from openmm_cgflow.coordinates.features import on_circle
from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.forces.switching import Differences, Switches, slower
from openmm_cgflow.networks.flow import SlowDensity
from openmm_cgflow.networks.pmf import SlowFreeEnergy
from openmm_cgflow.seeds import Stream, derive_seed
from openmm_cgflow.training.method import EvaluationBudget, Row
from openmm_cgflow.training.pmf.fits import AnchorDifferences
from openmm_cgflow.training.pmf.state import Phase, PMFState

__all__ = ["Anchors", "low_paths"]

logger = logging.getLogger(__name__)

_N_SWITCHES = 16  # to a conformation and back, in one step
_N_STEPS = 24  # at most
_SMALLEST_ERROR = 0.02  # kT, that a difference counts with

_N_NEIGHBOURS = 12  # of each vertex of the graph in which paths are sought
_HIGHEST = 9.0  # kT above the lowest free energy, of conformations at the ends
_SPACING = math.radians(8.0)  # of the torsions, between two points of a path


class Anchors(Phase):
    """Free energies of some conformations by switching between them, for the last fit to hold on to.

    Switches until every difference is known to ``stopping.free_energy_error``, or at most 24 times as the budget
    allows; more slowly where much work is dissipated. Without a torsion, or with ``pmf.n_switched: 0``, there are none.

    Arguments:
        state: Shared by all phases.
        budget: Energy evaluations that may be spent.

    Attributes:
        n_steps: Steps made so far.
        lost: Numbers of the conformations that could not be switched to; what is known of the others stays.
    """

    def __init__(self, state: PMFState, budget: EvaluationBudget) -> None:
        self.state, self.budget = state, budget
        self.n_steps = 0
        self.lost: list[int] = []
        self._switches: Switches | None = None
        # Of the switches so far: their bootstrap takes too long to be done anew for every row of metrics.
        self._found: Differences | None = None
        self._next: list[int] = []

    @property
    def asked_for(self) -> bool:
        """Whether there will be any: paths lead through torsions."""
        return bool(self.state.settings.n_switched and self.state.flow.n_circular)

    @property
    def done(self) -> bool:
        """Whether no difference is to be known better, or none may be."""
        return not self._next

    @property
    def expected_steps(self) -> int:
        return self.n_steps + (not self.done)

    @property
    def unmet(self) -> tuple[str, ...]:
        if not self.done:
            return ()
        wanted, found = self.state.stopping.free_energy_error, []
        error = self.compare(self.state.pmf)["anchor_error"]
        if error > wanted:  # never so where it is nan
            found.append(f"differences by switching to {error:.3g} kT (wanted {wanted:g})")
        if self.lost:
            found.append(f"{len(self.lost)} conformations could not be switched to")
        return tuple(found)

    def begin(self) -> None:
        """Chooses conformations and paths; see :func:`low_paths`."""
        if self.asked_for:
            state = self.state
            scale = min(state.exploring, state.flow_fitter.trained_up_to)
            paths = low_paths(
                state.flow, state.pmf, state.coordinates, state.settings.n_switched, state.generator, scale
            )
            self._switches = Switches(paths)
            self._evaluate()
            self._plan()

    def step(self) -> Row:
        """Switches to every conformation whose free energy is not known well enough, and back.

        Those where it does not succeed are left: without them the last fit has mean forces alone, as elsewhere.
        """
        assert self._switches is not None
        state = self.state
        lost = self._switches.add(
            lambda paths, slowness: state.estimator.switch(paths, state.temperature, slowness),
            self._next,
            _N_SWITCHES,
            [self._slowness(path) for path in self._next],
        )
        if lost:
            logger.warning("%d of %d conformations could not be switched to", len(lost), len(self._switches.paths))
        self.lost = sorted({*self.lost, *lost})
        self.n_steps += 1
        self._evaluate()
        self._plan()
        return {"barrier_scale": state.exploring}

    def _evaluate(self) -> None:
        if self._switches is not None:
            self._found = self._switches.differences(derive_seed(self.state.seed, Stream.ANCHOR_ERRORS))

    def _slowness(self, path: int) -> int:
        """How slow the next switches along a path are to be."""
        assert self._switches is not None and self._found is not None
        return slower(self._switches.slowness[path], self._found.dissipation[path])

    def _plan(self) -> None:
        """Chooses the paths of the next step, the cheapest first where not all can be afforded."""
        assert self._switches is not None and self._found is not None
        self._next = []
        if self.n_steps == _N_STEPS:
            return
        wanted = self.state.stopping.free_energy_error
        rough = np.setdiff1d(np.flatnonzero(self._found.error > wanted), self.lost).tolist()
        left = self.budget.left
        for path in sorted(rough, key=self._slowness):
            left -= self._switches.cost(_N_SWITCHES, self._slowness(path))
            if left >= 0:
                self._next.append(path)
        self._next.sort()

    def differences(self) -> AnchorDifferences | None:
        """Free energies of all conformations that are known relative to the lowest; None where none is."""
        if self._switches is None or self._found is None or not np.isfinite(self._found.error).any():
            return None
        known = torch.as_tensor(np.isfinite(self._found.error))
        start, end = self._switches.paths[:, 0], self._switches.paths[:, -1]
        value, error = torch.as_tensor(self._found.value), torch.as_tensor(self._found.error)
        error = error.clamp(min=_SMALLEST_ERROR)
        generator = torch.Generator().manual_seed(derive_seed(self.state.seed, Stream.ANCHOR_WEIGHTS))
        weights = torch.empty((len(error), self.state.settings.n_members)).exponential_(generator=generator)
        return AnchorDifferences(*(part[known].float() for part in (start, end, value, error, weights)))

    @torch.no_grad()
    def compare(self, pmf: SlowFreeEnergy) -> dict[str, float]:
        """The largest error of a difference, and how far the PMF is from them, root mean square by precision, kT."""
        known = self.differences()
        if known is None:
            return {"anchor_error": math.nan, "anchor_misfit": math.nan}
        away = pmf(known.end) - pmf(known.start) - known.difference
        precision = known.error**-2
        misfit = (precision * away.square()).sum() / precision.sum()
        return {"anchor_error": float(known.error.max()), "anchor_misfit": float(misfit.sqrt())}

    def describe(self, row: Row) -> str:
        return f"switching: free energies to {row['anchor_error']:.2f} kT, PMF off by {row['anchor_misfit']:.2f} kT"

    def state_dict(self) -> dict[str, Any]:
        switches = None if self._switches is None else self._switches.state_dict()
        return {"n_steps": self.n_steps, "next": list(self._next), "lost": list(self.lost), "switches": switches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.n_steps, self._next, self.lost = state["n_steps"], list(state["next"]), list(state["lost"])
        self._switches = None if state["switches"] is None else Switches.from_state(state["switches"])
        self._evaluate()


@torch.no_grad()
def low_paths(
    flow: SlowDensity,
    pmf: Callable[[Tensor], Tensor],
    coordinates: Coordinates,
    n_conformations: int,
    generator: torch.Generator,
    scale: float = 0.1,
    n_vertices: int = 4000,
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
        n_vertices: Samples that are the graph in which paths are sought.

    Returns:
        Shape (n_paths, n_points, n_features), float64.
    """
    flow, n, features = copy.deepcopy(flow).double(), coordinates.features.n_circular, coordinates.features
    scales = torch.ones(n_vertices, dtype=torch.float64)
    scales[n_vertices // 3 :] = math.sqrt(scale)
    scales[2 * n_vertices // 3 :] = scale
    torsions = flow.sample(n_vertices, generator, scales)[0][:, :n]
    z = _centre(flow, torsions)
    energy = (pmf(z) - coordinates.log_volume(z) + flow.log_prob_bounded(z)).numpy()
    points = features.embed_first(torsions).numpy()
    distance, neighbour = cKDTree(points).query(points, _N_NEIGHBOURS + 1)
    rows = np.repeat(np.arange(n_vertices), _N_NEIGHBOURS)
    columns = neighbour[:, 1:].ravel()
    above = np.minimum(energy - energy.min(), 50.0)
    resistance = distance[:, 1:].ravel() * np.exp(np.maximum(above[rows], above[columns]))
    graph = coo_matrix((np.maximum(resistance, 1e-12), (rows, columns)), shape=(n_vertices, n_vertices))
    start = int(energy.argmin())
    cost, previous = dijkstra(graph.tocsr(), directed=False, indices=start, return_predecessors=True)
    candidates = np.flatnonzero((above[: n_vertices // 3] < _HIGHEST) & np.isfinite(cost[: n_vertices // 3]))
    targets = _far_and_low(points, above, candidates, start, n_conformations)
    if not targets:
        return z.new_zeros((0, 1, z.shape[1]))
    curves = []
    for target in targets:
        vertices = [target]
        while vertices[-1] != start:
            vertices.append(int(previous[vertices[-1]]))
        curves.append(features.unwrap(torsions.numpy()[vertices[::-1]]))
    even = torch.as_tensor(_evenly_spaced(curves))
    return _centre(flow, on_circle(even.flatten(0, 1))).unflatten(0, even.shape[:2])


def _evenly_spaced(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Curves through the same points, with equally many at equal distances, shape (n_curves, n_points, n_circular)."""
    lengths = [np.linalg.norm(np.diff(curve, axis=0), axis=1) for curve in curves]
    n_points = 1 + max(math.ceil(length.sum() / _SPACING) for length in lengths)
    even = []
    for curve, length in zip(curves, lengths, strict=True):
        arc = np.concatenate(([0.0], np.cumsum(np.maximum(length, 1e-9))))
        even.append(interp1d(arc, curve, axis=0)(np.linspace(0.0, arc[-1], n_points)))
    return np.array(even)


def _centre(flow: SlowDensity, torsions: Tensor) -> Tensor:
    """z of torsions, the bounded coordinates where the flow puts its base's centre."""
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

"""A check of the fitted potential of mean force that does not use mean forces: nonequilibrium switching.

The slow atoms are moved from one conformation to others and back along paths of low free energy, while the fast atoms
follow by Langevin steps. Each move of the slow atoms takes the fast internal coordinates along by their learned
response, whatever its quality; the sum of the changes of energy and volume element is the work W, and
<exp(-beta W)> = exp(-beta dA) exactly, however fast the switching (Jarzynski 1997; with an escort, Vaikuntanathan and
Jarzynski 2008; annealed importance sampling, Neal 2001). Forward and backward works together give dA by Bennett's
acceptance ratio.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree
from scipy.special import expit
from torch import Tensor

from openmm_cgflow.errors import CGFlowError, ReplicaError
from openmm_cgflow.meanforce import FastChains
from openmm_cgflow.model import CGModel
from openmm_cgflow.replicas import ReplicaEngine
from openmm_cgflow.seeds import derive_seed
from openmm_cgflow.units import thermal_beta

__all__ = ["Verification", "acceptance_ratio", "verify"]

_N_POINTS = 4000  # of the graph in which paths are sought
_N_NEIGHBOURS = 12
_HIGHEST = 5.0  # kT above the lowest free energy, of conformations that are checked
_SPACING = math.radians(8.0)  # of the torsions, between two steps of a path
_N_LANGEVIN = 10  # steps of the fast atoms after each of them
_N_EQUILIBRATION = 150  # steps of the fast atoms at either end
_N_BOOTSTRAP = 200
_LARGEST_WORK = 1e4  # kT
_SMALLEST_ERROR = 1e-3  # kT; where nothing dissipates, as in some synthetic targets, all works are equal


@dataclass(frozen=True)
class Verification:
    """Free energies of conformations relative to the first one, kT.

    Attributes:
        torsions: Of the conformations, radians, shape (n, n_circular).
        pmf: What the fitted PMF says, shape (n,).
        switching: Bennett's acceptance ratio of the works, shape (n,).
        error: Its standard error, shape (n,).
        dissipation: Mean of forward and backward work; errors are to be believed while it is a few kT, shape (n,).
        n_evaluations: Energy evaluations it took.
    """

    torsions: list[list[float]]
    pmf: list[float]
    switching: list[float]
    error: list[float]
    dissipation: list[float]
    n_evaluations: int

    @property
    def rms_difference(self) -> float:
        """Between PMF and switching, kT, weighted by their precision; without errors of the PMF about `rms_error`."""
        difference = np.array(self.pmf) - self.switching
        return float(np.sqrt(np.average(np.square(difference), weights=1 / np.square(self.error))))

    @property
    def rms_error(self) -> float:
        """What `rms_difference` would be if only the switching had errors, kT."""
        return float(np.sqrt(len(self.error) / np.sum(1 / np.square(self.error))))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"rms_difference": self.rms_difference, "rms_error": self.rms_error, "unit": "kT"}


def verify(model: CGModel, engine: ReplicaEngine, n_conformations: int, n_replicas: int, seed: int) -> Verification:
    """Compares the model's PMF with switching between conformations that differ most among its samples.

    Arguments:
        model: Trained on a PMF.
        engine: Runs the fast atoms.
        n_conformations: Besides the one they are compared with.
        n_replicas: Switches of each, in each direction.
        seed: Same seed, same result.

    Raises:
        CGFlowError: If the model has no PMF or no torsion.
        ReplicaError: If too many chains fail, or all of one conformation.
    """
    if model.pmf is None or model.coordinates.n_circular == 0:
        raise CGFlowError("switching needs a potential of mean force and at least one slow torsion")
    paths = _paths(model, n_conformations, torch.Generator().manual_seed(derive_seed(seed, 20)))
    with torch.no_grad():
        ends = model.pmf(paths[:, -1]) - model.pmf(paths[:, 0])
    chains = model.chains(engine)
    both = torch.cat((paths, paths.flip(1))).repeat_interleave(n_replicas, 0)
    before = chains.engine.n_energy_evaluations
    work, valid = _switch(chains, both, model.temperature, seed)
    forward, backward = work.reshape(2, n_conformations, n_replicas).numpy()
    good_forward, good_backward = valid.reshape(2, n_conformations, n_replicas).numpy()
    rng = np.random.default_rng(derive_seed(seed, 21))
    rows = []
    for k in range(n_conformations):
        there, back = forward[k][good_forward[k]], backward[k][good_backward[k]]
        if min(len(there), len(back)) < 2:
            raise ReplicaError(f"only {len(there)} switches to conformation {k} and {len(back)} back were usable")
        resampled = [
            acceptance_ratio(rng.choice(there, len(there)), rng.choice(back, len(back))) for _ in range(_N_BOOTSTRAP)
        ]
        error = max(float(np.std(resampled)), _SMALLEST_ERROR)
        rows.append((acceptance_ratio(there, back), error, (there.mean() + back.mean()) / 2))
    switching, error, dissipation = np.array(rows).T
    return Verification(
        paths[:, -1, : model.coordinates.n_circular].tolist(),
        ends.tolist(),
        switching.tolist(),
        error.tolist(),
        dissipation.tolist(),
        chains.engine.n_energy_evaluations - before,
    )


def acceptance_ratio(forward: np.ndarray, backward: np.ndarray) -> float:
    """Free-energy difference in kT from works of both directions in kT (Bennett 1976; Crooks 2000)."""
    offset = math.log(len(forward) / len(backward))

    def excess(difference: float) -> float:
        return float(expit(difference - offset - forward).sum() - expit(-difference + offset - backward).sum())

    low = min(forward.min(), (-backward).min()) - 10.0
    high = max(forward.max(), (-backward).max()) + 10.0
    return float(brentq(excess, low, high))


def _switch(chains: FastChains, paths: Tensor, temperature: float, seed: int) -> tuple[Tensor, Tensor]:
    """Work along paths (n, n_steps, n_features), kT, and which replicas may be used, shapes (n,)."""
    assembly, engine, beta = chains.assembly, chains.engine, thermal_beta(temperature)
    frames = chains.run(paths[:, 0], temperature, _N_EQUILIBRATION, 1, 1, derive_seed(seed, 22))
    work, valid = torch.zeros(len(paths), dtype=torch.float64), frames.valid.clone()
    for step in range(1, paths.shape[1]):
        y = assembly.read_fast(frames.xyz[:, 0])
        y = torch.where(valid[:, None, None], y, y[valid][:1])
        shifted = chains.follow(y, paths[:, step - 1], paths[:, step]) if chains.follow else y
        moved = assembly.build(paths[:, step], shifted)
        energy = torch.as_tensor(engine.evaluate(moved.numpy())[0])
        work += beta * (energy - frames.energy[:, 0])
        work -= assembly.log_volume_fast(shifted) - assembly.log_volume_fast(y)
        frames = chains.propagate(paths[:, step], moved, temperature, _N_LANGEVIN, derive_seed(seed, 23, step))
        # An overlap met on the way counts, with no weight; what is not a number does not.
        work = work.clamp(max=_LARGEST_WORK)
        valid &= frames.valid & ~torch.isnan(work)
        if not valid.any():
            raise ReplicaError(f"no switch was usable after step {step} of {paths.shape[1] - 1}")
    return work, valid


@torch.no_grad()
def _paths(model: CGModel, n_conformations: int, generator: torch.Generator) -> Tensor:
    """Paths of equally many steps from the lowest conformation, shape (n_conformations, n_steps, n_features).

    They follow the flow's samples at several gamma along the least resistance, length times exp(free energy). Bounded
    coordinates are those that the flow gives to its base's centre.
    """
    flow, n = model.flow, model.coordinates.n_circular
    gamma = torch.ones(_N_POINTS)
    gamma[_N_POINTS // 3 :] = 0.3
    gamma[2 * _N_POINTS // 3 :] = 0.1
    torsions = flow.sample(_N_POINTS, generator, gamma)[0][:, :n]
    z = _centre(model, torsions)
    assert model.pmf is not None
    energy = (model.pmf(z) - model.coordinates.log_volume(z) + flow.log_prob_bounded(z)).numpy()
    on_circle = torch.cat((torsions.cos(), torsions.sin()), dim=-1).numpy()
    distance, neighbour = cKDTree(on_circle).query(on_circle, _N_NEIGHBOURS + 1)
    rows = np.repeat(np.arange(_N_POINTS), _N_NEIGHBOURS)
    columns = neighbour[:, 1:].ravel()
    above = np.minimum(energy - energy.min(), 50.0)
    resistance = distance[:, 1:].ravel() * np.exp(np.maximum(above[rows], above[columns]))
    graph = coo_matrix((np.maximum(resistance, 1e-12), (rows, columns)), shape=(_N_POINTS, _N_POINTS))
    start = int(energy.argmin())
    cost, previous = dijkstra(graph.tocsr(), directed=False, indices=start, return_predecessors=True)
    candidates = np.flatnonzero((above[: _N_POINTS // 3] < _HIGHEST) & np.isfinite(cost[: _N_POINTS // 3]))
    if len(candidates) < n_conformations:
        raise CGFlowError(f"found only {len(candidates)} conformations to check, expected {n_conformations}")
    curves = []
    for target in _farthest_first(on_circle, candidates, start, n_conformations):
        vertices = [target]
        while vertices[-1] != start:
            vertices.append(int(previous[vertices[-1]]))
        curves.append(np.unwrap(torsions.numpy()[vertices[::-1]], axis=0))
    lengths = [np.linalg.norm(np.diff(curve, axis=0), axis=1) for curve in curves]
    n_steps = 1 + max(math.ceil(length.sum() / _SPACING) for length in lengths)
    resampled = []
    for curve, length in zip(curves, lengths, strict=True):
        arc = np.concatenate(([0.0], np.cumsum(np.maximum(length, 1e-9))))
        resampled.append(interp1d(arc, curve, axis=0)(np.linspace(0.0, arc[-1], n_steps)))
    flat = torch.as_tensor(np.array(resampled)).flatten(0, 1)
    wrapped = torch.remainder(flat + math.pi, 2 * math.pi) - math.pi
    return _centre(model, wrapped).unflatten(0, (n_conformations, n_steps))


def _centre(model: CGModel, torsions: Tensor) -> Tensor:
    middle = torsions.new_zeros((len(torsions), model.flow.n_bounded))
    return torch.cat((torsions, model.flow.map_bounded(torsions, middle)), dim=-1)


def _farthest_first(points: np.ndarray, candidates: np.ndarray, start: int, n: int) -> list[int]:
    """n candidates, each the farthest from the start and all before it."""
    chosen: list[int] = []
    nearest = np.linalg.norm(points[candidates] - points[start], axis=1)
    for _ in range(n):
        best = int(nearest.argmax())
        chosen.append(int(candidates[best]))
        nearest = np.minimum(nearest, np.linalg.norm(points[candidates] - points[candidates[best]], axis=1))
    return chosen

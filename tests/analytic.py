"""Molecules, chain engines and mean forces in closed form, shared by the tests of the numerical core."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from openmm_cgflow.coordinates.all_atom import MoleculeMap
from openmm_cgflow.coordinates.placement import Placement, bond_angle_dihedral, place_first_three
from openmm_cgflow.coordinates.slow import CartesianCoordinates, InternalCoordinates
from openmm_cgflow.coordinates.zmatrix import fast_zmatrix, slow_zmatrix
from openmm_cgflow.engines.engine import Frames, Schedule
from openmm_cgflow.forces.estimator import MeanForce
from openmm_cgflow.forces.fast_atoms import FastAtoms, Follow
from openmm_cgflow.molecule.bonds import bond_graph, stereocentres
from openmm_cgflow.settings import ChainSettings
from openmm_cgflow.units import thermal_beta

BONDS = {
    "three": [(0, 1), (1, 2)],
    "chain": [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)],
    "isobutane": [(0, 1), (1, 2), (1, 3)],
    "neopentane": [(0, 1), (1, 2), (1, 3), (1, 4)],
    "valine": [(0, 1), (1, 2), (2, 3), (1, 4), (4, 5), (4, 6)],  # N CA C O CB CG1 CG2
}
"""Trees of heavy atoms."""


def n_atoms_of(bonds: Sequence[tuple[int, int]]) -> int:
    return 1 + max(max(bond) for bond in bonds)


def random_tree(n: int, rng: np.random.Generator, max_degree: int = 4) -> list[tuple[int, int]]:
    """Bonds of a random tree, atoms and bonds in random order."""
    degree, bonds, name = [0] * n, [], rng.permutation(n)
    for new in range(1, n):
        old = int(rng.choice([i for i in range(new) if degree[i] < max_degree]))
        degree[old] += 1
        degree[new] += 1
        bonds.append((int(name[new]), int(name[old])))
    return [bonds[k] for k in rng.permutation(len(bonds))]


def random_structure(bonds: Sequence[tuple[int, int]], seed: int = 0) -> Tensor:
    """Positions with common bonds and angles, siblings apart and random torsions, nm, shape (n_atoms, 3)."""
    n = n_atoms_of(bonds)
    rng = np.random.default_rng(seed)
    zmatrix = slow_zmatrix(bond_graph(n, bonds), range(n))
    table = np.stack((rng.uniform(0.14, 0.16, n), rng.uniform(1.8, 2.0, n), rng.uniform(-np.pi, np.pi, n)), axis=1)
    n_siblings: dict[int, int] = {}
    for k in np.flatnonzero(zmatrix.improper):
        parent = int(zmatrix.references[k, 0])
        n_siblings[parent] = n_siblings.get(parent, 0) + 1
        table[k, 2] = (2.1 if n_siblings[parent] % 2 else -2.1) + rng.uniform(-0.1, 0.1)
    internal = torch.as_tensor(table)
    placement = Placement(zmatrix.without_first_three(), zmatrix.atoms[:3])
    first = place_first_three(internal[1, 0], internal[2, 0], internal[2, 1])
    return placement(first, internal[3:])[np.argsort(placement.order)]


def internal_coordinates(
    bonds: Sequence[tuple[int, int]],
    xyz: Tensor,
    slow: Sequence[int] | None = None,
    bound: float = 5.0,
    stiff: Sequence[tuple[int, int]] = (),
) -> InternalCoordinates:
    """Internal coordinates centred on a structure, with common widths; ``stiff`` bonds are not turned."""
    n = n_atoms_of(bonds)
    held = [frozenset(bond) for bond in stiff]
    zmatrix = slow_zmatrix(bond_graph(n, bonds), range(n) if slow is None else slow, held)
    references = torch.as_tensor(zmatrix.references).clamp(min=0)
    centre = bond_angle_dihedral(xyz, torch.as_tensor(zmatrix.atoms), references).numpy()
    width = np.tile([0.004, 0.05, 0.08], (len(zmatrix.atoms), 1))
    return InternalCoordinates(zmatrix, [f"A{i}" for i in range(n)], centre, width, bound)


def cartesian_coordinates(atoms: Sequence[int], xyz: Tensor, bound: float = 5.0) -> CartesianCoordinates:
    """Cartesian coordinates centred on a structure; the first three atoms fix the frame."""
    labels = [f"A{i}" for i in range(max(atoms) + 1)]
    unit = CartesianCoordinates(atoms, labels, np.full(3 * len(atoms) - 6, 50.0), np.full(3 * len(atoms) - 6, 50.0), 50)
    centre = unit.to_physical(unit.from_xyz(xyz[list(atoms)])).numpy()
    half = np.full(len(centre), 0.04)
    half[3:] = 0.2
    return CartesianCoordinates(atoms, labels, centre, half, bound)


def assembly_of(
    bonds: Sequence[tuple[int, int]],
    slow: Sequence[int],
    xyz: Tensor,
    elements: Sequence[str] | None = None,
    kind: str = "internal",
) -> MoleculeMap:
    """Slow coordinates and fast placements of a molecule."""
    graph = bond_graph(n_atoms_of(bonds), bonds)
    coordinates: Any = internal_coordinates(bonds, xyz, slow)
    if kind == "cartesian":
        coordinates = cartesian_coordinates(coordinates.atoms, xyz)
    centres = stereocentres(graph, elements or ["C"] * len(graph))
    return MoleculeMap(coordinates, fast_zmatrix(graph, slow), centres, xyz.numpy())


def random_z(coordinates: Any, n: int, generator: torch.Generator, spread: float = 0.6) -> Tensor:
    """Torsions anywhere, bounded features in the middle of their intervals, shape (n, n_features)."""
    uniform = 2 * torch.rand((n, coordinates.n_features), generator=generator, dtype=torch.float64) - 1
    circular = coordinates.circular.double()
    return uniform * (math.pi * circular + spread * coordinates.bound * (1 - circular))


def random_rotation(generator: torch.Generator) -> Tensor:
    """A proper rotation, shape (3, 3)."""
    q, _ = torch.linalg.qr(torch.randn((3, 3), generator=generator, dtype=torch.float64))
    return q * torch.sign(torch.linalg.det(q))


def largest_sigma(values: Tensor, expected: Tensor | float = 0.0) -> float:
    """Largest deviation of the mean of rows from what is expected, in standard errors of these rows."""
    away = values - expected
    return float((away.mean(0) / (away.std(0) / math.sqrt(len(away))).clamp(min=1e-300)).abs().max())


class AnalyticMeanForce:
    """A mean force in closed form, with Gaussian noise if wanted: a :class:`MeanForceEstimator`.

    Arguments:
        free_energy: A(z), kJ/mol, the same at all temperatures, shape (B, n_features) -> (B,).
        noise: Standard error of d(beta A)/dz.
        invalid: Replicas of every batch that fail.
    """

    def __init__(
        self, free_energy: Callable[[Tensor], Tensor], noise: float = 0.0, invalid: Sequence[int] = (), seed: int = 0
    ) -> None:
        self.free_energy, self.noise, self.invalid = free_energy, noise, list(invalid)
        self.generator = torch.Generator().manual_seed(seed)
        self.n_energy_evaluations, self.dissipation = 0, 0.5

    def __call__(self, z: Tensor, temperature: float) -> MeanForce:
        at = z.detach().clone().requires_grad_()
        energy = self.free_energy(at)
        (gradient,) = torch.autograd.grad(energy.sum() * thermal_beta(temperature), at)
        gradient = gradient + self.noise * torch.randn(z.shape, generator=self.generator, dtype=torch.float64)
        valid = torch.ones(len(z), dtype=torch.bool)
        valid[self.invalid] = False
        self.n_energy_evaluations += len(z)
        variance = torch.where(valid[:, None], torch.full_like(gradient, self.noise**2), 0.0)
        return MeanForce(
            torch.where(valid[:, None], gradient, 0.0),
            variance,
            torch.where(valid, energy.detach(), 0.0),
            torch.zeros(len(z), dtype=torch.float64),
            valid,
        )

    def tune(self, noise: float) -> None:
        """Nothing to choose."""

    def switch(self, paths: Tensor, temperature: float, slowness: int) -> tuple[Tensor, Tensor]:
        """Gaussian works, which obey Crooks' theorem; what they dissipate falls with the slowness."""
        difference = thermal_beta(temperature) * (self.free_energy(paths[:, -1]) - self.free_energy(paths[:, 0]))
        noise = torch.randn(len(paths), generator=self.generator, dtype=torch.float64)
        self.n_energy_evaluations += slowness * len(paths)
        lost = self.dissipation / slowness
        return difference + lost + math.sqrt(2 * lost) * noise, torch.ones(len(paths), dtype=torch.bool)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "n_energy_evaluations": self.n_energy_evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.n_energy_evaluations = state["n_energy_evaluations"]


def advance(trainer: Any, n: int | None = None) -> list[dict[str, float]]:
    """Steps down the ladder, n of them or to its end; their rows of metrics."""
    rows: list[dict[str, float]] = []
    while not trainer.done and (n is None or len(rows) < n):
        if trainer.stage_done:
            trainer.next_stage()
        rows.append(trainer.step())
    return rows


def saved(trainer: Any) -> io.BytesIO:
    """The state of a trainer as a file."""
    file = io.BytesIO()
    torch.save(trainer.state_dict(), file)
    return file


def loaded(file: io.BytesIO) -> dict[str, Any]:
    """What :func:`saved` wrote."""
    file.seek(0)
    return torch.load(file, weights_only=True)


class Uninterrupted:
    """A training from its start to its end, saved after every step.

    Attributes:
        trainer: As it is in the end.
        rows: Metrics of every step.
        files: State after each number of steps.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.rows: list[dict[str, float]] = []
        self.files: dict[int, io.BytesIO] = {}
        while not trainer.done:
            self.rows += advance(trainer, 1)
            self.files[trainer.n_steps] = saved(trainer)


def flattened(state: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries, lists and tuples, by their paths."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flattened(value, f"{name}/{key}").items()}
    if isinstance(state, list | tuple):
        return {k: v for key, value in enumerate(state) for k, v in flattened(value, f"{name}/{key}").items()}
    return {name: state}


def assert_identical(first: Any, second: Any) -> None:
    """Two states are equal bit for bit."""
    first, second = flattened(first), flattened(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        assert same, name


class QuadraticBath:
    """Atoms joined by springs of zero rest length, U = 1/2 sum k_ij |x_i - x_j|^2: a :class:`Engine`.

    Given the slow atoms the fast ones are Gaussian, so frames are drawn exactly, as a stationary first-order
    autoregression, and the potential of mean force is the Schur complement. A spring constant may be negative as long
    as the fast atoms stay bound.

    Arguments:
        springs: (i, j, k_ij), kJ/mol/nm^2.
        slow: Slow atoms.
        correlation: Of successive frames.
    """

    def __init__(
        self, n_atoms: int, springs: Sequence[tuple[int, int, float]], slow: Sequence[int], correlation: float = 0.0
    ) -> None:
        graph = nx.Graph()
        graph.add_nodes_from(range(n_atoms))
        graph.add_weighted_edges_from(springs)
        self.laplacian = torch.as_tensor(nx.laplacian_matrix(graph, nodelist=range(n_atoms)).toarray()).double()
        self.slow, self.fast = list(slow), [i for i in range(n_atoms) if i not in set(slow)]
        self.correlation = correlation
        self.n_energy_evaluations = 0

    def _block(self, rows: list[int], columns: list[int]) -> Tensor:
        return self.laplacian[rows][:, columns]

    def free_energy(self, xyz: Tensor) -> Tensor:
        """A of slow positions in the order ``slow``, kJ/mol, shape (..., n_slow, 3) -> (...,)."""
        fs, ff = self._block(self.fast, self.slow), self._block(self.fast, self.fast)
        schur = self._block(self.slow, self.slow) - fs.T @ torch.linalg.solve(ff, fs)
        return 0.5 * (xyz * (schur @ xyz)).sum((-1, -2))

    def mean_energy(self, xyz: Tensor, temperature: float) -> Tensor:
        """<U> over the fast atoms, kJ/mol."""
        return self.free_energy(xyz) + 1.5 * len(self.fast) / thermal_beta(temperature)

    def run(self, xyz: np.ndarray, schedule: Schedule, seed: int) -> Frames[Tensor]:
        n_frames = schedule.n_frames
        n_steps = schedule.n_relax + schedule.n_equilibration + n_frames * schedule.stride
        self.n_energy_evaluations += len(xyz) * n_steps
        generator = torch.Generator().manual_seed(seed)
        start = torch.as_tensor(xyz)
        ff = self._block(self.fast, self.fast)
        mean = -torch.linalg.solve(ff, self._block(self.fast, self.slow) @ start[:, self.slow])
        root = torch.linalg.inv(torch.linalg.cholesky(ff)).T / math.sqrt(thermal_beta(schedule.temperature))
        noise = torch.randn((n_frames, *mean.shape), generator=generator, dtype=torch.float64)
        fresh = math.sqrt(1 - self.correlation**2)
        for k in range(1, n_frames):
            noise[k] = self.correlation * noise[k - 1] + fresh * noise[k]
        frames = start[:, None].repeat(1, n_frames, 1, 1)
        frames[:, :, self.fast] = (mean + root @ noise).transpose(0, 1)
        forces = -self.laplacian @ frames
        energy = -0.5 * (frames * forces).sum((-1, -2))
        return Frames(frames, forces, energy, torch.ones(len(xyz), dtype=torch.bool))


class EchoEngine:
    """A :class:`Engine` that returns what it is given, after a small move, and records it.

    Attributes:
        broken: Replicas that come back as nan.
        mirrored: Replicas that come back as their mirror images.
        calls: Arguments of every call, those of the schedule by name.
    """

    def __init__(self) -> None:
        self.broken: list[int] = []
        self.mirrored: list[int] = []
        self.calls: list[dict[str, Any]] = []
        self.n_energy_evaluations = 0

    def run(self, xyz: np.ndarray, schedule: Schedule, seed: int) -> tuple[np.ndarray, ...]:
        self.calls.append({"xyz": xyz.copy(), "seed": seed} | asdict(schedule))
        n_frames = schedule.n_frames
        self.n_energy_evaluations += len(xyz) * n_frames
        rng = np.random.default_rng(seed)
        frames = np.repeat(xyz[:, None], n_frames, axis=1) + rng.normal(0, 1e-4, (len(xyz), n_frames, *xyz.shape[1:]))
        frames[self.mirrored] *= [1, 1, -1]
        frames[self.broken] = np.nan
        forces, energy = np.where(np.isnan(frames), np.nan, 0.5), frames.sum((-1, -2))
        return frames, forces, energy, np.isfinite(energy).all(-1)


def chain_settings(**values: Any) -> ChainSettings:
    """Short chains that fail seldom."""
    numbers = {"n_pool_steps": 500, "n_relax": 11, "n_equilibration": 7, "n_frames": 3, "stride": 2, "max_invalid": 0.2}
    return ChainSettings(**{**numbers, **values})


def chiral_chains(engine: Any = None, seed: int = 5, follow: Follow | None = None, **values: Any) -> FastAtoms:
    """Chains of a four-atom slow chain with two fast atoms at a stereocentre, on an :class:`EchoEngine`."""
    bonds = [(0, 1), (1, 2), (2, 3), (1, 4), (1, 5)]
    xyz = random_structure(bonds, 1)
    all_atom = assembly_of(bonds, [0, 1, 2, 3], xyz, ["C", "C", "C", "C", "H", "F"])
    y = all_atom.read_fast(xyz)

    def draw_fast(z: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
        return y + 0.02 * torch.randn((len(z), 2, 3), generator=generator, dtype=torch.float64)

    return FastAtoms(engine or EchoEngine(), all_atom, draw_fast, chain_settings(**values), seed, follow)


def some_z(fast_atoms: FastAtoms, n: int, seed: int = 0) -> Tensor:
    return random_z(fast_atoms.all_atom.coordinates, n, torch.Generator().manual_seed(seed), 0.5)

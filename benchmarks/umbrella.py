"""Two-dimensional umbrella sampling that finds its windows: they spread from the start while free energies are low."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import openmm
from estimators import bin_centres, umbrella_bias, wham
from md import STRIDE, Molecule, finite, langevin

from openmm_cgflow.analysis.distances import circle_bins
from openmm_cgflow.engines.copies import replicate_system
from openmm_cgflow.engines.platforms import platform_choice
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.seeds import derive_seed
from openmm_cgflow.units import thermal_beta

__all__ = [
    "Run",
    "RunAll",
    "Settings",
    "Window",
    "hold",
    "lower_barriers",
    "restrain",
    "run_together",
    "run_window",
    "sample",
    "spread",
    "unbias",
]

_APART = 2.5  # thermal widths of a free torsion in a window; a fifth of the frames of two such neighbours are shared
_FINE = 200  # bins of WHAM along each torsion; the bias hardly changes within one
_FRAMES = 10000  # at which windows are chosen
_SPREAD, _SAMPLE = range(2)  # what a seed is derived for

Cell = tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """How the torsions are held.

    Attributes:
        molecule: Its first two torsions are biased.
        spacing: Degrees between two windows.
        force_constant: Of the bias ``k (1 - cos)`` on each torsion, kJ/mol.
        cutoff: Windows whose free energy is higher are left out, kT.
        flatten: By how much the barriers of a third torsion, χ1, are lowered in every window, kJ/mol.
    """

    molecule: Molecule
    spacing: float = 15.0
    force_constant: float = 60.0
    cutoff: float = 13.0
    flatten: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.spacing < math.inf or not math.isclose(360 / self.spacing, self.n) or self.n < 3:
            raise CGFlowError(f"--spacing {self.spacing:g}: expected a fraction of 360 degrees, such as 15")
        if not 0 < self.force_constant < math.inf:
            raise CGFlowError(f"--force-constant {self.force_constant:g}: expected a positive number of kJ/mol")
        if not 0 <= self.flatten < math.inf:
            raise CGFlowError(f"--flatten {self.flatten:g}: expected a number of kJ/mol, 0 or more")
        if self.flatten and len(self.molecule.torsions) < 3:
            raise CGFlowError("--flatten: the molecule has no χ1 whose barriers could be lowered")
        apart = math.radians(self.spacing) * math.sqrt(self.strength)
        if apart > _APART:
            raise CGFlowError(
                f"--spacing {self.spacing:g} --force-constant {self.force_constant:g}: neighbouring windows are "
                f"{apart:.1f} thermal widths apart and hardly overlap; bring that below {_APART:g} by lowering either"
            )

    @property
    def n(self) -> int:
        """Windows along each torsion."""
        return round(360 / self.spacing)

    @property
    def strength(self) -> float:
        """The force constant in kT."""
        return self.force_constant * thermal_beta(self.molecule.temperature)

    def centre(self, cell: Cell) -> np.ndarray:
        """Where the window ``cell`` holds the torsions, ``(2,)`` in radians."""
        return -np.pi + np.radians(self.spacing) * np.array(cell)

    def flattening(self, angles: np.ndarray) -> np.ndarray:
        """The bias on χ1, the last of the torsions ``(n_frames, n_torsions)``, ``(n_frames,)`` in kT."""
        height = self.flatten * thermal_beta(self.molecule.temperature)
        return -0.5 * height * (1 + np.cos(3 * angles[:, -1]))

    def bias(self, cells: list[Cell], angles: np.ndarray) -> np.ndarray:
        """The bias of each window on frames ``(n_frames, 2)``, ``(n_windows, n_frames)`` in kT."""
        return umbrella_bias(angles, np.array([self.centre(cell) for cell in cells]), self.strength)


@dataclass(frozen=True)
class Run:
    """What one window is to do: ``n_settle`` steps, then frames every ``STRIDE`` steps for ``n_steps``."""

    settings: Settings
    cell: Cell
    xyz: np.ndarray
    n_settle: int
    n_steps: int
    seed: int


@dataclass(frozen=True)
class Window:
    """What one window gave.

    Attributes:
        angles: All torsions of its frames, ``(n_frames, n_torsions)`` in radians.
        frames: ``(n_frames, n_atoms, 3)`` in nm, float32.
        xyz: Its last positions, ``(n_atoms, 3)`` in nm.
        free_energy: Relative to the first window, kT; set by ``spread``.
    """

    angles: np.ndarray
    frames: np.ndarray
    xyz: np.ndarray
    free_energy: float = 0.0


RunAll = Callable[[Sequence[Run]], list[Window]]
"""What runs the windows, in their order: a ``map`` of :func:`run_window`, or :func:`run_together`."""


def restrain(system: openmm.System, torsions: Sequence[Sequence[int]], force_constant: float) -> None:
    """Adds the bias to a System: kJ/mol, and one parameter of the Context, ``centre0``, ..., for each torsion."""
    for k, atoms in enumerate(torsions):
        force = openmm.CustomTorsionForce(f"{force_constant!r}*(1-cos(theta-centre{k}))")
        force.addGlobalParameter(f"centre{k}", 0.0)
        force.addTorsion(*atoms, [])
        system.addForce(force)


def hold(context: openmm.Context, centre: np.ndarray) -> None:
    """Moves the bias of ``restrain`` to ``centre``, ``(n_torsions,)`` in radians."""
    for k, angle in enumerate(centre):
        context.setParameter(f"centre{k}", angle)


def lower_barriers(system: openmm.System, torsions: Sequence[Sequence[int]], height: float) -> None:
    """Lowers the three barriers of torsions between tetrahedral atoms by ``height`` in kJ/mol."""
    force = openmm.CustomTorsionForce(f"-{0.5 * height!r}*(1+cos(3*theta))")
    for torsion in torsions:
        force.addTorsion(*torsion, [])
    system.addForce(force)


@lru_cache(maxsize=1)
def _context(
    xml: str,
    temperature: float,
    platform: str,
    force_constant: float,
    flatten: float,
    torsions: tuple[tuple[int, ...], ...],
) -> openmm.Context:
    """One Context of this process, kept from window to window: building it would cost as much as some of them."""
    system = openmm.XmlSerializer.deserialize(xml)
    restrain(system, torsions[:2], force_constant)
    if flatten:
        lower_barriers(system, torsions[-1:], flatten)
    return platform_choice(platform).context(system, langevin(temperature, 1))


def run_window(run: Run) -> Window:
    """Runs one window; the same run gives the same window in any process.

    Raises:
        CGFlowError: If the dynamics diverges.
    """
    settings, molecule = run.settings, run.settings.molecule
    torsions = tuple(molecule.torsions.values())
    model = molecule.system_xml, molecule.temperature, molecule.platform
    context = _context(*model, settings.force_constant, settings.flatten, torsions)
    integrator = context.getIntegrator()
    integrator.setRandomNumberSeed(run.seed)
    context.reinitialize()
    hold(context, settings.centre(run.cell))
    context.setPositions(run.xyz)
    context.setVelocitiesToTemperature(molecule.temperature, run.seed)
    integrator.step(run.n_settle)
    frames = np.empty((_frames(run.n_steps), *run.xyz.shape))
    for frame in frames:
        integrator.step(STRIDE)
        frame[:] = finite(context)
    return Window(molecule.angles(frames), frames.astype(np.float32), frames[-1])


def run_together(runs: Sequence[Run]) -> list[Window]:
    """Runs windows of a molecule whose whole energy takes many structures in one call, in one System.

    Raises:
        CGFlowError: If the dynamics diverges.
    """
    settings, n_atoms = runs[0].settings, len(runs[0].xyz)
    molecule, torsions = settings.molecule, list(settings.molecule.torsions.values())

    def of_copy(atoms: Sequence[int], copy: int) -> list[int]:
        return [copy * n_atoms + i for i in atoms]

    # Copies of such an energy do not see one another, wherever they are, and there is nothing to cut off.
    giant = replicate_system(molecule.system(), len(runs), cutoff=1.0)
    for k, atoms in enumerate(torsions[:2]):
        force = openmm.CustomTorsionForce(f"{settings.force_constant!r}*(1-cos(theta-centre))")
        force.addPerTorsionParameter("centre")
        for copy, run in enumerate(runs):
            force.addTorsion(*of_copy(atoms, copy), [settings.centre(run.cell)[k]])
        giant.addForce(force)
    if settings.flatten:
        lower_barriers(giant, [of_copy(torsions[-1], copy) for copy in range(len(runs))], settings.flatten)
    integrator = langevin(molecule.temperature, derive_seed(*(run.seed for run in runs)))
    context = platform_choice(molecule.platform).context(giant, integrator)
    context.setPositions(np.concatenate([run.xyz for run in runs]))
    context.setVelocitiesToTemperature(molecule.temperature, runs[0].seed)
    integrator.step(runs[0].n_settle)
    frames = np.empty((_frames(runs[0].n_steps), len(runs), n_atoms, 3))
    for frame in frames:
        integrator.step(STRIDE)
        frame[:] = finite(context).reshape(frame.shape)
    each = frames.swapaxes(0, 1)
    return [Window(molecule.angles(own), own.astype(np.float32), own[-1]) for own in each]


def spread(settings: Settings, n_steps: int, seed: int, run_all: RunAll) -> tuple[dict[Cell, Window], int]:
    """Finds the windows with low free energy, from the starting structure outwards, and equilibrates them.

    A window starts from the last frame of the lowest neighbour that has been there before. WHAM on the second halves of
    all windows so far says which to keep, and the neighbours of those come next.

    Arguments:
        settings: The windows.
        n_steps: Of each window.
        seed: Of this pass.
        run_all: Runs windows.

    Returns:
        The kept windows and the number of steps of all that were tried.
    """
    molecule, n = settings.molecule, settings.n
    start = np.rint((molecule.angles(molecule.positions[None])[0, :2] + np.pi) / np.radians(settings.spacing))
    wave: dict[Cell, Cell | None] = {(int(start[0]) % n, int(start[1]) % n): None}
    tried: dict[Cell, Window] = {}
    while wave:
        runs = []
        for cell, parent in wave.items():
            xyz = molecule.positions if parent is None else tried[parent].xyz
            lengths = (n_steps // 2, n_steps - n_steps // 2)
            runs.append(Run(settings, cell, xyz, *lengths, derive_seed(seed, _SPREAD, *cell)))
        for (cell, parent), window in zip(wave.items(), run_all(runs), strict=True):
            guess = 0.0 if parent is None else tried[parent].free_energy
            tried[cell] = replace(window, free_energy=guess)
        tried = _with_free_energies(settings, tried)
        kept = _kept(settings, tried)
        wave = {}
        for cell in kept:
            for near in (other for other in _neighbours(cell, n) if other not in tried):
                parents = [other for other in _neighbours(near, n) if other in kept]
                wave[near] = min(parents, key=lambda other: tried[other].free_energy)
    return kept, len(tried) * (n_steps // 2 + _frames(n_steps - n_steps // 2) * STRIDE)


def _with_free_energies(settings: Settings, windows: dict[Cell, Window]) -> dict[Cell, Window]:
    """The same windows with free energies from a few frames of each, more as there are fewer windows."""
    centres = np.array([settings.centre(cell) for cell in windows])
    every = max(1, sum(len(window.angles) for window in windows.values()) // _FRAMES)
    angles = np.array([window.angles[::every, :2] for window in windows.values()])
    guess = np.array([window.free_energy for window in windows.values()])
    found, _ = unbias(angles, centres, settings.strength, guess)
    return {
        cell: replace(window, free_energy=float(value))
        for (cell, window), value in zip(windows.items(), found, strict=True)
    }


def _frames(n_steps: int) -> int:
    return max(n_steps // STRIDE, 1)


def _kept(settings: Settings, tried: dict[Cell, Window]) -> dict[Cell, Window]:
    lowest = min(window.free_energy for window in tried.values())
    return {cell: window for cell, window in tried.items() if window.free_energy - lowest <= settings.cutoff}


def _neighbours(cell: Cell, n: int) -> list[Cell]:
    i, j = cell
    return [((i + 1) % n, j), ((i - 1) % n, j), (i, (j + 1) % n), (i, (j - 1) % n)]


def sample(
    settings: Settings,
    windows: dict[Cell, Window],
    n_steps: int,
    seed: int,
    run_all: RunAll,
) -> tuple[dict[Cell, Window], int]:
    """Runs every window for ``n_steps`` from where it is; returns them and the number of steps."""
    runs = [Run(settings, cell, at.xyz, 0, n_steps, derive_seed(seed, _SAMPLE, *cell)) for cell, at in windows.items()]
    sampled = dict(zip(windows, run_all(runs), strict=True))
    return sampled, len(runs) * _frames(n_steps) * STRIDE


def unbias(
    angles: np.ndarray, centres: np.ndarray, strength: float, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """WHAM on a fine grid.

    Arguments:
        angles: ``(n_windows, n_frames, 2)`` in radians.
        centres: ``(n_windows, 2)`` in radians.
        strength: Of the bias, kT.
        start: Where the solver starts, free energies ``(n_windows,)`` in kT.

    Returns:
        Free energies of the windows, ``(n_windows,)`` in kT, and weights of the frames, ``(n_windows * n_frames,)``.
    """
    n_windows, n_frames, _ = angles.shape
    index = circle_bins(angles.reshape(-1, 2), _FINE)
    seen, place, counts = np.unique(index, return_inverse=True, return_counts=True)
    axis = bin_centres(_FINE)
    bins = np.column_stack([axis[seen // _FINE], axis[seen % _FINE]])
    free_energy, probability = wham(counts, np.full(n_windows, n_frames), umbrella_bias(bins, centres, strength), start)
    return free_energy, (probability / counts)[place]

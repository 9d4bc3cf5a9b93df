"""The paper's synthetic systems (section 3.1 and 3.2) as OpenMM Systems, with their exact answers.

Every coordinate x_i of a target is the x of one particle, in nm; energies are in kJ/mol, so that beta = 1 of the paper
is 120.27 K. The y and z of each particle lie in springs of their own, which nothing else feels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import openmm
from openmm import app
from scipy.special import logsumexp

from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.settings import TargetSettings

__all__ = ["DoubleWell", "GaussianMixture", "Target", "new_target", "target_system"]

_MASS = 1.0  # Da
_N_GRID = 20001  # points of a quadrature
_N_MODES = 3
_FARTHEST = 60.0  # kT of the quartic term, where the quadrature ends


def _sum_over_particles(expression: str, constants: np.ndarray) -> openmm.CustomExternalForce:
    """The sum of a function of the position and of a constant c over the first particles."""
    force = openmm.CustomExternalForce(expression)
    force.addPerParticleParameter("c")
    for i, constant in enumerate(constants.tolist()):
        force.addParticle(i, [constant])
    return force


class Target(ABC):
    """A system of slow coordinates z and fast ones y with an energy in closed form; x = (z, y).

    Attributes:
        n_slow: Number of slow coordinates, the first particles.
        n_fast: Number of fast coordinates.
        mode_names: Of the parts of z-space that :meth:`modes` tells apart.
        spring: kJ/mol/nm^2, of y given z, and of the unused coordinates: softer ones would not be in equilibrium where
            chains are as short as y allows, and switching, which carries them along, would be off by 0.1 kT.
    """

    n_slow: int
    n_fast: int
    mode_names: tuple[str, ...]
    spring: float

    @abstractmethod
    def forces(self) -> list[openmm.Force]:
        """The energy, a function of the x of all particles."""

    @abstractmethod
    def slow_energy(self, z: np.ndarray) -> np.ndarray:
        """U(z), kJ/mol, shape (n, n_slow) -> (n,); exp(-beta U) is the density of z up to a constant at every beta."""

    @abstractmethod
    def fast_moments(self, z: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean, shape (n, n_fast), and standard deviation, shape (n_fast,), of y given z, which is Gaussian."""

    @abstractmethod
    def sample_slow(self, n: int, beta: float, rng: np.random.Generator) -> np.ndarray:
        """Exact independent samples of z, shape (n, n_slow)."""

    @abstractmethod
    def log_normaliser(self, beta: float, rng: np.random.Generator) -> float:
        """log of the integral of exp(-beta U(z)) over z."""

    @abstractmethod
    def modes(self, z: np.ndarray) -> np.ndarray:
        """Which mode each z belongs to, shape (n, n_slow) -> (n,) int."""

    def sample(self, n: int, beta: float, rng: np.random.Generator) -> np.ndarray:
        """Exact independent samples of x = (z, y), shape (n, n_slow + n_fast)."""
        z = self.sample_slow(n, beta, rng)
        mean, spread = self.fast_moments(z, beta)
        return np.concatenate((z, mean + spread * rng.standard_normal(mean.shape)), axis=1)

    def log_density(self, x: np.ndarray, beta: float, normaliser: float) -> np.ndarray:
        """log of the density of z, shape (n, n_slow), or of (z, y), shape (n, n_slow + n_fast) -> (n,).

        Arguments:
            x: Coordinates.
            beta: mol/kJ.
            normaliser: From :meth:`log_normaliser`.
        """
        z, y = x[:, : self.n_slow], x[:, self.n_slow :]
        log_slow = -beta * self.slow_energy(z) - normaliser
        if not y.shape[1]:
            return log_slow
        mean, spread = self.fast_moments(z, beta)
        away = (y - mean) / spread
        return log_slow - 0.5 * (away**2).sum(1) - np.log(spread * math.sqrt(2 * math.pi)).sum()

    def populations(self, beta: float, rng: np.random.Generator, n: int = 200_000) -> np.ndarray:
        """Populations of all modes, shape (n_modes,)."""
        found = self.modes(self.sample_slow(n, beta, rng))
        return np.bincount(found, minlength=len(self.mode_names)) / n

    def system(self) -> openmm.System:
        """The OpenMM System: one particle for every coordinate."""
        n = self.n_slow + self.n_fast
        system = openmm.System()
        for _ in range(n):
            system.addParticle(_MASS)
        unused = _sum_over_particles("c*(y^2 + z^2)", np.full(n, 0.5 * self.spring))
        for force in (*self.forces(), unused):
            system.addForce(force)
        return system

    def topology(self) -> app.Topology:
        """One residue of argon atoms Z1, Z2, ... (slow) and Y1, Y2, ... (fast), without bonds."""
        topology = app.Topology()
        residue = topology.addResidue("CGF", topology.addChain())
        names = [f"Z{i + 1}" for i in range(self.n_slow)] + [f"Y{i + 1}" for i in range(self.n_fast)]
        for name in names:
            topology.addAtom(name, app.element.argon, residue)
        return topology


class DoubleWell(Target):
    """U = x1^4/4 - 3 x1^2 + x1 + x2^2/2 (paper eq. 19); x1 is slow."""

    n_slow = n_fast = 1
    spring = 1.0
    mode_names = ("x1 < top of the barrier", "x1 > top of the barrier")

    def forces(self) -> list[openmm.Force]:
        energy = openmm.CustomCompoundBondForce(2, "0.25*x1^4 - 3*x1^2 + x1 + 0.5*x2^2")
        energy.addBond([0, 1])
        return [energy]

    def slow_energy(self, z: np.ndarray) -> np.ndarray:
        x = z[:, 0]
        return 0.25 * x**4 - 3 * x**2 + x

    def fast_moments(self, z: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(z), 1)), np.full(1, 1 / math.sqrt(beta))

    @cached_property
    def _barrier(self) -> float:
        roots = np.roots([1.0, 0.0, -6.0, 1.0]).real  # of dU/dx1
        return float(np.sort(roots)[1])

    def _quadrature(self, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """Points and log density at them, up to a constant, as far out as it is not nothing."""
        reach = (4 * _FARTHEST / beta) ** 0.25 + 4
        x = np.linspace(-reach, reach, _N_GRID)
        return x, -beta * self.slow_energy(x[:, None])

    def _density(self, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """The same points, and the density with 1 at its maximum."""
        x, log_density = self._quadrature(beta)
        return x, np.exp(log_density - log_density.max())

    def log_normaliser(self, beta: float, rng: np.random.Generator) -> float:
        x, log_density = self._quadrature(beta)
        return float(logsumexp(log_density) + math.log(x[1] - x[0]))

    def sample_slow(self, n: int, beta: float, rng: np.random.Generator) -> np.ndarray:
        x, density = self._density(beta)
        cumulative = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
        return np.interp(rng.random(n), cumulative / cumulative[-1], x)[:, None]

    def populations(self, beta: float, rng: np.random.Generator, n: int = 0) -> np.ndarray:
        x, density = self._density(beta)
        above = density[x > self._barrier].sum() / density.sum()
        return np.array([1 - above, above])

    def modes(self, z: np.ndarray) -> np.ndarray:
        return (z[:, 0] > self._barrier).astype(int)


class GaussianMixture(Target):
    """Three equal Gaussians in z of standard deviation 0.1, y given z Gaussian around B z with the same (eqs. 20-21).

    Arguments:
        dimensions: Of z and of y.
        seed: Of the means, uniform in [-1, 1], and of B, standard normal.
    """

    spread = 0.1
    spring = 1 / spread**2

    def __init__(self, dimensions: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.n_slow = self.n_fast = dimensions
        self.means = rng.uniform(-1, 1, (_N_MODES, dimensions))
        self.matrix = rng.standard_normal((dimensions, dimensions))
        self.mode_names = tuple(f"mode {k + 1}" for k in range(_N_MODES))

    def forces(self) -> list[openmm.Force]:
        """The mixture of z, and springs of y to B z as a sum over pairs of coordinates.

        OpenMM differentiates and compiles what stands here whenever it makes a Context. Of one expression of all
        coordinates it takes a second to do so, of these a few milliseconds.
        """
        half, first = 0.5 * self.spring, self.means[0]
        # Exponents are alike but for a linear term; the largest one is taken out, or they would overflow.
        terms, linear = ["top = max(0, max(a2, a3))"], {}
        for k, mean in enumerate(self.means[1:], 2):
            terms.append(f"a{k} = d{k} + ({float(half * (first @ first - mean @ mean))!r})")
            linear[f"d{k}"] = _sum_over_particles("c*x", 2 * half * (mean - first))
        logarithm = "top + log(exp(-top) + exp(a2 - top) + exp(a3 - top))"
        mixture = openmm.CustomCVForce(f"{half!r}*q - ({logarithm}); {'; '.join(terms)}")
        for name, force in (("q", _sum_over_particles("(x - c)^2", first)), *linear.items()):
            mixture.addCollectiveVariable(name, force)
        n, b = self.n_slow, self.matrix
        springs = half * np.block([[b.T @ b, -b.T], [-b, np.eye(n)]])
        pairs = openmm.CustomCompoundBondForce(2, "2*c*x1*x2")
        pairs.addPerBondParameter("c")
        for i, j in zip(*np.triu_indices(2 * n, 1), strict=True):
            if springs[i, j]:
                pairs.addBond([int(i), int(j)], [float(springs[i, j])])
        return [mixture, pairs, _sum_over_particles("c*x^2", springs.diagonal())]

    def _exponents(self, z: np.ndarray) -> np.ndarray:
        return -0.5 * ((z[:, None] - self.means) ** 2).sum(-1) / self.spread**2

    def slow_energy(self, z: np.ndarray) -> np.ndarray:
        return -logsumexp(self._exponents(z), axis=1)

    def fast_moments(self, z: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
        return z @ self.matrix.T, np.full(self.n_fast, self.spread / math.sqrt(beta))

    def _proposals(self, n: int, beta: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Samples of the mixture of widths at beta, and the density over theirs, up to a factor."""
        which = rng.integers(_N_MODES, size=n)
        z = self.means[which] + self.spread / math.sqrt(beta) * rng.standard_normal((n, self.n_slow))
        exponents = self._exponents(z)
        return z, np.exp(beta * logsumexp(exponents, axis=1) - logsumexp(beta * exponents, axis=1))

    def sample_slow(self, n: int, beta: float, rng: np.random.Generator) -> np.ndarray:
        # Samples of the sum of a^beta, kept with the ratio of (sum of a)^beta to it, which is largest where all a are
        # equal for beta > 1, and where all but one vanish otherwise.
        largest = max(1.0, _N_MODES ** (beta - 1))
        kept, n_kept = [], 0
        while n_kept < n:
            z, ratio = self._proposals(n, beta, rng)
            kept.append(z[rng.random(n) * largest < ratio])
            n_kept += len(kept[-1])
        return np.concatenate(kept)[:n]

    def log_normaliser(self, beta: float, rng: np.random.Generator) -> float:
        _, ratio = self._proposals(200_000, beta, rng)
        volume = 0.5 * self.n_slow * math.log(2 * math.pi * self.spread**2 / beta)
        return math.log(_N_MODES) + volume + math.log(ratio.mean())

    def modes(self, z: np.ndarray) -> np.ndarray:
        return self._exponents(z).argmax(1)


def new_target(settings: TargetSettings) -> Target:
    """The target that ``system.target`` names."""
    if settings.name == "double_well":
        return DoubleWell()
    return GaussianMixture(settings.dimensions, settings.seed)


def target_system(target: Target) -> MolecularSystem:
    """A target as what is simulated; its particles start at zero, and the checks of molecules do not apply to it."""
    positions = np.zeros((target.n_slow + target.n_fast, 3))
    positions.setflags(write=False)
    return MolecularSystem(target.topology(), target.system(), positions)

"""A quadratic bath that remembers, for tests of switching."""

import math

import numpy as np
import torch
from analytic import QuadraticBath, assembly_of, random_structure

from openmm_cgflow.forces.fast_atoms import FastAtoms
from openmm_cgflow.settings import ChainSettings
from openmm_cgflow.units import thermal_beta

TEMPERATURE = 420.0  # not the usual one: the works must be in kT of what they are made at
BETA = thermal_beta(TEMPERATURE)

# A slow chain A-B-C-D with one torsion, a fast atom E bound to C and a fast atom F bound to E.
A, B, C, D, E, F = 1, 4, 0, 3, 2, 5
BONDS = [(A, B), (B, C), (C, D), (C, E), (E, F)]
SLOW = [0, 1, 3, 4]
# Soft enough that exponential averages converge; A-D makes the difference in free energy several kT.
SPRINGS = [(C, E, 1.2e3), (D, E, -3e2), (B, E, -3e2), (E, F, 750.0), (C, F, -150.0), (A, F, 450.0), (A, D, 2e3)]


class MovingBath(QuadraticBath):
    """A quadratic bath whose frames after few steps remember where they started: what moves them must be right.

    Arguments:
        memory: Of frames after ten steps.
    """

    def __init__(self, memory=0.7):
        super().__init__(6, SPRINGS, SLOW)
        self.memory = memory
        self.broken = {}  # replicas that come back as nan, by the number of the call
        self.unbounded = {}  # replicas whose structures have no energy
        self.n_runs = self.n_evaluated = 0

    def energy(self, xyz):
        return 0.5 * (xyz * (self.laplacian @ xyz)).sum((-1, -2))

    def evaluate(self, xyz):
        at = torch.as_tensor(xyz)
        self.n_energy_evaluations += len(xyz)
        energy = self.energy(at)
        energy[self.unbounded.get(self.n_evaluated, [])] = math.nan
        self.n_evaluated += 1
        return energy.numpy(), -(self.laplacian @ at).numpy()

    def run(self, xyz, schedule, seed):
        assert np.isfinite(xyz).all()  # also where a replica broke before
        frames = super().run(xyz, schedule, seed)
        if not schedule.n_equilibration:
            start = torch.as_tensor(xyz)
            ff, fs = self._block(self.fast, self.fast), self._block(self.fast, self.slow)
            mean = -torch.linalg.solve(ff, fs @ start[:, self.slow])
            fresh = frames.xyz[:, 0, self.fast] - mean
            memory = self.memory ** (schedule.stride / 10)
            mixed = memory * (start[:, self.fast] - mean) + math.sqrt(1 - memory**2) * fresh
            frames.xyz[:, 0, self.fast] = mean + mixed
            frames = frames._replace(forces=-self.laplacian @ frames.xyz, energy=self.energy(frames.xyz))
        broken = self.broken.get(self.n_runs, [])
        for part in (frames.xyz, frames.forces, frames.energy):
            part[broken] = math.nan
        frames.valid[broken] = False
        self.n_runs += 1
        return frames


def molecule():
    return assembly_of(BONDS, SLOW, random_structure(BONDS, 4))


def chains_of(engine, all_atom=None, follow=None):
    def draw(z, temperature, generator):
        return torch.tensor([0.1, 1.5, 0.5], dtype=torch.float64).expand(len(z), 2, 3)

    settings = ChainSettings(keep_chirality=False, max_invalid=0.5)
    return FastAtoms(engine, all_atom or molecule(), draw, settings, 0, follow)


def exact(engine, all_atom, z):
    """beta A of the quadratic bath, shape (...,)."""
    order = [list(all_atom.slow).index(atom) for atom in engine.slow]
    return BETA * engine.free_energy(all_atom.coordinates.to_xyz(z)[..., order, :])


def line(n_steps, start=(0.4, 0.4), end=(1.6, -0.4)):
    """A path of z that turns the torsion and moves every bond and angle, shape (n_steps, 6)."""
    share = torch.linspace(0, 1, n_steps, dtype=torch.float64)[:, None]
    first, last = (torch.tensor([torsion] + [other] * 5, dtype=torch.float64) for torsion, other in (start, end))
    return first + share * (last - first)

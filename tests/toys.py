"""Small molecules of the sampler's tests, with what the engines need of a MolecularSystem."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openmm
from openmm import app

from openmm_cgflow.settings import ChainSettings
from openmm_cgflow.units import GAS_CONSTANT

ELEMENTS = {"C": 12.0, "H": 1.0}


@dataclass
class Toy:
    topology: app.Topology
    system: openmm.System
    positions: np.ndarray

    @property
    def elements(self) -> list[str]:
        return [atom.element.symbol for atom in self.topology.atoms()]


def make_toy(elements: str, bonds: list[tuple[int, int]], positions: np.ndarray, *forces: openmm.Force) -> Toy:
    """A molecule of carbons and hydrogens, such as ``"CCHH"``, with the given bonds and forces."""
    topology, system = app.Topology(), openmm.System()
    residue = topology.addResidue("TOY", topology.addChain())
    atoms = [topology.addAtom(f"{e}{i}", app.Element.getBySymbol(e), residue) for i, e in enumerate(elements)]
    for element in elements:
        system.addParticle(ELEMENTS[element])
    for i, j in bonds:
        topology.addBond(atoms[i], atoms[j])
    for force in forces:
        system.addForce(force)
    return Toy(topology, system, np.array(positions, dtype=np.float64))


def reference_settings(**changes) -> ChainSettings:
    """Small Contexts on the Reference platform in this process, but for the changes."""
    return ChainSettings(**({"engine": "contexts", "platform": "Reference", "n_workers": 1} | changes))


class HarmonicBath:
    """Two frozen atoms (0, 1) and two fast ones (2, 3), all tied by springs of length zero: everything is Gaussian."""

    slow = (0, 1)
    springs = ((0, 2, 4000.0), (1, 2, 2000.0), (1, 3, 6000.0), (2, 3, 3000.0))  # kJ/mol/nm^2

    def __init__(self) -> None:
        force = openmm.HarmonicBondForce()
        for i, j, k in self.springs:
            force.addBond(i, j, 0.0, k)
        start = np.array([[0.0, 0.0, 0.0], [0.1, 0.02, 0.0], [0.2, 0.1, 0.1], [0.0, 0.1, 0.2]])
        self.toy = make_toy("CCCH", [(0, 2), (1, 2), (1, 3), (2, 3)], start, force)
        laplacian = np.zeros((4, 4))
        for i, j, k in self.springs:
            laplacian[[i, j], [i, j]] += k
            laplacian[[i, j], [j, i]] -= k
        self.precision = laplacian[2:, 2:]
        self.mean = -np.linalg.solve(self.precision, laplacian[2:, :2] @ start[:2])
        relaxed = np.concatenate([start[:2], self.mean])
        self.mean_force = -(laplacian @ relaxed)[:2]
        self.ground = 0.5 * np.sum(relaxed * (laplacian @ relaxed))

    def starts(self, n: int) -> np.ndarray:
        """The input structure n times, shape (n, 4, 3)."""
        return np.repeat(self.toy.positions[None], n, axis=0)

    def deviations(self, frames, temperature: float) -> dict[str, float]:
        """Largest deviations of replica averages from the closed form, in standard errors."""
        thermal = GAS_CONSTANT * temperature
        fast = frames.xyz[:, :, 2:]
        covariance = np.einsum("bfix,bfjx->bfijx", fast - self.mean, fast - self.mean).mean(axis=-1)
        expected = thermal * np.linalg.inv(self.precision)
        return {
            "mean": n_sigma(fast, self.mean),
            "covariance": n_sigma(covariance, expected),
            "mean force": n_sigma(frames.forces[:, :, :2], self.mean_force),
            "energy": n_sigma(frames.energy, self.ground + 3 * thermal),
        }


def n_sigma(samples: np.ndarray, expected: np.ndarray | float) -> float:
    """Largest deviation of averages over replicas (first axis) and frames (second), in standard errors."""
    replicas = samples.mean(axis=1)
    error = replicas.std(axis=0, ddof=1) / np.sqrt(len(replicas))
    return float(np.max(np.abs(replicas.mean(axis=0) - expected) / error))

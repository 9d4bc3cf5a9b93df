"""Energies of many structures, where a potential takes them all in one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from openmm_cgflow.engines.engine import Evaluator
from openmm_cgflow.molecule.python_forces import BatchedEnergy

__all__ = ["BatchEvaluator"]

_CHUNK = 1024  # structures of one call; more would only take more memory


class BatchEvaluator:
    """Energies and forces of many structures, those of batched energies in one call: an :class:`Evaluator`.

    Arguments:
        energies: Their sum counts.
        rest: Evaluates all other forces, structure by structure; None where there are none.
    """

    def __init__(self, energies: Sequence[BatchedEnergy], rest: Evaluator | None) -> None:
        self._energies, self._rest = energies, rest
        self.n_energy_evaluations = 0
        self.description = "one call for all" + (f", other forces by {rest.description}" if rest else "")

    def evaluate(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies and forces; see ``Engine.evaluate``."""
        if self._rest is None:
            energy, forces = np.zeros(len(xyz)), np.zeros(xyz.shape)
        else:
            energy, forces = self._rest.evaluate(xyz)
        for batched in self._energies:
            for first in range(0, len(xyz), _CHUNK):
                part = slice(first, first + _CHUNK)
                more_energy, more_forces = batched.evaluate(xyz[part])
                energy[part] += more_energy
                forces[part] += more_forces
        self.n_energy_evaluations += len(xyz)
        return energy, forces

    def close(self) -> None:
        """Closes the evaluator of the other forces."""
        if self._rest is not None:
            self._rest.close()

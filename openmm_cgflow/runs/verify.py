"""A check of the fitted potential of mean force that uses no mean force: switching between conformations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_cgflow.engines.engine import Engine
from openmm_cgflow.errors import CGFlowError, ReplicaError
from openmm_cgflow.forces.switching import DISSIPATED, N_BOOTSTRAP, Switches, slower, switch
from openmm_cgflow.model.cg_model import CGModel
from openmm_cgflow.seeds import Stream, derive_seed
from openmm_cgflow.training.pmf.anchors import low_paths

__all__ = ["Verification", "verify"]


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

    def deviations(self, tolerance: float) -> np.ndarray:
        """Differences in units of their errors, shape (n,): those of switching, and `tolerance` (kT) of the PMF."""
        difference = np.array(self.pmf) - self.switching
        return np.abs(difference) / np.hypot(self.error, tolerance)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"rms_difference": self.rms_difference, "rms_error": self.rms_error, "unit": "kT"}


def verify(
    model: CGModel,
    engine: Engine,
    n_conformations: int,
    n_replicas: int,
    seed: int,
    *,
    n_bootstrap: int = N_BOOTSTRAP,
    dissipated: float = DISSIPATED,
) -> Verification:
    """Compares the model's PMF with switching between conformations that differ most among its samples.

    Arguments:
        model: Trained on a PMF.
        engine: Runs the fast atoms.
        n_conformations: Besides the one they are compared with.
        n_replicas: Switches of each, in each direction.
        seed: Same seed, same result.
        n_bootstrap: Resamples of the works that the errors are from.
        dissipated: kT above which a conformation is switched to once more, slower.

    Raises:
        CGFlowError: If the model has no PMF or no torsion, or there are not so many conformations of low free energy.
        ReplicaError: If too many chains fail, or all of one conformation.
    """
    density = model.density
    if not density.can_be_switched:
        raise CGFlowError("switching needs a potential of mean force and at least one slow torsion")
    generator = torch.Generator().manual_seed(derive_seed(seed, Stream.VERIFIED))
    switches = Switches(low_paths(model.flow, density.free_energy, model.coordinates, n_conformations, generator))
    if len(switches.paths) < n_conformations:
        raise CGFlowError(f"found only {len(switches.paths)} conformations to check, expected {n_conformations}")
    ends = switches.paths[:, -1]
    with torch.no_grad():
        pmf = density.free_energy(ends) - density.free_energy(switches.paths[:, 0])
    fast_atoms = model.fast_atoms(engine)
    before = engine.n_energy_evaluations
    every = list(range(n_conformations))

    def run(paths: Tensor, slowness: int) -> tuple[Tensor, Tensor]:
        return switch(fast_atoms, paths, model.temperature, seed, slowness)

    if failed := switches.add(run, every, n_replicas):
        raise ReplicaError(f"hardly any switch to {len(failed)} of {n_conformations} conformations was usable")
    found = switches.differences(derive_seed(seed, Stream.VERIFICATION_ERRORS), n_bootstrap)
    slowness = [slower(1, dissipation, dissipated) for dissipation in found.dissipation]
    if again := [path for path in every if slowness[path] > 1]:
        switches.add(run, again, n_replicas, [slowness[path] for path in again])
        found = switches.differences(derive_seed(seed, Stream.VERIFICATION_ERRORS), n_bootstrap)
    return Verification(
        ends[:, : model.coordinates.n_circular].tolist(),
        pmf.tolist(),
        found.value.tolist(),
        found.error.tolist(),
        found.dissipation.tolist(),
        engine.n_energy_evaluations - before,
    )

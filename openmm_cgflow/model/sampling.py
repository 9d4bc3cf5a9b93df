"""All-atom samples of a trained model: draws of its density, kept by their weights, and the fast atoms."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mdtraj
import numpy as np
import torch
from torch import Tensor

from openmm_cgflow.engines.engine import Engine, Schedule
from openmm_cgflow.errors import CGFlowError, ReplicaError
from openmm_cgflow.forces.fast_atoms import FastAtoms
from openmm_cgflow.model.density import Proposals, TrainedDensity
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.networks.weights import RejectionControl
from openmm_cgflow.seeds import Stream, derive_seed
from openmm_cgflow.settings import SampleSettings

__all__ = ["Samples", "draw_samples"]

logger = logging.getLogger(__name__)

_N_TRIALS = 8  # batches without a usable sample, after which there will be none
_BATCH_SIZE = 1024  # samples drawn at once, at least, where so many are wanted
_N_PILOT = 4096  # draws whose weights say which of the later ones become samples


class Sampled(Protocol):
    """What is drawn from: a :class:`openmm_cgflow.model.cg_model.CGModel`."""

    @property
    def density(self) -> TrainedDensity: ...
    @property
    def temperature(self) -> float: ...
    @property
    def molecular_system(self) -> MolecularSystem: ...
    def fast_atoms(self, engine: Engine) -> FastAtoms: ...


_Draw = Callable[[int, torch.Generator, int], tuple[Tensor, ...]]
"""Positions, z, log q, log weight, energy and which are usable of a batch, from about its size, a generator and its
number."""
_Propose = Callable[[int, torch.Generator], Proposals]
"""Draws of a density, from their number and a generator."""


@dataclass(frozen=True)
class Samples:
    """Independent all-atom samples.

    Attributes:
        trajectory: All atoms; frames are independent, their time is an index.
        z: Slow coordinates, shape (n, n_features).
        log_q: log q(z) of the flow, or of all positions after a joint training, shape (n,).
        log_weight: Logarithm of the importance weight that each sample still has, unnormalised, shape (n,), of the
            fitted potential of mean force or, after a joint training, of the energy; None where there is neither.
        energy: Potential energy, kJ/mol, shape (n,).
        n_rejected: Samples drawn again because their chain diverged or changed its handedness.
    """

    trajectory: mdtraj.Trajectory
    z: np.ndarray
    log_q: np.ndarray
    log_weight: np.ndarray | None
    energy: np.ndarray
    n_rejected: int


def draw_samples(
    model: Sampled,
    engine: Engine,
    n: int,
    seed: int,
    settings: SampleSettings,
    must_stop: Callable[[], bool] | None = None,
) -> Samples:
    """Independent all-atom samples of a model; see :meth:`openmm_cgflow.model.cg_model.CGModel.sample`.

    Arguments:
        model: What is drawn from.
        engine: Runs the fast atoms.
        n: Number of samples.
        seed: Same seed, same samples.
        settings: The ``samples`` section of the configuration.
        must_stop: Asked before every batch.

    Raises:
        CGFlowError: If a number is out of range.
        ReplicaError: If too many chains fail.
        KeyboardInterrupt: Once ``must_stop()`` is true.
    """
    if n < 1:
        raise CGFlowError(f"number of samples: got {n}, expected at least 1")
    if not 0 < settings.acceptance <= 1:
        raise CGFlowError(f"acceptance: got {settings.acceptance}, expected above 0 and at most 1")
    fast_atoms = model.fast_atoms(engine)
    size = max(fast_atoms.settings.n_replicas, min(n, _BATCH_SIZE))
    draw = _drawing(model, fast_atoms, engine, seed, settings)
    generator = torch.Generator().manual_seed(derive_seed(seed, Stream.DRAWS))
    kept: list[tuple[Tensor, ...]] = []
    n_kept = batch = n_rejected = 0
    while n_kept < n:
        if must_stop is not None and must_stop():
            raise KeyboardInterrupt
        batch += 1
        *drawn, good = draw(size, generator, batch)
        kept.append(tuple(part[good] for part in drawn))
        n_kept += int(good.sum())
        n_rejected += int((~good).sum())
        if not n_kept and batch == _N_TRIALS:
            raise ReplicaError(f"none of {n_rejected} samples was usable (diverged, or changed handedness)")
    xyz, slow, log_q, log_weight, energy = (torch.cat(parts)[:n].numpy() for parts in zip(*kept, strict=True))
    if n_rejected:
        logger.warning("%d samples were rejected (diverged, or changed handedness) and drawn again", n_rejected)
    trajectory = mdtraj.Trajectory(xyz, model.molecular_system.mdtraj_topology, time=np.arange(n))
    if len(model.molecular_system.bonds):  # a target's particles lie in an external field
        trajectory.center_coordinates()
    return Samples(trajectory, slow, log_q, log_weight if model.density.weighted else None, energy, n_rejected)


def _drawing(model: Sampled, fast_atoms: FastAtoms, engine: Engine, seed: int, settings: SampleSettings) -> _Draw:
    """Draws of the density that become samples; where it draws no whole structures, chains give the fast atoms."""
    density, n_relax = model.density, fast_atoms.settings.n_relax
    schedule = Schedule(model.temperature, n_relax, settings.n_equilibration)

    def propose(n: int, generator: torch.Generator) -> Proposals:
        return density.propose(n, generator, engine.evaluate, fast_atoms.settings.keep_chirality)

    accepted = _accepted(propose, seed, settings.acceptance) if density.weighted else propose

    def draw(size: int, generator: torch.Generator, batch: int) -> tuple[Tensor, ...]:
        drawn = accepted(size, generator)
        slow = drawn["z"], drawn["log_q"], drawn["log_weight"]
        if "xyz" in drawn:
            return drawn["xyz"], *slow, drawn["energy"], drawn["valid"]
        frames = fast_atoms.run(drawn["z"], schedule, derive_seed(seed, Stream.CHAINS_OF_SAMPLES, batch))
        return frames.xyz[:, 0], *slow, frames.energy[:, 0], frames.valid

    return draw


def _accepted(propose: _Propose, seed: int, acceptance: float) -> _Propose:
    """The same, but for draws that are not to become samples, and with the weights that are left."""
    if acceptance == 1:
        return propose
    pilot = propose(_N_PILOT, torch.Generator().manual_seed(derive_seed(seed, Stream.PILOT)))["log_weight"]
    try:
        control = RejectionControl(pilot, acceptance)
    except ValueError:
        raise ReplicaError(f"none of {_N_PILOT} draws was usable (diverged, or changed handedness)") from None
    waiting: list[Proposals] = []  # that were kept beyond what was asked for

    def accepted(n: int, generator: torch.Generator) -> Proposals:
        while sum(len(batch["z"]) for batch in waiting) < n:
            drawn = propose(math.ceil(n / acceptance), generator)
            log_weight = drawn["log_weight"]
            kept = control.keep(log_weight, generator)
            left = {"log_weight": control.left(log_weight[kept])}
            waiting.append({name: column[kept] for name, column in drawn.items()} | left)
        columns = {name: torch.cat([batch[name] for batch in waiting]) for name in waiting[0]}
        waiting[:] = [{name: column[n:] for name, column in columns.items()}]
        return {name: column[:n] for name, column in columns.items()}

    return accepted

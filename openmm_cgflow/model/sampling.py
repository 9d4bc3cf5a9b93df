"""All-atom samples of a trained model: draws of its density, kept by their weights, and the fast atoms."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mdtraj
import numpy as np
import torch
from torch import Tensor

from openmm_cgflow.engines.engine import Engine, Schedule
from openmm_cgflow.errors import CGFlowError, ReplicaError
from openmm_cgflow.networks.weights import RejectionControl, weighted_samples
from openmm_cgflow.seeds import derive_seed
from openmm_cgflow.settings import SampleSettings
from openmm_cgflow.units import thermal_beta

if TYPE_CHECKING:
    from openmm_cgflow.model.cg_model import CGModel

__all__ = ["Samples", "draw_samples"]

logger = logging.getLogger(__name__)

_N_TRIALS = 8  # batches without a usable sample, after which there will be none
_BATCH_SIZE = 1024  # samples drawn at once, at least, where so many are wanted
_N_PILOT = 4096  # draws whose weights say which of the later ones become samples

_Draw = Callable[[int, torch.Generator, int], tuple[Tensor, ...]]
"""Positions, z, log q, log weight, energy and which are usable of a batch, from about its size, a generator and its
number."""
_Propose = Callable[[int, torch.Generator], tuple[Tensor, ...]]
"""Log weights of draws and what else they have, from their number and a generator."""


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
    model: CGModel,
    engine: Engine,
    n: int,
    seed: int,
    settings: SampleSettings,
    must_stop: Callable[[], bool] | None = None,
) -> Samples:
    """See :meth:`openmm_cgflow.model.cg_model.CGModel.sample`; ``KeyboardInterrupt`` once ``must_stop()`` is true."""
    if n < 1:
        raise CGFlowError(f"number of samples: got {n}, expected at least 1")
    if not 0 < settings.acceptance <= 1:
        raise CGFlowError(f"acceptance: got {settings.acceptance}, expected above 0 and at most 1")
    size = max(model.config.chains.n_replicas, min(n, _BATCH_SIZE))
    draw = (_all_at_once if model.joint else _from_chains)(model, engine, seed, settings)
    generator = torch.Generator().manual_seed(derive_seed(seed, 6))
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
    weighed = model.pmf is not None or model.joint is not None
    return Samples(trajectory, slow, log_q, log_weight if weighed else None, energy, n_rejected)


def _from_chains(model: CGModel, engine: Engine, seed: int, settings: SampleSettings) -> _Draw:
    fast_atoms, n_relax = model.fast_atoms(engine), model.config.chains.n_relax
    schedule = Schedule(model.temperature, n_relax, settings.n_equilibration)

    @torch.no_grad()
    def propose(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        if model.pmf is None:
            z, log_q = model.flow.sample(n, generator)
            return torch.zeros_like(log_q), z, log_q
        drawn = weighted_samples(model.flow, model.pmf, model.coordinates, n, generator)
        return drawn.log_weights, drawn.z, drawn.log_q

    accepted = _accepted(propose, seed, settings.acceptance) if model.pmf is not None else propose

    def draw(size: int, generator: torch.Generator, batch: int) -> tuple[Tensor, ...]:
        log_weight, z, log_q = accepted(size, generator)
        frames = fast_atoms.run(z, schedule, derive_seed(seed, 7, batch))
        return frames.xyz[:, 0], z, log_q, log_weight, frames.energy[:, 0], frames.valid

    return draw


def _all_at_once(model: CGModel, engine: Engine, seed: int, settings: SampleSettings) -> _Draw:
    joint, gamma, keep_chirality = model.joint, model.gamma, model.config.chains.keep_chirality
    assert joint is not None

    @torch.no_grad()
    def propose(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        z, r = joint(joint.draw_base(n, generator), gamma)
        log_q = joint.log_prob(z, r, gamma) - joint.log_volume(z, r, gamma)
        xyz = joint.build(z, r, gamma)
        energy = torch.as_tensor(engine.evaluate(xyz.numpy())[0])
        valid = torch.isfinite(energy)
        if keep_chirality:
            valid &= joint.thermal_map.same_handedness(xyz)
        log_weight = torch.where(valid, -thermal_beta(model.temperature) * energy - log_q, -math.inf)
        return log_weight, xyz, z, log_q, energy, valid

    accepted = _accepted(propose, seed, settings.acceptance)

    def draw(size: int, generator: torch.Generator, batch: int) -> tuple[Tensor, ...]:
        log_weight, xyz, z, log_q, energy, valid = accepted(size, generator)
        return xyz, z, log_q, log_weight, energy, valid

    return draw


def _accepted(propose: _Propose, seed: int, acceptance: float) -> _Propose:
    """The same, but for draws that are not to become samples, and with the weights that are left."""
    if acceptance == 1:
        return propose
    pilot = propose(_N_PILOT, torch.Generator().manual_seed(derive_seed(seed, 15)))[0]
    try:
        control = RejectionControl(pilot, acceptance)
    except ValueError:
        raise ReplicaError(f"none of {_N_PILOT} draws was usable (diverged, or changed handedness)") from None
    waiting: list[tuple[Tensor, ...]] = []  # that were kept beyond what was asked for

    def accepted(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        while sum(len(log_weight) for log_weight, *_ in waiting) < n:
            log_weight, *rest = propose(math.ceil(n / acceptance), generator)
            kept = control.keep(log_weight, generator)
            waiting.append((control.left(log_weight[kept]), *(part[kept] for part in rest)))
        columns = [torch.cat(parts) for parts in zip(*waiting, strict=True)]
        waiting[:] = [tuple(column[n:] for column in columns)]
        return tuple(column[:n] for column in columns)

    return accepted

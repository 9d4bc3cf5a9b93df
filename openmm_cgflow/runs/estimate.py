"""The dry run behind ``openmm-cgflow check``: everything a training would load, and what it would cost."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.geometry import Geometry, rotamer_warning
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.engine import Engine
from openmm_cgflow.networks.threads import one_torch_thread
from openmm_cgflow.runs.build import build_geometry, choose_partition, load_molecule
from openmm_cgflow.runs.loop import hottest_temperature, new_training
from openmm_cgflow.settings import ChainSettings
from openmm_cgflow.training.method import Plan

__all__ = ["Cost", "dry_run", "measure_cost"]

_PROBE_POOL_STEPS = 20
_EVALUATIONS_OF_A_SWITCH = 600  # about; its paths are not known yet
_N_PROBE_STEPS = 2
_FEWEST = 16  # replicas that are timed
_N_TIMED = 8  # energies that tell how long a step will be


@dataclass(frozen=True)
class Cost:
    """What a training takes.

    Attributes:
        plan: Stages and steps.
        n_evaluations: Energy evaluations, those of the final samples included.
        seconds: Wall time on this machine as it is now.
        seconds_per_step: Of one training step.
        evaluations_per_second: Of the engine, the flow's time included.
    """

    plan: Plan
    n_evaluations: float
    seconds: float
    seconds_per_step: float
    evaluations_per_second: float


def dry_run(config: Config) -> Iterator[str]:
    """Loads, builds and times everything that a training needs; yields a report, line by line.

    Raises:
        CGFlowError: If a training would be refused.
    """
    molecular_system = load_molecule(config)
    yield f"molecule: {molecular_system.n_atoms} atoms, {len(molecular_system.bonds)} bonds"
    yield from (f"note: {note}" for note in molecular_system.notes)
    partition = choose_partition(config, molecular_system)
    yield "partition: " + partition.describe(molecular_system)
    with create_engine(molecular_system, partition.slow, config.chains) as engine:
        geometry = build_geometry(config, molecular_system, partition, hottest_temperature(config), engine.evaluate)
        coordinates = geometry.coordinates
        yield f"coordinates ({config.coordinates.kind}): {coordinates.n_features}, {geometry.kinds}"
        yield from (f"  {name}" for name in coordinates.names)
        yield f"handedness: {geometry.all_atom.n_stereocentres} stereocentre(s)"
        if rotamers := geometry.fast_rotamers():
            yield f"warning: {rotamer_warning(rotamers)}"
        yield f"engine: {engine.description}"
        cost = measure_cost(config, geometry, engine)
    rate = f"{cost.n_evaluations:.1e} energy evaluations at {cost.evaluations_per_second:.1e} per second"
    plan = cost.plan
    yield (
        f"training: {plan.course}{plan.precision}{plan.n_steps} steps of {cost.seconds_per_step:.2g} s, {rate}"
        + (f"; {plan.end}" if plan.end else "")
    )
    limit = plan.precision if plan.end else ""
    yield f"estimated wall time: {limit}{_readable(cost.seconds)} on this machine"


def measure_cost(config: Config, geometry: Geometry, engine: Engine, long_step: float = 10.0) -> Cost:
    """Times a few training steps and scales them to the whole run.

    Where a step would take longer than ``long_step``, in seconds, fewer replicas are timed.
    """
    chains = config.chains
    few_steps = min(chains.n_pool_steps, _PROBE_POOL_STEPS)
    n_replicas = _timed_replicas(chains, geometry, engine, long_step)
    changed = {"n_pool_steps": few_steps, "n_replicas": n_replicas, "adaptive": False}
    quick = config.model_copy(
        update={
            "chains": chains.model_copy(update=changed),
            # Whole rounds are timed, also where the limits would end them at once.
            "stopping": config.stopping.model_copy(update={"max_rounds": 100, "max_evaluations": math.inf}),
        }
    )
    timed = new_training(quick, geometry, engine).method
    with one_torch_thread():  # as in a training
        timed.step()  # fills the pool and warms up
        before, start = engine.n_energy_evaluations, time.perf_counter()
        for _ in range(_N_PROBE_STEPS):
            timed.step()
        seconds = time.perf_counter() - start
    evaluations = engine.n_energy_evaluations - before
    rate = evaluations / seconds
    scale = chains.n_replicas / n_replicas / _N_PROBE_STEPS
    per_step, per_step_evaluations = scale * seconds, scale * evaluations
    method = new_training(config, geometry, engine).method
    plan = method.plan(per_step_evaluations)
    # The first pool, the final samples and the check by switching.
    samples = config.samples
    extra = min(chains.n_pool, chains.n_replicas) * chains.n_pool_steps
    extra += samples.n_samples * (chains.n_relax + samples.n_equilibration + 2)
    if method.density().can_be_switched:
        extra += 2 * samples.n_verified * samples.n_switches * _EVALUATIONS_OF_A_SWITCH
    return Cost(
        plan=plan,
        n_evaluations=plan.n_measured * per_step_evaluations + extra,
        seconds=plan.n_steps * per_step + extra / rate,
        seconds_per_step=per_step,
        evaluations_per_second=rate,
    )


def _timed_replicas(chains: ChainSettings, geometry: Geometry, engine: Engine, long_step: float) -> int:
    """All, unless the engine runs them one by one with so slow a potential that the steps would take very long."""
    if engine.n_at_once > 1:
        return chains.n_replicas
    structures = np.repeat(geometry.molecule.positions[None], _N_TIMED, axis=0)
    start = time.perf_counter()
    engine.evaluate(structures)
    seconds = (time.perf_counter() - start) / _N_TIMED * chains.chain_evaluations
    return min(chains.n_replicas, max(_FEWEST, int(long_step / seconds)))


def _readable(seconds: float) -> str:
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

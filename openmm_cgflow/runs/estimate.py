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
from openmm_cgflow.forces.fast_atoms import FastAtoms
from openmm_cgflow.networks.threads import one_torch_thread
from openmm_cgflow.runs.build import build_geometry, choose_partition, load_molecule
from openmm_cgflow.runs.loop import new_method
from openmm_cgflow.settings import ChainSettings, TemperingSettings
from openmm_cgflow.training.tempering import start_temperature

__all__ = ["Cost", "count_stages", "dry_run", "measure_cost"]

_PROBE_POOL_STEPS = 20
_EVALUATIONS_OF_A_SWITCH = 600  # about; its paths are not known yet
_N_PROBE_STEPS = 2
_LONG_STEP = 10.0  # s, of one training step, above which fewer replicas are timed
_FEWEST = 16  # of them
_N_TIMED = 8  # energies that tell how long a step will be


@dataclass(frozen=True)
class Cost:
    """What a training takes.

    Attributes:
        n_stages: Stages of the temperature ladder; an estimate for the adaptive schedule.
        n_steps: Training steps.
        n_evaluations: Energy evaluations, those of the final samples included.
        seconds: Wall time on this machine as it is now.
        seconds_per_step: Of one training step.
        evaluations_per_second: Of the engine, the flow's time included.
    """

    n_stages: int
    n_steps: int
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
        geometry = build_geometry(config, molecular_system, partition, engine.evaluate)
        coordinates = geometry.all_atom.coordinates
        yield f"coordinates ({config.coordinates.kind}): {coordinates.n_features}, {geometry.kinds}"
        yield from (f"  {name}" for name in coordinates.names)
        yield f"handedness: {geometry.all_atom.n_stereocentres} stereocentre(s)"
        if rotamers := geometry.fast_rotamers():
            yield f"warning: {rotamer_warning(rotamers)}"
        yield f"engine: {engine.description}"
        cost = measure_cost(config, geometry, engine)
    rate = f"{cost.n_evaluations:.1e} energy evaluations at {cost.evaluations_per_second:.1e} per second"
    if config.training.method == "pmf":
        yield (
            f"training: at most {cost.n_steps} steps of {cost.seconds_per_step:.2g} s, {rate}; it ends once the "
            "criteria of the stopping section are met"
        )
        yield f"estimated wall time: at most {_readable(cost.seconds)} on this machine"
        return
    about = "about " if config.tempering.schedule == "adaptive" else ""
    yield (
        f"training: {about}{cost.n_stages} stages from {start_temperature(config.tempering, config.temperature):g} K "
        f"to {config.temperature:g} K, {about}{cost.n_steps} steps of {cost.seconds_per_step:.2g} s, {rate}"
    )
    yield f"estimated wall time: {_readable(cost.seconds)} on this machine"


def measure_cost(config: Config, geometry: Geometry, engine: Engine) -> Cost:
    """Times a few training steps and scales them to the whole run."""
    chains = config.chains
    few_steps = min(chains.n_pool_steps, _PROBE_POOL_STEPS)
    n_replicas = _timed_replicas(chains, geometry, engine)
    changed = {"n_pool_steps": few_steps, "n_replicas": n_replicas, "adaptive": False}
    quick = config.model_copy(
        update={
            "chains": chains.model_copy(update=changed),
            # Whole rounds are timed, also where the limits would end them at once.
            "stopping": config.stopping.model_copy(update={"max_rounds": 100, "max_evaluations": math.inf}),
        }
    )
    fast_atoms = FastAtoms(engine, geometry.all_atom, geometry.draw_fast, quick.chains, quick.seed)
    trainer = new_method(quick, geometry, fast_atoms)
    with one_torch_thread():  # as in a training
        trainer.step()  # fills the pool and warms up
        before, start = engine.n_energy_evaluations, time.perf_counter()
        for _ in range(_N_PROBE_STEPS):
            trainer.step()
        seconds = time.perf_counter() - start
    evaluations = engine.n_energy_evaluations - before
    rate = evaluations / seconds
    scale = chains.n_replicas / n_replicas / _N_PROBE_STEPS
    per_step, per_step_evaluations = scale * seconds, scale * evaluations
    n_stages = n_steps = 1
    if config.training.method == "pmf":
        n_rounds = min(config.stopping.max_rounds, config.stopping.max_evaluations / per_step_evaluations)
        # The last fit and updates of the flow alone follow, at about a third of a round's time for each of its own.
        n_last = config.pmf.final_updates / config.pmf.n_updates
        n_last += config.pmf.polish_updates * config.stopping.max_polish_cycles / config.pmf.flow_updates
        n_steps = math.ceil(n_rounds + n_last / 3)
        per_step_evaluations *= n_rounds / n_steps
    else:
        n_stages = count_stages(config.tempering, config.temperature, geometry.coordinates.n_features)
        n_steps = config.training.n_steps_last
        if n_stages > 1:
            n_steps += config.training.n_steps_first + (n_stages - 2) * config.training.n_steps
    # The first pool, the final samples and the check by switching.
    sampling = config.samples
    extra = min(chains.n_pool, chains.n_replicas) * chains.n_pool_steps
    extra += sampling.n_samples * (chains.n_relax + sampling.n_equilibration + 2)
    if config.training.method == "pmf" and geometry.coordinates.n_circular:
        extra += 2 * sampling.n_verified * sampling.n_switches * _EVALUATIONS_OF_A_SWITCH
    return Cost(
        n_stages=n_stages,
        n_steps=n_steps,
        n_evaluations=n_steps * per_step_evaluations + extra,
        seconds=n_steps * per_step + extra / rate,
        seconds_per_step=per_step,
        evaluations_per_second=rate,
    )


def _timed_replicas(chains: ChainSettings, geometry: Geometry, engine: Engine) -> int:
    """All, unless the engine runs them one by one with so slow a potential that the steps would take very long."""
    if engine.n_at_once > 1:
        return chains.n_replicas
    structures = np.repeat(geometry.molecule.positions[None], _N_TIMED, axis=0)
    start = time.perf_counter()
    engine.evaluate(structures)
    seconds = (time.perf_counter() - start) / _N_TIMED * chains.chain_evaluations
    return min(chains.n_replicas, max(_FEWEST, int(_LONG_STEP / seconds)))


def count_stages(settings: TemperingSettings, temperature: float, n_features: int) -> int:
    """Stages of the temperature ladder.

    The adaptive schedule finds its own; for a harmonic molecule, whose energy varies by n_features/2 kT² over the slow
    coordinates, log weights of variance s² give an effective sample size of exp(-s²) and a KL increase of s²/2.
    """
    start = start_temperature(settings, temperature)
    if start <= temperature:
        return 1
    if settings.schedule == "list":
        return len(settings.temperatures) + (temperature not in settings.temperatures)
    if settings.schedule == "linear":
        return max(settings.n_stages, 2)
    spread = math.sqrt(-math.log(settings.min_ess)) if settings.criterion == "ess" else math.sqrt(2 * settings.max_kl)
    # One step multiplies beta by 1 + s / sqrt(n/2).
    return 1 + math.ceil(math.log(start / temperature) / math.log1p(spread / math.sqrt(n_features / 2)))


def _readable(seconds: float) -> str:
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

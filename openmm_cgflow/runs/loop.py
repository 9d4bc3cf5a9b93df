"""The training method of a run, and the loop that steps it: checkpoints, metrics, progress, and stopping in time."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.geometry import Geometry
from openmm_cgflow.engines.engine import Engine
from openmm_cgflow.files.atomic import atomic_path
from openmm_cgflow.files.log import append_row
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.forces.estimator import EngineEnergies, MolecularMeanForce
from openmm_cgflow.forces.fast_atoms import FastAtoms
from openmm_cgflow.model.cg_model import CGModel
from openmm_cgflow.model.density import JointDensity, PMFDensity
from openmm_cgflow.runs.build import Setup, new_density, new_model
from openmm_cgflow.runs.load import model_state, save_state
from openmm_cgflow.training.joint import JointTraining
from openmm_cgflow.training.ladder import start_temperature
from openmm_cgflow.training.method import EvaluationBudget, Method, Row
from openmm_cgflow.training.pmf.method import PMFTraining
from openmm_cgflow.training.pmf.state import PMFState
from openmm_cgflow.training.reverse_kl import ReverseKL

__all__ = ["Clock", "Training", "TrainingLoop", "hottest_temperature", "new_training", "stop_requests"]

logger = logging.getLogger(__name__)


@dataclass
class Clock:
    """Wall time of a run.

    Attributes:
        started: ``time.monotonic()`` when this process began.
        max_time: Seconds after that at which to stop, or None.
        earlier: Seconds that earlier processes took, which this one continues.
    """

    started: float
    max_time: float | None = None
    earlier: float = 0.0

    @property
    def wall_time(self) -> float:
        """Seconds of the whole run."""
        return self.earlier + time.monotonic() - self.started

    def must_stop(self, stop: threading.Event) -> bool:
        """Whether ``stop`` was set or the time is up."""
        late = self.max_time is not None and time.monotonic() - self.started > self.max_time
        return stop.is_set() or late


class TrainingLoop:
    """Steps a training method in a run directory: checkpoints, metrics, models of finished stages, provenance.

    Arguments:
        run: Where everything is written.
        setup: What the method trains on.
        method: Stepped to its end.
        engine: For its description.
        fast_atoms: Of the method's mean forces, on that engine.
        clock: Wall time.
    """

    def __init__(
        self,
        run: RunDirectory,
        setup: Setup,
        method: Method,
        engine: Engine,
        fast_atoms: FastAtoms,
        clock: Clock,
    ) -> None:
        self.directory, self.setup, self.method = run, setup, method
        self.engine, self.fast_atoms, self.clock = engine, fast_atoms, clock
        self.began = datetime.now(UTC).isoformat(timespec="seconds")

    def run(self, progress: bool | None, stop: threading.Event) -> bool:
        """Steps to the end; False if it had to stop before."""
        method = self.method
        checkpointed = time.monotonic()
        interval = self.setup.config.training.checkpoint_interval
        self.write_provenance("running")
        with _bar(progress) as bar:
            while True:
                while not method.stage_done:
                    ended = method.outcome.reason
                    row = method.step()
                    append_row(self.directory.metrics, row)
                    self._show(bar, row)
                    if method.outcome.reason != ended:
                        logger.info(method.outcome.reason)
                    if self.clock.must_stop(stop):
                        self.save_checkpoint()
                        return False
                    if time.monotonic() - checkpointed > interval:
                        self.save_checkpoint()
                        checkpointed = time.monotonic()
                self._save_stage()
                if method.done:
                    self.save_checkpoint()
                    return True
                method.next_stage()

    def model(self) -> CGModel:
        """What is learned by now."""
        method, pool = self.method, self.fast_atoms.pool
        density, platform = method.density(), self.engine.platform.name
        return new_model(self.setup, density, list(method.temperatures), pool, platform)

    def save_checkpoint(self) -> None:
        """Writes everything that the run can be continued from."""
        system = self.setup.molecular_system
        state = {
            "fingerprint": system.fingerprint(),
            "positions": torch.tensor(system.positions),
            "geometry": self.setup.geometry.saved_arrays(),
            "method": self.method.state_dict(),
            "platform": self.engine.platform.name,
            "wall_time": self.clock.wall_time,
        }
        self.directory.save_checkpoint(lambda path: save_state(state, path))

    def _save_stage(self) -> None:
        method, stage = self.method, len(self.method.temperatures) - 1
        with atomic_path(self.directory.stage(stage)) as path:
            save_state(model_state(self.model()), path)
        logger.info(
            "stage %d finished: %.1f K, %d steps, %.3g energy evaluations, %.0f s",
            stage,
            method.temperatures[-1],
            method.n_steps,
            method.n_energy_evaluations,
            self.clock.wall_time,
        )
        if unmet := method.outcome.unmet:
            logger.info("not met: %s", "; ".join(unmet))
        counts = self.fast_atoms.quarantine
        if counts.not_finite or counts.flipped:
            logger.info(
                "quarantined so far: %d diverged and %d changed handedness, of %d replicas",
                counts.not_finite,
                counts.flipped,
                counts.total,
            )

    def _show(self, bar: tqdm, row: Row) -> None:
        text = self.method.describe(row)
        bar.total = self.method.expected_steps
        bar.n = self.method.n_steps
        bar.set_description(text, refresh=False)
        bar.update(0)
        if bar.disable and self.method.n_steps % self.method.log_interval == 0:
            logger.info("step %d: %s, %.0f s", row["step"], text, self.clock.wall_time)

    def write_provenance(self, status: str) -> None:
        """Writes what is known of the run, and how it stands."""
        method, config = self.method, self.setup.config
        self.directory.write_provenance(
            {
                "status": status,
                "started": self.began,
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                "wall_time_s": round(self.clock.wall_time, 1),
                "engine": self.engine.description,
                "seed": config.seed,
                "fingerprint": self.setup.molecular_system.fingerprint(),
                "method": config.training.method,
                "ended_by": method.outcome.reason,
                "unmet": list(method.outcome.unmet),
                "n_steps": method.n_steps,
                "temperatures_K": method.temperatures,
                "energy_evaluations": method.n_energy_evaluations,
                "quarantine": vars(self.fast_atoms.quarantine),
            }
        )


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set an event instead of ending the process; a second one ends it."""
    stop = threading.Event()

    def request(number: int, _: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        # A handler may run in the middle of another line of the log, whose stream must not be entered twice.
        line = "%s: stopping as soon as everything is safe"
        threading.Thread(target=logger.warning, args=(line, signal.Signals(number).name)).start()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bar(progress: bool | None) -> tqdm:
    return tqdm(disable=None if progress is None else not progress, unit="step", dynamic_ncols=True)


class Training(NamedTuple):
    """A training method with what runs its fast atoms."""

    method: Method
    fast_atoms: FastAtoms


def new_training(config: Config, geometry: Geometry, engine: Engine) -> Training:
    """What ``training.method`` names, at its start."""
    chains, temperature, seed = config.chains, config.temperature, config.seed
    density = new_density(config, geometry, temperature)
    fast_atoms = FastAtoms(engine, geometry.all_atom, geometry.draw_fast, chains, seed, density.follow)
    if isinstance(density, PMFDensity):
        estimator = MolecularMeanForce(fast_atoms, chains, chains.adaptive)
        networks = density.flow, density.pmf, density.response
        state = PMFState(config.pmf, config.stopping, temperature, seed, density.coordinates, *networks, estimator)
        budget = EvaluationBudget(config.stopping.max_evaluations, estimator)
        return Training(PMFTraining(state, budget, chains), fast_atoms)
    ladder = config.training, config.tempering, temperature
    if isinstance(density, JointDensity):
        energies, n_replays = EngineEnergies(engine), config.joint.n_replays
        joint = JointTraining(*ladder, chains, n_replays, seed, density.joint, density.coordinates, energies)
        return Training(joint, fast_atoms)
    forces = MolecularMeanForce(fast_atoms, chains)
    return Training(ReverseKL(*ladder, chains.n_replicas, seed, density.coordinates, density.flow, forces), fast_atoms)


def hottest_temperature(config: Config) -> float:
    """Highest temperature of the training, K."""
    if config.training.method == "pmf":
        return config.temperature
    return start_temperature(config.tempering, config.temperature)

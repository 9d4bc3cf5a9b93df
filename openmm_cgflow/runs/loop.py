"""One process's part of a training: steps, checkpoints, metrics, progress, and stopping in time."""

from __future__ import annotations

import copy
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch
from tqdm.auto import tqdm

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.geometry import Geometry
from openmm_cgflow.engines.engine import Engine
from openmm_cgflow.files.atomic import atomic_path
from openmm_cgflow.files.metrics import append_row
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.forces.estimator import EngineEnergies, MolecularMeanForce
from openmm_cgflow.forces.fast_atoms import FastAtoms
from openmm_cgflow.model.cg_model import CGModel
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.networks.flow import new_flow
from openmm_cgflow.networks.joint import new_joint
from openmm_cgflow.networks.pmf import new_pmf
from openmm_cgflow.networks.response import new_response
from openmm_cgflow.runs.load import save_state
from openmm_cgflow.training.joint import JointTraining
from openmm_cgflow.training.pmf.method import PMFTraining
from openmm_cgflow.training.reverse_kl import ReverseKL

__all__ = ["TrainingLoop", "new_method", "stop_requests"]

logger = logging.getLogger(__name__)

AnyMethod = ReverseKL | PMFTraining | JointTraining


def new_method(config: Config, geometry: Geometry, fast_atoms: FastAtoms) -> AnyMethod:
    """What ``training.method`` names, at its start."""
    coordinates, seed = geometry.coordinates, config.seed
    flow = new_flow(config.flow, geometry, seed)
    if config.training.method == "joint":
        joint = new_joint(flow, config.joint, config.flow, geometry, config.temperature, seed)
        return JointTraining(config, joint, EngineEnergies(fast_atoms.engine))
    adaptive = config.chains.adaptive and config.training.method == "pmf"
    estimator = MolecularMeanForce(fast_atoms, config.chains, adaptive)
    if config.training.method == "reverse_kl":
        return ReverseKL(config, coordinates, flow, estimator)
    pmf = new_pmf(config.pmf, geometry, seed)
    response = new_response(config.pmf, geometry, config.temperature, seed)
    return PMFTraining(config, coordinates, flow, pmf, response, estimator)


class TrainingLoop:
    """Runs a trainer in a run directory.

    Arguments:
        run: Where everything is written.
        config: All settings.
        molecular_system: The molecule.
        partition: Slow and fast atoms.
        geometry: What the trainer's model is built on.
        trainer: Stepped to its end.
        engine: For its description.
        chains: Of the trainer's mean forces, on that engine.
        started: ``time.monotonic()`` when this process began the run.
        max_time: Seconds after ``started`` to stop at, or None.
        earlier: Seconds that earlier sessions of this run took.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        molecular_system: MolecularSystem,
        partition: Partition,
        geometry: Geometry,
        trainer: AnyMethod,
        engine: Engine,
        fast_atoms: FastAtoms,
        started: float,
        max_time: float | None,
        earlier: float,
    ) -> None:
        self.config, self.molecular_system, self.partition = config, molecular_system, partition
        self.run, self.geometry, self.trainer, self.engine, self.fast_atoms = run, geometry, trainer, engine, fast_atoms
        self.started, self.max_time, self.earlier = started, max_time, earlier
        self.began = datetime.now(UTC).isoformat(timespec="seconds")

    @property
    def wall_time(self) -> float:
        """Seconds of this session and the ones it continues."""
        return self.earlier + time.monotonic() - self.started

    def must_stop(self, stop: threading.Event) -> bool:
        """Whether ``stop`` was set or the time is up."""
        late = self.max_time is not None and time.monotonic() - self.started > self.max_time
        return stop.is_set() or late

    def train(self, progress: bool | None, stop: threading.Event) -> bool:
        """Steps to the end; False if it had to stop before."""
        trainer = self.trainer
        checkpointed = time.monotonic()
        interval = self.config.training.checkpoint_interval
        self.write_provenance("running")
        with _bar(progress) as bar:
            while True:
                while not trainer.stage_done:
                    ended = trainer.ended_by
                    row = trainer.step()
                    append_row(self.run.metrics, row)
                    self._show(bar, row)
                    if trainer.ended_by != ended:
                        logger.info(trainer.ended_by)
                    if self.must_stop(stop):
                        self.save_checkpoint()
                        return False
                    if time.monotonic() - checkpointed > interval:
                        self.save_checkpoint()
                        checkpointed = time.monotonic()
                self._save_stage()
                if trainer.done:
                    self.save_checkpoint()
                    return True
                trainer.next_stage()

    def model(self) -> CGModel:
        """The flow as it is now."""
        trainer, platform = self.trainer, self.engine.platform.name
        joint = copy.deepcopy(trainer.joint)
        flow = joint.flow if joint is not None else copy.deepcopy(trainer.flow)
        (joint or flow).double()  # training may run in single precision
        return CGModel(
            self.config,
            self.molecular_system,
            self.partition,
            self.geometry,
            flow,
            trainer.pmf,
            trainer.response,
            trainer.temperatures,
            self.fast_atoms.pool,
            platform,
            joint,
        )

    def save_checkpoint(self) -> None:
        state = {
            "fingerprint": self.molecular_system.fingerprint(),
            "positions": torch.tensor(self.molecular_system.positions),
            "geometry": self.geometry.saved_arrays(),
            "trainer": self.trainer.state_dict(),
            "platform": self.engine.platform.name,
            "wall_time": self.wall_time,
        }
        self.run.save_checkpoint(lambda path: save_state(state, path))

    def _save_stage(self) -> None:
        trainer = self.trainer
        with atomic_path(self.run.stage(trainer.stage)) as path:
            save_state(self.model().state(), path)
        logger.info(
            "stage %d finished: %.1f K, %d steps, %.3g energy evaluations, %.0f s",
            trainer.stage,
            trainer.temperature,
            trainer.n_steps,
            trainer.estimator.n_energy_evaluations,
            self.wall_time,
        )
        if unmet := trainer.unmet:
            logger.info("not met: %s", "; ".join(unmet))
        counts = self.fast_atoms.quarantine
        if counts.not_finite or counts.flipped:
            logger.info(
                "quarantined so far: %d diverged and %d changed handedness, of %d replicas",
                counts.not_finite,
                counts.flipped,
                counts.total,
            )

    def _show(self, bar: tqdm, row: dict[str, float]) -> None:
        text = self.trainer.describe(row)
        bar.total = self.trainer.expected_steps
        bar.n = self.trainer.n_steps
        bar.set_description(text, refresh=False)
        bar.update(0)
        if bar.disable and self.trainer.n_steps % self.trainer.log_interval == 0:
            logger.info("step %d: %s, %.0f s", row["step"], text, self.wall_time)

    def write_provenance(self, status: str) -> None:
        config = self.config
        self.run.write_provenance(
            {
                "status": status,
                "started": self.began,
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                "wall_time_s": round(self.wall_time, 1),
                "engine": self.engine.description,
                "seed": config.seed,
                "fingerprint": self.molecular_system.fingerprint(),
                "method": config.training.method,
                "ended_by": self.trainer.ended_by,
                "unmet": self.trainer.unmet,
                "n_steps": self.trainer.n_steps,
                "temperatures_K": self.trainer.temperatures,
                "energy_evaluations": self.trainer.estimator.n_energy_evaluations,
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

"""A run from configuration to samples: everything that ``openmm-cgflow train`` does, and ``load`` for what it left."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from openmm import app, unit
from tqdm.auto import tqdm

from openmm_cgflow import plots
from openmm_cgflow.config import Config, dump_config, load_config
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.export import colvar_columns, peptide_torsions, write_colvar, write_trajectory
from openmm_cgflow.files import atomic_path, atomic_write
from openmm_cgflow.meanforce import MolecularMeanForce
from openmm_cgflow.model import CGModel, Samples, Scaffold, new_flow
from openmm_cgflow.partition import Partition
from openmm_cgflow.replicas import ReplicaEngine, create_engine
from openmm_cgflow.rundir import RunDirectory
from openmm_cgflow.system import MolecularSystem
from openmm_cgflow.training import Trainer

__all__ = ["load", "save_samples", "train"]

logger = logging.getLogger(__name__)

_FORMAT = 1


def train(
    config: Config,
    output: str | Path,
    *,
    molecular_system: MolecularSystem | None = None,
    resume: bool = False,
    overwrite: bool = False,
    max_time: float | None = None,
    progress: bool | None = None,
    source: str = "FILE.yaml",
) -> CGModel:
    """Trains a flow from a force field, samples it and leaves everything in a run directory.

    SIGINT and SIGTERM, and ``max_time``, end the training after the current step with a checkpoint; the model returned
    then is that of the step reached.

    Arguments:
        config: Settings; their ``system`` section may be missing if ``molecular_system`` is given.
        output: The run directory.
        molecular_system: The molecule, instead of the files that ``config.system`` names.
        resume: Continue the run that ``output`` holds, bit for bit as if it had not stopped.
        overwrite: Delete the run that ``output`` holds.
        max_time: Seconds of wall time after which to stop with a checkpoint.
        progress: Show a progress bar; by default on a terminal only.
        source: Name of the configuration file, for messages.

    Raises:
        CGFlowError: For anything the user can mend.
        ReplicaError: If too many replicas fail; the last checkpoint stays.
    """
    started = time.monotonic()
    RunDirectory(output).check_free(resume=resume, overwrite=overwrite, source=source)
    if molecular_system is None:
        if config.system is None:
            raise CGFlowError("the configuration has no system section, and no molecular_system was given")
        molecular_system = MolecularSystem.from_files(config.system)
    partition = Partition.resolve(molecular_system, config.partition.slow)
    with ExitStack() as stack:
        engine = stack.enter_context(create_engine(molecular_system, partition.slow, config.sampler))
        saved: dict[str, Any] | None = None
        scaffold: Scaffold | None = None
        if not resume:  # whatever can be wrong with the input is found before the directory is touched
            scaffold = Scaffold.build(config, molecular_system, partition, engine.evaluate)
        run = RunDirectory.create(output, dump_config(config), resume=resume, overwrite=overwrite, source=source)
        stack.enter_context(run.logging())
        if resume:
            saved = run.load_checkpoint(lambda path: _load_file(path, molecular_system))
            if saved is None:
                logger.info("%s: nothing to resume, starting from the beginning", run.path)
        if scaffold is None:
            arrays = saved["scaffold"] if saved else None
            scaffold = Scaffold.build(config, molecular_system, partition, engine.evaluate, saved=arrays)
        _describe(scaffold, engine)
        trainer = Trainer(
            config,
            scaffold.assembly.coordinates,
            new_flow(config, scaffold.assembly.coordinates),
            MolecularMeanForce(scaffold.chains(engine), config.sampler.estimator),
        )
        if saved is not None:
            trainer.load_state_dict(saved["trainer"])
        run.truncate_metrics(trainer.n_steps)
        if saved is None:
            _write_inputs(run, scaffold)
        session = _Session(run, scaffold, trainer, engine, started, max_time, saved["wall_time"] if saved else 0.0)
        complete = session.train(progress)
        model = session.model()
        if complete:
            _finish(run, model, engine, config)
        session.write_provenance("finished" if complete else "stopped")
        if not complete:
            logger.info("stopped after step %d; continue with --resume", trainer.n_steps)
        return model


def load(run_directory: str | Path, stage: int | None = None) -> CGModel:
    """Opens the model of a run.

    Arguments:
        run_directory: What ``train`` wrote.
        stage: Tempering stage, 0 the hottest; the last finished one by default.

    Raises:
        CGFlowError: If there is no such run or stage.
    """
    run = RunDirectory.open(run_directory)
    available = sorted(run.models.glob("stage_*.pt"))
    names = {int(path.stem.removeprefix("stage_")): path for path in available}
    if not names:
        raise CGFlowError(f"{run.path}: no tempering stage was finished yet; continue the training with --resume")
    if stage is None:
        stage = max(names)
    if stage not in names:
        raise CGFlowError(f"{run.path}: no stage {stage}; there are {', '.join(map(str, sorted(names)))}")
    state = _load_file(names[stage], None)
    config = load_config(run.config)
    molecular_system = MolecularSystem.from_files(run.topology, system_xml=run.system_xml)
    molecular_system = dataclasses.replace(molecular_system, positions=state["positions"].numpy())
    partition = Partition.resolve(molecular_system, json.loads(run.slow_atoms.read_text())["slow"])
    return CGModel.from_state(state, config, molecular_system, partition)


def save_samples(model: CGModel, samples: Samples, path: Path, topology: Path | None = None) -> list[Path]:
    """Writes a trajectory, its topology and its COLVAR table side by side; returns their paths."""
    topology = write_trajectory(samples.trajectory, path, topology=topology)
    colvar = path.with_suffix(".colvar")
    write_colvar(colvar, colvar_columns(samples, model.coordinates.names))
    return [path, topology, colvar]


class _Session:
    """One process's part of a training: checkpoints, metrics, progress, and stopping in time."""

    def __init__(
        self,
        run: RunDirectory,
        scaffold: Scaffold,
        trainer: Trainer,
        engine: ReplicaEngine,
        started: float,
        max_time: float | None,
        earlier: float,
    ) -> None:
        self.run, self.scaffold, self.trainer, self.engine = run, scaffold, trainer, engine
        self.started, self.max_time, self.earlier = started, max_time, earlier
        self.began = datetime.now(UTC).isoformat(timespec="seconds")

    @property
    def wall_time(self) -> float:
        """Seconds of this session and the ones it continues."""
        return self.earlier + time.monotonic() - self.started

    def train(self, progress: bool | None) -> bool:
        """Steps to the end; False if stopped before it."""
        trainer = self.trainer
        checkpointed = time.monotonic()
        interval = self.scaffold.config.training.checkpoint_interval
        self.write_provenance("running")
        with _stop_requests() as stop, _bar(progress) as bar:
            while True:
                while not trainer.stage_done:
                    row = trainer.step()
                    self.run.append_metrics(row)
                    self._show(bar, row)
                    late = self.max_time is not None and time.monotonic() - self.started > self.max_time
                    if stop.is_set() or late:
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
        trainer = self.trainer
        chains = trainer.estimator.state_dict()["chains"]
        return CGModel(self.scaffold, trainer.flow, trainer.temperatures, chains["pool"])

    def save_checkpoint(self) -> None:
        state = {
            "format": _FORMAT,
            "fingerprint": self.scaffold.molecular_system.fingerprint(),
            "scaffold": self.scaffold.saved_arrays(),
            "trainer": self.trainer.state_dict(),
            "wall_time": self.wall_time,
        }
        self.run.save_checkpoint(lambda path: torch.save(state, path))

    def _save_stage(self) -> None:
        trainer = self.trainer
        with atomic_path(self.run.models / f"stage_{trainer.stage:02d}.pt") as path:
            torch.save({"format": _FORMAT, **self.model().state()}, path)
        logger.info(
            "stage %d finished: %.1f K, %d steps, %.3g energy evaluations, %.0f s",
            trainer.stage,
            trainer.temperature,
            trainer.n_steps,
            trainer.estimator.n_energy_evaluations,
            self.wall_time,
        )
        counts = trainer.estimator.chains.quarantine
        if counts.not_finite or counts.flipped:
            logger.info(
                "quarantined so far: %d diverged and %d changed handedness, of %d replicas",
                counts.not_finite,
                counts.flipped,
                counts.total,
            )

    def _show(self, bar: tqdm, row: dict[str, float]) -> None:
        text = f"stage {row['stage']} {row['temperature']:.0f} K, residual {row['residual']:.2f} (noise {row['noise']:.2f})"
        bar.total = self.trainer.n_steps - self.trainer.n_stage_steps + self.trainer.stage_length
        bar.n = self.trainer.n_steps
        bar.set_description(text, refresh=False)
        bar.update(0)
        if bar.disable and self.trainer.n_steps % 20 == 0:
            logger.info("step %d: %s, %.0f s", row["step"], text, self.wall_time)

    def write_provenance(self, status: str) -> None:
        config = self.scaffold.config
        self.run.write_provenance(
            {
                "status": status,
                "started": self.began,
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                "wall_time_s": round(self.wall_time, 1),
                "engine": self.engine.description,
                "seed": config.seed,
                "fingerprint": self.scaffold.molecular_system.fingerprint(),
                "n_steps": self.trainer.n_steps,
                "temperatures_K": self.trainer.temperatures,
                "energy_evaluations": self.trainer.estimator.n_energy_evaluations,
                "quarantine": vars(self.trainer.estimator.chains.quarantine),
            }
        )


def _describe(scaffold: Scaffold, engine: ReplicaEngine) -> None:
    system, coordinates = scaffold.molecular_system, scaffold.assembly.coordinates
    for note in system.notes:
        logger.info("note: %s", note)
    logger.info(scaffold.partition.describe(system))
    logger.info(
        "%d slow coordinates, %d of them torsions; %d stereocentres",
        coordinates.n_features,
        coordinates.n_circular,
        len(scaffold.assembly.stereocentres),
    )
    logger.info(engine.description)


def _write_inputs(run: RunDirectory, scaffold: Scaffold) -> None:
    system = scaffold.molecular_system
    atomic_write(run.system_xml, system.to_xml())
    with atomic_path(run.topology) as path, path.open("w") as file:
        app.PDBFile.writeFile(system.topology, system.positions * unit.nanometer, file, keepIds=True)
    atomic_write(run.slow_atoms, json.dumps(scaffold.partition.to_json(system), indent=2) + "\n")


def _finish(run: RunDirectory, model: CGModel, engine: ReplicaEngine, config: Config) -> None:
    if config.sampling.plots:
        plots.save(plots.convergence(run.read_metrics()), run.plots / "convergence.png")
    if config.sampling.n_samples == 0:
        return
    logger.info("sampling %d structures at %.1f K", config.sampling.n_samples, model.temperature)
    samples = model.sample_with(engine, config.sampling.n_samples, config.seed, config.sampling.n_equilibration)
    paths = save_samples(model, samples, run.samples, run.path / "samples.pdb")
    logger.info("wrote %s", ", ".join(map(str, paths)))
    if config.sampling.plots:
        _plot_samples(run, model, samples)


def _plot_samples(run: RunDirectory, model: CGModel, samples: Samples) -> None:
    torsions = peptide_torsions(samples.trajectory)
    for name in torsions:
        if name.startswith("phi_"):
            residue = name.removeprefix("phi_")
            figure = plots.ramachandran(
                torsions[name], torsions[f"psi_{residue}"], temperature=model.temperature, title=residue
            )
            plots.save(figure, run.plots / f"ramachandran_{residue}.png")
    n = model.coordinates.n_circular
    if n:
        names = [name.removeprefix("dihedral ") for name in model.coordinates.names[:n]]
        plots.save(plots.torsion_marginals(names, samples.z[:, :n]), run.plots / "torsions.png")


def _load_file(path: Path, molecular_system: MolecularSystem | None) -> dict[str, Any]:
    state = torch.load(path, weights_only=True)
    if state.get("format") != _FORMAT:
        raise CGFlowError(f"{path}: written by another version of openmm-cgflow (format {state.get('format')})")
    if molecular_system is not None and state["fingerprint"] != molecular_system.fingerprint():
        raise CGFlowError(
            f"{path}: belongs to another molecule or force field than the one that was loaded now. Restore the "
            "original input files, or start a new run in another directory"
        )
    return state


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set an event instead of ending the process; a second one ends it."""
    stop = threading.Event()

    def request(number: int, _: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        logger.warning("%s: stopping after this step", signal.Signals(number).name)
        stop.set()

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

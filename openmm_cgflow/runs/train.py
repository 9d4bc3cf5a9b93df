"""A run from configuration to samples: everything that ``openmm-cgflow train`` does."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_cgflow.analysis import plots
from openmm_cgflow.config import Config, dump_config, free_settings, load_config
from openmm_cgflow.coordinates.geometry import Geometry, rotamer_warning
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.engine import Engine
from openmm_cgflow.engines.platforms import keep_platform
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.atomic import atomic_path, atomic_write
from openmm_cgflow.files.log import drop_rows_after, held_back, read_rows
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.model.cg_model import CGModel
from openmm_cgflow.model.sampling import draw_samples
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.molecule.system import MolecularSystem
from openmm_cgflow.networks.threads import one_torch_thread
from openmm_cgflow.runs.build import Setup, build_geometry, choose_partition, load_molecule
from openmm_cgflow.runs.export import plot_samples, save_samples
from openmm_cgflow.runs.load import load_state
from openmm_cgflow.runs.loop import Clock, TrainingLoop, hottest_temperature, new_training, stop_requests
from openmm_cgflow.runs.verify import verify

__all__ = ["train"]

logger = logging.getLogger(__name__)

# By how many errors the check may differ before a word of warning: on average, and anywhere. Chance goes beyond in one
# run of some hundred.
_MANY_ERRORS, _ONE_FAR_OFF = 2.0, 3.8


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
    then is that of the step reached. They also end the final sampling, which ``resume`` then starts anew.

    Arguments:
        config: Settings; their ``system`` section may be missing if ``molecular_system`` is given.
        output: The run directory.
        molecular_system: The molecule, instead of the files that ``config.system`` names.
        resume: Continue the run that ``output`` holds, bit for bit as if it had not stopped (not so on GPUs).
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
        molecular_system = load_molecule(config)
    partition = choose_partition(config, molecular_system)
    with ExitStack() as stack:
        stack.enter_context(one_torch_thread())
        saved: dict[str, Any] | None = None
        if resume:
            earlier_config = RunDirectory(output).config
            if earlier_config.exists():
                load_config(earlier_config)  # refuses one that another version wrote
            run = RunDirectory.create(output, dump_config(config), resume=True, source=source, free=free_settings())
            stack.enter_context(run.logging())
            saved = run.load_checkpoint(lambda path: load_state(path, molecular_system))
            if saved is None:
                logger.info("%s: nothing to resume, starting from the beginning", run.path)
        platform = keep_platform(config.chains.platform, saved["platform"]) if saved else config.chains.platform
        settings = config.chains.model_copy(update={"platform": platform})
        arrays = saved["geometry"] if saved else None
        with held_back() as release_log:
            engine = stack.enter_context(create_engine(molecular_system, partition.slow, settings))
            hottest = hottest_temperature(config)
            geometry = build_geometry(config, molecular_system, partition, hottest, engine.evaluate, saved=arrays)
        if not resume:  # whatever can be wrong with the input was found before the directory is touched
            run = RunDirectory.create(output, dump_config(config), overwrite=overwrite, source=source)
            stack.enter_context(run.logging())
            release_log()
        _describe(molecular_system, partition, geometry, engine)
        method, fast_atoms = new_training(config, geometry, engine)
        if saved is not None:
            method.load_state_dict(saved["method"])
        drop_rows_after(run.metrics, method.n_steps)
        if saved is None:
            _write_inputs(run, molecular_system, partition)
        clock = Clock(started, max_time, saved["wall_time"] if saved else 0.0)
        setup = Setup(config, molecular_system, partition, geometry)
        loop = TrainingLoop(run, setup, method, engine, fast_atoms, clock)
        try:
            with stop_requests() as stop:
                complete = loop.run(progress, stop)
                model = loop.model()
                if complete:
                    complete = _finish(run, model, engine, config, lambda: clock.must_stop(stop))
        except BaseException as error:
            with suppress(CGFlowError):  # where the disk is full, the first error is the one to tell
                loop.write_provenance("failed")
            if isinstance(error, openmm.OpenMMException):  # such as a GPU that is full, or gone
                raise CGFlowError(
                    f"OpenMM stopped with: {error}. The last checkpoint is kept; continue with --resume"
                ) from error
            raise
        loop.write_provenance("finished" if complete else "stopped")
        if not complete:
            logger.info("stopped after step %d; continue with --resume", method.n_steps)
        return model


def _describe(system: MolecularSystem, partition: Partition, geometry: Geometry, engine: Engine) -> None:
    coordinates = geometry.coordinates
    for note in system.notes:
        logger.info("note: %s", note)
    logger.info(partition.describe(system))
    logger.info(
        "%d slow coordinates, %s; %d stereocentres",
        coordinates.n_features,
        geometry.kinds,
        geometry.all_atom.n_stereocentres,
    )
    logger.info(engine.description)
    if rotamers := geometry.fast_rotamers():
        logger.warning(rotamer_warning(rotamers))


def _write_inputs(run: RunDirectory, system: MolecularSystem, partition: Partition) -> None:
    atomic_write(run.system_xml, system.to_xml())
    with atomic_path(run.topology) as path, path.open("w") as file:
        app.PDBFile.writeFile(system.topology, system.positions * unit.nanometer, file, keepIds=True)
    atomic_write(run.slow_atoms, json.dumps(partition.to_json(system), indent=2) + "\n")


def _finish(run: RunDirectory, model: CGModel, engine: Engine, config: Config, must_stop: Callable[[], bool]) -> bool:
    """Samples and plots of a finished training; False if stopped before their end."""
    if config.samples.plots:
        plots.save(plots.convergence(read_rows(run.metrics)), run.plots / "convergence.png")
    if model.density.can_be_switched and config.samples.n_verified and not must_stop():
        _verify(run, model, engine, config)
    for line in model.describe_map():
        logger.info(line)
    if config.samples.n_samples == 0:
        return True
    logger.info("sampling %d structures at %.1f K", config.samples.n_samples, model.temperature)
    try:
        samples = draw_samples(model, engine, config.samples.n_samples, config.seed, config.samples, must_stop)
    except KeyboardInterrupt:
        return False
    paths = save_samples(model, samples, run.samples)
    logger.info("wrote %s", ", ".join(map(str, paths)))
    if config.samples.plots:
        plot_samples(model, samples, run.plots)
    return True


def _verify(run: RunDirectory, model: CGModel, engine: Engine, config: Config) -> None:
    """Checks the PMF by switching, and says what came out."""
    settings = config.samples
    try:
        found = verify(model, engine, settings.n_verified, settings.n_switches, config.seed)
    except CGFlowError as error:  # the training is done and sampling can go on
        logger.warning("the fitted free energies could not be checked by switching: %s", error)
        return
    atomic_write(run.verification, json.dumps(found.to_dict(), indent=2) + "\n")
    logger.info(
        "check: free energies of %d conformations by nonequilibrium switching, which uses no mean forces (%.2g energy "
        "evaluations), differ from the PMF's by %.2f kT rms; the switching's own errors would give %.2f",
        settings.n_verified,
        found.n_evaluations,
        found.rms_difference,
        found.rms_error,
    )
    deviations = found.deviations(config.stopping.free_energy_error)
    worst = int(deviations.argmax())
    if np.sqrt(np.mean(deviations**2)) > _MANY_ERRORS or deviations[worst] > _ONE_FAR_OFF:
        logger.warning(
            "that is more than errors explain: one conformation is off by %.2f kT, %.1f times what is to be expected, "
            "and populations may be off by as much. Where the training ended at a limit, raise "
            "stopping.max_evaluations; else fast atoms that take longer than a chain to turn are the usual cause: add "
            "them to partition.slow, or raise chains.n_equilibration",
            abs(found.pmf[worst] - found.switching[worst]),
            deviations[worst],
        )

"""``openmm-cgflow evaluate`` of a run on a synthetic target: samples and model against what is known exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from openmm_cgflow.analysis.observables import read_samples
from openmm_cgflow.analysis.reference import load_structure
from openmm_cgflow.config import load_config
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.atomic import atomic_write, writing
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.paper.exact import ExactEvaluation, compare_exactly
from openmm_cgflow.runs.build import exact_target
from openmm_cgflow.runs.load import load
from openmm_cgflow.seeds import Stream, derive_seed

__all__ = ["ExactEvaluation", "evaluate_exactly"]


def evaluate_exactly(
    run_directory: str | Path,
    samples: str | Path | None = None,
    output: str | Path | None = None,
    *,
    seed: int | None = None,
) -> ExactEvaluation:
    """Compares the samples and the model of a run on a synthetic target with the exact answers.

    Arguments:
        run_directory: What :func:`openmm_cgflow.train` wrote for a ``system.target``.
        samples: Trajectory of the samples; the run's by default.
        output: Folder for ``evaluation.json`` and ``evaluation.txt``; ``evaluation`` in the run directory by default.
        seed: Of exact samples; the configuration's by default.

    Raises:
        CGFlowError: If a file is missing or cannot be read, the run is not on a synthetic target, or the target has
            no density in the model's box.
    """
    run = RunDirectory.open(run_directory)
    config, model = load_config(run.config), load(run.path)
    record = run.read_provenance()
    target = exact_target(config)
    if target is None:
        raise CGFlowError(f"{run.path}: not a run on a synthetic target; evaluate compares it with a reference")
    if "energy_evaluations" not in record:
        raise CGFlowError(f"{run.provenance}: missing, or without the number of energy evaluations; restore it")
    path = run.samples if samples is None else Path(samples)
    frames, log_weight = read_samples(run, path, load_structure(run.topology))
    found = compare_exactly(
        target,
        [*(load(run.path, stage) for stage in range(model.stage)), model],
        frames.xyz[..., 0].astype(float),
        log_weight,
        np.random.default_rng(derive_seed(config.seed if seed is None else seed, Stream.EVALUATION)),
        run=str(run.path),
        file=str(path),
        energy_evaluations=int(record["energy_evaluations"]),
    )
    folder = run.evaluation if output is None else Path(output)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "evaluation.json", json.dumps(found.to_dict(), indent=2) + "\n")
    atomic_write(folder / "evaluation.txt", found.table() + "\n")
    return found

"""``openmm-cgflow evaluate``: the samples of a run, held against a reference where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openmm_cgflow.analysis.basins import compare_basins
from openmm_cgflow.analysis.comparison import Ensemble, Grid, compare_densities, compare_sizes, compare_states
from openmm_cgflow.analysis.distances import N_BINS, PSEUDOCOUNT, effective_size
from openmm_cgflow.analysis.observables import measure, read_samples, residues_with_maps
from openmm_cgflow.analysis.reference import (
    GridReference,
    TrajectoryReference,
    load_reference,
    load_structure,
)
from openmm_cgflow.analysis.report import Evaluation, write_evaluation
from openmm_cgflow.config import load_config
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.files.trajectory import colvar_constants
from openmm_cgflow.seeds import Stream, derive_seed
from openmm_cgflow.units import thermal_beta

if TYPE_CHECKING:
    from openmm_cgflow.paper.exact import ExactEvaluation

__all__ = ["Evaluation", "evaluate"]

_N_BLOCKS = 20  # of a reference trajectory, whose neighbouring frames are correlated


def evaluate(
    run_directory: str | Path,
    reference: str | Path | None = None,
    *,
    topology: str | Path | None = None,
    weights: str | Path | None = None,
    samples: str | Path | None = None,
    output: str | Path | None = None,
    residue: str | None = None,
    seed: int | None = None,
) -> Evaluation | ExactEvaluation:
    """Compares the samples of a run with a reference, and writes tables, arrays and plots.

    A run on a synthetic target needs no reference: it is compared with the exact answers, as
    :func:`openmm_cgflow.evaluate_exactly` does.

    Arguments:
        run_directory: What :func:`openmm_cgflow.train` wrote.
        reference: A trajectory in any format MDTraj reads, or an ``.npz`` file with P (n, n), the probability of
            (φ, ψ), and centers (n,) in radians. Without one the samples are described alone.
        topology: Of the reference trajectory; the run's by default.
        weights: Of the frames of the reference trajectory, text or ``.npy``; non-negative numbers.
        samples: Trajectory of the samples, with its COLVAR table beside it; the run's by default.
        output: Folder to write to; ``evaluation`` in the run directory by default.
        residue: The only residue whose (φ, ψ) to look at, such as ``ALA2``; needed for a grid where there are several.
        seed: Of bootstrap and noise floors; the configuration's by default.

    Raises:
        CGFlowError: If a file is missing, cannot be read or does not fit the others.
    """
    run = RunDirectory.open(run_directory)
    config = load_config(run.config)
    if config.has_exact_answers:
        if any(given is not None for given in (reference, topology, weights, residue)):
            raise CGFlowError("a synthetic target is compared with its exact answers: leave out the reference")
        from openmm_cgflow.runs.exact import evaluate_exactly  # with torch, which other evaluations do without

        return evaluate_exactly(run.path, samples, output, seed=seed)
    structure, slow = load_structure(run.topology), run.read_slow_atoms()
    available = residues_with_maps(structure)
    if residue is not None and residue not in available:
        listed = ", ".join(available) or "none"
        raise CGFlowError(f"residue '{residue}': not a residue with φ and ψ; the run has {listed}")
    if reference is None and (topology is not None or weights is not None):
        raise CGFlowError("a topology and weights belong to a reference trajectory; give --reference as well")
    theirs = None
    if reference is not None:
        theirs = load_reference(
            Path(reference),
            structure,
            topology=None if topology is None else Path(topology),
            weights=None if weights is None else Path(weights),
        )
    chosen = available if residue is None else [residue]
    grid = _grid(theirs, chosen) if isinstance(theirs, GridReference) else None

    trajectory_file = run.samples if samples is None else Path(samples)
    ours, log_weight = read_samples(run, trajectory_file, structure)
    constants = colvar_constants(trajectory_file.with_suffix(".colvar"))
    temperature = constants.get("temperature_K", config.temperature)  # of another stage than the last, say
    observables = measure(ours, structure, slow, chosen)
    ensembles = {"samples": Ensemble(observables, np.ones(ours.n_frames), ours.n_frames)}
    if log_weight is not None:
        ensembles["weighted"] = Ensemble(observables, np.exp(log_weight - log_weight.max()), ours.n_frames)
    if isinstance(theirs, TrajectoryReference):
        n = theirs.trajectory.n_frames
        measured = measure(theirs.trajectory, structure, slow, chosen)
        ensembles["reference"] = Ensemble(measured, theirs.weights, min(_N_BLOCKS, n))

    seed = config.seed if seed is None else seed
    rng = np.random.default_rng(derive_seed(seed, Stream.EVALUATION))
    maps, torsions = compare_densities(ensembles, grid, rng)
    evaluation = Evaluation(
        run=str(run.path),
        samples=_describe_samples(trajectory_file, ensembles),
        reference=_describe_reference(theirs, chosen),
        settings={
            "temperature_K": temperature,
            "seed": seed,
            "bins_per_turn": N_BINS,
            "pseudocount_of_kl": PSEUDOCOUNT,
        },
        maps=maps,
        torsions=torsions,
        basins=compare_basins(ensembles, grid, thermal_beta(temperature), rng),
        sizes=compare_sizes(ensembles),
        states=compare_states(ensembles, grid),
    )
    write_evaluation(evaluation, run.evaluation if output is None else Path(output))
    return evaluation


def _grid(reference: GridReference, residues: list[str]) -> Grid:
    if not residues:
        raise CGFlowError(
            f"{reference.path}: a grid is of φ and ψ, and no residue of the run has both; give a reference trajectory"
        )
    if len(residues) > 1:
        raise CGFlowError(f"{reference.path}: of which residue is this grid? Give --residue, of {', '.join(residues)}")
    return Grid(residues[0], reference)


def _describe_samples(path: Path, ensembles: dict[str, Ensemble]) -> dict[str, Any]:
    n = len(ensembles["samples"].weights)
    described = {"file": str(path), "n_frames": n}
    if "weighted" in ensembles:
        described["relative_ess"] = effective_size(ensembles["weighted"].weights) / n
    return described


def _describe_reference(
    reference: GridReference | TrajectoryReference | None, residues: list[str]
) -> dict[str, Any] | None:
    if reference is None:
        return None
    if isinstance(reference, GridReference):
        return {
            "file": str(reference.path),
            "kind": "grid",
            "n_bins": len(reference.centers),
            "residue": residues[0],
        }
    return {
        "file": str(reference.path),
        "kind": "trajectory",
        "n_frames": reference.trajectory.n_frames,
        "n_effective": effective_size(reference.weights),
        "n_blocks": min(_N_BLOCKS, reference.trajectory.n_frames),
    }

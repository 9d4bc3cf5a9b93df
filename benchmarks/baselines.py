"""What other methods reach with the same number of energy evaluations.

    python benchmarks/baselines.py systems/alanine_dipeptide/alanine_dipeptide.yaml --evaluations 3e6 --seeds 1 2 3 \\
        --reference reference.npz

Molecular dynamics (md), replica exchange with MBAR over all its replicas (remd) and well-tempered metadynamics on φ and
ψ, reweighted by its final bias (metad), as practitioners run them: 2 fs, hydrogens of 4 Da, friction 1/ps. Every run
starts from the input structure; its energy evaluations are those of all replicas and of its equilibration. A line for
each run: populations of the four basins, their free energies minus those of the reference in kT (inf: never visited),
KL(reference || samples) in nats on 36 x 36 bins, and the noise floor of that, the KL between the two halves of the run.
The last lines are the root mean square of a method's errors.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mdtraj
import numpy as np
from estimators import populations
from md import Molecule, exit_code, load, load_grid, parallel_map, seed_option
from samplers import METHODS, Sampled

from openmm_cgflow.analysis.distances import circle_histogram, compare
from openmm_cgflow.analysis.reference import GridReference
from openmm_cgflow.analysis.states import RAMACHANDRAN
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.atomic import atomic_write, writing


@dataclass(frozen=True)
class Job:
    """One run, and where its frames go (None: nowhere)."""

    molecule: Molecule
    method: str
    n_evaluations: int
    seed: int
    save: Path | None


@dataclass(frozen=True)
class Result:
    """What is printed of a run: ``populations`` (4,), maps ``(36, 36)`` of all of it and of its halves."""

    method: str
    seed: int
    n_evaluations: int
    populations: np.ndarray
    density: np.ndarray
    halves: tuple[np.ndarray, np.ndarray]


def run(job: Job) -> Result:
    """Runs one method with one seed."""
    sampled = METHODS[job.method](job.molecule, job.n_evaluations, job.seed)
    angles = job.molecule.angles(sampled.xyz)[:, :2]
    half = len(angles) // 2
    parts = [circle_histogram(angles[part], sampled.weights[part]) for part in (slice(half), slice(half, None))]
    if job.save is not None:
        _save(job, sampled)
    return Result(
        job.method,
        job.seed,
        sampled.n_evaluations,
        populations(angles, sampled.weights),
        circle_histogram(angles, sampled.weights),
        (parts[0], parts[1]),
    )


def _save(job: Job, sampled: Sampled) -> None:
    assert job.save is not None
    if not sampled.at_target.any():
        return
    frames = mdtraj.Trajectory(sampled.xyz[sampled.at_target], job.molecule.topology)
    frames.center_coordinates()
    path = job.save / f"{job.method}_seed{job.seed}.dcd"
    with writing(path):
        frames.save_dcd(str(path))


def line(result: Result, reference: GridReference | None) -> str:
    """The line of one run."""
    text = f"{result.method:8s}{result.seed:>6d}{result.n_evaluations:>12.3g}"
    text += "".join(f"{value:9.4f}" for value in result.populations)
    if reference is not None:
        text += "".join(f"{value:+9.3f}" for value in errors(result, reference))
        text += f"{compare(reference.rebinned(), result.density).kl:10.4f}"
    return text + f"{compare(*result.halves).kl:10.4f}"


def errors(result: Result, reference: GridReference) -> np.ndarray:
    """Free energies of the basins minus the reference's, ``(4,)`` in kT; inf or nan where one of them has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.log(result.populations / reference.populations())


def table(results: Sequence[Result], reference: GridReference | None) -> str:
    """Everything that is printed."""
    head = f"{'method':8s}{'seed':>6s}{'evaluations':>12s}" + "".join(f"{name:>9s}" for name in RAMACHANDRAN)
    lines = []
    if reference is not None:
        head += "".join(f"{name + ' kT':>9s}" for name in ("aR", "beta", "PPII", "phi>0")) + f"{'KL':>10s}"
        known = "".join(f"{value:9.4f}" for value in reference.populations())
        lines.append(f"{'reference':26s}{known}")
    lines = [head + f"{'KL halves':>10s}", *lines, *(line(result, reference) for result in results)]
    if reference is not None:
        for method in dict.fromkeys(result.method for result in results):
            mine = [result for result in results if result.method == method]
            spread = np.sqrt(np.mean([errors(result, reference) ** 2 for result in mine], axis=0))
            distance = np.mean([compare(reference.rebinned(), result.density).kl for result in mine])
            numbers = "".join(f"{value:9.3f}" for value in spread)
            lines.append(f"{method + ', rms and mean KL of ' + str(len(mine)):62s}{numbers}{distance:10.4f}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("config", help="YAML file of openmm-cgflow; its system and temperature are used")
    result.add_argument("--evaluations", type=float, required=True, help="energy evaluations of each run, such as 3e6")
    result.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS))
    result.add_argument("--seeds", nargs="+", type=seed_option, default=[1])
    result.add_argument("--reference", type=Path, help="npz file with P (n, n), as benchmarks/reference.py writes it")
    result.add_argument("-o", "--output", type=Path, help="also write the table to this file")
    result.add_argument(
        "--save",
        type=Path,
        metavar="FOLDER",
        help="write frames at the target temperature there, METHOD_seedN.dcd with topology.pdb, for openmm-cgflow "
        "evaluate; not of metadynamics, whose frames are biased",
    )
    result.add_argument("--workers", type=int, default=1, help="processes, a run each; the result is the same")
    result.add_argument("--platform", default="Reference", help="OpenMM platform (Reference)")
    return result


def main() -> None:
    options = parser().parse_args()
    if not 1 <= options.evaluations < math.inf:
        raise CGFlowError(f"--evaluations {options.evaluations:g}: expected a positive number")
    molecule = load(options.config, ("phi", "psi"), options.platform)
    reference = load_grid(options.reference, molecule) if options.reference else None
    if options.save:
        with writing(options.save):
            options.save.mkdir(parents=True, exist_ok=True)
            mdtraj.Trajectory(molecule.positions, molecule.topology).save_pdb(str(options.save / "topology.pdb"))
    jobs = [
        Job(molecule, method, int(options.evaluations), seed, options.save)
        for method in options.methods
        for seed in options.seeds
    ]
    with parallel_map(options.workers) as run_all:
        text = table(run_all(run, jobs), reference)
    print(text)
    if options.output:
        atomic_write(options.output, text + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))

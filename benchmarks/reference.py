"""A reference by a standard method, with its own error.

    python benchmarks/reference.py systems/alanine_dipeptide/alanine_dipeptide.yaml -o reference.npz

Umbrella sampling: windows k (1 - cos) on two torsions, on a grid that spreads from the starting structure to wherever
the free energy is below a cutoff, and the weighted histogram analysis method (WHAM). Molecules with a third slow
coordinate, such as the side chain of valine, need --flatten, which lowers its barriers in all windows and weighs the
frames back, or --method remd: replica exchange and MBAR. The passes share nothing but the starting structure, so what
they differ by is the error. Windows of a potential that takes many structures in one call run all together.

The file holds P (100, 100), the probability of the two torsions on [-180, 180) degrees, its bin centers (100,) in
radians, P_passes (n_passes, 100, 100), n_evaluations (energy evaluations in all), temperature in K and the names of the
torsions; with a side chain also chi1 (36,), the probability of χ1, and chi1_passes. `openmm-cgflow evaluate RUN
--reference FILE` reads it. Errors are standard errors of the mean of the passes. With --frames FILE.dcd the frames of
all passes are kept, for sizes and side chains, and their weights beside them: `openmm-cgflow evaluate RUN --reference
FILE.dcd --weights FILE.npy`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
from estimators import (
    bin_centres,
    mbar,
    populations,
    rotamer_populations,
    umbrella_bias,
)
from md import STRIDE, TIMESTEP, Molecule, exit_code, load, load_grid, parallel_map, seed_option, steps
from samplers import replica_exchange
from umbrella import RunAll, Settings, run_together, run_window, sample, spread, unbias

from openmm_cgflow.analysis.distances import N_BINS, circle_histogram
from openmm_cgflow.analysis.distances import compare as distances
from openmm_cgflow.analysis.reference import GridReference
from openmm_cgflow.analysis.states import RAMACHANDRAN, ROTAMER
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.atomic import atomic_path, writing
from openmm_cgflow.seeds import derive_seed

N_GRID = 100
_DEFAULT_PS = {"umbrella": 60.0, "remd": 10000.0}
_CHECKED = 8000  # frames on which WHAM is compared with MBAR


@dataclass(frozen=True)
class Pass:
    """Weighted frames of one pass in the order of time.

    Attributes:
        xyz: ``(n_frames, n_atoms, 3)`` in nm.
        angles: Torsions, ``(n_frames, n_torsions)`` in radians.
        weights: Of sum 1, ``(n_frames,)``.
        n_evaluations: Energy evaluations.
    """

    xyz: np.ndarray
    angles: np.ndarray
    weights: np.ndarray
    n_evaluations: int


def by_umbrella(settings: Settings, ps: float, equilibration: float, seed: int, run_all: RunAll) -> Pass:
    """One pass of umbrella sampling.

    Arguments:
        settings: The windows.
        ps: Recorded of each window.
        equilibration: Of each window before that, ps.
        seed: Of the pass.
        run_all: Runs windows.
    """
    windows, n_spread = spread(settings, steps(equilibration), seed, run_all)
    sampled, n_sampled = sample(settings, windows, steps(ps), seed, run_all)
    n_evaluations = n_spread + n_sampled
    angles = np.array([window.angles for window in sampled.values()])  # (n_windows, n_frames, n_torsions)
    centres = np.array([settings.centre(cell) for cell in sampled])
    odd = settings.molecule.odd_states(np.array([window.xyz for window in sampled.values()]))
    free_energy, weights = unbias(angles[..., :2], centres, settings.strength)
    frames = angles.reshape(-1, angles.shape[2])
    if settings.flatten:
        weights = weights * np.exp(settings.flattening(frames))
        weights /= weights.sum()
    print(
        f"  {len(centres)} windows up to {np.ptp(free_energy):.1f} kT, {n_evaluations:.3g} energy evaluations; WHAM "
        f"differs from MBAR by up to {_from_mbar(angles[..., :2], centres, settings.strength):.3f} kT",
        flush=True,
    )
    for name, part in odd.items():
        print(f"  note: {part:.1%} of the windows ended in the state '{name}'", flush=True)
    # Frames of all windows at one time follow each other, so that a part of the frames is a part of the time.
    in_time = np.arange(len(frames)).reshape(angles.shape[:2]).T.ravel()
    xyz = np.concatenate([window.frames for window in sampled.values()])
    return Pass(xyz[in_time], frames[in_time], weights[in_time], n_evaluations)


def _from_mbar(angles: np.ndarray, centres: np.ndarray, strength: float) -> float:
    """The largest difference in kT between WHAM and MBAR on some of the frames: the width of the bins shows there."""
    every = max(1, angles.shape[0] * angles.shape[1] // _CHECKED)
    some = angles[:, ::every]
    free_energy, _ = unbias(some, centres, strength)
    energies = umbrella_bias(some.reshape(-1, 2), centres, strength)
    exact, _ = mbar(energies, np.full(len(centres), some.shape[1]), free_energy)
    return float(np.abs(free_energy - exact).max())


def by_replica_exchange(molecule: Molecule, ps: float, seed: int, n_replicas: int, hottest: float) -> Pass:
    """One pass of replica exchange, ``ps`` picoseconds for each replica."""
    sampled = replica_exchange(molecule, n_replicas * steps(ps), seed, n_replicas, hottest)
    print(f"  {n_replicas} replicas to {hottest:g} K, {sampled.n_evaluations:.3g} energy evaluations", flush=True)
    for name, part in molecule.odd_states(sampled.xyz, sampled.weights).items():
        print(f"  note: the state '{name}' has the population {part:.2g}", flush=True)
    return Pass(sampled.xyz, molecule.angles(sampled.xyz), sampled.weights, sampled.n_evaluations)


def table(names: Sequence[str], populations_of_passes: Sequence[np.ndarray]) -> list[str]:
    """Lines of a table: the populations ``(n,)`` of each pass, their mean, its standard error, and that in kT."""
    rows = np.array(populations_of_passes)
    mean, error = rows.mean(0), rows.std(0, ddof=1) / np.sqrt(len(rows))
    with np.errstate(divide="ignore", invalid="ignore"):
        in_kt = error / mean
    lines = [f"{'':12s}" + "".join(f"{name:>10s}" for name in names)]
    labels = [*(f"pass {i + 1}" for i in range(len(rows))), "mean", "  +-", "  +- in kT"]
    for label, row in zip(labels, [*rows, mean, error, in_kt], strict=True):
        lines.append(f"{label:12s}" + "".join(f"{value:10.4f}" for value in row))
    return lines


def compare(mine: GridReference, other: GridReference) -> list[str]:
    """Lines about the difference from another reference."""
    with np.errstate(divide="ignore", invalid="ignore"):
        in_kt = -np.log(mine.populations() / other.populations())
    p, q = mine.rebinned(), other.rebinned()
    return [
        f"{'compared':12s}" + "".join(f"{value:10.4f}" for value in other.populations()),
        f"{'  off by, kT':12s}" + "".join(f"{value:+10.4f}" for value in in_kt),
        f"KL(compared || this) {distances(q, p).kl:.5f} and back {distances(p, q).kl:.5f} on {N_BINS} x {N_BINS} bins",
    ]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("config", help="YAML file of openmm-cgflow; its system and temperature are used")
    result.add_argument("-o", "--output", type=Path, required=True, help="the npz file to write")
    result.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="SETTING=VALUE", help="instead of the file's"
    )
    result.add_argument("--method", choices=("umbrella", "remd"), default="umbrella")
    result.add_argument("--torsions", nargs=2, default=("phi", "psi"), help="the two of the map (default: phi psi)")
    result.add_argument("--passes", type=int, default=2)
    result.add_argument("--ps", type=float, help="recorded of each window (60) or run of each replica (10000)")
    result.add_argument("--equilibration", type=float, default=10.0, help="ps of each window before that (10)")
    result.add_argument("--spacing", type=float, default=15.0, help="degrees between windows (15)")
    result.add_argument("--force-constant", type=float, default=60.0, help="kJ/mol, of k (1 - cos) (60)")
    result.add_argument("--cutoff", type=float, default=13.0, help="kT above which windows are left out (13)")
    result.add_argument(
        "--flatten", type=float, default=0.0, help="kJ/mol by which umbrella sampling lowers the barriers of χ1 (0)"
    )
    result.add_argument("--replicas", type=int, default=8, help="temperatures of replica exchange (8)")
    result.add_argument("--hottest", type=float, default=600.0, help="K, the highest of them (600)")
    result.add_argument("--workers", type=int, default=1, help="processes for the windows; the result is the same")
    result.add_argument("--platform", default="Reference", help="OpenMM platform (Reference)")
    result.add_argument("--seed", type=seed_option, default=2025)
    result.add_argument(
        "--frames", type=Path, metavar="FILE.dcd", help="keep the frames, too, and FILE.npy, their weights"
    )
    result.add_argument("--compare", type=Path, metavar="FILE.npz", help="another reference")
    return result


def main() -> None:
    options = parser().parse_args()
    molecule = load(options.config, options.torsions, options.platform, options.set)
    settings = Settings(molecule, options.spacing, options.force_constant, options.cutoff, options.flatten)
    other = load_grid(options.compare, molecule) if options.compare else None
    if options.passes < 2:
        raise CGFlowError(f"--passes {options.passes}: at least 2, their difference is the error")
    ps = options.ps if options.ps is not None else _DEFAULT_PS[options.method]
    shortest = 2 * STRIDE * TIMESTEP
    if not (shortest <= ps < math.inf and shortest <= options.equilibration < math.inf):
        raise CGFlowError(f"--ps and --equilibration: expected at least {shortest:g} ps each")
    with writing(options.output):
        options.output.parent.mkdir(parents=True, exist_ok=True)
    passes = []
    with parallel_map(options.workers) as run_map:
        run_all: RunAll = run_together if molecule.takes_all else partial(run_map, run_window)
        for k in range(options.passes):
            print(f"pass {k + 1}", flush=True)
            seed = derive_seed(options.seed, k)
            if options.method == "umbrella":
                passes.append(by_umbrella(settings, ps, options.equilibration, seed, run_all))
            else:
                passes.append(by_replica_exchange(molecule, ps, seed, options.replicas, options.hottest))
    arrays = collect(passes, molecule)
    with atomic_path(options.output) as temporary:
        np.savez_compressed(temporary, **arrays)
    if options.frames is not None:
        mdtraj.Trajectory(np.concatenate([one.xyz for one in passes]), molecule.topology).save(str(options.frames))
        np.save(options.frames.with_suffix(".npy"), np.concatenate([one.weights for one in passes]))
    print(f"wrote {options.output}\n\n{' '.join(options.torsions)} at {molecule.temperature:g} K, ", end="")
    print(f"{arrays['n_evaluations']:.3g} energy evaluations")
    if list(options.torsions) == ["phi", "psi"]:
        print("\n".join(table(RAMACHANDRAN, [populations(one.angles[:, :2], one.weights) for one in passes])))
        if other is not None:
            mine = GridReference(options.output, arrays["P"], arrays["centers"])
            print("\n".join(compare(mine, other)))
    first, second = (circle_histogram(one.angles[:, :2], one.weights) for one in passes[:2])
    print(f"KL(pass 1 || pass 2) {distances(first, second).kl:.5f} and back {distances(second, first).kl:.5f}")
    if "chi1" in arrays:
        print("\n".join(["", *table(ROTAMER, [rotamer_populations(one.angles[:, 2], one.weights) for one in passes])]))
        if options.method == "umbrella" and not options.flatten:
            print(
                "χ1 is not biased: passes may share an error that they do not show; --flatten lowers its barriers, and "
                "--method remd crosses them"
            )


def collect(passes: Sequence[Pass], molecule: Molecule) -> dict[str, Any]:
    """The arrays of the file that is written."""
    maps = np.array([circle_histogram(one.angles[:, :2], one.weights, N_GRID) for one in passes])
    arrays = {
        "P": maps.mean(0),
        "centers": bin_centres(N_GRID),
        "P_passes": maps,
        "n_evaluations": sum(one.n_evaluations for one in passes),
        "temperature": molecule.temperature,
        "torsions": list(molecule.torsions)[:2],
    }
    if list(molecule.torsions)[2:] == ["chi1"]:
        chi1 = np.array([circle_histogram(one.angles[:, 2:], one.weights) for one in passes])
        arrays |= {"chi1": chi1.mean(0), "chi1_passes": chi1}
    return arrays


if __name__ == "__main__":
    sys.exit(exit_code(main))

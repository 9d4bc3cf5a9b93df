"""The paper's synthetic systems against their exact answers, over several seeds.

    python benchmarks/synthetic.py systems/double_well/double_well.yaml --seeds 1 2 3 -o runs/double_well \\
        [--set SETTING=VALUE ...] [--samples N] [--keep]

Each run is trained, N samples are drawn from it (1,000,000, so that the noise of their histogram is small), and
`openmm-cgflow evaluate` compares both with what is known. With --keep, runs that are there are not made again. The last
lines are a table of all seeds. Without tempering and without a potential of mean force:

    python benchmarks/synthetic.py systems/gmm_2d/gmm_2d.yaml -o runs/gmm_2d_plain --set training.method=reverse_kl \\
        tempering.schedule=list
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from md import exit_code

import openmm_cgflow as cgf
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.paper.exact import ExactEvaluation, Mode
from openmm_cgflow.runs.exact import evaluate_exactly
from openmm_cgflow.runs.export import save_samples


def modes_found(modes: dict[str, Mode]) -> int:
    """How many modes hold a tenth of what they should."""
    return sum(mode.population > 0.1 * mode.exact for mode in modes.values())


def summary(found: dict[int, ExactEvaluation], seconds: dict[int, float]) -> str:
    """A row for each seed: what is off by most, and the same with importance weights where there are any."""
    lines = [
        f"{'seed':>4s}{'modes found':>13s}{'weight off by':>15s}{'mean off by, nm':>17s}{'spread / exact':>16s}"
        f"{'ESS':>8s}{'evaluations':>13s}{'s':>7s}"
    ]
    for seed, one in found.items():
        ess = list(one.levels.values())[-1].ess
        for modes in filter(None, (one.modes, one.weighted_modes)):
            weight = max(abs(mode.population - mode.exact) for mode in modes.values())
            visited = [mode for mode in modes.values() if math.isfinite(mode.spread_ratio)]
            away = max((mode.mean_error for mode in visited), default=math.nan)
            spread = max((mode.spread_ratio for mode in visited), key=lambda ratio: abs(ratio - 1), default=math.nan)
            lines.append(
                f"{seed:4d}{f'{modes_found(modes)} of {len(modes)}':>13s}{weight:15.4f}{away:17.4f}{spread:16.3f}"
                f"{ess:8.3f}{one.energy_evaluations:13.3g}{seconds[seed]:7.0f}"
                + ("  weighted" if modes is one.weighted_modes else "")
            )
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser, n_samples: int) -> None:
    """What the runs of a script have in common."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", action="extend", metavar="SETTING=VALUE", default=[])
    parser.add_argument("--samples", type=int, default=n_samples)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("-o", "--output", required=True)


def train_and_evaluate(
    config: str, folder: str, seed: int, settings: Sequence[str], n_samples: int, keep: bool
) -> tuple[ExactEvaluation, dict[str, Any]]:
    """Trains, unless that run is to be kept, and compares many samples with what is known; and the provenance."""
    run = RunDirectory(Path(folder))
    if not (keep and run.samples.exists()):
        changed = [*settings, f"seed={seed}", "samples.plots=false", "samples.n_samples=1000"]
        cgf.train(cgf.load_config(config, changed), run.path, overwrite=run.path.exists(), progress=False)
    model, many = cgf.load(run.path), run.path / "many.dcd"
    save_samples(model, model.sample(n_samples, seed=seed), many)
    return evaluate_exactly(run.path, many), run.read_provenance()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    add_options(parser, n_samples=1_000_000)
    arguments = parser.parse_args()
    found: dict[int, ExactEvaluation] = {}
    seconds: dict[int, float] = {}
    for seed in arguments.seeds:
        found[seed], record = train_and_evaluate(
            arguments.config,
            f"{arguments.output}-seed{seed}",
            seed,
            arguments.set,
            arguments.samples,
            arguments.keep,
        )
        seconds[seed] = record["wall_time_s"]
        print(f"seed {seed}, {record['method']}: {seconds[seed]:.0f} s; {record['ended_by']}")
        print(found[seed].table() + "\n", flush=True)
    print(summary(found, seconds))


if __name__ == "__main__":
    sys.exit(exit_code(main))

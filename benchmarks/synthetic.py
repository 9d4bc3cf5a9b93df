"""The paper's synthetic systems against their exact answers, over several seeds.

    python benchmarks/synthetic.py systems/double_well/double_well.yaml --seeds 1 2 3 -o runs/double_well \\
        [--set SETTING=VALUE ...] [--samples N] [--keep]

Each run is trained, N samples are drawn from it (1,000,000, so that the noise of their histogram is small), and
`openmm-cgflow evaluate` compares both with what is known. With --keep, runs that are there are not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import openmm_cgflow as cgf
from openmm_cgflow.exact import evaluate_exactly
from openmm_cgflow.rundir import RunDirectory
from openmm_cgflow.runner import save_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", metavar="SETTING=VALUE")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("-o", "--output", required=True)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        run = RunDirectory(Path(f"{arguments.output}-seed{seed}"))
        if not (arguments.keep and run.samples.exists()):
            settings = [*(arguments.set or []), f"seed={seed}", "sampling.plots=false", "sampling.n_samples=1000"]
            config = cgf.load_config(arguments.config, settings)
            cgf.train(config, run.path, overwrite=run.path.exists(), progress=False)
        model, many = cgf.load(run.path), run.path / "many.dcd"
        save_samples(model, model.sample(arguments.samples, seed=seed), many)
        record = run.read_provenance()
        print(f"seed {seed}, {record['method']}: {record['wall_time_s']:.0f} s; {record['ended_by']}")
        print(evaluate_exactly(run.path, many).table() + "\n", flush=True)


if __name__ == "__main__":
    main()

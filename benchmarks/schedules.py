"""Four ways down in temperature on the paper's double well, in one table.

    python benchmarks/schedules.py -o runs/schedules [--seeds 1 2 3] [--set SETTING=VALUE ...] [--samples N] [--keep]

The joint density with the map held fixed, from beta = 0.01 to 1: steps that keep the effective sample size (`ess`),
steps that bound the increase of the KL, as in the paper's second version (`kl`), ten equal steps of beta (`linear`),
and a list of ten equal steps of log beta (`list`). Adaptive ladders have as many stages as they need, with as many
updates in each. Populations are those of the minor mode, over the exact one; KL(exact || model) is in nats.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from md import exit_code
from synthetic import add_options, train_and_evaluate

_HOTTEST, _TARGET, _N_STAGES = 12027.236, 120.27236, 10  # K
_LIST = ",".join(f"{temperature:.6g}" for temperature in np.geomspace(_HOTTEST, _TARGET, _N_STAGES)[:-1])
SCHEDULES = {
    "ess": ["tempering.criterion=ess"],
    "kl": ["tempering.criterion=kl"],
    "linear": ["tempering.schedule=linear", f"tempering.n_stages={_N_STAGES}"],
    "list": ["tempering.schedule=list", f"tempering.temperatures=[{_LIST}]"],
}
_COMMON = [
    "training.method=joint",
    f"tempering.start={_HOTTEST}",
    "chains.n_replicas=256",
    "training.learning_rate=0.002",
    "training.n_steps_first=100",
    "training.n_steps=40",
    "training.n_steps_last=300",
    "flow.n_layers=4",
    "flow.n_bins=8",
]
_CONFIG = Path(__file__).parent.parent / "systems" / "double_well" / "double_well.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, n_samples=100_000)
    arguments = parser.parse_args()
    print("schedule  seed  stages  evaluations      s  drawn / exact  weighted / exact        KL   KL slow    ESS")
    for name, schedule in SCHEDULES.items():
        for seed in arguments.seeds:
            found, record = train_and_evaluate(
                str(_CONFIG),
                f"{arguments.output}-{name}-seed{seed}",
                seed,
                [*_COMMON, *schedule, *arguments.set],
                arguments.samples,
                arguments.keep,
            )
            level = list(found.levels.values())[-1]
            print(
                f"{name:8s}{seed:6d}{len(record['temperatures_K']):8d}{found.energy_evaluations:13.3g}{record['wall_time_s']:7.0f}"
                f"{level.populations[1] / level.exact[1]:15.3f}{level.weighted[1] / level.exact[1]:18.3f}"
                f"{level.kl:10.5f}{level.kl_slow:10.5f}{level.ess:7.3f}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(exit_code(main))

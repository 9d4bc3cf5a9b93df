"""Replica-steps per second of the two engines, in one run on one machine.

    python benchmarks/engines.py systems/alanine_dipeptide/alanine_dipeptide.yaml
    python benchmarks/engines.py molecule.pdb --forcefield amber99sbildn.xml amber99_obc.xml --platform CUDA

Every engine makes the same call as a training step: ``chains.n_replicas`` chains of equilibration and frames from the
input structure. Calls of the engines alternate, so that a busy machine slows all of them; the fastest call counts. The
lattice engine's frames are evaluated in single Contexts, which is part of its time.
"""

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from md import exit_code

from openmm_cgflow import MolecularSystem, Partition, load_config
from openmm_cgflow.config import Config
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.engine import Engine, Schedule
from openmm_cgflow.runs.build import choose_partition, load_molecule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("molecule", type=Path, help="configuration (.yaml) or structure (with --forcefield)")
    parser.add_argument("--forcefield", nargs="+", action="extend", default=[])
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="SETTING=VALUE", help="instead of the configuration's"
    )
    parser.add_argument("--slow", help="selection of the slow atoms; by default the configuration's, or backbone")
    parser.add_argument("--platform", default="Reference", help="OpenMM platform; by default Reference")
    parser.add_argument("--n-replicas", type=int, help="by default the configuration's")
    parser.add_argument("--n-calls", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers to compare")
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    if arguments.molecule.suffix in (".yaml", ".yml"):
        config = load_config(arguments.molecule, arguments.set)
        molecule = load_molecule(config)
    else:
        molecule, config = MolecularSystem.from_files(arguments.molecule, arguments.forcefield), Config()
    chains = config.chains
    slow = (Partition.resolve(molecule, arguments.slow) if arguments.slow else choose_partition(config, molecule)).slow
    n_replicas = arguments.n_replicas or chains.n_replicas
    chains = chains.model_copy(update={"platform": arguments.platform, "n_replicas": n_replicas})
    schedule = Schedule(300.0, chains.n_relax, chains.n_equilibration, chains.n_frames, chains.stride)
    variants = {f"contexts, {n} worker(s)": {"engine": "contexts", "n_workers": n} for n in arguments.workers}
    variants["lattice"] = {"engine": "lattice", "n_workers": arguments.workers[-1]}
    with ExitStack() as stack:
        engines = {}
        for name, update in variants.items():
            engines[name] = stack.enter_context(create_engine(molecule, slow, chains.model_copy(update=update)))
            print(f"{name}: {engines[name].description}", flush=True)
        xyz = np.repeat(molecule.positions[None], chains.n_replicas, axis=0)
        for engine in engines.values():
            call(engine, xyz, schedule, seed=0)  # starts workers, compiles kernels
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for seed in range(1, 1 + arguments.n_calls):
            for name, engine in engines.items():
                seconds[name].append(call(engine, xyz, schedule, seed))
    n_steps = chains.n_replicas * (chains.n_relax + chains.n_equilibration + chains.n_frames * chains.stride)
    slowest = max(min(times) for times in seconds.values())
    print(
        f"\n{molecule.n_atoms} atoms, {chains.n_replicas} replicas\n\n{'engine':24}{'replica-steps/s':>18}{'ratio':>8}"
    )
    for name, times in seconds.items():
        print(f"{name:24}{n_steps / min(times):18.0f}{slowest / min(times):8.2f}")


def call(engine: Engine, xyz: np.ndarray, schedule: Schedule, seed: int) -> float:
    """Seconds of one training step's chains."""
    start = time.perf_counter()
    engine.run(xyz, schedule, seed)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(exit_code(main))

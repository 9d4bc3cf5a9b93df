"""Short runs of all three methods: records their numbers, or compares them bit for bit with a record.

    python benchmarks/same_numbers.py record FOLDER     # before a change that must not change any number
    python benchmarks/same_numbers.py compare FOLDER    # after it

The same seed gives the same numbers on one machine with the same versions of torch and OpenMM; elsewhere the last
digits differ, and chains of molecular dynamics amplify that. A record holds the fingerprint of where it was made.
tests/test_same_numbers.py holds the records in tests/data against the code.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import mdtraj  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from openmm_cgflow import load_config, train  # noqa: E402

SYSTEMS = Path(__file__).resolve().parent.parent / "systems"
COMMON = (
    "chains.n_replicas=16",
    "chains.n_pool_steps=30",
    "chains.n_workers=1",
    "chains.platform=Reference",
    "flow.n_layers=2",
    "flow.hidden_features=[16]",
    "samples.n_samples=16",
    "samples.n_equilibration=5",
    "samples.plots=false",
    "training.checkpoint_interval=1000",
)
# Rounds, switching, the last fit and the flow alone: every phase of the default method.
PMF = (
    "pmf.n_updates=5",
    "pmf.final_updates=5",
    "pmf.response_updates=5",
    "pmf.flow_updates=2",
    "pmf.flow_batch_size=32",
    "pmf.polish_updates=50",
    "pmf.hidden_features=[16]",
    "stopping.max_rounds=3",
    "stopping.max_polish_cycles=2",
    "pmf.n_switched=1",
    "stopping.free_energy_error=5",
    "samples.n_verified=2",
    "samples.n_switches=2",
)
LADDER = (
    "tempering.schedule=adaptive",
    "tempering.start=600",
    "training.n_steps_first=4",
    "training.n_steps=3",
    "training.n_steps_last=4",
)
CASES = {
    "ala2_pmf": ("alanine_dipeptide", (*COMMON, *PMF)),
    "ala2_reverse_kl": ("alanine_dipeptide", (*COMMON, *LADDER, "training.method=reverse_kl")),
    "butane_pmf": ("butane", (*COMMON, *PMF)),
    "butane_reverse_kl": ("butane", (*COMMON, *LADDER, "training.method=reverse_kl", "coordinates.kind=cartesian")),
    "butane_joint": ("butane", (*COMMON, *LADDER, "training.method=joint")),
    "double_well_pmf": ("double_well", (*COMMON, *PMF)),
    "double_well_joint": ("double_well", (*COMMON, *LADDER, "training.method=joint", "joint.map=linear")),
}


def numbers(case: str, folder: Path) -> dict[str, np.ndarray]:
    """Runs a case: the columns of its metrics and the positions of its frames, nm, shape (n_frames, n_atoms, 3)."""
    system, settings = CASES[case]
    train(load_config(SYSTEMS / system / f"{system}.yaml", settings), folder / case, progress=False)
    with (folder / case / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {f"metrics {name}": np.array([float(row[name]) for row in rows]) for name in rows[0]}
    frames = mdtraj.load(str(folder / case / "samples.dcd"), top=str(folder / case / "topology.pdb"))
    return columns | {"frames": frames.xyz}


def fingerprint() -> dict[str, str]:
    """What the last digits depend on: the processor with what it can do, and versions."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = " ".join(sorted(facts.get("flags", facts.get("Features", "")).split()))
    return {
        "processor": facts.get("model name", platform.processor() or platform.machine()),
        "flags": hashlib.sha256(flags.encode()).hexdigest()[:12],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        **{name: importlib.metadata.version(name) for name in ("torch", "openmm", "numpy", "scipy")},
    }


def read_record(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Numbers and fingerprint of a record."""
    with np.load(path) as archive:
        columns = dict(archive)
    return columns, json.loads(str(columns.pop("fingerprint", "{}")))


def differences(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> list[str]:
    """What is not the same to the last bit, a line each; nan is equal to nan."""
    lines = [f"{name}: only in one of the two" for name in sorted(old.keys() ^ new.keys())]
    for name in sorted(old.keys() & new.keys()):
        if old[name].shape != new[name].shape:
            lines.append(f"{name}: shape {new[name].shape}, was {old[name].shape}")
        elif not np.array_equal(old[name], new[name], equal_nan=True):
            first = int(np.flatnonzero(~((old[name] == new[name]) | (np.isnan(old[name]) & np.isnan(new[name]))))[0])
            lines.append(
                f"{name}: differs from number {first} on, {new[name].flat[first]}, was {old[name].flat[first]}"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for case in CASES:
            new, path = numbers(case, Path(temporary)), options.folder / f"{case}.npz"
            if options.what == "record":
                np.savez_compressed(path, fingerprint=np.array(json.dumps(fingerprint())), **new)
                print(f"{case}: {len(new['metrics step'])} steps and {len(new['frames'])} frames recorded in {path}")
                continue
            found = differences(read_record(path)[0], new)
            failed += bool(found)
            print("\n  ".join([f"{case}: {'the same' if not found else 'NOT THE SAME'}", *found]))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Is the map of a molecule without a chiral centre its own mirror image? A check that needs no reference.

    python benchmarks/mirror.py runs/glycine-seed1 runs/glycine-seed2 runs/glycine-seed3

For each run, KL(mirrored || map) of the frames on disk in (phi, psi) and (-phi, -psi) on 36 x 36 bins, and what a
symmetric map of as many frames scores: each frame of the run mirrored or not at random, against the opposite choice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from md import exit_code

from openmm_cgflow.analysis.distances import N_BINS, compare
from openmm_cgflow.analysis.reference import load_frames, load_structure
from openmm_cgflow.analysis.states import peptide_torsions
from openmm_cgflow.files.run_directory import RunDirectory

_N_SPLITS = 50


def histogram(torsions: np.ndarray) -> np.ndarray:
    """Probabilities of pairs of torsions, radians, shape (n, 2)."""
    edges = np.linspace(-np.pi, np.pi, N_BINS + 1)
    return np.histogram2d(*torsions.T, bins=(edges, edges))[0] / len(torsions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    for path in parser.parse_args().runs:
        run = RunDirectory.open(path)
        torsions = peptide_torsions(load_frames(run.samples, load_structure(run.topology)))
        rng = np.random.default_rng(0)
        for name in (name.removeprefix("phi_") for name in torsions if name.startswith("phi_")):
            pair = np.stack((torsions[f"phi_{name}"], torsions[f"psi_{name}"]), axis=1)
            found = compare(histogram(-pair), histogram(pair)).kl
            signs = rng.choice([-1, 1], (_N_SPLITS, len(pair), 1))
            floor = [compare(histogram(-sign * pair), histogram(sign * pair)).kl for sign in signs]
            print(
                f"{path} {name}: {len(pair)} frames, KL(mirrored || map) {found:.4f}; a symmetric map scores "
                f"{np.mean(floor):.4f} +- {np.std(floor):.4f}"
            )


if __name__ == "__main__":
    sys.exit(exit_code(main))

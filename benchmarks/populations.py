"""Does training find the right populations? Several seeds from configuration to samples on disk, against a reference.

    python benchmarks/populations.py systems/alanine_dipeptide/alanine_dipeptide.yaml --reference reference.npz \\
        --seeds 1 2 3 -o runs/ala2 [--set SETTING=VALUE ...] [--keep]

A row for each seed and ensemble: `samples` are the frames on disk; `weighted` the same frames with the importance
weights that they still have. ESS is that of the flow at the end of training. Free energies of basins,
-ln(population), are those of the samples minus the reference's, kT, with the bootstrap error of a run's frames;
KL(reference || samples) is in nats on 36 x 36 bins, and `floor` is what as many perfect samples would score.
`energy evaluations` are all of a run, those of the final samples and checks included; `training` are those until
training ended. With --keep, runs that are there are not made again. Without a reference the populations alone are
printed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import mdtraj
import numpy as np
import torch
from md import exit_code
from mdtraj.geometry.dihedral import indices_phi, indices_psi

import openmm_cgflow as cgf
from openmm_cgflow.analysis.basins import Basin
from openmm_cgflow.analysis.states import RAMACHANDRAN, ramachandran_basin
from openmm_cgflow.files.log import read_rows
from openmm_cgflow.files.run_directory import RunDirectory

_N_DRAWS = 300_000


def run(arguments: argparse.Namespace, seed: int) -> RunDirectory:
    """Trains with one seed, unless that run is to be kept."""
    folder = RunDirectory(Path(f"{arguments.output}-seed{seed}"))
    if not (arguments.keep and folder.samples.exists()):
        config = cgf.load_config(arguments.config, [*arguments.set, f"seed={seed}"])
        cgf.train(config, folder.path, overwrite=folder.path.exists(), progress=False)
    return folder


def describe(folder: RunDirectory) -> str:
    """What a run cost and what it says of itself."""
    record, rows = folder.read_provenance(), read_rows(folder.metrics)
    text = f"{folder.path}: {record['energy_evaluations']:.2e} energy evaluations, {rows[-1]['evaluations']:.2e} of "
    text += f"them training, {record['wall_time_s']:.0f} s; {record['ended_by']}"
    if record.get("unmet"):
        text += f"\n  not met: {'; '.join(record['unmet'])}"
    if folder.verification.exists():
        check = json.loads(folder.verification.read_text())
        text += (
            f"\n  switching differs by {check['rms_difference']:.2f} kT rms, by its own errors {check['rms_error']:.2f}"
        )
    return text


def free_energy(state: Basin, reference: Basin | None) -> str:
    """A basin's free energy minus the reference's and its sampling error; blank where one of them is not known."""
    if reference is None or reference is state or not state.population or not reference.population:
        return " " * 16
    error = math.nan if state.population_error is None else state.population_error / state.population
    return f"{-math.log(state.population / reference.population):+9.3f} ±{error:5.3f}"


def draws(folder: RunDirectory) -> str | None:
    """Populations of many draws of z, plain and weighted; None unless phi and psi of one residue are slow."""
    model = cgf.load(folder.path)
    if not model.density.weighted:
        return None
    atoms = np.array(model.coordinates.atoms)
    topology = model.molecular_system.mdtraj_topology.subset(np.sort(atoms))
    torsions = np.concatenate((indices_phi(topology), indices_psi(topology)))
    if len(torsions) != 2:
        return None
    with torch.no_grad():
        z, _ = model.flow.sample(_N_DRAWS, torch.Generator().manual_seed(1))
        xyz = model.coordinates.to_xyz(z)[:, np.argsort(atoms)]
    angles = mdtraj.compute_dihedrals(mdtraj.Trajectory(xyz.numpy(), topology), torsions, periodic=False)
    log_weights = model.log_weights(z)
    basin = ramachandran_basin(*angles.T)
    text = []
    for weights in (np.ones(_N_DRAWS), np.exp(log_weights - log_weights.max())):
        text.append(" ".join(f"{p:.4f}" for p in np.bincount(basin, weights, len(RAMACHANDRAN)) / weights.sum()))
    return f"{_N_DRAWS} draws of z, {', '.join(RAMACHANDRAN)}: {text[0]}; weighted {text[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--reference")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("-o", "--output", required=True)
    arguments = parser.parse_args()
    folders = [(seed, run(arguments, seed)) for seed in arguments.seeds]
    for _, folder in folders:
        print(describe(folder))
    header = ""
    for seed, folder in folders:
        ess = read_rows(folder.metrics)[-1].get("ess", math.nan)
        found = cgf.evaluate(folder.path, arguments.reference)
        for residue, basins in found.basins.items():
            density = found.maps.get(residue)
            if header != str(list(basins)):
                header = str(list(basins))
                names = "".join(f"{name:>10s}{'F - ref (kT)':>16s}" for name in basins)
                print(f"\n{residue:6s} seed ensemble   {names}   KL     floor    ESS")
            for ensemble in (
                name for name in ("samples", "weighted", "reference") if name in next(iter(basins.values()))
            ):
                text = f"{residue:6s} {seed:4d} {ensemble:10s}"
                for basin in basins.values():
                    state = basin[ensemble]
                    text += f"{state.population:10.4f}" + free_energy(state, basin.get("reference"))
                distance = density.distances.get(ensemble) if density is not None else None
                if distance is not None:
                    text += f"   {distance.kl:.4f} {density.noise_floor[ensemble].kl:.4f}"
                if ensemble == "samples" and math.isfinite(ess):
                    text += f"   {ess:.3f}"
                print(text)
        if (text := draws(folder)) is not None:
            print(f"seed {seed}: {text}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

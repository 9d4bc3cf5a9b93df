"""Error of basin free energies against energy evaluations: the curve of one run.

    python benchmarks/convergence.py runs/ala2-seed1 --reference reference.npz

Fits the potential of mean force of a finished run anew for every round, from the mean forces that the training had then
and with what it knew of the fast atoms' response by then, and weighs the final flow's samples with each. A row for
each: energy evaluations so far, populations, and free energies minus the reference's in kT, relative to the
reference's main basin. The last row is that of the training itself, with the differences from switching.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mdtraj
import numpy as np
import torch
from md import exit_code

import openmm_cgflow as cgf
from openmm_cgflow.analysis.reference import GridReference, load_reference
from openmm_cgflow.analysis.states import RAMACHANDRAN, ramachandran_basin
from openmm_cgflow.files.log import read_rows
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.forces.estimator import ChainParts
from openmm_cgflow.networks.pmf import PMF, new_pmf
from openmm_cgflow.networks.response import new_response
from openmm_cgflow.networks.threads import one_torch_thread
from openmm_cgflow.runs.load import load_state
from openmm_cgflow.training.pmf.fits import MeanForceBuffer, PMFFitter, ResponseFitter

_N_SAMPLES = 100_000
_N_BLOCKS = 10  # of updates with one learning rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--every", type=int, default=1, help="rounds between two rows (1)")
    arguments = parser.parse_args()
    run, model = RunDirectory.open(arguments.run), cgf.load(arguments.run)
    saved = run.load_checkpoint(lambda path: load_state(path, model.molecular_system))
    if saved is None:
        raise SystemExit(f"{run.path}: no checkpoint")
    config = cgf.load_config(run.config)
    kept = MeanForceBuffer(config.pmf.n_members)
    kept.load_state_dict(saved["method"]["shared"]["buffer"])
    evaluations = [int(row["evaluations"]) for row in read_rows(run.metrics)]
    generator = torch.Generator().manual_seed(config.seed)
    z, log_q = model.flow.sample(_N_SAMPLES, generator)
    volume = model.coordinates.log_volume(z)
    inside = np.equal.outer(np.arange(len(RAMACHANDRAN)), ramachandran_basin(*z[:, :2].numpy().T)).astype(float)
    structure = mdtraj.Trajectory(model.molecular_system.positions, model.molecular_system.mdtraj_topology)
    reference = load_reference(Path(arguments.reference), structure)
    if not isinstance(reference, GridReference):
        raise SystemExit(f"{arguments.reference}: expected a gridded reference")
    truth = reference.populations()
    base = truth.argmax()
    growing, response = (
        MeanForceBuffer(config.pmf.n_members),
        new_response(config.pmf, model.geometry, config.temperature, config.seed),
    )
    response_fitter = ResponseFitter(response)

    def report(n_evaluations: int, pmf: PMF) -> None:
        weights = torch.softmax(volume - pmf(z) - log_q, dim=0).numpy()
        populations = inside @ weights
        error = -np.log(populations / populations[base]) + np.log(truth / truth[base])
        cells = "".join(f"{p:10.4f}{e:+11.3f}" for p, e in zip(populations, error, strict=True))
        print(f"{n_evaluations:11.2e} {1 / np.square(weights).sum() / len(z):5.2f} {cells}", flush=True)

    names = "".join(f"{name:>10s}{'error (kT)':>11s}" for name in RAMACHANDRAN)
    print(f"evaluations   ESS {names}")
    with one_torch_thread(), torch.no_grad():
        for number, (part, count) in enumerate(zip(kept.rounds, evaluations, strict=False), 1):
            growing.rounds.append(part)
            data = growing.data()
            parts = ChainParts(data["slow"], data["fast"])
            with torch.enable_grad():
                response_fitter.fit(data["z"], parts, config.pmf.response_updates, generator)
                if number % arguments.every and number != len(kept.rounds):
                    continue
                data, pmf = response.corrected(data), new_pmf(config.pmf, model.geometry, config.seed)
                fitter, n = PMFFitter(pmf, config.pmf.learning_rate), _N_BLOCKS
                for k in range(n):
                    fitter.fit(data, config.pmf.final_updates // n, generator, 1 - k / n)
            report(count, pmf)
        report(evaluations[-1], model.density.pmf)


if __name__ == "__main__":
    sys.exit(exit_code(main))

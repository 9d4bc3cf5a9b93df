"""Noise of the mean-force estimators at one z, and whether their means agree.

    python benchmarks/variance.py runs/ala2-seed1

The estimators are the paper's (Cartesian), the co-moving one, and the co-moving one with the response of the fast atoms
that the run has learned. The slow atoms stay at the input structure. Every estimate is the mean of a short chain of
``chains.n_frames`` frames. Printed for each slow coordinate, in kT per radian (torsions) or per thermal width at the
target temperature: the standard deviation of one estimate by each, how many times fewer samples the last one needs than
the others, and how far its mean is from theirs in standard errors.
"""

import argparse
import sys

import numpy as np
import torch
from md import exit_code

import openmm_cgflow as cgf
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.engine import Schedule
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.forces.gradients import cartesian_gradients, comoving_gradients
from openmm_cgflow.units import thermal_beta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--n-estimates", type=int, default=2048)
    arguments = parser.parse_args()
    model = cgf.load(arguments.run)
    if model.density.follow is None:
        raise SystemExit(f"{arguments.run}: was trained by reverse KL and has no response of the fast atoms")
    config = cgf.load_config(RunDirectory.open(arguments.run).config)
    all_atom, system = model.geometry.all_atom, model.molecular_system
    with create_engine(system, model.partition.slow, config.chains) as engine:
        z = all_atom.read_slow(torch.tensor(system.positions)).expand(arguments.n_estimates, -1)
        fast_atoms, chains = model.fast_atoms(engine), config.chains
        schedule = Schedule(config.temperature, chains.n_relax, 1000, chains.n_frames, chains.stride)
        frames = fast_atoms.run(z, schedule)
    beta, valid = thermal_beta(config.temperature), frames.valid
    comoving, balance = comoving_gradients(all_atom, z, frames, beta)
    estimates = {
        "Cartesian": cartesian_gradients(all_atom, z, frames, beta),
        "co-moving": comoving,
        "response": comoving + model.density.response.correction(z, balance),
    }
    # One thermal width, in units of z: the harmonic width at the target over the scale of the interval.
    coordinates = model.coordinates
    widths = model.geometry.harmonic.widths(config.temperature)[: len(model.partition.slow)]
    unit = widths[coordinates.slot_atom, coordinates.slot_kind] / coordinates.scale.numpy()
    unit[: coordinates.n_circular] = 1.0
    means = {name: values[valid].mean(1).numpy() * unit for name, values in estimates.items()}
    print(f"{int(valid.sum())} estimates of {config.chains.n_frames} frames at {config.temperature:g} K")
    print(f"{'':44s}{'standard deviation':>30s}{'variance over last':>22s}{'difference to last':>22s}")
    first = "".join(f"{name:>10s}" for name in means)
    others = "".join(f"{name:>11s}" for name in list(means)[:-1])
    print(f"{'coordinate':44s}{first}{others}{others}")
    *_, best = means.values()
    for k, name in enumerate(coordinates.names):
        deviations = [values[:, k].std(ddof=1) for values in means.values()]
        row = "".join(f"{deviation:10.3f}" for deviation in deviations)
        row += "".join(f"{(deviation / deviations[-1]) ** 2:11.1f}" for deviation in deviations[:-1])
        for values in list(means.values())[:-1]:
            away = values[:, k] - best[:, k]
            row += f"{away.mean() / (away.std(ddof=1) / np.sqrt(len(away))):+9.1f} s"
        print(f"{name:44s}{row}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

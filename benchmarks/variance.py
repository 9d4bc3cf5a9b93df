"""Noise of the two mean-force estimators at one z, and whether their means agree.

    python benchmarks/variance.py systems/alanine_dipeptide/alanine_dipeptide.yaml

The slow atoms stay at the input structure. Every estimate is the mean of a short chain of ``sampler.n_frames`` frames.
Printed for each slow coordinate, in kT per radian (torsions) or per thermal width at the target temperature: the
standard deviation of one estimate by both estimators, the ratio of their variances (how many times fewer samples the
co-moving one needs), and the difference of their means in standard errors.
"""

import argparse

import numpy as np
import torch

from openmm_cgflow import MolecularSystem, Partition, load_config
from openmm_cgflow.meanforce import frame_gradients
from openmm_cgflow.replicas import create_engine
from openmm_cgflow.scaffold import Scaffold
from openmm_cgflow.units import thermal_beta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--n-estimates", type=int, default=2048)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    system = MolecularSystem.from_files(config.system)
    partition = Partition.resolve(system, config.partition.slow)
    with create_engine(system, partition.slow, config.sampler) as engine:
        scaffold = Scaffold.build(config, system, partition, engine.evaluate)
        coordinates = scaffold.assembly.coordinates
        z = scaffold.assembly.read_slow(torch.tensor(system.positions)).expand(arguments.n_estimates, -1)
        chains = scaffold.chains(engine)
        frames = chains.run(z, config.temperature, 1000, config.sampler.n_frames, config.sampler.stride)
    beta = thermal_beta(config.temperature)
    n = coordinates.n_circular
    # One thermal width, in units of z: the harmonic width at the target over the scale of the interval.
    widths = scaffold.harmonic.widths(config.temperature)[: len(partition.slow)]
    in_z = widths[coordinates.slot_atom, coordinates.slot_kind] * 2 * coordinates.bound
    unit = in_z / (coordinates.high - coordinates.low).numpy()
    unit[:n] = 1.0
    estimates = {
        name: frame_gradients(scaffold.assembly, z, frames, beta, name)[frames.valid].mean(1).numpy() * unit
        for name in ("cartesian", "comoving")
    }
    deviation = {name: values.std(0, ddof=1) for name, values in estimates.items()}
    difference = estimates["cartesian"] - estimates["comoving"]
    sigmas = difference.mean(0) / (difference.std(0, ddof=1) / np.sqrt(len(difference)))
    print(f"{len(difference)} estimates of {config.sampler.n_frames} frames at {config.temperature:g} K")
    print(f"{'coordinate':44s} {'Cartesian':>10s} {'co-moving':>10s} {'variance ratio':>15s} {'difference':>11s}")
    for k, name in enumerate(coordinates.names):
        a, b = deviation["cartesian"][k], deviation["comoving"][k]
        print(f"{name:44s} {a:10.3f} {b:10.3f} {a * a / (b * b):15.1f} {sigmas[k]:+9.1f} s")


if __name__ == "__main__":
    main()

"""Are the samples of a run what molecular dynamics samples? Populations, and histograms against short free MD.

    python benchmarks/quality.py runs/ala2 [--reference FILE.npz]

Prints the populations of the Ramachandran basins with bootstrap errors (and a gridded reference's, if given: arrays P
(n, n) and centers in radians), then Kolmogorov-Smirnov distances of all bond lengths, angles and the energy between the
samples and free Langevin dynamics of the same System, beside the noise floor: the same distance between the two halves
of the MD replicas.
"""

import argparse
import sys

import mdtraj
import numpy as np
import openmm
from md import exit_code
from openmm import unit
from scipy.stats import ks_2samp

from openmm_cgflow import load
from openmm_cgflow.analysis.states import RAMACHANDRAN, peptide_torsions, ramachandran_basin
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.files.trajectory import read_colvar


def populations(phi: np.ndarray, psi: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights of the basins ``states.RAMACHANDRAN``, shape (4,); angles in radians."""
    return np.bincount(ramachandran_basin(phi, psi), weights, len(RAMACHANDRAN)) / weights.sum()


def free_md(
    system: openmm.System, positions: np.ndarray, temperature: float, n_replicas: int, ps: float, seed: int
) -> tuple:
    """Frames (n_replicas, n_frames, n_atoms, 3) nm and energies (n_replicas, n_frames) kJ/mol, 0.2 ps apart."""
    integrator = openmm.LangevinMiddleIntegrator(temperature, 2.0, 0.001)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    xyz, energy = [], []
    for replica in range(n_replicas):
        context.setPositions(positions)
        openmm.LocalEnergyMinimizer.minimize(context, 10.0)
        context.setVelocitiesToTemperature(temperature, seed + replica)
        integrator.step(10000)
        for _ in range(int(ps / 0.2)):
            integrator.step(200)
            state = context.getState(positions=True, energy=True)
            xyz.append(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
            energy.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
    shape = (n_replicas, -1)
    return np.array(xyz).reshape(*shape, *positions.shape), np.array(energy).reshape(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--reference")
    parser.add_argument("--md-replicas", type=int, default=8)
    parser.add_argument("--md-ps", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    run, model = RunDirectory.open(arguments.run), load(arguments.run)
    record = run.read_provenance()
    print(f"{arguments.run}: {record['energy_evaluations']:.3g} energy evaluations, {record['wall_time_s']:.0f} s")
    print(record["engine"])
    topology = mdtraj.load(str(run.topology)).topology
    samples, energy = mdtraj.load(str(run.samples), top=topology), read_colvar(run.colvar)["energy"]
    torsions = peptide_torsions(samples)
    if len(torsions) == 2:
        phi, psi = torsions.values()
        rng = np.random.default_rng(arguments.seed)
        n = len(phi)
        boot = [populations(phi[i], psi[i], np.ones(n)) for i in (rng.integers(0, n, n) for _ in range(200))]
        rows = [("samples", populations(phi, psi, np.ones(n))), ("  +-", np.std(boot, axis=0))]
        if arguments.reference:
            grid = np.load(arguments.reference)
            a, b = np.meshgrid(grid["centers"], grid["centers"], indexing="ij")
            rows.append(("reference", populations(a.ravel(), b.ravel(), grid["P"].ravel())))
        print(f"{'populations':12s}" + "".join(f"{name:>10s}" for name in RAMACHANDRAN))
        for name, row in rows:
            print(f"{name:12s}" + "".join(f"{value:10.4f}" for value in row))
    system = model.molecular_system
    xyz, md_energy = free_md(
        system.system, system.positions, model.temperature, arguments.md_replicas, arguments.md_ps, arguments.seed
    )
    md = mdtraj.Trajectory(xyz.reshape(-1, *xyz.shape[2:]), topology)
    half = len(md) // 2
    bonds = np.array([[a.index, b.index] for a, b in topology.bonds])
    neighbours = {
        i: sorted({*bonds[bonds[:, 0] == i, 1], *bonds[bonds[:, 1] == i, 0]}) for i in range(topology.n_atoms)
    }
    angles = np.array([(i, j, k) for j, near in neighbours.items() for i in near for k in near if i < k])
    print(f"\nKS distance to {arguments.md_replicas} x {arguments.md_ps:g} ps of free MD (largest, median)")
    for name, mine, theirs in (
        ("bond lengths", mdtraj.compute_distances(samples, bonds), mdtraj.compute_distances(md, bonds)),
        ("angles", mdtraj.compute_angles(samples, angles), mdtraj.compute_angles(md, angles)),
        ("energy", energy[:, None], md_energy.reshape(-1, 1)),
    ):
        distances = [ks_2samp(a, b).statistic for a, b in zip(mine.T, theirs.T, strict=True)]
        floor = [ks_2samp(b[:half], b[half:]).statistic for b in theirs.T]
        print(
            f"{name:14s} samples {max(distances):.3f} {np.median(distances):.3f}   "
            f"noise floor {max(floor):.3f} {np.median(floor):.3f}"
        )
    print(
        f"mean energy    samples {energy.mean():.2f}   MD {md_energy.mean():.2f} +- "
        f"{md_energy.mean(1).std(ddof=1) / np.sqrt(len(md_energy)):.2f} kJ/mol"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))

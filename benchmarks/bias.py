"""Barriers flattened by a trained model: how often all-atom dynamics crosses them, and what reweighting gives back.

    python benchmarks/bias.py runs/ala2 --reference FILE.npz

Runs ordinary Langevin dynamics of the run's molecule twice, with and without the force that
``CGModel.create_force(scale=-S, energy=..., mechanism=...)`` makes, for the same number of steps of 2 fs; with
--only-with, long, it is a reference of its own, whatever the bias is worth. Prints how
often phi went through 0, how often it went from one side of it to the other for good (beyond 30 degrees), the effective
number of frames that the weights exp(beta V) leave, and populations beside a gridded reference's, with errors from
blocks of the trajectory.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mdtraj
import numpy as np
import openmm
from md import HYDROGEN_MASS, STRIDE, TIMESTEP, exit_code, langevin
from openmm import unit

import openmm_cgflow as cgf
from openmm_cgflow.analysis.reference import load_reference
from openmm_cgflow.analysis.states import RAMACHANDRAN, peptide_torsions, ramachandran_basin
from openmm_cgflow.units import thermal_beta

_BIAS = 1  # the force group
_EQUILIBRATION = 5000  # steps
_FAR = np.radians(30)
_N_BLOCKS = 20


@dataclass(frozen=True)
class Run:
    """Angles in radians and the energy of the bias in kJ/mol of each frame, and seconds of processor time per step."""

    phi: np.ndarray
    psi: np.ndarray
    bias: np.ndarray
    seconds: float


def simulate(model: cgf.CGModel, force: openmm.Force | None, n_steps: int, seed: int) -> Run:
    molecule = model.molecular_system
    system = openmm.XmlSerializer.clone(molecule.system)
    for i, symbol in enumerate(molecule.elements):
        if symbol == "H":
            system.setParticleMass(i, HYDROGEN_MASS)
    if force is not None:
        force.setForceGroup(_BIAS)
        system.addForce(force)
    integrator = langevin(model.temperature, seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(molecule.positions)
    context.setVelocitiesToTemperature(model.temperature, seed)
    integrator.step(_EQUILIBRATION)
    xyz, bias = [], []
    started = time.process_time()
    for _ in range(n_steps // STRIDE):
        integrator.step(STRIDE)
        xyz.append(context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer))
        energy = context.getState(energy=True, groups={_BIAS}).getPotentialEnergy()
        bias.append(energy.value_in_unit(unit.kilojoule_per_mole))
    seconds = (time.process_time() - started) / n_steps
    phi, psi = peptide_torsions(mdtraj.Trajectory(np.array(xyz), molecule.mdtraj_topology)).values()
    return Run(phi, psi, np.array(bias), seconds)


def crossings(phi: np.ndarray) -> tuple[int, int]:
    """How often phi passes 0 between two frames, and how often it gets from beyond 30 degrees on one side to the other.

    Passing 180 degrees is neither.
    """
    near = np.abs(phi) < np.pi / 2
    passed = (np.sign(phi[1:]) != np.sign(phi[:-1])) & near[1:] & near[:-1]
    side, n_transitions, through = 0, 0, False
    for angle in phi:
        through |= abs(angle) < _FAR
        if abs(angle) < _FAR:
            continue
        now = 1 if angle > 0 else -1
        n_transitions += bool(side and now != side and through)
        side, through = now, False
    return int(passed.sum()), n_transitions


def populations(run: Run, beta: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Weights of the basins, their standard errors by the block bootstrap, and Kish's effective number of frames."""
    weights = np.exp(beta * (run.bias - run.bias.max()))
    basin = np.eye(len(RAMACHANDRAN))[ramachandran_basin(run.phi, run.psi)] * weights[:, None]
    blocks = np.array([part.sum(0) for part in np.array_split(basin, _N_BLOCKS)])
    draws = np.random.default_rng(0).integers(0, _N_BLOCKS, (1000, _N_BLOCKS))
    again = blocks[draws].sum(1)
    found = blocks.sum(0) / blocks.sum()
    return found, (again / again.sum(1, keepdims=True)).std(0), weights.sum() ** 2 / np.square(weights).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--scale", type=float, default=0.8)
    parser.add_argument("--ceiling", type=float, help="kJ/mol above the minimum; there the bias levels off")
    parser.add_argument("--energy", default="torsions", choices=("pmf", "flow", "torsions"))
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--mechanism", default="table", choices=("table", "python", "torchforce"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only-with", action="store_true", help="leave out the run without the bias")
    arguments = parser.parse_args()
    model = cgf.load(arguments.run)
    beta = thermal_beta(model.temperature)
    force = model.create_force(
        scale=-arguments.scale, energy=arguments.energy, mechanism=arguments.mechanism, ceiling=arguments.ceiling
    )
    print(
        f"{arguments.steps} steps of {1000 * TIMESTEP:g} fs; bias: -{arguments.scale:g} x {arguments.energy}, "
        f"{arguments.mechanism}" + (f", up to {arguments.ceiling:g} kJ/mol" if arguments.ceiling else "")
    )
    print(
        f"{'':12s}{'phi = 0':>9s}{'30 deg':>9s}{'ESS':>9s}{'us/step':>9s}" + "".join(f"{n:>18s}" for n in RAMACHANDRAN)
    )
    runs = [("with bias", force)] if arguments.only_with else [("with bias", force), ("without", None)]
    for name, bias in runs:
        run = simulate(model, bias, arguments.steps, arguments.seed)
        found, error, size = populations(run, beta)
        passed, transitions = crossings(run.phi)
        print(
            f"{name:12s}{passed:9d}{transitions:9d}{size:9.0f}{1e6 * run.seconds:9.0f}"
            + "".join(f"{a:8.4f} +- {b:.4f}" for a, b in zip(found, error, strict=True)),
            flush=True,
        )
    if arguments.reference:
        structure = mdtraj.Trajectory(model.molecular_system.positions, model.molecular_system.mdtraj_topology)
        grid = load_reference(arguments.reference, structure)
        print(f"{'reference':48s}" + "".join(f"{value:10.4f}{'':8s}" for value in grid.populations()))


if __name__ == "__main__":
    sys.exit(exit_code(main))

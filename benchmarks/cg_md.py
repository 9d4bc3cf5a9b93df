"""Beads that move under the exported free energy: is their map of torsions the flow's own?

    python benchmarks/cg_md.py runs/ala2

Runs Langevin dynamics of many copies of the beads that ``CGModel.create_cg_system`` makes, all in one System, so that
one call of the torch model serves every copy. All start from the input structure; the first third is left out. Prints
populations of the basins with phi < 0, which the dynamics connects (at 300 K it crosses phi = 0 too seldom), beside
those of as many independent samples of the flow, as drawn and weighted to the fitted potential; errors are bootstraps
over copies. KL is that of the map on 10 degree bins from the flow's, beside that between two halves of the copies.
"""

import argparse
import sys
import time

import numpy as np
import openmm
import torch
from md import exit_code
from openmm import unit
from torch import Tensor, nn

import openmm_cgflow as cgf
from openmm_cgflow.analysis.distances import circle_histogram, compare
from openmm_cgflow.analysis.states import RAMACHANDRAN, ramachandran_basin
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.torch_force import python_force
from openmm_cgflow.networks.threads import one_torch_thread

_CONNECTED = len(RAMACHANDRAN) - 1


class Copies(nn.Module):
    """The energy of all copies, beads of one after those of the other."""

    def __init__(self, energy: nn.Module, n_beads: int) -> None:
        super().__init__()
        self.energy, self.n_beads = energy, n_beads

    def forward(self, xyz: Tensor) -> Tensor:
        return self.energy(xyz.unflatten(0, (-1, self.n_beads))).sum()


def simulate(
    model: cgf.CGModel, energy: str, n_copies: int, ps: float, timestep: float, seed: int
) -> tuple[np.ndarray, float]:
    """z of frames 0.1 ps apart, shape (n_frames, n_copies, n_features), and milliseconds of processor time a step."""
    beads = model.create_cg_system()
    n_beads = len(beads.positions)
    system = openmm.System()
    for _ in range(n_copies):
        for i in range(n_beads):
            system.addParticle(beads.system.getParticleMass(i))
    system.addForce(python_force(Copies(model.energy_of_positions(energy=energy), n_beads)))
    integrator = openmm.LangevinMiddleIntegrator(model.temperature, 5.0, timestep)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(np.tile(beads.positions, (n_copies, 1)))
    context.setVelocitiesToTemperature(model.temperature, seed)
    order = [model.partition.slow.index(atom) for atom in model.coordinates.atoms]
    frames, stride = [], round(0.1 / timestep)
    started = time.process_time()
    for _ in range(round(ps / 0.1)):
        integrator.step(stride)
        xyz = context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        if not np.isfinite(xyz).all():
            raise CGFlowError("the beads diverged: positions are not finite")
        frames.append(model.coordinates.from_xyz(torch.tensor(xyz.reshape(n_copies, n_beads, 3)[:, order])).numpy())
    return np.array(frames), 1000 * (time.process_time() - started) / (len(frames) * stride)


def populations(z: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of each copy (or sample), weights in the connected basins, shape (n, 3); z of shape (..., n, n_features)."""
    inside = np.eye(len(RAMACHANDRAN))[ramachandran_basin(z[..., 0], z[..., 1])] * weights[..., None]
    return inside.reshape(-1, z.shape[-2], len(RAMACHANDRAN)).sum(0)[:, :_CONNECTED]


def torsion_map(z: np.ndarray) -> np.ndarray:
    """Probabilities of (phi < 0, psi) on bins of 10 degrees, shape (36, 36); z of shape (..., n_features)."""
    angles = z.reshape(-1, z.shape[-1])[:, :2]
    left = angles[angles[:, 0] < 0]
    return circle_histogram(left, np.ones(len(left)))


def ratios(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fractions of the connected basins and their bootstrap errors over the rows of ``parts``."""
    draws = np.random.default_rng(0).integers(0, len(parts), (500, len(parts)))
    again = parts[draws].sum(1)
    return parts.sum(0) / parts.sum(), (again / again.sum(1, keepdims=True)).std(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--energy", default="pmf", choices=("pmf", "flow"))
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--ps", type=float, default=60.0)
    parser.add_argument("--timestep", type=float, default=0.004, help="ps; beads weigh 15 Da and more")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    model = cgf.load(arguments.run)
    with one_torch_thread():
        z, cost = simulate(model, arguments.energy, arguments.copies, arguments.ps, arguments.timestep, arguments.seed)
        kept = z[len(z) // 3 :]
        drawn = model.flow.sample(arguments.samples, torch.Generator().manual_seed(arguments.seed))[0].numpy()
        log_weight = model.log_weights(drawn) if model.density.weighted else np.zeros(len(drawn))
    print(
        f"{arguments.copies} copies, {arguments.ps:g} ps each in steps of {1000 * arguments.timestep:g} fs, force: "
        f"{arguments.energy}; {cost:.2f} ms a step for all copies"
    )
    rows = {
        "beads": ratios(populations(kept, np.ones(kept.shape[:-1]))),
        "flow": ratios(populations(drawn, np.ones(len(drawn)))),
        "flow, weighted": ratios(populations(drawn, np.exp(log_weight - log_weight.max()))),
    }
    print(f"{'phi < 0':16s}" + "".join(f"{name:>18s}" for name in RAMACHANDRAN[:_CONNECTED]))
    for name, (part, error) in rows.items():
        print(f"{name:16s}" + "".join(f"{a:8.4f} +- {b:.4f}" for a, b in zip(part, error, strict=True)))
    bead_map, flow_map, first, second = (torsion_map(part) for part in (kept, drawn, kept[:, ::2], kept[:, 1::2]))
    print(
        f"KL(flow || beads) {compare(flow_map, bead_map).kl:.4f}; of one half of the copies from the other, "
        f"{compare(first, second).kl:.4f}"
    )
    beads = kept.reshape(-1, kept.shape[-1])
    outside = (np.abs(beads[:, model.coordinates.n_circular :]) > model.coordinates.bound).any(-1).mean()
    print(f"frames with phi > 0: {(beads[:, 0] > 0).mean():.5f}; beyond the support of the flow's base: {outside:.6f}")


if __name__ == "__main__":
    sys.exit(exit_code(main))

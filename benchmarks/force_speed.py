"""What a step costs with the exported force, and without.

    python benchmarks/force_speed.py runs/ala2

Prints, for each energy that ``CGModel.create_force`` offers, milliseconds of processor time for one call: as the
module under autograd, float64 and float32, as the traced module under autograd, and as what the force calls, the
traced module with its forces; then for a step of the run's molecule on the Reference platform, with one thread: the
force field alone, with the torsions as a table, with each energy as a ``PythonForce``, and with that evaluated every
fourth step (``MTSLangevinIntegrator``).
"""

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import openmm
import torch
from md import FRICTION, exit_code

import openmm_cgflow as cgf
from openmm_cgflow.model.force import traced, traced_with_forces
from openmm_cgflow.model.free_energy import FreeEnergy
from openmm_cgflow.molecule.torch_force import python_force
from openmm_cgflow.networks.threads import one_torch_thread

_TIMESTEP = 0.001  # ps


def milliseconds(call: Callable[[], Any], seconds: float = 2.0) -> float:
    """Processor time of one call, after some to warm up: other work on the machine does not enter."""
    for _ in range(5):
        call()
    n, started = 0, time.process_time()
    while (spent := time.process_time() - started) < seconds or n < 5:
        call()
        n += 1
    return 1000 * spent / n


def differentiated(module: torch.nn.Module, xyz: torch.Tensor) -> Callable[[], torch.Tensor]:
    at = xyz.clone().requires_grad_()
    return lambda: torch.autograd.grad(module(at), at)[0]


def without_graph(module: torch.nn.Module, xyz: torch.Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            return module(xyz)

    return call


def step(model: cgf.CGModel, force: openmm.Force | None, every: int = 1) -> float:
    """Milliseconds of a step of 1 fs."""
    molecule = model.molecular_system
    system = openmm.XmlSerializer.clone(molecule.system)
    if force is not None:
        force.setForceGroup(1)
        system.addForce(force)
    integrator: openmm.Integrator
    if every == 1:
        integrator = openmm.LangevinMiddleIntegrator(model.temperature, FRICTION, _TIMESTEP)
    else:
        groups = [(0, every), (1, 1)]
        integrator = openmm.MTSLangevinIntegrator(model.temperature, FRICTION, every * _TIMESTEP, groups)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(molecule.positions)
    return milliseconds(lambda: integrator.step(20)) / 20 / every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".torch.jit", DeprecationWarning)
    model = cgf.load(arguments.run)
    xyz = torch.tensor(model.molecular_system.positions[list(model.partition.slow)])
    energies = ["pmf", "torsions", "flow"] if model.density.weighted else ["torsions", "flow"]
    with one_torch_thread():
        names = ("autograd", "float32", "traced", "with forces", "trace (s)")
        print(f"{'one call, ms':16s}" + "".join(f"{name:>14s}" for name in names))
        forces = {}
        for energy in energies:
            module = model.energy_of_positions(energy=energy)
            started = time.process_time()
            fast = traced_with_forces(module)
            cost = time.process_time() - started
            fast = torch.jit.freeze(fast)
            forces[energy] = python_force(fast, model.partition.slow, outputs_forces=True)
            rows = [
                milliseconds(differentiated(module, xyz)),
                milliseconds(differentiated(_Single(module), xyz)),
                milliseconds(differentiated(traced(module), xyz)),
                milliseconds(without_graph(fast, xyz)),
                cost,
            ]
            print(f"{energy:16s}" + "".join(f"{value:14.2f}" for value in rows), flush=True)
        plain = step(model, None)
        print(f"\n{'a step, ms':32s}{'':8s}{'of a plain one':>16s}\n{'force field alone':32s}{plain:8.3f}{1:16.1f}")
        table = model.create_force(scale=-0.8, energy="torsions", mechanism="table")
        cost = step(model, table)
        print(f"{'with torsions as a table':32s}{cost:8.3f}{cost / plain:16.1f}", flush=True)
        for energy in energies:
            for every in (1, 4):
                cost = step(model, openmm.XmlSerializer.clone(forces[energy]), every)
                name = f"with {energy}" + (", every 4 steps" if every > 1 else "")
                print(f"{name:32s}{cost:8.3f}{cost / plain:16.1f}", flush=True)


class _Single(torch.nn.Module):
    """A free energy whose networks compute in float32."""

    def __init__(self, energy: FreeEnergy) -> None:
        super().__init__()
        self.energy, self.potential = energy, copy.deepcopy(energy.potential).float()

    def forward(self, xyz: torch.Tensor) -> torch.Tensor:
        z = self.energy.coordinates.from_xyz(xyz.index_select(-2, self.energy.order))
        return self.energy.scale * self.potential(z[None].float())[0]


if __name__ == "__main__":
    sys.exit(exit_code(main))

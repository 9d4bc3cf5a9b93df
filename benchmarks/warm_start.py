"""How soon chains of the fast atoms are in equilibrium, from where they start.

    python benchmarks/warm_start.py runs/ala2-seed1

Starts at the same z, samples of the run's flow: a harmonic draw, as for the first pool; where the nearest chain of the
run ended, as it was, and moved along with z by the learned response, as trainings do; and q(y | z) of a joint density,
Gaussian and with spline layers, which the paper's second version learns together with q(z). Here it has the best of
teachers, the ends of chains at other z, by maximum likelihood, with methyl groups turned to one of their three equal
states. Printed: the mean potential energy above that of long chains, kT, after some steps, and its standard error.
"""

import argparse
import sys

import numpy as np
import torch
from md import exit_code

import openmm_cgflow as cgf
from openmm_cgflow.config import Config
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.engine import Schedule
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.networks.joint import JointFlow, new_joint
from openmm_cgflow.units import thermal_beta

_STRIDE, _N_FRAMES = 5, 33  # of what is looked at
_SHOWN = (0, 5, 10, 20, 40, 80, 160)  # steps
_N_LONG, _N_LONG_FRAMES, _LONG_STRIDE = 2000, 40, 25
_N_UPDATES, _BATCH = 600, 256
_TURN = 2 * np.pi / 3


def conditional(config: Config, model: cgf.CGModel, z: torch.Tensor, xyz: torch.Tensor, n_layers: int) -> JointFlow:
    """A joint density whose q(y | z) is fitted to structures at z."""
    settings = config.joint.model_copy(update={"n_layers": n_layers})
    joint = new_joint(model.flow, settings, config.flow, model.geometry, config.temperature, config.seed)
    thermal_map = joint.thermal_map
    away = model.geometry.all_atom.wrap_fast(model.geometry.all_atom.read_fast(xyz) - thermal_map.centre)
    turned = (away[..., 2].abs() > _TURN / 2).double().mean(0) > 0.05  # dihedrals with more than one state
    away[..., 2] -= torch.where(turned, _TURN * torch.round(away[..., 2] / _TURN), 0.0)
    r = (away / model.geometry.fast_widths(config.temperature)).flatten(1)
    optimizer = torch.optim.Adam(joint.conditional.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _N_UPDATES)
    generator = torch.Generator().manual_seed(config.seed)

    for _ in range(_N_UPDATES):
        rows = torch.randint(len(z), (_BATCH,), generator=generator)
        log_q = joint.conditional.log_prob(r[rows].to(joint.flow.dtype), joint.context(z[rows], 1.0))
        optimizer.zero_grad()
        (-log_q[torch.isfinite(log_q)].mean()).backward()  # a few structures are outside the support
        optimizer.step()
        scheduler.step()
    return joint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("-n", type=int, default=1024, help="chains of each kind")
    parser.add_argument("--n-taught", type=int, default=4096, help="structures that q(y | z) is fitted to")
    parser.add_argument(
        "--scale", type=float, default=0.3, help="barrier scale of the flow's samples, so that barriers are among them"
    )
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    model = cgf.load(arguments.run)
    config = cgf.load_config(RunDirectory.open(arguments.run).config)
    all_atom, temperature = model.geometry.all_atom, model.temperature
    generator, beta = torch.Generator().manual_seed(arguments.seed), thermal_beta(temperature)
    with create_engine(model.molecular_system, model.partition.slow, config.chains) as engine:
        fast_atoms = model.fast_atoms(engine)
        taught = model.flow.sample(arguments.n_taught, generator, arguments.scale)[0]
        n_relax = config.chains.n_relax
        ends = fast_atoms.run(taught, Schedule(temperature, n_relax, 400), seed=arguments.seed, keep=False)
        taught, xyz = taught[ends.valid], ends.xyz[ends.valid, 0]

        z = model.flow.sample(arguments.n, generator, arguments.scale)[0]
        schedule = Schedule(temperature, n_relax, _N_LONG, _N_LONG_FRAMES, _LONG_STRIDE)
        long = fast_atoms.run(z, schedule, seed=arguments.seed + 1, keep=False)
        starts = {"harmonic draw": all_atom.build(z, model.geometry.draw_fast(z, temperature, generator))}
        y, before = fast_atoms.nearest(z)
        starts["nearest chain"] = all_atom.build(z, y)
        starts["nearest chain, response"] = all_atom.build(z, fast_atoms.moved(y, before, z))
        for name, n_layers in (("q(y | z), Gaussian", 0), ("q(y | z), splines", 4)):
            joint = conditional(config, model, taught, xyz, n_layers)
            base = joint.draw_base(len(z), generator)[1]
            with torch.no_grad():
                r = joint.conditional(base.to(joint.flow.dtype), joint.context(z, 1.0))[0].double()
                starts[name] = joint.build(z, r)
        print(f"{len(z)} chains from each start, energy above equilibrium, kT, after steps")
        print(f"{'':26s}" + "".join(f"{step:>10d}" for step in _SHOWN) + f"{'+-':>8s}{'failed':>8s}")
        for name, structures in starts.items():
            energy = torch.as_tensor(engine.evaluate(structures.numpy())[0])[:, None]
            schedule = Schedule(temperature, n_relax, n_frames=_N_FRAMES, stride=_STRIDE)
            raw = engine.run(structures.numpy(), schedule, seed=arguments.seed + 2)
            valid = torch.as_tensor(raw.valid) & long.valid
            energy = torch.cat((energy, torch.as_tensor(raw.energy)), dim=1)
            above = beta * (energy - long.energy.mean(1, keepdim=True))[valid].numpy()
            columns = [above[:, step // _STRIDE] for step in _SHOWN]
            # Overlaps at the very start have no mean worth the name.
            means = [np.mean(column) if k else np.median(column) for k, column in enumerate(columns)]
            error = columns[-1].std() / np.sqrt(len(above))
            row = "".join(f"{mean:10.2f}" for mean in means)
            print(f"{name:26s}{row}{error:8.2f}{int((~valid).sum()):8d}", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))

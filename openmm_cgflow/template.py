"""The commented configuration that ``openmm-cgflow init`` writes, with every default as :mod:`config` has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from openmm_cgflow.settings import (
    ChainSettings,
    CoordinatesSettings,
    FlowSettings,
    PMFSettings,
    SampleSettings,
    StoppingSettings,
    TrainingSettings,
)

__all__ = ["render"]

_SYSTEM_COMMENTS = {
    "structure": "PDB, mmCIF, inpcrd, rst7, gro or crd",
    "forcefield": "OpenMM force-field XML files",
    "topology": "Amber prmtop, GROMACS top or CHARMM psf",
    "parameters": "CHARMM parameter files",
    "system_xml": "a serialized openmm.System",
    "implicit_solvent": "hct, obc1, obc2, gbn or gbn2",
    "include_dir": "where GROMACS include files live",
}


def render(system: Mapping[str, Any], *, slow: str, temperature: float, seed: int = 2025, command: str = "") -> str:
    """The configuration as commented YAML.

    Arguments:
        system: Settings of the ``system`` section, as they are to be written; empty ones are left out.
        slow: ``partition.slow``.
        temperature: K.
        seed: The seed.
        command: How the file was made, for its first line.
    """
    chains, training, pmf, stopping = ChainSettings(), TrainingSettings(), PMFSettings(), StoppingSettings()
    coordinates, flow, samples = CoordinatesSettings(), FlowSettings(), SampleSettings()
    named = [(name, value) for name, value in system.items() if value not in (None, [], ())]
    system_lines = "\n".join(f"  {name}: {_scalar(value)}  # {_SYSTEM_COMMENTS[name]}" for name, value in named)
    made = f"# Made by: {command}\n" if command else ""
    lines = f"""\
{made}# Check it with `openmm-cgflow check FILE.yaml`, train it with `openmm-cgflow train FILE.yaml -o RUN`.
# Paths are relative to this file. AnchorValues carry units, or are plain numbers in K, ps, 1/ps and Da.

system:
{system_lines}

temperature: {temperature:g} K
seed: {seed}

partition:
  # backbone (N CA C, and the carbons and nitrogens of the caps), heavy (all but hydrogens, with those of hydroxyl and
  # thiol groups), an MDTraj selection such as "name N CA C", or a list of 0-based atom indices: one connected set
  # without rings.
  slow: {_scalar(slow)}

coordinates:
  kind: {coordinates.kind}  # bonds, angles and torsions; or cartesian, the paper's own choice
  peptide_bonds: {coordinates.peptide_bonds}  # cis or trans as in the structure; or sample, both
  bound: {coordinates.bound:g}  # half-width of the intervals of bonds and angles, in thermal widths

flow:
  n_layers: {flow.n_layers}  # of the torsions
  n_bounded_layers: {flow.n_bounded_layers}  # of bonds and angles given the torsions
  n_bins: {flow.n_bins}
  hidden_features: {_scalar(flow.hidden_features)}

chains:  # frozen-slow Langevin dynamics of the fast atoms
  estimator: {chains.estimator}  # or cartesian, the paper's own: unbiased too, but far noisier
  n_replicas: {chains.n_replicas}  # samples of one training step
  timestep: {1000 * chains.timestep:g} fs
  friction: {chains.friction:g} /ps
  hydrogen_mass: {chains.hydrogen_mass:g} Da  # of fast hydrogens; averages do not depend on it
  n_pool_steps: {chains.n_pool_steps}  # equilibration of the first fast atoms
  n_equilibration: {chains.n_equilibration}  # steps before the frames of every later chain
  n_frames: {chains.n_frames}
  stride: {chains.stride}  # steps between frames
  # platform: CUDA            # else OPENMM_DEFAULT_PLATFORM, else the fastest in a short probe
  n_workers: {chains.n_workers}  # processes of the CPU engine; 0 = one per core

training:
  method: {training.method}  # or reverse_kl and joint, the paper's, with the settings of tempering and training

pmf:  # the potential of mean force that is learned, and what the flow learns from it
  n_members: {pmf.n_members}  # of the ensemble, whose spread is the error
  explore_height: {pmf.explore_height:g}  # how far up most mean forces are measured, kT of free energy
  flow_updates: {pmf.flow_updates}  # of the flow in each round

stopping:  # rounds of mean forces end when all of these hold, or at a limit
  free_energy_error: {stopping.free_energy_error:g}  # kT, of differences by switching; twice as much ends the rounds
  held_out: {stopping.held_out:g}  # error of predicted mean forces over their noise
  ess: {stopping.ess:g}  # relative effective sample size
  max_evaluations: {stopping.max_evaluations:.0f}
  max_rounds: {stopping.max_rounds}

samples:  # what ends the training
  n_samples: {samples.n_samples}
  n_equilibration: {samples.n_equilibration}  # steps of each frame's own chain
  plots: {_scalar(samples.plots)}
"""
    return "\n".join(_aligned(line) for line in lines.splitlines()) + "\n"


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _aligned(line: str) -> str:
    """Moves the comment that follows a setting to one column."""
    setting, mark, comment = line.partition("  # ")
    if not mark or not setting.strip() or setting.lstrip().startswith("#"):
        return line
    return f"{setting.rstrip():<28}  # {comment}"

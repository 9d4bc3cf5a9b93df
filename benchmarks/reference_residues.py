"""A reference of every residue of a peptide by replica exchange, with its own error; it can be used while it grows.

    python benchmarks/reference_residues.py systems/alanine_tetrapeptide/alanine_tetrapeptide.yaml -o references/ala3

Passes share nothing but the starting structure, so what they differ by is the error. They grow side by side, piece by
piece, and after every piece the files in the folder are written anew:

table.txt: of every residue the populations of each pass, their mean and its standard error.
residues.npz: residues (n_residues,) and basins (4,), names; populations (n_passes, n_residues, 4); maps (n_passes,
    n_residues, 36, 36), the probability of φ and ψ on bins of 10 degrees from -180; n_evaluations (n_passes,), energy
    evaluations; temperature in K.
frames.dcd, weights.npy: frames of all passes, at all temperatures, and their weights at that of the configuration:
    `openmm-cgflow evaluate RUN --reference FOLDER/frames.dcd --weights FOLDER/weights.npy`.

The first part of every pass is left out of all of it. The barrier between φ < 0 and φ > 0 is the highest there is, and
what no pass crosses has an error that does not show: hot replicas have it lowered, by --lower-phi at the hottest, and
all frames are weighed back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import mdtraj
import numpy as np
from estimators import populations
from md import TIMESTEP, Molecule, exit_code, load, seed_option, steps
from reference import table
from samplers import ReplicaExchange, Sampled

from openmm_cgflow.analysis.distances import circle_histogram
from openmm_cgflow.analysis.observables import residues_with_maps
from openmm_cgflow.analysis.states import RAMACHANDRAN, peptide_torsions
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.atomic import atomic_path, atomic_write, writing
from openmm_cgflow.seeds import derive_seed

_SETTLING = 0.1
"""The first part of a pass, which may still know where it started."""


def angles_of(molecule: Molecule, xyz: np.ndarray, residues: Sequence[str]) -> np.ndarray:
    """φ and ψ of residues in frames ``(n_frames, n_atoms, 3)`` in nm: ``(n_residues, n_frames, 2)`` in radians."""
    torsions = peptide_torsions(mdtraj.Trajectory(xyz, molecule.topology))
    pairs = [(torsions[f"phi_{name}"], torsions[f"psi_{name}"]) for name in residues]
    return np.moveaxis(np.array(pairs), 1, 2)


def write(folder: Path, molecule: Molecule, residues: Sequence[str], passes: Sequence[Sampled]) -> str:
    """Writes what is known of all passes, and hands back the table.

    Raises:
        CGFlowError: If a file cannot be written.
    """
    angles = [angles_of(molecule, one.xyz, residues) for one in passes]
    found, maps = (
        np.array([[measure(a, one.weights) for a in each] for each, one in zip(angles, passes, strict=True)])
        for measure in (populations, circle_histogram)
    )
    lines = [f"{sum(one.n_evaluations for one in passes):.3g} energy evaluations at {molecule.temperature:g} K"]
    for k, name in enumerate(residues):
        lines += ["", name, *table(RAMACHANDRAN, list(found[:, k]))]
    for k, one in enumerate(passes):
        for name, part in molecule.odd_states(one.xyz, one.weights).items():
            lines.append(f"note: in pass {k + 1} the state '{name}' has the population {part:.2g}")
    text = "\n".join(lines) + "\n"
    frames = mdtraj.Trajectory(np.concatenate([one.xyz for one in passes]), molecule.topology)
    with writing(folder):
        with atomic_path(folder / "frames.dcd") as path:
            frames.save_dcd(str(path))
        with atomic_path(folder / "weights.npy") as path:
            np.save(path, np.concatenate([one.weights for one in passes]))
        with atomic_path(folder / "residues.npz") as path:
            np.savez_compressed(
                path,
                residues=residues,
                basins=RAMACHANDRAN,
                populations=found,
                maps=maps,
                n_evaluations=[one.n_evaluations for one in passes],
                temperature=molecule.temperature,
            )
    atomic_write(folder / "table.txt", text)
    return text


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("config", help="YAML file of openmm-cgflow; its system and temperature are used")
    result.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    result.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="SETTING=VALUE", help="instead of the file's"
    )
    result.add_argument("--passes", type=int, default=2)
    result.add_argument("--pieces", type=int, default=10, help="of each pass (10)")
    result.add_argument("--ps", type=float, default=1000.0, help="of each replica in a piece (1000)")
    result.add_argument("--replicas", type=int, default=6, help="temperatures (6)")
    result.add_argument("--hottest", type=float, default=600.0, help="K, the highest of them (600)")
    result.add_argument(
        "--lower-phi",
        type=float,
        default=18.0,
        help="kJ/mol by which the hottest has the barrier at φ = 0 lowered (18)",
    )
    result.add_argument("--exchange", type=int, default=250, help="steps between exchanges, and between frames (250)")
    result.add_argument("--platform", default="Reference", help="OpenMM platform (Reference)")
    result.add_argument("--seed", type=seed_option, default=2025)
    return result


def main() -> None:
    options = parser().parse_args()
    molecule = load(options.config, (), options.platform, options.set)
    structure = mdtraj.Trajectory(molecule.positions, molecule.topology)
    residues = residues_with_maps(structure)
    if not residues:
        raise CGFlowError(f"{options.config}: no residue of the molecule has φ and ψ")
    if options.passes < 2:
        raise CGFlowError(f"--passes {options.passes}: at least 2, their difference is the error")
    if options.pieces < 1 or options.exchange < 1:
        raise CGFlowError(f"--pieces {options.pieces} --exchange {options.exchange}: expected at least 1 each")
    if not 2 * options.exchange * TIMESTEP <= options.ps < float("inf"):
        raise CGFlowError(f"--ps {options.ps:g}: expected at least two exchanges, each after {options.exchange} steps")
    if not 0 <= options.lower_phi < float("inf"):
        raise CGFlowError(f"--lower-phi {options.lower_phi:g}: expected a number of kJ/mol, 0 or more")
    phi = [[int(i) for i in atoms] for atoms in mdtraj.compute_phi(structure)[0]] if options.lower_phi else []
    ladder = (options.replicas, options.hottest, options.exchange, phi, options.lower_phi)
    passes = [ReplicaExchange(molecule, derive_seed(options.seed, k), *ladder) for k in range(options.passes)]
    with writing(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
    for k in range(options.pieces):
        for one in passes:
            one.run(steps(options.ps) // options.exchange)
        text = write(options.output, molecule, residues, [one.sampled(_SETTLING) for one in passes])
        print(f"piece {k + 1} of {options.pieces}: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))

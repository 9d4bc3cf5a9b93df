"""What the scripts that run ordinary molecular dynamics share: the molecule, one seeded Context, torsions of frames."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loky
import mdtraj
import numpy as np
import openmm
from mdtraj.geometry.dihedral import indices_chi1, indices_phi, indices_psi
from openmm import unit

from openmm_cgflow import load_config
from openmm_cgflow.analysis import states
from openmm_cgflow.analysis.reference import GridReference, load_reference
from openmm_cgflow.engines.platforms import available_platforms
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.python_forces import batched_energy
from openmm_cgflow.runs.build import load_molecule

__all__ = [
    "FRICTION",
    "STRIDE",
    "TIMESTEP",
    "Molecule",
    "exit_code",
    "finite",
    "langevin",
    "load",
    "parallel_map",
    "seed_option",
    "steps",
]

TIMESTEP = 0.002
"""ps, with hydrogens of 4 Da and no constraints."""
FRICTION = 1.0
"""1/ps"""
HYDROGEN_MASS = 4.0
"""Da, of all atoms where there are no hydrogens; averages over configurations do not depend on masses."""
STRIDE = 50
"""Steps between two frames, 0.1 ps."""
_TORSIONS = {"phi": indices_phi, "psi": indices_psi, "chi1": indices_chi1}


@dataclass(frozen=True)
class Molecule:
    """A molecule as plain data, so that it can be sent to worker processes.

    Attributes:
        system_xml: The OpenMM System with heavy hydrogens, serialized.
        positions: ``(n_atoms, 3)`` in nm.
        topology: For MDTraj.
        temperature: K.
        torsions: Indices of the four atoms of each torsion that is recorded, by name.
        platform: OpenMM's name of the platform.
    """

    system_xml: str
    positions: np.ndarray
    topology: mdtraj.Topology
    temperature: float
    torsions: dict[str, tuple[int, ...]]
    platform: str = "Reference"

    def system(self) -> openmm.System:
        """A copy of the System."""
        return openmm.XmlSerializer.deserialize(self.system_xml)

    @property
    def takes_all(self) -> bool:
        """Whether its whole energy takes many structures in one call."""
        system = self.system()
        return all(batched_energy(force) is not None for force in system.getForces())

    def angles(self, xyz: np.ndarray) -> np.ndarray:
        """The torsions of frames ``(n_frames, n_atoms, 3)`` in nm, ``(n_frames, n_torsions)`` in radians."""
        frames = mdtraj.Trajectory(xyz, self.topology)
        return mdtraj.compute_dihedrals(frames, list(self.torsions.values()), periodic=False).astype(np.float64)

    def odd_states(self, xyz: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
        """The fraction of frames ``(n_frames, n_atoms, 3)`` in each state that should be rare: cis, mirrored."""
        structure = mdtraj.Trajectory(self.positions, self.topology)
        found = states.find(mdtraj.Trajectory(xyz, self.topology), structure, weights)
        return {name: part for name, part in found.items() if part > 0 and name.startswith(("cis ", "mirror image "))}


def load(
    path: str | Path, torsions: Sequence[str], platform: str = "Reference", overrides: Sequence[str] = ()
) -> Molecule:
    """The molecule of a configuration, ready for ordinary dynamics.

    Arguments:
        path: A configuration of ``openmm-cgflow``; its ``system`` and ``temperature`` are used.
        torsions: Names of torsions to record: ``phi``, ``psi``, ``chi1``; χ1 is added where the molecule has one.
        platform: OpenMM's name of the platform.
        overrides: Settings that replace those of the file, ``section.key=value``.

    Raises:
        CGFlowError: If the configuration or the molecule cannot be loaded, it has several residues with such a torsion
            or none, or there is no such platform.
    """
    if platform not in available_platforms():
        raise CGFlowError(f"--platform {platform}: not here; available: {', '.join(available_platforms())}")
    config = load_config(path, overrides)
    molecule = load_molecule(config)
    topology = molecule.mdtraj_topology
    names = list(dict.fromkeys(torsions))
    if len(names) < len(torsions):
        raise CGFlowError(f"--torsions {' '.join(torsions)}: expected different ones")
    if "chi1" not in names and len(_TORSIONS["chi1"](topology)) == 1:
        names.append("chi1")
    found = {}
    for name in names:
        if name not in _TORSIONS:
            raise CGFlowError(f"--torsions {name}: unknown; known are {', '.join(_TORSIONS)}")
        rows = _TORSIONS[name](topology)
        if len(rows) != 1:
            raise CGFlowError(f"{path}: the molecule has {len(rows)} torsions {name}, expected one")
        found[name] = tuple(int(i) for i in rows[0])
    system = openmm.XmlSerializer.clone(molecule.system)
    for i, symbol in enumerate(molecule.elements):
        if symbol == "H" or "H" not in molecule.elements:
            system.setParticleMass(i, HYDROGEN_MASS)
    xml = openmm.XmlSerializer.serialize(system)
    return Molecule(xml, np.array(molecule.positions), topology, config.temperature, found, platform)


def load_grid(path: Path, molecule: Molecule) -> GridReference:
    """A gridded reference.

    Raises:
        CGFlowError: If the file cannot be read or is none.
    """
    loaded = load_reference(path, mdtraj.Trajectory(molecule.positions, molecule.topology))
    if not isinstance(loaded, GridReference):
        raise CGFlowError(
            f"{path}: is a trajectory; here a grid is needed, as benchmarks/reference.py writes it (.npz)"
        )
    return loaded


def langevin(temperature: float, seed: int) -> openmm.LangevinMiddleIntegrator:
    """A seeded Langevin integrator at ``temperature`` in K."""
    integrator = openmm.LangevinMiddleIntegrator(temperature, FRICTION, TIMESTEP)
    integrator.setRandomNumberSeed(seed)
    return integrator


def steps(ps: float) -> int:
    """Time steps in ``ps`` picoseconds."""
    return round(ps / TIMESTEP)


def finite(context: openmm.Context) -> np.ndarray:
    """The positions in a Context, ``(n_atoms, 3)`` in nm.

    Raises:
        CGFlowError: If they are not finite: the Reference platform goes on with NaN.
    """
    xyz = context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    if not np.isfinite(xyz).all():
        raise CGFlowError("the dynamics diverged: positions are not finite; is the starting structure minimised?")
    return xyz


@contextmanager
def parallel_map(n_workers: int) -> Iterator[Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]]:
    """A ``map`` over ``n_workers`` processes with one thread each, in the order of its input; 1 means this process."""
    if n_workers < 1:
        raise CGFlowError(f"--workers {n_workers}: expected at least 1")
    if n_workers == 1:
        yield lambda function, items: [function(item) for item in items]
        return
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENMM_CPU_THREADS")
    executor = loky.ProcessPoolExecutor(n_workers, env=dict.fromkeys(threads, "1"))
    try:
        yield lambda function, items: list(executor.map(function, items))
    finally:
        executor.shutdown(wait=True, kill_workers=True)


def seed_option(text: str) -> int:
    """The type of a seed on the command line: a whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number, 0 or more")
    return int(text)


def exit_code(main: Callable[[], None]) -> int:
    """Runs a script: 0, or 2 after one message about what the user can mend."""
    try:
        main()
    except CGFlowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

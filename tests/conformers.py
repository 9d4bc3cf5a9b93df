"""Frames with known torsions, and run directories that hold them, without any training."""

import json

import mdtraj
import networkx as nx
import numpy as np
from scipy.spatial.transform import Rotation

from openmm_cgflow.config import Config, dump_config
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.files.trajectory import write_colvar, write_trajectory

PHI, PSI = ("C", "N", "CA", "C"), ("N", "CA", "C", "N")
CENTRES = {"alphaR": (-70, -20), "beta": (-140, 150), "PPII": (-70, 150), "phi > 0": (55, 40)}
"""A point well inside each basin, degrees."""


def turned(trajectory, atoms, angles):
    """The frames with one torsion of four atoms set to ``angles`` (radians), all that hangs on its end moved along."""
    first, second = atoms[1], atoms[2]
    graph = nx.Graph([(a.index, b.index) for a, b in trajectory.topology.bonds])
    graph.remove_edge(first, second)
    moved = sorted(nx.node_connected_component(graph, second))
    now = mdtraj.compute_dihedrals(trajectory, [atoms], periodic=False)[:, 0].astype(float)
    xyz = trajectory.xyz.astype(float)
    origin = xyz[:, first]
    axis = xyz[:, second] - origin
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    rotation = Rotation.from_rotvec(axis * (np.asarray(angles) - now)[:, None]).as_matrix()
    xyz[:, moved] = np.einsum("fij,faj->fai", rotation, xyz[:, moved] - origin[:, None]) + origin[:, None]
    return mdtraj.Trajectory(xyz, trajectory.topology)


def repeated(structure, n):
    return mdtraj.Trajectory(np.repeat(structure.xyz[:1], n, axis=0), structure.topology)


def atoms_of(topology, *names):
    """Indices of atoms such as ``ALA2-CA``."""
    found = {str(atom): atom.index for atom in topology.atoms}
    return tuple(found[name] for name in names)


def alanine_frames(structure, phi, psi):
    """Alanine dipeptide with these angles in radians."""
    phi_atoms = atoms_of(structure.topology, "ACE1-C", "ALA2-N", "ALA2-CA", "ALA2-C")
    psi_atoms = atoms_of(structure.topology, "ALA2-N", "ALA2-CA", "ALA2-C", "NME3-N")
    return turned(turned(repeated(structure, len(phi)), phi_atoms, phi), psi_atoms, psi)


def basin_frames(structure, counts):
    """Alanine dipeptide, so many frames in the middle of each basin, one basin after the other."""
    centres = np.radians([CENTRES[name] for name in counts])
    angles = np.repeat(centres, list(counts.values()), axis=0)
    return alanine_frames(structure, angles[:, 0], angles[:, 1])


def write_run(path, structure, slow, samples, columns=None):
    """What a finished training leaves, as far as an evaluation reads it."""
    run = RunDirectory.create(path, dump_config(Config()))
    structure.save(str(run.topology))
    run.slow_atoms.write_text(json.dumps({"slow": list(slow)}))
    write_samples(run.samples, samples, columns)
    return run


def write_samples(path, samples, columns=None):
    write_trajectory(samples, path)
    write_colvar(path.with_suffix(".colvar"), {"log_q": np.zeros(samples.n_frames), **(columns or {})})

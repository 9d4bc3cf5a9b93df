"""Builds structures from standard geometry: those in systems/, or a peptide of any sequence between caps.

    python benchmarks/build_systems.py
    python benchmarks/build_systems.py --sequence AAAAAAAA -o FOLDER

Needs the extra [systems] (PeptideBuilder). The output does not depend on when or where it is run, up to the last
digit of the minimiser. A sequence also gets a configuration: FOLDER/FOLDER.pdb and FOLDER/FOLDER.yaml, in the force
field and at the temperature of systems/alanine_dipeptide.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import networkx as nx
import numpy as np
import PeptideBuilder
from md import exit_code
from openmm import CustomTorsionForce, LangevinMiddleIntegrator, LocalEnergyMinimizer, Platform, Vec3, app, unit
from openmm.app import element
from PeptideBuilder import Geometry

__all__ = [
    "build_butane",
    "build_heavy",
    "build_peptide",
    "dihedral",
    "formula",
    "place",
    "refuse_clashes",
    "write_sequence",
]

_FORCEFIELDS = ("amber99sbildn.xml", "amber99_obc.xml")
_PEPTIDES = {
    "alanine_dipeptide": ("A", _FORCEFIELDS),
    "alanine_dipeptide_ff96": ("A", ("amber96.xml", "implicit/obc1.xml")),
    "alanine_tetrapeptide": ("AAA", _FORCEFIELDS),
    "alanine_hexapeptide": ("AAAAA", _FORCEFIELDS),
    "glycine_dipeptide": ("G", _FORCEFIELDS),
    "glycine_tetrapeptide": ("GGG", _FORCEFIELDS),
    "glycine_hexapeptide": ("GGGGG", _FORCEFIELDS),
    "valine_dipeptide": ("V", _FORCEFIELDS),
}
_ACE = ("ACE", {"CA": "CH3", "C": "C", "O": "O"})
_NME = ("NME", {"N": "N", "CA": "C"})
_PHI, _PSI = -80.0, 80.0  # C7eq
_AMINO_ACIDS = frozenset("ACDEFGHIKLMNPQRSTVWY")
_CLOSEST = 0.16
"""nm, between atoms more than three bonds apart: a hydrogen bond is longer, a clash shorter."""
_CONFIGURATION = """\
# {formula} in implicit solvent, 300 K.
#   openmm-cgflow train {path} -o runs/{name}
# Settings that are not named here have their defaults; a run directory holds all of them in its config.yaml.

system:
  structure: {name}.pdb
  forcefield: [{forcefields}]

temperature: 300 K
seed: 2025

partition:
  slow: backbone          # N CA C and the carbons of the caps
"""


def place(a: np.ndarray, b: np.ndarray, c: np.ndarray, length: float, angle: float, torsion: float) -> np.ndarray:
    """The position bonded to a, at an angle to b and a torsion to c, shape (3,); nm and degrees."""
    angle, torsion = math.radians(angle), math.radians(torsion)
    axis = (a - b) / np.linalg.norm(a - b)
    normal = np.cross(b - c, axis)
    normal /= np.linalg.norm(normal)
    local = np.array([-math.cos(angle), math.sin(angle) * math.cos(torsion), math.sin(angle) * math.sin(torsion)])
    return a + length * (local[0] * axis + local[1] * np.cross(normal, axis) + local[2] * normal)


def dihedral(p: np.ndarray) -> float:
    """The torsion of four positions, shape (4, 3), in degrees."""
    b1, b2, b3 = np.diff(p, axis=0)
    n1, n2 = np.cross(b1, b2), np.cross(b2, b3)
    return math.degrees(math.atan2(np.dot(np.cross(n1, n2), b2 / np.linalg.norm(b2)), np.dot(n1, n2)))


def minimise(
    topology: app.Topology,
    positions: unit.Quantity,
    forcefield: app.ForceField,
    torsions: Sequence[tuple[int, int, int, int, float]] = (),
) -> np.ndarray:
    """Positions at the nearest minimum, given torsions (atoms, degrees) held; centred, shape (n_atoms, 3), nm."""
    system = forcefield.createSystem(topology, removeCMMotion=False)
    restraint = CustomTorsionForce("1000*(1-cos(theta-theta0))")
    restraint.addPerTorsionParameter("theta0")
    for *atoms, degrees in torsions:
        restraint.addTorsion(*atoms, [math.radians(degrees)])
    system.addForce(restraint)
    simulation = app.Simulation(
        topology, system, LangevinMiddleIntegrator(300, 1, 0.001), Platform.getPlatformByName("Reference")
    )
    simulation.context.setPositions(positions)
    LocalEnergyMinimizer.minimize(simulation.context, 0.01)
    xyz = simulation.context.getState(getPositions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    return np.round(xyz - xyz.mean(axis=0), 4) + 0.0  # as exact as a PDB file, without its "-0.000"


def write(path: Path, topology: app.Topology, xyz: np.ndarray, remark: str) -> None:
    """Writes a PDB file without the date that PDBFile.writeFile puts into the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write(f"REMARK   1 {remark}\n")
        app.PDBFile.writeModel(topology, xyz * unit.nanometer, file)
        app.PDBFile.writeFooter(topology, file)
    bonds = app.PDBFile(str(path)).topology.getNumBonds()
    if bonds != topology.getNumBonds():
        raise RuntimeError(f"{path}: {bonds} bonds read back, {topology.getNumBonds()} written")
    print(f"{path}: {len(xyz)} atoms, {bonds} bonds")


def formula(topology: app.Topology) -> str:
    """Residues in their order, repetitions counted: ``ACE-ALA3-NME``."""
    runs = itertools.groupby(residue.name for residue in topology.residues())
    counted = ((name, len(list(run))) for name, run in runs)
    return "-".join(name if n == 1 else f"{name}{n}" for name, n in counted)


def _chain(sequence: str, phi: float, psi: float) -> tuple[app.Topology, unit.Quantity]:
    """Heavy atoms of residues between caps: a chain with a glycine at both ends, which are cut down; degrees."""
    geometries = [Geometry.geometry(letter) for letter in f"G{sequence}G"]
    for geometry in geometries[1:]:
        geometry.phi, geometry.psi_im1 = phi, psi
    geometries[1].psi_im1 = geometries[-1].phi = 180
    chain = PeptideBuilder.make_structure_from_geos(geometries)
    topology, positions = app.Topology(), []
    residues = topology.addChain()
    caps = {0: _ACE, len(sequence) + 1: _NME}
    for i, source in enumerate(chain.get_residues()):
        name, kept = caps.get(i, (source.resname, None))
        residue = topology.addResidue(name, residues, id=str(i + 1))
        for atom in source.get_atoms():
            if kept is not None and atom.name not in kept:
                continue
            label = atom.name if kept is None else kept[atom.name]
            topology.addAtom(label, element.get_by_symbol(label[0]), residue)
            positions.append(Vec3(*(0.1 * float(x) for x in atom.coord)))
    topology.createStandardBonds()
    return topology, positions * unit.nanometer


def build_peptide(sequence: str, forcefields: Sequence[str]) -> tuple[app.Topology, np.ndarray]:
    """ACE-X...-NME with every residue in C7eq, hydrogens by Modeller, minimised with all φ and ψ held.

    Arguments:
        sequence: One-letter codes of the amino acids between the caps.
        forcefields: OpenMM force-field files.

    Returns:
        The topology and positions ``(n_atoms, 3)`` in nm.

    Raises:
        RuntimeError: If a residue is not L, valine's two methyl groups have each other's name, or atoms clash.
    """
    forcefield = app.ForceField(*forcefields)
    modeller = app.Modeller(*_chain(sequence, _PHI, _PSI))
    random.seed(0)  # Modeller scatters the hydrogens before it minimises them
    modeller.addHydrogens(forcefield, platform=Platform.getPlatformByName("Reference"))
    index = {(atom.residue.index, atom.name): atom.index for atom in modeller.topology.atoms()}
    torsions = [
        (
            [index[key] for key in ((i - 1, "C"), (i, "N"), (i, "CA"), (i, "C"))],
            [index[key] for key in ((i, "N"), (i, "CA"), (i, "C"), (i + 1, "N"))],
        )
        for i in range(1, len(sequence) + 1)
    ]
    held = [(*atoms, value) for pair in torsions for atoms, value in zip(pair, (_PHI, _PSI), strict=True)]
    xyz = minimise(modeller.topology, modeller.positions, forcefield, held)
    for i, (code, pair) in enumerate(zip(sequence, torsions, strict=True), start=1):
        side = [f"{dihedral(xyz[atoms]):.1f}" for atoms in pair]
        side += _checked(code, {name: xyz[atom] for (residue, name), atom in index.items() if residue == i})
        print(f"{code}: torsions φ, ψ{', χ1' if len(side) > 2 else ''} {', '.join(side)} degrees")
    refuse_clashes(modeller.topology, xyz)
    return modeller.topology, xyz


def _checked(code: str, at: Mapping[str, np.ndarray]) -> list[str]:
    """Refuses D amino acids and exchanged methyl groups; χ1 of valine as text, in degrees, and nothing of others."""
    if "CB" in at and np.dot(np.cross(at["N"] - at["CA"], at["C"] - at["CA"]), at["CB"] - at["CA"]) <= 0:
        raise RuntimeError(f"{code} is not L")
    if code != "V":
        return []
    first, second = (dihedral(np.array([at[a] for a in ("N", "CA", "CB", g)])) for g in ("CG1", "CG2"))
    if not 90 < (second - first) % 360 < 150:
        raise RuntimeError("CG1 and CG2 are exchanged")
    return [f"{first:.1f}"]


def refuse_clashes(topology: app.Topology, xyz: np.ndarray) -> None:
    """Raises RuntimeError if atoms more than three bonds apart nearly touch; positions ``(n_atoms, 3)`` in nm."""
    graph = nx.Graph((bond.atom1.index, bond.atom2.index) for bond in topology.bonds())
    near = dict(nx.all_pairs_shortest_path_length(graph, cutoff=3))
    distances = np.linalg.norm(xyz[:, None] - xyz, axis=-1)
    for i, j in np.argwhere(distances < _CLOSEST):
        if j not in near[i]:
            raise RuntimeError(f"atoms {i} and {j} (0-based) are {distances[i, j]:.3f} nm apart")


def build_heavy(source: Path) -> tuple[app.Topology, np.ndarray]:
    """The heavy atoms of alanine dipeptide's structure in the order of the paper's potential, side chain before C."""
    pdb = app.PDBFile(str(source))
    order = ("CH3", "N", "CA", "CB", "C", "O")
    topology, kept = app.Topology(), []
    chain = topology.addChain("A")
    for residue in pdb.topology.residues():
        atoms = [atom for atom in residue.atoms() if atom.element != element.hydrogen]
        if residue.name != "NME":
            atoms.sort(key=lambda atom: order.index(atom.name))
        own = topology.addResidue(residue.name, chain, id=residue.id)
        for atom in atoms:
            topology.addAtom(atom.name, atom.element, own)
            kept.append(atom.index)
    topology.createStandardBonds()
    return topology, pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer)[kept]


def build_butane(forcefield: Path) -> tuple[app.Topology, np.ndarray]:
    """Trans n-butane, carbons first, minimised."""
    topology = app.Topology()
    residue = topology.addResidue("BUT", topology.addChain(), id="1")
    carbons = [topology.addAtom(f"C{i + 1}", element.carbon, residue) for i in range(4)]
    positions = [np.zeros(3), np.array([0.1526, 0.0, 0.0])]
    positions.append(place(positions[1], positions[0], np.array([0.0, 1.0, 0.0]), 0.1526, 112.0, 0.0))
    positions.append(place(positions[2], positions[1], positions[0], 0.1526, 112.0, 180.0))
    for first, second in itertools.pairwise(carbons):
        topology.addBond(first, second)
    # Each carbon's hydrogens by their torsions to a carbon two bonds away.
    references = {0: (1, 2, (60, 180, 300)), 1: (2, 3, (60, 300)), 2: (1, 0, (60, 300)), 3: (2, 1, (60, 180, 300))}
    for i, (b, c, torsions) in references.items():
        for k, torsion in enumerate(torsions):
            hydrogen = topology.addAtom(f"H{i + 1}{k + 1}", element.hydrogen, residue)
            topology.addBond(carbons[i], hydrogen)
            positions.append(place(positions[i], positions[b], positions[c], 0.109, 109.5, torsion))
    quantity = [Vec3(*map(float, p)) for p in positions] * unit.nanometer
    xyz = minimise(topology, quantity, app.ForceField(str(forcefield)))
    print(f"C-C-C-C {dihedral(xyz[:4]):.1f} degrees")
    return topology, xyz


def write_sequence(sequence: str, folder: Path) -> None:
    """Writes the structure of a capped peptide and a configuration for it, both with the name of the folder."""
    name, (topology, xyz) = folder.resolve().name, build_peptide(sequence, _FORCEFIELDS)
    path = folder / f"{name}.yaml"
    write(path.with_suffix(".pdb"), topology, xyz, remark=formula(topology))
    forcefields = ", ".join(_FORCEFIELDS)
    path.write_text(
        _CONFIGURATION.format(formula=formula(topology), path=path, name=name, forcefields=forcefields),
        encoding="utf-8",
    )


def _sequence(text: str) -> str:
    if unknown := sorted(set(text) - _AMINO_ACIDS):
        raise argparse.ArgumentTypeError(f"'{text}': no amino acids are called {', '.join(unknown)}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence", type=_sequence, help="one-letter codes of what is between the caps")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="where to write (default: systems/)")
    options = parser.parse_args()
    if options.sequence is not None:
        if options.output is None:
            parser.error("--sequence: give a folder, -o FOLDER")
        write_sequence(options.sequence, options.output)
        return
    source = Path(__file__).resolve().parent.parent / "systems"
    folder = options.output or source
    for name, (sequence, forcefields) in _PEPTIDES.items():
        topology, xyz = build_peptide(sequence, forcefields)
        write(folder / name / f"{name}.pdb", topology, xyz, remark=f"{formula(topology)}, see SOURCE.md")
    heavy = build_heavy(folder / "alanine_dipeptide" / "alanine_dipeptide.pdb")
    name = "alanine_dipeptide_heavy"
    write(folder / name / f"{name}.pdb", *heavy, remark="ACE-ALA-NME without hydrogens, see SOURCE.md")
    butane = build_butane(source / "butane" / "butane.xml")
    write(folder / "butane" / "butane.pdb", *butane, remark="n-butane, see SOURCE.md")


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Builds the structures in systems/ from standard geometry: python benchmarks/build_systems.py [FOLDER]

Needs the extra [systems] (PeptideBuilder). The output does not depend on when or where it is run, up to the last
digit of the minimiser.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PeptideBuilder
from md import exit_code
from openmm import CustomTorsionForce, LangevinMiddleIntegrator, LocalEnergyMinimizer, Platform, Vec3, app, unit
from openmm.app import element
from PeptideBuilder import Geometry

__all__ = ["build_butane", "build_dipeptide", "build_heavy", "dihedral", "place"]

_PEPTIDES = {
    "alanine_dipeptide": ("A", "ALA", ("amber99sbildn.xml", "amber99_obc.xml")),
    "alanine_dipeptide_ff96": ("A", "ALA", ("amber96.xml", "implicit/obc1.xml")),
    "glycine_dipeptide": ("G", "GLY", ("amber99sbildn.xml", "amber99_obc.xml")),
    "valine_dipeptide": ("V", "VAL", ("amber99sbildn.xml", "amber99_obc.xml")),
}
_CAPS = {0: ("ACE", {"CA": "CH3", "C": "C", "O": "O"}), 2: ("NME", {"N": "N", "CA": "C"})}


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


def _chain(code: str, phi: float, psi: float) -> tuple[app.Topology, unit.Quantity]:
    """Heavy atoms of the residue between caps: a GLY-X-GLY chain with the glycines cut down; degrees."""
    geometries = [Geometry.geometry(letter) for letter in f"G{code}G"]
    geometries[1].phi, geometries[1].psi_im1 = phi, 180
    geometries[2].phi, geometries[2].psi_im1 = 180, psi
    chain = PeptideBuilder.make_structure_from_geos(geometries)
    topology, positions = app.Topology(), []
    residues = topology.addChain()
    for i, source in enumerate(chain.get_residues()):
        name, kept = _CAPS.get(i, (source.resname, None))
        residue = topology.addResidue(name, residues, id=str(i + 1))
        for atom in source.get_atoms():
            if kept is not None and atom.name not in kept:
                continue
            label = atom.name if kept is None else kept[atom.name]
            topology.addAtom(label, element.get_by_symbol(label[0]), residue)
            positions.append(Vec3(*(0.1 * float(x) for x in atom.coord)))
    topology.createStandardBonds()
    return topology, positions * unit.nanometer


def build_dipeptide(code: str, forcefields: Sequence[str]) -> tuple[app.Topology, np.ndarray]:
    """ACE-X-NME in C7eq, hydrogens by Modeller, minimised with φ and ψ held.

    Arguments:
        code: One-letter code of the amino acid X.
        forcefields: OpenMM force-field files.

    Raises:
        RuntimeError: If X is not L, or valine's two methyl groups have each other's name.
    """
    forcefield = app.ForceField(*forcefields)
    modeller = app.Modeller(*_chain(code, -80.0, 80.0))
    random.seed(0)  # Modeller scatters the hydrogens before it minimises them
    modeller.addHydrogens(forcefield, platform=Platform.getPlatformByName("Reference"))
    index = {(atom.residue.index, atom.name): atom.index for atom in modeller.topology.atoms()}
    phi = [index[key] for key in ((0, "C"), (1, "N"), (1, "CA"), (1, "C"))]
    psi = [index[key] for key in ((1, "N"), (1, "CA"), (1, "C"), (2, "N"))]
    xyz = minimise(modeller.topology, modeller.positions, forcefield, [(*phi, -80.0), (*psi, 80.0)])
    side = [f"{dihedral(xyz[atoms]):.1f}" for atoms in (phi, psi)]
    if (1, "CB") in index:
        n, ca, c, cb = (xyz[index[1, name]] for name in ("N", "CA", "C", "CB"))
        if np.dot(np.cross(n - ca, c - ca), cb - ca) <= 0:
            raise RuntimeError(f"{code} is not L")
    if (1, "CG1") in index:
        first, second = (dihedral(xyz[[index[1, a] for a in ("N", "CA", "CB", g)]]) for g in ("CG1", "CG2"))
        if not 90 < (second - first) % 360 < 150:
            raise RuntimeError("CG1 and CG2 are exchanged")
        side.append(f"{first:.1f}")
    print(f"{code}: torsions φ, ψ{', χ1' if len(side) > 2 else ''} {', '.join(side)} degrees")
    return modeller.topology, xyz


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = Path(__file__).resolve().parent.parent / "systems"
    parser.add_argument("folder", nargs="?", type=Path, default=source, help="where to write (default: systems/)")
    folder = parser.parse_args().folder
    for name, (code, residue, forcefields) in _PEPTIDES.items():
        peptide = build_dipeptide(code, forcefields)
        write(folder / name / f"{name}.pdb", *peptide, remark=f"ACE-{residue}-NME, see SOURCE.md")
    heavy = build_heavy(folder / "alanine_dipeptide" / "alanine_dipeptide.pdb")
    name = "alanine_dipeptide_heavy"
    write(folder / name / f"{name}.pdb", *heavy, remark="ACE-ALA-NME without hydrogens, see SOURCE.md")
    butane = build_butane(source / "butane" / "butane.xml")
    write(folder / "butane" / "butane.pdb", *butane, remark="n-butane, see SOURCE.md")


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""The all-atom model: one molecule with its topology, energy function and starting positions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import mdtraj
import numpy as np
import openmm
from openmm import app, unit

from openmm_cgflow.describe import validated
from openmm_cgflow.molecule.checks import check_molecule
from openmm_cgflow.molecule.readers import load_files, load_parmed
from openmm_cgflow.molecule.topology import atom_labels
from openmm_cgflow.settings import Section, SystemSettings

if TYPE_CHECKING:
    import parmed

__all__ = ["MolecularSystem"]


class _Input(Section):
    """The settings of a molecule, where they stand in a configuration: messages name them as there."""

    system: SystemSettings


@dataclass(frozen=True, eq=False)
class MolecularSystem:
    """One molecule without a box, ready for frozen-slow dynamics.

    The constructor takes its arguments as they are; ``from_files``, ``from_openmm`` and ``from_parmed`` check them.

    Attributes:
        topology: Atoms, residues and bonds; no box.
        system: Sanitised copy: no constraints, CMMotionRemover, barostats or thermostats; the OBC2 ``CustomGBForce``
            as ``GBSAOBCForce`` where that is exact. Masses as given.
        positions: ``(n_atoms, 3)`` in nm, float64.
        notes: What was changed or noticed, one sentence each, for the log.
    """

    topology: app.Topology
    system: openmm.System
    positions: np.ndarray
    notes: tuple[str, ...] = ()

    @classmethod
    def from_files(
        cls,
        structure: SystemSettings | str | Path,
        forcefield: str | Sequence[str] = (),
        *,
        topology: str | Path | None = None,
        parameters: Sequence[str | Path] = (),
        system_xml: str | Path | None = None,
        implicit_solvent: str | None = None,
        include_dir: str | Path | None = None,
        potential: Mapping[str, Any] | None = None,
    ) -> Self:
        """Loads a molecule from a validated configuration, or from the same settings given one by one.

        Arguments:
            structure: A ``SystemSettings``, or the file with the starting positions (PDB, mmCIF, inpcrd, gro, crd).
            forcefield: OpenMM force-field XML names, such as ``["amber99sbildn.xml", "amber99_obc.xml"]``.
            topology: Amber prmtop, GROMACS top or CHARMM psf.
            parameters: CHARMM parameter files, with a psf.
            system_xml: Serialized ``openmm.System``.
            implicit_solvent: ``hct``, ``obc1``, ``obc2``, ``gbn`` or ``gbn2``, with ``topology``.
            include_dir: Where GROMACS include files live.
            potential: Settings of a ``PotentialSettings``, such as ``{"python": "my_module:factory"}``: alone or added
                to the force field.

        Raises:
            CGFlowError: If a setting is wrong, a file is missing or unreadable, the force field does not fit, or the
                molecule is not supported; the message says what to do.
        """
        if not isinstance(structure, SystemSettings):
            settings = {
                "structure": structure,
                "forcefield": [forcefield] if isinstance(forcefield, str) else [str(name) for name in forcefield],
                "topology": topology,
                "parameters": list(parameters),
                "system_xml": system_xml,
                "implicit_solvent": implicit_solvent,
                "include_dir": include_dir,
                "potential": potential,
            }
            structure = validated(_Input, {"system": settings}, source="MolecularSystem.from_files").system
        return cls(*check_molecule(*load_files(structure), source=str(structure.structure)))

    @classmethod
    def from_openmm(cls, topology: app.Topology, system: openmm.System, positions: Any) -> Self:
        """Takes OpenMM objects, which are copied and never changed.

        Arguments:
            topology: Its bonds must connect all atoms; bonds it lacks are taken from the System's bond terms.
            system: Any non-periodic System; see ``openmm_cgflow.molecule.sanitize.sanitize`` for what is removed.
            positions: ``(n_atoms, 3)``: a length ``Quantity``, a list of ``Vec3``, or an array in nm.

        Raises:
            CGFlowError: If the sizes disagree, positions are not finite, or the molecule is not supported.
        """
        return cls(*check_molecule(topology, system, positions, source="from_openmm"))

    @classmethod
    def from_parmed(cls, structure: parmed.Structure, *, implicit_solvent: str | None = None) -> Self:
        """Takes a parametrised ParmEd structure with coordinates.

        Arguments:
            structure: Any ``parmed.Structure`` whose ``createSystem`` works.
            implicit_solvent: ``hct``, ``obc1``, ``obc2``, ``gbn`` or ``gbn2``, with the ACE surface term.

        Raises:
            CGFlowError: If parameters or coordinates are missing, or the molecule is not supported.
        """
        loaded = load_parmed(structure, implicit_solvent, "from_parmed")
        return cls(*check_molecule(*loaded, source="from_parmed"))

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return self.topology.getNumAtoms()

    @cached_property
    def masses(self) -> np.ndarray:
        """Masses of the atoms as the System has them, Da, shape ``(n_atoms,)``."""
        return np.array(
            [self.system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(self.system.getNumParticles())]
        )

    @cached_property
    def bonds(self) -> np.ndarray:
        """Sorted atom indices of each bond, each bond once, shape ``(n_bonds, 2)``."""
        pairs = {tuple(sorted((bond.atom1.index, bond.atom2.index))) for bond in self.topology.bonds()}
        return np.array(sorted(pairs), dtype=int).reshape(-1, 2)

    @cached_property
    def elements(self) -> list[str]:
        """Chemical symbols, ``"X"`` for particles without an element."""
        return ["X" if atom.element is None else atom.element.symbol for atom in self.topology.atoms()]

    @cached_property
    def mdtraj_topology(self) -> mdtraj.Topology:
        """The topology as MDTraj has it."""
        return mdtraj.Topology.from_openmm(self.topology)

    @cached_property
    def labels(self) -> list[str]:
        """Readable names of all atoms; see :meth:`atom_label`."""
        return atom_labels(self.topology)

    def atom_label(self, index: int) -> str:
        """A readable name such as ``ALA2:CA``; with several chains ``B/ALA2:CA``."""
        return self.labels[index]

    def to_xml(self) -> str:
        """The System as OpenMM XML, enough for a worker process to rebuild it."""
        return openmm.XmlSerializer.serialize(self.system)

    def fingerprint(self) -> str:
        """SHA-256 of the System, atom names and bonds; independent of positions and of OpenMM's version stamp."""
        energy = re.sub(r' openmmVersion="[^"]*"', "", self.to_xml())
        atoms = " ".join(self.labels) + " " + " ".join(self.elements)
        return hashlib.sha256("\n".join([energy, atoms, str(self.bonds.tolist())]).encode()).hexdigest()

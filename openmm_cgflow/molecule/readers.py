"""Reads molecules from files: every route ends in a topology, an unconstrained non-periodic System and positions."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import openmm
from openmm import app, unit

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.force_fields import PLAIN, read_system_xml, system_from_force_field
from openmm_cgflow.molecule.positions import (
    AMBER_READERS,
    CHARMM_READERS,
    READERS,
    positions_for,
    read_positions,
    reading,
    structure_file,
)
from openmm_cgflow.molecule.topology import refuse_explicit_solvent
from openmm_cgflow.settings import PotentialSettings, SystemSettings

if TYPE_CHECKING:
    import parmed

__all__ = ["Loaded", "load_files", "load_parmed"]

_SOLVENTS = {"hct": app.HCT, "obc1": app.OBC1, "obc2": app.OBC2, "gbn": app.GBn, "gbn2": app.GBn2}


class Loaded(NamedTuple):
    """What a file route yields, not yet checked or sanitised.

    Attributes:
        topology: Atoms, residues, bonds.
        system: No constraints, no cutoff, no CMMotionRemover.
        positions: ``(n_atoms, 3)`` length Quantity.
        notes: Warnings of the readers.
    """

    topology: app.Topology
    system: openmm.System
    positions: Any
    notes: tuple[str, ...]


def load_files(settings: SystemSettings) -> Loaded:
    """Follows the one route that the configuration names.

    Routes: PDB or mmCIF with force-field XML (``openmm.app.ForceField``) or a System XML; Amber prmtop
    (``AmberPrmtopFile``); GROMACS top (``GromacsTopFile``, ParmEd with implicit solvent); CHARMM psf
    (``CharmmPsfFile``). Implicit solvent by keyword always has the ACE surface term and no salt. A machine-learned
    potential is added to any of these, or to the atoms of a PDB or mmCIF file.

    Raises:
        CGFlowError: If a file is missing or unreadable, or the parameters do not fit the molecule.
    """
    potential = settings.potential
    files = [settings.structure, settings.topology, settings.system_xml, *settings.parameters]
    if potential is not None:
        files += [potential.torchscript, *potential.files.values()]
    for path in filter(None, files):
        if not path.is_file():
            raise CGFlowError(f"{path}: is a directory, not a file" if path.is_dir() else f"{path}: no such file")
    if settings.include_dir is not None and not settings.include_dir.is_dir():
        raise CGFlowError(f"{settings.include_dir}: no such directory (system.include_dir)")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = _follow(settings)
        if potential is not None:
            loaded = _with_potential(potential, loaded)
    # Each once and in order; how a reader closes its files or calls its libraries is not the user's concern.
    heard = dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, UserWarning))
    return loaded._replace(notes=(*loaded.notes, *heard))


def load_parmed(structure: parmed.Structure, implicit_solvent: str | None, source: str) -> Loaded:
    """A System from a parametrised ParmEd structure.

    Arguments:
        structure: With parameters and coordinates.
        implicit_solvent: A key of ``SystemSettings.implicit_solvent``, or None.
        source: Names the input in messages.

    Raises:
        CGFlowError: If ParmEd cannot build a System from it.
    """
    if implicit_solvent is not None and implicit_solvent not in _SOLVENTS:
        known = ", ".join(_SOLVENTS)
        raise CGFlowError(f"{source}: implicit_solvent is {implicit_solvent!r}, expected one of {known}")
    if not callable(getattr(structure, "createSystem", None)):
        raise CGFlowError(f"{source}: got a {type(structure).__name__}, expected a parametrised parmed.Structure")
    if structure.positions is None:
        raise CGFlowError(
            f"{source}: the ParmEd structure has no coordinates; give them with "
            "parmed.load_file(topology, xyz=coordinates)"
        )
    solvent = {}
    if implicit_solvent is not None:
        solvent = {"implicitSolvent": _SOLVENTS[implicit_solvent], "useSASA": True}
    with reading(source, "ParmEd cannot build an OpenMM System from it; is every term parametrised?"):
        system = structure.createSystem(**PLAIN, **solvent)
    return Loaded(structure.topology, system, structure.positions, _solvent_note(implicit_solvent))


def _follow(settings: SystemSettings) -> Loaded:
    if settings.topology is None:
        if settings.parameters:
            raise CGFlowError("system.parameters are CHARMM files and go with a psf topology (system.topology)")
        return _from_structure(settings)
    suffix = settings.topology.suffix.lower()
    with settings.topology.open("rb") as handle:
        is_amber = handle.read(8) == b"%VERSION"
    if is_amber or suffix in (".prmtop", ".parm7"):
        return _from_amber(settings, settings.topology)
    if suffix == ".top":
        return _from_gromacs(settings, settings.topology)
    if suffix == ".psf":
        return _from_charmm(settings, settings.topology)
    raise CGFlowError(
        f"{settings.topology}: unknown kind of topology {suffix!r}; expected an Amber .prmtop or .parm7, a "
        "GROMACS .top or a CHARMM .psf file (a force field in XML goes under system.forcefield)"
    )


def _from_structure(settings: SystemSettings) -> Loaded:
    path = structure_file(settings)
    if path.suffix.lower() == ".gro" or path.suffix.lower() not in READERS:
        raise CGFlowError(
            f"{path}: expected a PDB (.pdb) or mmCIF (.cif) file, whose residues and bonds the force field "
            "or System XML needs; Amber, GROMACS and CHARMM coordinates go with system.topology"
        )
    structure = read_positions(path, {})
    refuse_explicit_solvent(structure.topology, str(path))  # before a force field misses its templates
    n_models = structure.getNumFrames()
    notes = () if n_models == 1 else (f"{path.name} holds {n_models} models; the first is used",)
    if settings.system_xml is not None:
        return Loaded(structure.topology, read_system_xml(settings.system_xml), structure.positions, notes)
    if not settings.forcefield:  # a potential alone
        return Loaded(structure.topology, _bare_system(structure.topology, path), structure.positions, notes)
    system = system_from_force_field(settings.forcefield, structure.topology, path)
    return Loaded(structure.topology, system, structure.positions, notes)


def _bare_system(topology: app.Topology, path: Path) -> openmm.System:
    system = openmm.System()
    for atom in topology.atoms():
        if atom.element is None:
            raise CGFlowError(f"{path}: atom {atom.index} ({atom.name}) has no element, and so no mass")
        system.addParticle(atom.element.mass)
    return system


def _with_potential(settings: PotentialSettings, loaded: Loaded) -> Loaded:
    from openmm_cgflow.molecule.potentials import add_potential  # the only way from here to torch

    system = openmm.XmlSerializer.clone(loaded.system)
    xyz = np.array(loaded.positions.value_in_unit(unit.nanometer))
    notes = add_potential(settings, loaded.topology, system, xyz)
    return loaded._replace(system=system, notes=(*loaded.notes, *notes))


def _from_amber(settings: SystemSettings, path: Path) -> Loaded:
    with reading(path, "cannot be read as an Amber prmtop; is the file complete?"):
        prmtop = app.AmberPrmtopFile(str(path))
    positions = positions_for(prmtop.topology, settings, AMBER_READERS)
    hint = "" if settings.implicit_solvent is None else "; does it hold GB radii (leap: set default PBradii mbondi2)?"
    with reading(path, f"OpenMM cannot build a System from it{hint}"):
        system = prmtop.createSystem(
            **PLAIN,
            implicitSolvent=_solvent_model(settings),
        )
    _refuse_zero_radii(system, path)
    return Loaded(prmtop.topology, system, positions, _solvent_note(settings.implicit_solvent))


def _from_gromacs(settings: SystemSettings, path: Path) -> Loaded:
    if settings.implicit_solvent is not None:
        return _from_gromacs_by_parmed(settings, path)
    include = {} if settings.include_dir is None else {"includeDir": str(settings.include_dir)}
    with reading(path, "cannot be read as a GROMACS top (for include files set system.include_dir)"):
        top = app.GromacsTopFile(str(path), **include)
    positions = positions_for(top.topology, settings, {})
    with reading(path, "OpenMM cannot build a System from it"):
        system = top.createSystem(**PLAIN)
    return Loaded(top.topology, system, positions, ())


def _from_gromacs_by_parmed(settings: SystemSettings, path: Path) -> Loaded:
    try:
        from parmed import gromacs
    except ImportError as error:
        raise CGFlowError(
            f"{path}: GROMACS topologies with implicit solvent need ParmEd (pip install parmed): {error}"
        ) from error
    usual = gromacs.GROMACS_TOPDIR
    # ParmEd takes its include directory from this module variable only.
    if settings.include_dir is not None:
        gromacs.GROMACS_TOPDIR = str(settings.include_dir)
    try:
        with reading(path, "ParmEd cannot read it as a GROMACS top (for include files set system.include_dir)"):
            structure = gromacs.GromacsTopologyFile(str(path))
    finally:
        gromacs.GROMACS_TOPDIR = usual
    structure.positions = positions_for(structure.topology, settings, {})
    structure.box = None
    loaded = load_parmed(structure, settings.implicit_solvent, str(path))
    return loaded._replace(notes=(*loaded.notes, "GB radii were assigned by ParmEd"))


def _from_charmm(settings: SystemSettings, path: Path) -> Loaded:
    if not settings.parameters:
        raise CGFlowError(
            f"{path}: a CHARMM psf needs its parameter files: set system.parameters to the .prm, .rtf or .str files"
        )
    with reading(path, "cannot be read as a CHARMM psf"):
        psf = app.CharmmPsfFile(str(path))
    files = [str(name) for name in settings.parameters]
    with reading(" ".join(files), "cannot be read as CHARMM parameters"):
        parameters = app.CharmmParameterSet(*files)
    positions = positions_for(psf.topology, settings, CHARMM_READERS)
    # OpenMM renamed the keyword after 8.5.
    known = inspect.signature(psf.createSystem).parameters
    surface = {"sasaMethod" if "sasaMethod" in known else "gbsaModel": "ACE"} if settings.implicit_solvent else {}
    with reading(path, "OpenMM cannot build a System from it and the parameter files"):
        system = psf.createSystem(
            parameters,
            **PLAIN,
            implicitSolvent=_solvent_model(settings),
            **surface,
        )
    return Loaded(psf.topology, system, positions, _solvent_note(settings.implicit_solvent))


def _solvent_model(settings: SystemSettings) -> Any:
    return None if settings.implicit_solvent is None else _SOLVENTS[settings.implicit_solvent]


def _refuse_zero_radii(system: openmm.System, path: Path) -> None:
    """A prmtop written without GB radii gives a finite but absurd energy in some GB models."""
    for force in system.getForces():
        if isinstance(force, openmm.GBSAOBCForce):
            radii = [
                force.getParticleParameters(i)[1].value_in_unit(unit.nanometer) for i in range(system.getNumParticles())
            ]
        elif isinstance(force, openmm.CustomGBForce):
            radii = [force.getParticleParameters(i)[1] for i in range(system.getNumParticles())]
        else:
            continue
        if min(radii) <= 0:
            raise CGFlowError(
                f"{path}: it holds no GB radii, which implicit solvent needs; rebuild it with 'set default "
                "PBradii mbondi2' in leap, or use parmed.tools.changeRadii(structure, 'mbondi2')"
            )


def _solvent_note(implicit_solvent: str | None) -> tuple[str, ...]:
    if implicit_solvent is None:
        return ()
    return (f"implicit solvent {implicit_solvent}: dielectric 78.5, no salt, ACE surface term",)

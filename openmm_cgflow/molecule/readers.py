"""Reads molecules from files: every route ends in a topology, an unconstrained non-periodic System and positions."""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import openmm
from openmm import app, unit

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.python_forces import python_functions
from openmm_cgflow.molecule.topology import refuse_explicit_solvent
from openmm_cgflow.settings import PotentialSettings, SystemSettings

if TYPE_CHECKING:
    import parmed

__all__ = ["Loaded", "load_files", "load_parmed", "near_force_fields", "read_system_xml"]

_SOLVENTS = {"hct": app.HCT, "obc1": app.OBC1, "obc2": app.OBC2, "gbn": app.GBn, "gbn2": app.GBn2}
_READERS: dict[str, Callable[[str], Any]] = {
    ".pdb": app.PDBFile,
    ".ent": app.PDBFile,
    ".cif": app.PDBxFile,
    ".mmcif": app.PDBxFile,
    ".pdbx": app.PDBxFile,
    ".gro": app.GromacsGroFile,
}
_AMBER_READERS = dict.fromkeys((".inpcrd", ".rst7", ".rst", ".restrt", ".crd", ".ncrst"), app.AmberInpcrdFile)
_CHARMM_READERS: dict[str, Callable[[str], Any]] = {
    ".crd": app.CharmmCrdFile,
    ".cor": app.CharmmCrdFile,
    ".rst": app.CharmmRstFile,
}
_NOT_FORCE_FIELDS = {"residues.xml", "hydrogens.xml", "pdbNames.xml", "glycam-hydrogens.xml"}


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


def load_files(config: SystemSettings) -> Loaded:
    """Follows the one route that the configuration names.

    Routes: PDB or mmCIF with force-field XML (``openmm.app.ForceField``) or a System XML; Amber prmtop
    (``AmberPrmtopFile``); GROMACS top (``GromacsTopFile``, ParmEd with implicit solvent); CHARMM psf
    (``CharmmPsfFile``). Implicit solvent by keyword always has the ACE surface term and no salt. A machine-learned
    potential is added to any of these, or to the atoms of a PDB or mmCIF file.

    Raises:
        CGFlowError: If a file is missing or unreadable, or the parameters do not fit the molecule.
    """
    potential = config.potential
    files = [config.structure, config.topology, config.system_xml, *config.parameters]
    if potential is not None:
        files += [potential.torchscript, *potential.files.values()]
    for path in filter(None, files):
        if not path.is_file():
            raise CGFlowError(f"{path}: is a directory, not a file" if path.is_dir() else f"{path}: no such file")
    if config.include_dir is not None and not config.include_dir.is_dir():
        raise CGFlowError(f"{config.include_dir}: no such directory (system.include_dir)")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = _follow(config)
        if potential is not None:
            loaded = _with_potential(potential, loaded)
    # Each once and in order; how a reader closes its files or calls its libraries is not the user's concern.
    heard = dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, UserWarning))
    return loaded._replace(notes=(*loaded.notes, *heard))


def _structure(config: SystemSettings) -> Path:
    assert config.structure is not None  # validated: without it there is a target, which is no file
    return config.structure


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
    refuse_explicit_solvent(structure.topology, source)
    solvent = {}
    if implicit_solvent is not None:
        solvent = {"implicitSolvent": _SOLVENTS[implicit_solvent], "useSASA": True}
    with _reading(source, "ParmEd cannot build an OpenMM System from it; is every term parametrised?"):
        system = structure.createSystem(
            nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False, removeCMMotion=False, **solvent
        )
    return Loaded(structure.topology, system, structure.positions, _solvent_note(implicit_solvent))


def near_force_fields(name: str, n: int = 3) -> list[str]:
    """Force-field XML names shipped with OpenMM that resemble ``name``, the nearest first."""
    data = Path(app.__file__).parent / "data"
    known = [path.relative_to(data).as_posix() for path in sorted(data.rglob("*.xml"))]
    wanted = _plain(name)

    def likeness(candidate: str) -> float:
        return max(
            difflib.SequenceMatcher(None, wanted, _plain(candidate)).ratio(),
            difflib.SequenceMatcher(None, _plain(Path(name).name), _plain(Path(candidate).name)).ratio(),
        )

    scores = {candidate: likeness(candidate) for candidate in known if candidate not in _NOT_FORCE_FIELDS}
    ranked = sorted(scores, key=scores.__getitem__, reverse=True)
    return [candidate for candidate in ranked if scores[candidate] > 0.6][:n]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", name.lower().removesuffix(".xml"))


def _follow(config: SystemSettings) -> Loaded:
    if config.topology is None:
        if config.parameters:
            raise CGFlowError("system.parameters are CHARMM files and go with a psf topology (system.topology)")
        return _from_structure(config)
    suffix = config.topology.suffix.lower()
    with config.topology.open("rb") as handle:
        is_amber = handle.read(8) == b"%VERSION"
    if is_amber or suffix in (".prmtop", ".parm7"):
        return _from_amber(config, config.topology)
    if suffix == ".top":
        return _from_gromacs(config, config.topology)
    if suffix == ".psf":
        return _from_charmm(config, config.topology)
    raise CGFlowError(
        f"{config.topology}: unknown kind of topology {suffix!r}; expected an Amber .prmtop or .parm7, a "
        "GROMACS .top or a CHARMM .psf file (a force field in XML goes under system.forcefield)"
    )


def _from_structure(config: SystemSettings) -> Loaded:
    path = _structure(config)
    if path.suffix.lower() == ".gro" or path.suffix.lower() not in _READERS:
        raise CGFlowError(
            f"{path}: expected a PDB (.pdb) or mmCIF (.cif) file, whose residues and bonds the force field "
            "or System XML needs; Amber, GROMACS and CHARMM coordinates go with system.topology"
        )
    structure = _read_positions(path, {})
    refuse_explicit_solvent(structure.topology, str(path))
    n_models = structure.getNumFrames()
    notes = () if n_models == 1 else (f"{path.name} holds {n_models} models; the first is used",)
    if config.system_xml is not None:
        return Loaded(structure.topology, read_system_xml(config.system_xml), structure.positions, notes)
    if not config.forcefield:  # a potential alone
        return Loaded(structure.topology, _bare_system(structure.topology, path), structure.positions, notes)
    force_field = _force_field(config.forcefield)
    try:
        system = force_field.createSystem(
            structure.topology,
            nonbondedMethod=app.NoCutoff,
            constraints=None,
            rigidWater=False,
            removeCMMotion=False,
        )
    except Exception as error:  # ForceField raises ValueError, KeyError and plain Exception
        raise CGFlowError(_explain_template(error, config, force_field, structure.topology)) from error
    return Loaded(structure.topology, system, structure.positions, notes)


def _bare_system(topology: app.Topology, path: Path) -> openmm.System:
    system = openmm.System()
    for atom in topology.atoms():
        if atom.element is None:
            raise CGFlowError(f"{path}: atom {atom.index} ({atom.name}) has no element, and so no mass")
        system.addParticle(atom.element.mass)
    return system


def _with_potential(config: PotentialSettings, loaded: Loaded) -> Loaded:
    from openmm_cgflow.molecule.potentials import add_potential  # the only way from here to torch

    system = openmm.XmlSerializer.clone(loaded.system)
    xyz = np.array(loaded.positions.value_in_unit(unit.nanometer))
    notes = add_potential(config, loaded.topology, system, xyz)
    return loaded._replace(system=system, notes=(*loaded.notes, *notes))


def _force_field(names: Sequence[str]) -> app.ForceField:
    try:
        return app.ForceField(*names)
    except Exception as error:  # ForceField.loadFile raises plain Exception
        missing = re.search(r'Could not locate file "(.*)"', str(error))
        if missing is None:
            raise CGFlowError(f"force field {' '.join(names)}: cannot be loaded: {error}") from error
        near = near_force_fields(missing.group(1))
        hint = f"did you mean {', '.join(near)}?" if near else "nothing that OpenMM ships resembles it"
        raise CGFlowError(
            f"unknown force field {missing.group(1)!r}; {hint} (a name from OpenMM's data directory or "
            "the path of an XML file)"
        ) from None


def _explain_template(
    error: Exception, config: SystemSettings, force_field: app.ForceField, topology: app.Topology
) -> str:
    path, names, text = config.structure, " ".join(config.forcefield), str(error)
    reason = re.split(r"  (?:You may be able|For more information)", text)[0]
    if "contains no residue templates" in text:
        return (
            f"force field {names}: it has no residue templates, so it is not a force field by itself; add a protein "
            f"force field before {config.forcefield[0]}, for example: forcefield: [amber14-all.xml, "
            "implicit/obc2.xml] or [amber99sbildn.xml, amber99_obc.xml]"
        )
    if not text.startswith("No template found"):
        return (
            f"{path}: force field {names} cannot describe it: {reason.rstrip('.')}. Do the files belong together, the "
            "implicit solvent to this protein force field, and do they cover every residue once? Otherwise give the "
            "parameters as an Amber, GROMACS or CHARMM topology (system.topology)"
        )
    residues = [f"{residue.name}{residue.id}" for residue in force_field.getUnmatchedResidues(topology)]
    listed = ", ".join(residues[:8]) + (", ..." if len(residues) > 8 else "")
    if re.search(r"missing \d+ H atoms?", text) and "extra site" not in text:
        loading = ", ".join(repr(name) for name in config.forcefield)
        return (
            f"{path}: hydrogens are missing in {listed}: {reason}\n"
            f"Add them with\n  pdbfixer {path} --add-atoms=hydrogen --output=with_hydrogens.pdb\nor in Python\n"
            "  from openmm import app\n"
            f"  pdb = app.PDBFile({str(path)!r})\n"
            "  modeller = app.Modeller(pdb.topology, pdb.positions)\n"
            f"  modeller.addHydrogens(app.ForceField({loading}))\n"
            "  with open('with_hydrogens.pdb', 'w') as file:\n"
            "      app.PDBFile.writeFile(modeller.topology, modeller.positions, file)"
        )
    return (
        f"{path}: force field {names} has no template for {listed}: {reason}\nCheck atom names, missing atoms and "
        "CONECT records, or choose a force field with this residue; for ligands give the parameters as an Amber, "
        "GROMACS or CHARMM topology (system.topology) or a System XML (system.system_xml)"
    )


def read_system_xml(path: Path) -> openmm.System:
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise CGFlowError(f"{path}: cannot be read: {error}") from error
    try:
        python_functions(text)
    except Exception as error:  # whatever unpickling a user's class raises
        raise CGFlowError(
            f"{path}: its potential cannot be read: {type(error).__name__}: {error}; the module it was made with must "
            "be installed, or its folder be in PYTHONPATH"
        ) from error
    try:
        system = openmm.XmlSerializer.deserialize(text)
    except (openmm.OpenMMException, ValueError, TypeError) as error:
        raise CGFlowError(
            f"{path}: not a serialized openmm.System: {error}; write one with openmm.XmlSerializer.serialize(system)"
        ) from error
    if not isinstance(system, openmm.System):
        raise CGFlowError(f"{path}: holds a {type(system).__name__}, expected a serialized openmm.System")
    return system


def _from_amber(config: SystemSettings, path: Path) -> Loaded:
    with _reading(path, "cannot be read as an Amber prmtop; is the file complete?"):
        prmtop = app.AmberPrmtopFile(str(path))
    refuse_explicit_solvent(prmtop.topology, str(path))
    positions = _positions_for(prmtop.topology, config, _AMBER_READERS)
    hint = "" if config.implicit_solvent is None else "; does it hold GB radii (leap: set default PBradii mbondi2)?"
    with _reading(path, f"OpenMM cannot build a System from it{hint}"):
        system = prmtop.createSystem(
            nonbondedMethod=app.NoCutoff,
            constraints=None,
            rigidWater=False,
            removeCMMotion=False,
            implicitSolvent=_solvent_model(config),
        )
    _refuse_zero_radii(system, path)
    return Loaded(prmtop.topology, system, positions, _solvent_note(config.implicit_solvent))


def _from_gromacs(config: SystemSettings, path: Path) -> Loaded:
    if config.implicit_solvent is not None:
        return _from_gromacs_by_parmed(config, path)
    include = {} if config.include_dir is None else {"includeDir": str(config.include_dir)}
    with _reading(path, "cannot be read as a GROMACS top (for include files set system.include_dir)"):
        top = app.GromacsTopFile(str(path), **include)
    refuse_explicit_solvent(top.topology, str(path))
    positions = _positions_for(top.topology, config, {})
    with _reading(path, "OpenMM cannot build a System from it"):
        system = top.createSystem(
            nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False, removeCMMotion=False
        )
    return Loaded(top.topology, system, positions, ())


def _from_gromacs_by_parmed(config: SystemSettings, path: Path) -> Loaded:
    try:
        from parmed import gromacs
    except ImportError as error:
        raise CGFlowError(
            f"{path}: GROMACS topologies with implicit solvent need ParmEd (pip install parmed): {error}"
        ) from error
    usual = gromacs.GROMACS_TOPDIR
    # ParmEd takes its include directory from this module variable only.
    if config.include_dir is not None:
        gromacs.GROMACS_TOPDIR = str(config.include_dir)
    try:
        with _reading(path, "ParmEd cannot read it as a GROMACS top (for include files set system.include_dir)"):
            structure = gromacs.GromacsTopologyFile(str(path))
    finally:
        gromacs.GROMACS_TOPDIR = usual
    structure.positions = _positions_for(structure.topology, config, {})
    structure.box = None
    loaded = load_parmed(structure, config.implicit_solvent, str(path))
    return loaded._replace(notes=(*loaded.notes, "GB radii were assigned by ParmEd"))


def _from_charmm(config: SystemSettings, path: Path) -> Loaded:
    if not config.parameters:
        raise CGFlowError(
            f"{path}: a CHARMM psf needs its parameter files: set system.parameters to the .prm, .rtf or .str files"
        )
    with _reading(path, "cannot be read as a CHARMM psf"):
        psf = app.CharmmPsfFile(str(path))
    files = [str(name) for name in config.parameters]
    with _reading(" ".join(files), "cannot be read as CHARMM parameters"):
        parameters = app.CharmmParameterSet(*files)
    refuse_explicit_solvent(psf.topology, str(path))
    positions = _positions_for(psf.topology, config, _CHARMM_READERS)
    # OpenMM renamed the keyword after 8.5.
    known = inspect.signature(psf.createSystem).parameters
    surface = {"sasaMethod" if "sasaMethod" in known else "gbsaModel": "ACE"} if config.implicit_solvent else {}
    with _reading(path, "OpenMM cannot build a System from it and the parameter files"):
        system = psf.createSystem(
            parameters,
            nonbondedMethod=app.NoCutoff,
            constraints=None,
            rigidWater=False,
            removeCMMotion=False,
            implicitSolvent=_solvent_model(config),
            **surface,
        )
    return Loaded(psf.topology, system, positions, _solvent_note(config.implicit_solvent))


def _solvent_model(config: SystemSettings) -> Any:
    return None if config.implicit_solvent is None else _SOLVENTS[config.implicit_solvent]


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


def _read_positions(path: Path, readers: dict[str, Callable[[str], Any]]) -> Any:
    known = _READERS | readers
    reader = known.get(path.suffix.lower())
    if reader is None:
        raise CGFlowError(f"{path}: unknown kind of coordinates {path.suffix!r}; expected one of {', '.join(known)}")
    with _reading(path, f"OpenMM's {reader.__name__} cannot read it; is it a complete {path.suffix} file?"):
        content = reader(str(path))
    topology = getattr(content, "topology", None)
    if topology is not None and topology.getNumAtoms() == 0:
        raise CGFlowError(f"{path}: no atoms found; is it a {path.suffix} file?")
    return content


def _positions_for(topology: app.Topology, config: SystemSettings, readers: dict[str, Callable[[str], Any]]) -> Any:
    """Positions of the structure file once its atoms match the topology's in number and elements."""
    content = _read_positions(_structure(config), readers)
    if len(content.positions) != topology.getNumAtoms():
        raise CGFlowError(
            f"{_structure(config)} has {len(content.positions)} atoms but {config.topology} has "
            f"{topology.getNumAtoms()}; they must list the same atoms in the same order"
        )
    other = getattr(content, "topology", None)
    if other is not None:
        for ours, theirs in zip(topology.atoms(), other.atoms(), strict=True):
            if None not in (ours.element, theirs.element) and ours.element.symbol != theirs.element.symbol:
                raise CGFlowError(
                    f"atom {ours.index} is {ours.residue.name}:{ours.name} ({ours.element.symbol}) in {config.topology}"
                    f" but {theirs.residue.name}:{theirs.name} ({theirs.element.symbol}) in {config.structure}; they "
                    "must list the same atoms in the same order"
                )
    return content.positions


@contextmanager
def _reading(source: Any, what: str) -> Iterator[None]:
    """Turns whatever a third-party parser raises into one message; they raise nearly every built-in type."""
    try:
        yield
    except CGFlowError:
        raise
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # closes the files that the parser left open
        raise CGFlowError(f"{source}: {what}: {type(error).__name__}: {error}") from error

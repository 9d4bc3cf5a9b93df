"""Energy functions in OpenMM's XML: force fields for the atoms of a topology, and whole Systems."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openmm
from openmm import app

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.python_forces import python_functions

__all__ = ["PLAIN", "near_force_fields", "read_system_xml", "system_from_force_field"]

PLAIN: dict[str, Any] = {
    "nonbondedMethod": app.NoCutoff,
    "constraints": None,
    "rigidWater": False,
    "removeCMMotion": False,
}
"""Keywords of every ``createSystem``: no cutoff, nothing rigid, nothing that moves atoms but forces."""
_NOT_FORCE_FIELDS = {"residues.xml", "hydrogens.xml", "pdbNames.xml", "glycam-hydrogens.xml"}


def system_from_force_field(files: Sequence[str], topology: app.Topology, path: Path) -> openmm.System:
    """The System of a molecule by ``openmm.app.ForceField``, without cutoff and constraints.

    Arguments:
        files: Names in OpenMM's data directory, or paths, of force-field XML.
        topology: The molecule, all hydrogens included.
        path: Where the molecule was read from, for messages.

    Raises:
        CGFlowError: If a file is missing or unreadable, or the force field does not describe every residue; the
            message says what to do.
    """
    force_field = _force_field(files)
    try:
        return force_field.createSystem(topology, **PLAIN)
    except Exception as error:  # ForceField raises ValueError, KeyError and plain Exception
        raise CGFlowError(_explain_template(error, files, force_field, topology, path)) from error


def read_system_xml(path: Path) -> openmm.System:
    """A serialized System, with the machine-learned potential it may hold.

    Raises:
        CGFlowError: If the file cannot be read, holds something else, or its potential needs a module that is missing.
    """
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise CGFlowError(f"{path}: cannot be read: {error}") from error
    try:
        python_functions(text)
    except Exception as error:  # whatever unpickling a user's class raises
        if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("openmm_cgflow."):
            raise CGFlowError(
                f"{path}: its potential was written by another version of openmm-cgflow, which has no module "
                f"{error.name} now; make the file anew"
            ) from error
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


def near_force_fields(name: str) -> list[str]:
    """At most three force-field XML names shipped with OpenMM that resemble ``name``, the nearest first."""
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
    return [candidate for candidate in ranked if scores[candidate] > 0.6][:3]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", name.lower().removesuffix(".xml"))


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
    error: Exception, files: Sequence[str], force_field: app.ForceField, topology: app.Topology, path: Path
) -> str:
    names, text = " ".join(files), str(error)
    reason = re.split(r"  (?:You may be able|For more information)", text)[0]
    if "contains no residue templates" in text:
        return (
            f"force field {names}: it has no residue templates, so it is not a force field by itself; add a protein "
            f"force field before {files[0]}, for example: forcefield: [amber14-all.xml, "
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
        loading = ", ".join(repr(name) for name in files)
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

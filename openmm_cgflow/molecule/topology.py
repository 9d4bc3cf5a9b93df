"""Small tools on ``openmm.app.Topology``: copies, tables, labels, and waters and ions found."""

from __future__ import annotations

from collections import Counter

from openmm import app

from openmm_cgflow.errors import CGFlowError

__all__ = [
    "atom_labels",
    "copy_topology",
    "refuse_explicit_solvent",
    "topology_from_table",
    "topology_to_table",
]


def copy_topology(topology: app.Topology) -> app.Topology:
    """A copy that shares nothing with ``topology`` and has no box."""
    result = app.Topology()
    atoms = {}
    for chain in topology.chains():
        new_chain = result.addChain(chain.id)
        for residue in chain.residues():
            new_residue = result.addResidue(residue.name, new_chain, residue.id, residue.insertionCode)
            for atom in residue.atoms():
                atoms[atom] = result.addAtom(atom.name, atom.element, new_residue, atom.id)
    for bond in topology.bonds():
        result.addBond(atoms[bond.atom1], atoms[bond.atom2], bond.type, bond.order)
    return result


def topology_to_table(topology: app.Topology) -> dict[str, list]:
    """Atoms and bonds as plain data: a PDB file would lose equal names in one residue and some bonds.

    Returns:
        ``atoms``: chain, residue and atom as [chain number, chain id, residue number, name, id, insertion code, atom
        name, element symbol, atom id]; ``bonds``: [i, j].
    """
    atoms = [
        [
            *(atom.residue.chain.index, atom.residue.chain.id, atom.residue.index, atom.residue.name, atom.residue.id),
            *(atom.residue.insertionCode, atom.name, atom.element.symbol if atom.element else "", atom.id),
        ]
        for atom in topology.atoms()
    ]
    return {"atoms": atoms, "bonds": [[bond.atom1.index, bond.atom2.index] for bond in topology.bonds()]}


def topology_from_table(table: dict[str, list]) -> app.Topology:
    """A topology from the table of :func:`topology_to_table`, but for bond orders."""
    result = app.Topology()
    atoms, chains, residues = [], {}, {}
    for chain, chain_id, residue, name, residue_id, insertion_code, atom_name, symbol, atom_id in table["atoms"]:
        if chain not in chains:
            chains[chain] = result.addChain(chain_id)
        if residue not in residues:
            residues[residue] = result.addResidue(name, chains[chain], residue_id, insertion_code)
        element = app.Element.getBySymbol(symbol) if symbol else None
        atoms.append(result.addAtom(atom_name, element, residues[residue], atom_id))
    for i, j in table["bonds"]:
        result.addBond(atoms[i], atoms[j])
    return result


def atom_labels(topology: app.Topology) -> list[str]:
    """Names such as ``ALA2:CA``, in atom order; with several chains ``B/ALA2:CA``."""
    several = topology.getNumChains() > 1
    return [
        f"{atom.residue.chain.id}/{_residue(atom)}:{atom.name}" if several else f"{_residue(atom)}:{atom.name}"
        for atom in topology.atoms()
    ]


def _residue(atom: app.topology.Atom) -> str:
    return f"{atom.residue.name}{atom.residue.id}{atom.residue.insertionCode.strip()}"


def refuse_explicit_solvent(topology: app.Topology, source: str) -> None:
    """Refuses waters and monatomic ions beside anything else.

    Raises:
        CGFlowError: Naming what was found and what to do.
    """
    residues = list(topology.residues())
    bonded_outside = {
        atom.residue for bond in topology.bonds() for atom in bond if bond.atom1.residue is not bond.atom2.residue
    }
    found = Counter(residue.name for residue in residues if residue not in bonded_outside and _is_water_or_ion(residue))
    if found and len(residues) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in found.most_common(5))
        raise CGFlowError(
            f"{source}: explicit water or ions ({listed}) are not supported yet: remove them and the box "
            "(openmm.app.Modeller.deleteWater, or delete the residues) and use an implicit solvent, for "
            "example implicit/obc2.xml or amber99_obc.xml"
        )


def _is_water_or_ion(residue: app.topology.Residue) -> bool:
    elements = sorted(atom.element.symbol for atom in residue.atoms() if atom.element is not None)
    return len(elements) == 1 or elements == ["H", "H", "O"]

"""States are found where they are, in the right share of the frames, and under their names."""

import mdtraj
import numpy as np
import pytest
import torch
from conformers import alanine_frames, atoms_of, basin_frames, repeated, turned
from molecules import ALANINE, BUTANE, frame

from openmm_cgflow.analysis import states
from openmm_cgflow.coordinates.placement import signed_volumes
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.bonds import bond_graph, stereocentres


@pytest.fixture(scope="module")
def alanine():
    return frame(ALANINE)


@pytest.fixture(scope="module")
def butane():
    return frame(BUTANE)


@pytest.fixture(scope="module")
def serine(alanine):
    """Serine dipeptide: a hydrogen of alanine's methyl group becomes a hydroxyl group."""
    old = alanine.topology
    replaced = atoms_of(old, "ALA2-HB1")[0]
    topology = mdtraj.Topology()
    chain = topology.add_chain()
    atoms, source = {}, []
    for residue in old.residues:
        new = topology.add_residue("SER" if residue.name == "ALA" else residue.name, chain, residue.resSeq)
        for atom in residue.atoms:
            oxygen = atom.index == replaced
            symbol = "O" if oxygen else atom.element.symbol
            atoms[atom] = topology.add_atom(
                "OG" if oxygen else atom.name, mdtraj.element.Element.getBySymbol(symbol), new
            )
            source.append(atom.index)
            if oxygen:
                hydrogen = topology.add_atom("HG", mdtraj.element.hydrogen, new)
                topology.add_bond(atoms[atom], hydrogen)
                source.append(atom.index)
    for first, second in old.bonds:
        topology.add_bond(atoms[first], atoms[second])
    xyz = alanine.xyz[:, source].astype(float)
    away = xyz[0, source.index(replaced)] - xyz[0, atoms_of(topology, "SER2-CB")[0]]
    xyz[0, hydrogen.index] += away + np.array([0.03, 0.02, 0.0])
    return mdtraj.Trajectory(xyz, topology)


def molecule(elements, bonds):
    """A topology of one residue; atoms named by element and number."""
    topology = mdtraj.Topology()
    residue = topology.add_residue("LIG", topology.add_chain(), 1)
    atoms = [
        topology.add_atom(f"{symbol}{k}", mdtraj.element.Element.getBySymbol(symbol), residue)
        for k, symbol in enumerate(elements)
    ]
    for i, j in bonds:
        topology.add_bond(atoms[i], atoms[j])
    return topology


@pytest.mark.parametrize(
    ("phi", "psi", "name"),
    [
        (-70, -20, "alphaR"), (-150, -20, "alphaR"), (-70, -119.9, "alphaR"), (-70, 49.9, "alphaR"),
        (-100.1, 150, "beta"), (-179, -121, "beta"), (-99.9, 150, "PPII"), (-0.1, 50.1, "PPII"), (-1, -120.1, "PPII"),
        (0, -20, "phi > 0"), (55, 40, "phi > 0"), (179, 150, "phi > 0"),
    ],
)  # fmt: skip
def test_borders_of_the_basins(phi, psi, name):
    assert states.RAMACHANDRAN[states.ramachandran_basin(np.radians(phi), np.radians(psi))] == name


def test_borders_of_rotamers_and_peptide_bonds():
    angles = np.radians([-179, -121, -119, -1, 1, 119, 121, 179])
    names = [states.ROTAMER[k][-1] for k in states.rotamer_state(angles)]
    assert "".join(names) == "ss--++ss"
    assert states.peptide_bond_state(np.radians([-179, -91, -89, 0, 89, 91])).tolist() == [0, 0, 1, 1, 1, 0]


def test_shares_of_the_basins_are_those_put_in(alanine):
    counts = {"alphaR": 40, "beta": 30, "PPII": 25, "phi > 0": 5}
    found = states.find(basin_frames(alanine, counts), alanine)
    assert {name: round(100 * found[f"{name} ALA2"]) for name in counts} == counts
    weights = np.repeat([1.0, 1.0, 1.0, 3.0], list(counts.values()))
    weighted = states.find(basin_frames(alanine, counts), alanine, weights)
    assert np.isclose(weighted["phi > 0 ALA2"], 15 / 110)
    with pytest.raises(ValueError, match="weights"):
        states.find(basin_frames(alanine, counts), alanine, weights[1:])


def test_every_kind_of_state_is_named(alanine):
    found = states.find(alanine, alanine)
    assert list(found) == [
        *(f"{kind} {bond}" for bond in ("ACE1-ALA2", "ALA2-NME3") for kind in ("trans", "cis")),
        "mirror image ALA2:CA",
        *(f"{basin} ALA2" for basin in states.RAMACHANDRAN),
    ]
    assert found["trans ACE1-ALA2"] == found["trans ALA2-NME3"] == found["PPII ALA2"] == 1.0
    assert sum(found.values()) == 3.0


def test_omega_of_the_caps(alanine):
    atoms = states.peptide_bonds(alanine.topology)
    names = {key: [alanine.topology.atom(i).name for i in row] for key, row in atoms.items()}
    assert names["ACE1-ALA2"] == ["CH3", "C", "N", "CA"]
    assert names["ALA2-NME3"][:3] == ["CA", "C", "N"]
    assert alanine.topology.atom(atoms["ALA2-NME3"][3]).element.symbol == "C"


@pytest.mark.parametrize("bond", ["ACE1-ALA2", "ALA2-NME3"])
def test_cis_peptide_bonds_are_found(alanine, bond):
    omega = np.radians([180, 170, -170, 120, 91, 80, 0, -10, -89, 179])
    frames = turned(repeated(alanine, 10), states.peptide_bonds(alanine.topology)[bond], omega)
    found = states.find(frames, alanine)
    other = ({"ACE1-ALA2", "ALA2-NME3"} - {bond}).pop()
    assert found[f"cis {bond}"] == pytest.approx(0.4)
    assert found[f"trans {bond}"] == pytest.approx(0.6)
    assert found[f"cis {other}"] == 0.0


def test_mirror_images_are_found(alanine):
    frames = repeated(alanine, 10)
    frames.xyz[:3, :, 0] *= -1
    hydrogen, carbon = atoms_of(alanine.topology, "ALA2-HA", "ALA2-CB")
    frames.xyz[3:4, [hydrogen, carbon]] = frames.xyz[3:4, [carbon, hydrogen]]
    assert states.find(frames, alanine)["mirror image ALA2:CA"] == pytest.approx(0.4)
    # Proper rotations keep the handedness.
    turn = alanine.xyz[:, :, [1, 2, 0]]
    assert not states.mirrored(mdtraj.Trajectory(turn, alanine.topology), alanine)["ALA2:CA"].any()


def test_states_without_hydrogens(alanine):
    heavy = alanine.atom_slice(alanine.topology.select("not element H"))
    frames = repeated(heavy, 10)
    frames.xyz[:3, :, 0] *= -1
    found = states.find(frames, heavy)
    assert found["mirror image ALA2:CA"] == pytest.approx(0.3)
    assert found["trans ACE1-ALA2"] == found["trans ALA2-NME3"] == 1.0


def test_handedness_is_that_of_the_sampler(alanine):
    rng = np.random.default_rng(3)
    frames = repeated(alanine, 50)
    frames.xyz += 0.06 * rng.standard_normal(frames.xyz.shape)
    graph = bond_graph(22, ((a.index, b.index) for a, b in alanine.topology.bonds))
    rows = torch.as_tensor(stereocentres(graph, [atom.element.symbol for atom in alanine.topology.atoms]))
    volumes = [signed_volumes(torch.as_tensor(t.xyz, dtype=torch.float64), rows)[:, 0] for t in (frames, alanine)]
    expected = (volumes[0] * volumes[1] < 0).numpy()
    assert 0 < expected.sum() < 50
    assert np.array_equal(states.mirrored(frames, alanine)["ALA2:CA"], expected)


def test_side_chain_rotamers(serine):
    (name,) = states.rotamers(serine.topology)
    assert name == "SER2:N-CA-CB-OG"
    frames = turned(repeated(serine, 6), states.rotamers(serine.topology)[name], np.radians([60, 60, 65, -60, 180, 5]))
    found = states.find(frames, serine)
    shares = [found[f"{kind} {name}"] for kind in states.ROTAMER]
    assert np.allclose(shares, [1 / 6, 4 / 6, 1 / 6])
    indices, _ = mdtraj.compute_chi1(frames)
    assert states.rotamers(serine.topology)[name] == tuple(indices[0])
    assert list(states.mirrored(frames, serine)) == ["SER2:CA"]


def test_butane(butane):
    topology = butane.topology
    assert states.rotamers(topology) == states.slow_torsions(topology, range(4)) == {"BUT1:C1-C2-C3-C4": (0, 1, 2, 3)}
    angles = np.radians([180, 60, -60, -60])
    found = states.find(turned(repeated(butane, 4), (0, 1, 2, 3), angles), butane)
    assert found == {
        "trans BUT1:C1-C2-C3-C4": 0.25, "gauche+ BUT1:C1-C2-C3-C4": 0.25, "gauche- BUT1:C1-C2-C3-C4": 0.5,
    }  # fmt: skip


def test_slow_torsions_leave_out_peptide_bonds_and_fast_atoms(alanine):
    slow = sorted({*atoms_of(alanine.topology, "ACE1-CH3", "ALA2-N", "ALA2-CA", "ALA2-C", "NME3-N", "ACE1-C")})
    named = states.slow_torsions(alanine.topology, slow)
    phi = atoms_of(alanine.topology, "ACE1-C", "ALA2-N", "ALA2-CA", "ALA2-C")
    psi = atoms_of(alanine.topology, "ALA2-N", "ALA2-CA", "ALA2-C", "NME3-N")
    assert {min(row, row[::-1]) for row in named.values()} == {min(row, row[::-1]) for row in (phi, psi)}
    frames = alanine_frames(alanine, np.array([-2.0, 1.0]), np.array([0.5, -1.0]))
    values = sorted(np.round(v, 3).tolist() for v in states.dihedrals(frames, named).values())
    assert np.allclose(values, [[-2.0, 1.0], [0.5, -1.0]], atol=2e-3)


def test_groups_without_rotamers_are_left_out():
    ethyl = [(0, 1), *((0, k) for k in (2, 3, 4)), *((1, k) for k in (5, 6))]
    # Propanoate's carboxylate looks the same after half a turn; propanoic acid's does not.
    propanoate = molecule("CCHHHHHCOO", [*ethyl, (1, 7), (7, 8), (7, 9)])
    assert states.rotamers(propanoate) == {}
    acid = molecule("CCHHHHHCOOH", [*ethyl, (1, 7), (7, 8), (7, 9), (9, 10)])
    assert len(states.rotamers(acid)) == 1
    # Propanenitrile is straight beyond its second carbon.
    assert states.rotamers(molecule("CCHHHHHCN", [*ethyl, (1, 7), (7, 8)])) == {}
    # Rings do not turn: cyclohexane's heavy atoms.
    assert states.rotamers(molecule("CCCCCC", [(k, (k + 1) % 6) for k in range(6)])) == {}


def test_amides():
    # N-methylformamide has cis and trans, acetamide does not, nor has a five-ring lactam, but a nine-ring one.
    formamide = molecule("HCONHCHHH", [(0, 1), (1, 2), (1, 3), (3, 4), (3, 5), (5, 6), (5, 7), (5, 8)])
    assert states.peptide_bonds(formamide) == {"LIG1:C1-N3": (0, 1, 3, 5)}
    acetamide = molecule("CCONHHHHH", [(0, 1), (1, 2), (1, 3), (3, 4), (3, 5), (0, 6), (0, 7), (0, 8)])
    assert states.peptide_bonds(acetamide) == {}
    for size, n_found in ((5, 0), (9, 1)):
        ring = [(k, (k + 1) % size) for k in range(size)]
        lactam = molecule("CN" + "C" * (size - 2) + "OH", [*ring, (0, size), (1, size + 1)])
        assert len(states.peptide_bonds(lactam)) == n_found


def test_refusals(alanine, butane):
    with pytest.raises(CGFlowError, match="22 atoms, the structure 14"):
        states.find(alanine, butane)
    loose = molecule("CCC", [(0, 1)])
    with pytest.raises(CGFlowError, match=r"join only 2 of its 3 atoms.*CONECT"):
        states.rotamers(loose)


def test_peptide_torsions(alanine, butane):
    torsions = states.peptide_torsions(alanine)
    assert list(torsions) == ["phi_ALA2", "psi_ALA2"]
    assert np.allclose(np.degrees([torsions["phi_ALA2"][0], torsions["psi_ALA2"][0]]), [-80, 80], atol=0.5)
    assert states.peptide_torsions(butane) == {}

"""Coordinates are exact: both directions, rigid motions, and the volume element against autograd."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from analytic import (
    BONDS,
    cartesian_coordinates,
    internal_coordinates,
    random_rotation,
    random_structure,
    random_tree,
    random_z,
)

from openmm_cgflow.coordinates.placement import bond_angle_dihedral, signed_volumes
from openmm_cgflow.coordinates.slow import InternalCoordinates
from openmm_cgflow.coordinates.zmatrix import slow_zmatrix
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.bonds import bond_graph


def make(name, kind):
    """Coordinates of all atoms of a molecule, and a structure in their order."""
    xyz = random_structure(BONDS[name], seed=3)
    internal = internal_coordinates(BONDS[name], xyz)
    coordinates = internal if kind == "internal" else cartesian_coordinates(internal.atoms, xyz)
    return coordinates, xyz[list(coordinates.atoms)]


@pytest.fixture(params=[(name, kind) for name in BONDS for kind in ("internal", "cartesian")], ids="-".join)
def both(request):
    return make(*request.param)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


def jacobian_log_det(function, at):
    return torch.linalg.slogdet(torch.autograd.functional.jacobian(function, at))[1]


# ---------------------------------------------------------------- z <-> positions


def test_z_to_positions_to_z(both, generator):
    coordinates, _ = both
    z = random_z(coordinates, 30, generator, spread=0.99)
    torch.testing.assert_close(coordinates.from_xyz(coordinates.to_xyz(z)), z, rtol=0, atol=1e-9)


def test_positions_to_z_to_positions_up_to_a_rigid_motion(both, generator):
    coordinates, xyz = both
    thermal = xyz + 0.004 * torch.randn((30, *xyz.shape), generator=generator, dtype=torch.float64)
    again = coordinates.to_xyz(coordinates.from_xyz(thermal))
    torch.testing.assert_close(torch.cdist(again, again), torch.cdist(thermal, thermal), rtol=0, atol=1e-10)
    if len(coordinates.atoms) > 3:  # no reflection: distances alone would not notice
        rows = torch.tensor([[0, 1, 2, 3]])
        torch.testing.assert_close(signed_volumes(again, rows), signed_volumes(thermal, rows), rtol=0, atol=1e-12)


def test_z_does_not_change_with_rigid_motions(both, generator):
    coordinates, xyz = both
    shift = torch.randn(3, generator=generator, dtype=torch.float64)
    moved = xyz @ random_rotation(generator).T + shift
    torch.testing.assert_close(coordinates.from_xyz(moved), coordinates.from_xyz(xyz), rtol=0, atol=1e-10)


def test_standard_frame(both, generator):
    coordinates, _ = both
    xyz = coordinates.to_xyz(random_z(coordinates, 10, generator))
    order = [list(coordinates.atoms).index(atom) for atom in coordinates.atoms[:3]]
    first, second, third = xyz[:, order].unbind(1)
    assert (first == 0).all() and (second[:, 1:] == 0).all() and (third[:, 2] == 0).all()
    assert (second[:, 0] > 0).all() and (third[:, 1] > 0).all()


def test_gradcheck(both, generator):
    coordinates, _ = both
    z = random_z(coordinates, 1, generator)[0].requires_grad_()
    assert torch.autograd.gradcheck(coordinates.to_xyz, z)
    assert torch.autograd.gradcheck(coordinates.log_volume, z)
    thermal = coordinates.to_xyz(z).detach() + 0.1
    assert torch.autograd.gradcheck(coordinates.from_xyz, thermal.requires_grad_())


def test_batch_shapes(both, generator):
    coordinates, _ = both
    z = random_z(coordinates, 6, generator)
    n = len(coordinates.atoms)
    assert coordinates.n_features == 3 * n - 6 == len(coordinates.names) == len(coordinates.circular)
    nested = z.reshape(2, 3, -1)
    assert coordinates.to_xyz(nested).shape == (2, 3, n, 3)
    torch.testing.assert_close(coordinates.to_xyz(nested).reshape(6, n, 3), coordinates.to_xyz(z))
    torch.testing.assert_close(coordinates.from_xyz(coordinates.to_xyz(nested)).reshape(6, -1), z)
    torch.testing.assert_close(coordinates.log_volume(nested).reshape(6), coordinates.log_volume(z))


def test_input_structure_is_in_the_middle(both):
    coordinates, xyz = both
    z = coordinates.from_xyz(xyz)
    torch.testing.assert_close(z[~coordinates.circular], torch.zeros_like(z[~coordinates.circular]), rtol=0, atol=1e-9)


# ---------------------------------------------------------------- volume elements


def rotation_vector(w):
    zero = torch.zeros_like(w[0])
    return torch.linalg.matrix_exp(
        torch.stack(
            (
                torch.stack((zero, -w[2], w[1])),
                torch.stack((w[2], zero, -w[0])),
                torch.stack((-w[1], w[0], zero)),
            )
        )
    )


def all_positions_log_det(coordinates, z, generator):
    """log |det d(positions)/d(z, shift, rotation)| around a random placement: the volume element of everything."""
    n, rotation = coordinates.n_features, random_rotation(generator)

    def positions(q):
        return (coordinates.to_xyz(q[:n]) @ (rotation_vector(q[n + 3 :]) @ rotation).T + q[n : n + 3]).flatten()

    rigid = torch.cat((torch.randn(3, generator=generator, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)))
    return jacobian_log_det(positions, torch.cat((z, rigid)))


def volume_residuals(coordinates, generator):
    zs = random_z(coordinates, 12, generator, spread=0.95)
    log_dets = torch.stack([all_positions_log_det(coordinates, z, generator) for z in zs])
    return log_dets - coordinates.log_volume(zs)


def test_volume_element_with_rigid_motions(both, generator):
    """J(z) is the Jacobian of all 3n positions, up to one constant, wherever the molecule lies."""
    residuals = volume_residuals(both[0], generator)
    assert float(residuals.std()) < 1e-9
    assert float(residuals.mean().abs()) < 1e-8  # the scales of z are in J too


@pytest.mark.parametrize("kind", ["internal", "cartesian"])
def test_without_the_rigid_factor_the_volume_test_fails(kind, generator):
    coordinates, _ = make("valine", kind)
    right = coordinates.log_volume
    bond = coordinates.n_circular  # r12 in both descriptions
    coordinates.log_volume = lambda z: right(z) - 2 * torch.log(coordinates.to_physical(z)[..., bond])
    assert float(volume_residuals(coordinates, generator).std()) > 1e-3


@pytest.mark.parametrize("name", BONDS)
def test_volumes_of_internal_and_cartesian_coordinates_agree(name, generator):
    """The same physical density in both: they differ by the Jacobian between them."""
    internal, _ = make(name, "internal")
    cartesian, _ = make(name, "cartesian")
    residuals = []
    for z in random_z(internal, 12, generator):
        log_det = jacobian_log_det(lambda q: cartesian.from_xyz(internal.to_xyz(q)), z)
        there = cartesian.from_xyz(internal.to_xyz(z))
        back = jacobian_log_det(lambda q: internal.from_xyz(cartesian.to_xyz(q)), there)
        torch.testing.assert_close(back, -log_det)
        residuals.append(cartesian.log_volume(there) + log_det - internal.log_volume(z))
    assert float(torch.stack(residuals).std()) < 1e-9
    assert float(torch.stack(residuals).mean().abs()) < 1e-8


@pytest.mark.parametrize("seed", range(6))
def test_random_branched_molecules(seed, generator):
    bonds = random_tree(9, np.random.default_rng(seed))
    coordinates = internal_coordinates(bonds, random_structure(bonds, seed))
    z = random_z(coordinates, 5, generator)
    torch.testing.assert_close(coordinates.from_xyz(coordinates.to_xyz(z)), z, rtol=0, atol=1e-9)
    assert float(volume_residuals(coordinates, generator).std()) < 1e-9


@pytest.mark.parametrize("stiff", [[(1, 2)], [(2, 3), (3, 4)]], ids=str)
def test_stiff_bonds_change_the_description_and_not_the_density(stiff, generator):
    """Torsions of stiff bonds are bounded features; the volume element is that of the same structures."""
    bonds = BONDS["chain"]
    xyz = random_structure(bonds, 3)
    free, held = internal_coordinates(bonds, xyz), internal_coordinates(bonds, xyz, stiff=stiff)
    assert (held.n_circular, free.n_circular) == (3 - len(stiff), 3)
    assert sorted(held.names) == sorted(free.names)
    bounded = [name for name, circular in zip(held.names, held.circular.tolist(), strict=True) if not circular]
    assert sum(name.startswith("dihedral") for name in bounded) == len(stiff)
    z = random_z(held, 20, generator, spread=0.99)
    torch.testing.assert_close(held.from_xyz(held.to_xyz(z)), z, rtol=0, atol=1e-9)
    there = free.from_xyz(held.to_xyz(z))
    torch.testing.assert_close(held.to_xyz(z), free.to_xyz(there), rtol=0, atol=1e-12)
    # The scale of each stiff dihedral is all that differs.
    torch.testing.assert_close(
        held.log_volume(z) - free.log_volume(there), torch.full((20,), len(stiff) * math.log(0.08)).double()
    )
    residuals = volume_residuals(held, generator)
    assert float(residuals.std()) < 1e-9 and float(residuals.mean().abs()) < 1e-8


# ---------------------------------------------------------------- what is no structure


@pytest.mark.parametrize("name", ["chain", "valine"])
def test_what_is_no_structure_has_no_volume(name, generator):
    """Bonds and angles that a flow with a linear map may reach; the others' volumes and gradients are untouched."""
    coordinates, _ = make(name, "internal")
    z = random_z(coordinates, 7, generator)
    expected = coordinates.log_volume(z)
    assert torch.isfinite(expected).all()

    def reaching(feature, value):
        physical = coordinates.to_physical(z[0]).clone()
        physical[feature] = value
        return coordinates.from_physical(physical)

    n = coordinates.n_circular
    first_angle = next(k for k, text in enumerate(coordinates.names) if text.startswith("angle"))
    broken = [reaching(n, -0.01), reaching(n, -1e-6), reaching(first_angle, -0.1), reaching(first_angle, math.pi + 0.1)]
    both = torch.stack((*z, *broken)).requires_grad_()
    volume = coordinates.log_volume(both)
    assert (volume[7:] == -math.inf).all()
    torch.testing.assert_close(volume[:7].detach(), expected)
    (gradient,) = torch.autograd.grad(volume[:7].sum() + volume[7:].sum(), both)
    alone = z.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(coordinates.log_volume(alone).sum(), alone)
    torch.testing.assert_close(gradient[:7], wanted)
    assert (gradient[7:] == 0).all()
    inside = reaching(first_angle, 0.01)
    assert torch.isfinite(coordinates.log_volume(inside))


# ---------------------------------------------------------------- features


def test_torsions_come_first_and_are_the_dihedrals_of_the_atoms_in_their_names(generator):
    coordinates, _ = make("valine", "internal")
    assert coordinates.circular.tolist() == [True] * 2 + [False] * 13
    z = random_z(coordinates, 5, generator)
    xyz = coordinates.to_xyz(z)
    order = list(coordinates.atoms)
    for k, name in enumerate(coordinates.names):
        kind, atoms = name.split()
        chain = [order.index(int(label[1:])) for label in reversed(atoms.split("-"))]
        assert (kind == "dihedral") == bool(coordinates.circular[k])
        entry = {"bond": 0, "angle": 1, "dihedral": 2, "improper": 2}[kind]
        references = (chain[1:] + [i for i in range(7) if i not in chain])[:3]
        found = bond_angle_dihedral(xyz, torch.tensor([chain[0]]), torch.tensor([references]))[:, 0, entry]
        away = found - coordinates.to_physical(z)[:, k]
        torch.testing.assert_close(torch.sin(away), torch.zeros(5).double(), rtol=0, atol=1e-10)
        assert (torch.cos(away) > 0).all()
    assert len(set(coordinates.names)) == 15


def test_bounded_features_are_thermal_widths():
    coordinates, _ = make("chain", "internal")
    n = coordinates.n_circular
    one = coordinates.to_physical(torch.eye(coordinates.n_features).double()) - coordinates.to_physical(
        torch.zeros(coordinates.n_features).double()
    )
    torch.testing.assert_close(one.diagonal()[n:], torch.tensor([0.004] * 5 + [0.05] * 4).double())


def test_impropers_near_pi_do_not_jump(generator):
    """A planar centre's improper sits at 180 degrees; z must not change sides with its sign."""
    bonds = BONDS["isobutane"]
    xyz = random_structure(bonds)
    zmatrix = slow_zmatrix(bond_graph(4, bonds), range(4))
    centre = bond_angle_dihedral(xyz, torch.as_tensor(zmatrix.atoms), torch.as_tensor(zmatrix.references).clamp(min=0))
    centre = centre.numpy()
    centre[3, 2] = np.pi - 0.01
    coordinates = InternalCoordinates(zmatrix, list("abcd"), centre, np.full((4, 3), 0.02), 5.0)
    z = torch.linspace(-4, 4, 9).double()[:, None] * torch.tensor([0, 0, 0, 0, 0, 1.0]).double()
    signs = bond_angle_dihedral(coordinates.to_xyz(z), torch.tensor([3]), torch.tensor([[1, 0, 2]]))[:, 0, 2].sign()
    assert set(signs.tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(coordinates.from_xyz(coordinates.to_xyz(z)), z, rtol=0, atol=1e-9)


def test_a_wide_improper_covers_the_circle_once(generator):
    """A soft ring torsion at a high temperature: an interval beyond the circle would count conformations twice."""
    bonds = BONDS["isobutane"]
    xyz = random_structure(bonds)
    zmatrix = slow_zmatrix(bond_graph(4, bonds), range(4))
    centre = bond_angle_dihedral(xyz, torch.as_tensor(zmatrix.atoms), torch.as_tensor(zmatrix.references).clamp(min=0))
    coordinates = InternalCoordinates(zmatrix, list("abcd"), centre.numpy(), np.full((4, 3), 1.0), 5.0)
    assert float((coordinates.high - coordinates.low)[-1]) <= 2 * math.pi + 1e-12
    z = random_z(coordinates, 200, generator, spread=0.999)
    torch.testing.assert_close(coordinates.from_xyz(coordinates.to_xyz(z)), z, rtol=0, atol=1e-8)


def test_a_stiff_dihedral_has_half_a_turn_on_either_side():
    """A flow may leave the intervals; what it reaches further round is another z's structure and must not count."""
    bonds = BONDS["isobutane"]
    zmatrix = slow_zmatrix(bond_graph(4, bonds), range(4))
    centre = np.array([[0, 0, 0], [0.15, 0, 0], [0.15, 1.9, 0], [0.15, 1.9, 2.1]])
    coordinates = InternalCoordinates(zmatrix, list("abcd"), centre, np.full((4, 3), 0.05), 5.0)
    turns = torch.tensor([0.0, math.pi - 0.01, math.pi + 0.01, -math.pi + 0.01, -math.pi - 0.01]).double()
    z = torch.zeros((5, 6), dtype=torch.float64)
    z[:, 5] = turns / 0.05
    counted = torch.isfinite(coordinates.log_volume(z))
    assert counted.tolist() == [True, True, False, True, False]
    again = coordinates.from_xyz(coordinates.to_xyz(z))
    assert ((again - z).abs().amax(1) < 1e-9).tolist() == counted.tolist()


def test_no_feature_reaches_where_the_geometry_breaks(generator):
    xyz = random_structure(BONDS["chain"])
    zmatrix = slow_zmatrix(bond_graph(6, BONDS["chain"]), range(6))
    centre = bond_angle_dihedral(xyz, torch.as_tensor(zmatrix.atoms), torch.as_tensor(zmatrix.references).clamp(min=0))
    coordinates = InternalCoordinates(zmatrix, list("abcdef"), centre.numpy(), np.full((6, 3), 1.0), 5.0)
    inside = random_z(coordinates, 100, generator, 1.0)
    edges = torch.cat((inside.sign() * 5, inside))
    assert torch.isfinite(coordinates.log_volume(edges)).all()
    assert torch.isfinite(coordinates.to_xyz(edges)).all()


@pytest.mark.parametrize(("omega", "name"), [(0.1, "cis"), (3.1, "trans"), (-3.1, "trans")])
def test_a_stiff_torsion_stays_where_the_input_has_it(omega, name, generator):
    """Near 180 degrees it must not jump either; and no z leads from cis to trans."""
    bonds = list(pairwise(range(4)))
    zmatrix = slow_zmatrix(bond_graph(4, bonds), range(4), [frozenset((1, 2))])
    centre = np.array([[0, 0, 0], [0.14, 0, 0], [0.14, 2.0, 0], [0.14, 2.0, omega]])
    coordinates = InternalCoordinates(zmatrix, list("abcd"), centre, np.full((4, 3), 0.1), 6.0)
    assert coordinates.n_circular == 0
    assert coordinates.names[-1] == "dihedral a-b-c-d"
    z = random_z(coordinates, 200, generator, spread=0.999)
    torch.testing.assert_close(coordinates.from_xyz(coordinates.to_xyz(z)), z, rtol=0, atol=1e-9)
    found = bond_angle_dihedral(coordinates.to_xyz(z), torch.tensor([3]), torch.tensor([[2, 1, 0]]))[:, 0, 2]
    assert {"cis" if abs(angle) < math.pi / 2 else "trans" for angle in found.tolist()} == {name}
    middle = coordinates.to_physical(torch.zeros(6).double())[-1]
    assert math.isclose(float(middle), omega, abs_tol=1e-12)


def test_straight_chains_are_refused():
    zmatrix = slow_zmatrix(bond_graph(4, list(pairwise(range(4)))), range(4))
    centre = np.array([[0, 0, 0], [0.12, 0, 0], [0.14, 3.12, 0], [0.14, 1.9, 1.0]])
    with pytest.raises(CGFlowError, match="angle a-b-c is straight"):
        InternalCoordinates(zmatrix, list("abcd"), centre, np.full((4, 3), 0.05), 5.0)


def test_torsions_are_read_back_on_the_circle(generator):
    coordinates, _ = make("chain", "internal")
    z = random_z(coordinates, 20, generator)
    turns = 2 * math.pi * (coordinates.circular * torch.randint(-2, 3, z.shape, generator=generator)).double()
    torch.testing.assert_close(coordinates.to_xyz(z + turns), coordinates.to_xyz(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(coordinates.from_physical(coordinates.to_physical(z + turns)), z, rtol=0, atol=1e-12)

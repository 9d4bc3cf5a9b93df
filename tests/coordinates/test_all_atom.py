"""All-atom structures: round trips, handedness, and a volume element of the fast atoms that z does not touch."""

import numpy as np
import pytest
import torch
from analytic import BONDS, assembly_of, random_rotation, random_structure, random_tree, random_z

# Two carbons with hydrogens: C0 C1 C2 C3 slow, the rest fast; C1 carries H4 and F5, so it is a stereocentre.
CHIRAL = [(0, 1), (1, 2), (2, 3), (1, 4), (1, 5), (0, 6), (0, 7), (0, 8), (2, 9), (2, 10), (3, 11), (11, 12)]
ELEMENTS = ["C", "C", "C", "C", "H", "F", "H", "H", "H", "H", "H", "O", "H"]
SLOW = [0, 1, 2, 3]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


@pytest.fixture(params=["internal", "cartesian"])
def all_atom(request):
    return assembly_of(CHIRAL, SLOW, random_structure(CHIRAL, 1), ELEMENTS, request.param)


def thermal(xyz, n, generator, width=0.005):
    return xyz + width * torch.randn((n, *xyz.shape), generator=generator, dtype=torch.float64)


def test_build_inverts_read(all_atom, generator):
    xyz = thermal(random_structure(CHIRAL, 1), 40, generator) @ random_rotation(generator).T
    again = all_atom.build(all_atom.read_slow(xyz), all_atom.read_fast(xyz))
    assert again.shape == xyz.shape
    torch.testing.assert_close(torch.cdist(again, again), torch.cdist(xyz, xyz), rtol=0, atol=1e-10)
    assert all_atom.same_handedness(again).all()


def test_read_inverts_build(all_atom, generator):
    xyz = thermal(random_structure(CHIRAL, 1), 40, generator)
    z, y = random_z(all_atom.coordinates, 40, generator), all_atom.read_fast(xyz)
    built = all_atom.build(z, y)
    torch.testing.assert_close(all_atom.read_slow(built), z, rtol=0, atol=1e-9)
    torch.testing.assert_close(all_atom.read_fast(built), y, rtol=0, atol=1e-9)
    slow = built[:, list(all_atom.slow)]
    torch.testing.assert_close(slow, all_atom.coordinates.to_xyz(z), rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(6))
def test_random_molecules(seed, generator):
    rng = np.random.default_rng(seed)
    bonds = random_tree(14, rng)
    neighbours = {i: [j for bond in bonds if i in bond for j in bond if j != i] for i in range(14)}
    slow = [int(rng.integers(14))]
    while len(slow) < 6:
        slow.append(int(rng.choice([j for i in slow for j in neighbours[i] if j not in slow])))
    xyz = random_structure(bonds, seed)
    all_atom = assembly_of(bonds, sorted(slow), xyz)
    moved = thermal(xyz, 10, generator)
    again = all_atom.build(all_atom.read_slow(moved), all_atom.read_fast(moved))
    torch.testing.assert_close(torch.cdist(again, again), torch.cdist(moved, moved), rtol=0, atol=1e-9)


def test_mirror_images_are_noticed(all_atom, generator):
    assert all_atom.stereocentres.tolist() == [[0, 2, 4, 5]]
    xyz = thermal(random_structure(CHIRAL, 1), 30, generator) @ random_rotation(generator).T
    assert all_atom.same_handedness(xyz).all()
    for axis in range(3):
        mirror = torch.ones(3, dtype=torch.float64)
        mirror[axis] = -1
        assert not all_atom.same_handedness(xyz * mirror).any()
    swapped = xyz[:, [0, 1, 2, 3, 5, 4, *range(6, 13)]]  # H and F of the centre
    assert not all_atom.same_handedness(swapped).any()
    frames = torch.stack((xyz, -xyz), dim=1)
    assert all_atom.same_handedness(frames).tolist() == [[True, False]] * 30


def test_nan_has_no_handedness(all_atom):
    assert not all_atom.same_handedness(torch.full((1, 13, 3), float("nan"), dtype=torch.float64)).any()


def test_without_stereocentres_every_structure_is_fine(generator):
    xyz = random_structure(BONDS["isobutane"])
    all_atom = assembly_of(BONDS["isobutane"], [0, 1, 2], xyz)
    assert all_atom.same_handedness(torch.stack((xyz, -xyz))).all()


def test_volume_of_the_fast_atoms_depends_on_y_alone(all_atom, generator):
    """|det d(x_fast)/dy| = prod r^2 sin(theta) at every z: what the co-moving estimator stands on."""
    fast = [i for i in range(len(ELEMENTS)) if i not in SLOW]
    moved = thermal(random_structure(CHIRAL, 1), 4, generator)
    for y in all_atom.read_fast(moved):
        expected = (2 * torch.log(y[:, 0]) + torch.log(torch.sin(y[:, 1]))).sum()
        for z in random_z(all_atom.coordinates, 4, generator):

            def fast_positions(flat, z=z):
                return all_atom.build(z, flat.unflatten(0, (-1, 3)))[fast].flatten()

            jacobian = torch.autograd.functional.jacobian(fast_positions, y.flatten())
            torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], expected)


def test_build_is_differentiable(all_atom, generator):
    y = all_atom.read_fast(random_structure(CHIRAL, 1)).requires_grad_()
    z = random_z(all_atom.coordinates, 1, generator)[0].requires_grad_()
    assert torch.autograd.gradcheck(all_atom.build, (z, y))


def test_fast_atoms_follow_both_torsions(generator):
    """Turning a torsion at fixed y moves hydrogens with the carbon they sit on: no bond changes."""
    all_atom = assembly_of(CHIRAL, SLOW, random_structure(CHIRAL, 1), ELEMENTS)
    y = all_atom.read_fast(random_structure(CHIRAL, 1))
    z = all_atom.read_slow(random_structure(CHIRAL, 1)).repeat(12, 1)
    z[:, 0] = torch.linspace(-3, 3, 12)
    built = all_atom.build(z, y.expand(12, -1, -1))
    for i, j in CHIRAL:
        lengths = (built[:, i] - built[:, j]).norm(dim=-1)
        assert float(lengths.std()) < 1e-12
    # and neither do the angles of the hydrogens at both ends of the bond that turns
    for i, a, b in [(4, 1, 0), (4, 1, 2), (9, 2, 1), (9, 2, 3), (10, 2, 3)]:
        first, second = built[:, i] - built[:, a], built[:, b] - built[:, a]
        assert float(torch.cosine_similarity(first, second, dim=-1).std()) < 1e-12

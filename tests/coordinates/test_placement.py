"""Single atoms from bond, angle and dihedral, and back."""

import mdtraj
import numpy as np
import pytest
import torch

from openmm_cgflow.coordinates.placement import bond_angle_dihedral, place, place_first_three, signed_volumes


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


def jacobian_log_det(function, at):
    return torch.linalg.slogdet(torch.autograd.functional.jacobian(function, at))[1]


def test_bonds_angles_and_dihedrals_are_those_of_mdtraj():
    xyz = np.random.default_rng(0).normal(size=(50, 4, 3)).astype(np.float32)
    topology = mdtraj.Topology()
    residue = topology.add_residue("X", topology.add_chain())
    for k in range(4):
        topology.add_atom(f"C{k}", mdtraj.element.carbon, residue)
    trajectory = mdtraj.Trajectory(xyz, topology)
    expected = np.stack(
        (
            mdtraj.compute_distances(trajectory, [[0, 1]])[:, 0],
            mdtraj.compute_angles(trajectory, [[0, 1, 2]])[:, 0],
            mdtraj.compute_dihedrals(trajectory, [[0, 1, 2, 3]])[:, 0],
        ),
        axis=1,
    )
    found = bond_angle_dihedral(torch.as_tensor(xyz).double(), torch.tensor([0]), torch.tensor([[1, 2, 3]]))
    assert np.abs(expected[:, 2]).min() < 1 < np.abs(expected[:, 2]).max()
    np.testing.assert_allclose(found[:, 0].numpy(), expected, atol=2e-5)


def test_place_inverts_bond_angle_dihedral(generator):
    frame = torch.randn((20, 3, 3), generator=generator, dtype=torch.float64)
    internal = torch.rand((20, 3), generator=generator, dtype=torch.float64) + torch.tensor([0.05, 1.0, -0.5])
    atom = place(*frame.unbind(1), internal)
    found = bond_angle_dihedral(torch.cat((frame, atom[:, None]), 1), torch.tensor([3]), torch.tensor([[0, 1, 2]]))
    torch.testing.assert_close(found[:, 0], internal, rtol=0, atol=1e-12)


def test_first_three_atoms():
    xyz = place_first_three(*torch.tensor([0.1, 0.2, 2.0], dtype=torch.float64))
    found = bond_angle_dihedral(xyz, torch.tensor([2]), torch.tensor([[1, 0, 2]]))[0]
    torch.testing.assert_close(found[:2], torch.tensor([0.2, 2.0], dtype=torch.float64))
    assert xyz[0].tolist() == [0, 0, 0] and xyz[1].tolist() == [0.1, 0, 0] and xyz[2, 1] > 0 and xyz[2, 2] == 0


def test_placing_has_the_volume_element_r2_sin_theta(generator):
    frame = torch.randn((3, 3), generator=generator, dtype=torch.float64)
    internal = torch.tensor([0.3, 1.1, 2.2]).double()
    log_det = jacobian_log_det(lambda q: place(*frame, q), internal)
    torch.testing.assert_close(log_det, 2 * torch.log(internal[0]) + torch.log(torch.sin(internal[1])))


def test_place_gradcheck(generator):
    inputs = [torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    internal = torch.tensor([0.3, 1.1, 2.2]).double().requires_grad_()
    assert torch.autograd.gradcheck(place, (*inputs, internal))


def test_signed_volume_changes_sign_in_the_mirror(generator):
    xyz = torch.randn((9, 5, 3), generator=generator, dtype=torch.float64)
    centres = torch.tensor([[1, 2, 3, 4], [0, 1, 2, 4]])
    volume = signed_volumes(xyz, centres)
    determinant = torch.linalg.det(xyz[:, [1, 2, 3]] - xyz[:, 4:5])
    torch.testing.assert_close(volume[:, 0], determinant)
    torch.testing.assert_close(signed_volumes(xyz * torch.tensor([1, -1, 1]), centres), -volume)
    torch.testing.assert_close(signed_volumes(xyz[:, [0, 2, 1, 3, 4]], centres[:1]), -volume[:, :1])

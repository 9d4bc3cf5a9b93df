"""DimeNet++ against the authors' numbers, and against its definition spelled out edge by edge."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from scipy.special import eval_legendre, expit, spherical_jn

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.paper.bonded_terms import BondedTerms
from openmm_cgflow.paper.dimenet import _N_ORDERS, _N_ZEROS, DimeNetPP, DimeNetWithPrior, load_dimenet

_CUTOFF = 0.5
_SPECIES = [0, 1, 2, 1]


def _parameters(seed=1):
    """Weights of a network as small as the names allow: 4 channels of messages."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        "DimeNetPP/~/BesselRadial|RBF_Frequencies": math.pi * torch.arange(1, 7),
        "DimeNetPP/~/Embedding|Embedding_vect": torch.randn(3, 2, generator=generator),
    }

    def dense(name, n_in, n_out, bias=False):
        weight = torch.randn(n_in, n_out, generator=generator) / math.sqrt(n_in)
        parameters[f"DimeNetPP/~/{name}/~/linear|w"] = weight
        if bias:
            parameters[f"DimeNetPP/~/{name}/~/linear|b"] = torch.randn(n_out, generator=generator)

    dense("Embedding/~/RBF_Dense", 6, 4)
    dense("Embedding/~/Concat_Dense", 8, 4, bias=True)
    for k in range(5):
        name = f"Output_{k}" if k else "Output"
        dense(f"{name}/~/RBF_Dense", 6, 4)
        dense(f"{name}/~/Upprojection", 4, 5)
        for layer in ("Dense_Series", "Dense_Series_1", "Dense_Series_2"):
            dense(f"{name}/~/{layer}", 5, 5, bias=True)
        dense(f"{name}/~/Final_output", 5, 1)
    for k in range(4):
        name = f"Interaction_{k}" if k else "Interaction"
        for layer in ("Dense_kj", "Dense_ji", "FinalBeforeSkip"):
            dense(f"{name}/~/{layer}", 4, 4, bias=True)
        for n_in, n_out, layer in ((6, 2, "rbf1"), (2, 4, "rbf2"), (42, 2, "sbf1"), (2, 3, "sbf2")):
            dense(f"{name}/~/{layer}", n_in, n_out)
        dense(f"{name}/~/Downprojection", 4, 3)
        dense(f"{name}/~/Upprojection", 3, 4)
        for layer in ("ResLayer", "ResLayer_1", "ResLayer_2"):
            for part in ("ResidualSubLayer", "ResidualSubLayer_1"):
                dense(f"{name}/~/{layer}/~/{part}", 4, 4, bias=True)
    return {name: value.double() for name, value in parameters.items()}


def test_all_tensors_go_with_the_module_to_its_device(network):
    """The meta device computes nothing, but refuses tensors of another device, as a GPU does."""
    prior = BondedTerms([[0, 1, 0.15, 1e5]], [[0, 1, 2, 110.0, 0.1]], [[0, 1, 2, 3, 3, 1.0]], [])
    potential = copy.deepcopy(DimeNetWithPrior(network, prior)).to("meta")
    energy = potential(torch.zeros(5, 4, 3, dtype=torch.float64, device="meta"))
    assert energy.shape == (5,) and energy.device.type == "meta"


@pytest.fixture(scope="module")
def network():
    return DimeNetPP(_parameters(), _SPECIES, _CUTOFF)


@pytest.fixture(scope="module")
def xyz():
    """Four atoms, of which the last is within reach of the third only."""
    return torch.tensor([[0.0, 0.0, 0.0], [0.14, 0.02, 0.0], [0.2, 0.15, 0.03], [0.25, 0.5, 0.3]], dtype=torch.float64)


def _by_edges(parameters, species, xyz):
    """The energy as the definition has it: a message for each edge, a sum over explicit triplets."""
    xyz = xyz.numpy()
    named = {name.removeprefix("DimeNetPP/~/").replace("/~/linear", ""): p.numpy() for name, p in parameters.items()}

    def dense(x, name):
        return x @ named[f"{name}|w"] + named.get(f"{name}|b", 0.0)

    def swish(x):
        return x * expit(x)

    def envelope(d):
        return 1 - 28 * d**6 + 48 * d**7 - 21 * d**8

    n = len(xyz)
    distance = np.linalg.norm(xyz[:, None] - xyz, axis=-1)
    edges = [(j, i) for j in range(n) for i in range(n) if i != j and distance[i, j] < _CUTOFF]
    frequencies = named["BesselRadial|RBF_Frequencies"]

    def radial(edge):
        r = distance[edge]
        return envelope(r / _CUTOFF) * math.sqrt(2 / _CUTOFF) * np.sin(frequencies * r / _CUTOFF) / r

    # Those of j_l lie between those of j_(l-1).
    zeros = [np.arange(1, 14) * math.pi]
    for order in range(1, 7):
        low, high = zeros[-1][:-1].copy(), zeros[-1][1:].copy()
        rising = spherical_jn(order, high) > 0
        for _ in range(60):
            middle = (low + high) / 2
            beyond = (spherical_jn(order, middle) > 0) == rising
            low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
        zeros.append((low + high) / 2)

    def spherical(edge, cosine):
        d, values = distance[edge] / _CUTOFF, []
        for order in range(_N_ORDERS):
            z = zeros[order][:_N_ZEROS]
            norm = 1 / np.sqrt(0.5 * spherical_jn(order + 1, z) ** 2)
            angular = math.sqrt((2 * order + 1) / (4 * math.pi)) * eval_legendre(order, cosine)
            values.extend(envelope(d) * norm * spherical_jn(order, z * d) * angular)
        return np.array(values)

    rows = named["Embedding|Embedding_vect"][species]
    rbf = {edge: radial(edge) for edge in edges}
    m = {
        (j, i): swish(
            dense(
                np.concatenate((rows[i], rows[j], dense(rbf[j, i], "Embedding/~/RBF_Dense"))),
                "Embedding/~/Concat_Dense",
            )
        )
        for j, i in edges
    }

    def output(name):
        total = 0.0
        for atom in range(n):
            summed = sum((m[e] * dense(rbf[e], f"{name}/~/RBF_Dense") for e in edges if e[1] == atom), np.zeros(4))
            x = dense(summed, f"{name}/~/Upprojection")
            for layer in ("Dense_Series", "Dense_Series_1", "Dense_Series_2"):
                x = swish(dense(x, f"{name}/~/{layer}"))
            total += dense(x, f"{name}/~/Final_output")[0]
        return total

    def residual(x, name):
        return x + swish(dense(swish(dense(x, f"{name}/~/ResidualSubLayer")), f"{name}/~/ResidualSubLayer_1"))

    energy = output("Output")
    for k in range(4):
        name = f"Interaction_{k}" if k else "Interaction"
        new = {}
        for j, i in edges:
            arriving = np.zeros(3)
            for k_, j_ in edges:
                if j_ != j or k_ == i:
                    continue
                to_i, to_k = xyz[i] - xyz[j], xyz[k_] - xyz[j]
                angle = math.atan2(np.linalg.norm(np.cross(to_i, to_k)), to_i @ to_k)
                a = swish(dense(m[k_, j], f"{name}/~/Dense_kj"))
                a = a * dense(dense(rbf[k_, j], f"{name}/~/rbf1"), f"{name}/~/rbf2")
                a = swish(dense(a, f"{name}/~/Downprojection"))
                sbf = spherical((k_, j), math.cos(angle))
                arriving += a * dense(dense(sbf, f"{name}/~/sbf1"), f"{name}/~/sbf2")
            x = swish(dense(arriving, f"{name}/~/Upprojection")) + swish(dense(m[j, i], f"{name}/~/Dense_ji"))
            x = swish(dense(residual(x, f"{name}/~/ResLayer"), f"{name}/~/FinalBeforeSkip")) + m[j, i]
            new[j, i] = residual(residual(x, f"{name}/~/ResLayer_1"), f"{name}/~/ResLayer_2")
        m = new
        energy += output(f"Output_{k + 1}")
    return energy


def test_equals_its_definition(network, xyz):
    assert len({tuple(row) for row in ((xyz[:, None] - xyz).norm(dim=-1) < _CUTOFF).tolist()}) > 1  # not all are edges
    expected = _by_edges(_parameters(), _SPECIES, xyz)
    assert np.isclose(float(network(xyz)), expected, rtol=1e-10)


def test_moving_turning_and_mirroring_change_nothing(network, xyz):
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    moved = torch.stack((xyz + 3.0, xyz @ turn, -xyz))
    assert torch.allclose(network(moved), network(xyz).expand(3), rtol=1e-10)
    assert not torch.isclose(network(xyz[[1, 0, 2, 3]]), network(xyz), rtol=1e-3)  # atoms of two types


def test_atoms_beyond_the_cutoff_do_not_matter(network, xyz):
    far = xyz.clone()
    far[3] += 1.0
    farther = far.clone()
    farther[3] *= 2.0
    assert torch.equal(network(far), network(farther))
    # The pair's energy and force vanish at the cutoff.
    just = torch.tensor([[0.0, 0, 0], [0, 9, 0], [0, 0, 9], [_CUTOFF - 1e-4, 0, 0]], dtype=torch.float64)
    beyond = just + torch.tensor([[0.0], [0], [0], [2e-4]]) * torch.tensor([1.0, 0, 0])
    assert torch.allclose(network(just), network(beyond), atol=1e-8, rtol=0)


def test_a_batch_is_every_structure(network, xyz):
    batch = xyz + 0.01 * torch.randn((2, 3, 4, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    batch.requires_grad_()
    energy = network(batch)
    (gradient,) = torch.autograd.grad(energy.sum(), batch)
    assert energy.shape == (2, 3)
    one = batch[1, 2].detach().requires_grad_()
    alone = network(one)
    assert alone.shape == ()
    assert torch.allclose(alone, energy[1, 2], rtol=1e-12)
    assert torch.allclose(torch.autograd.grad(alone, one)[0], gradient[1, 2], rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(network, (one,))


_PRIOR = {
    "bonds": [{"i": 0, "j": 1, "r0_nm": 0.1, "k_kJ_mol_nm2": 3.0}],
    "angles": [{"i": 0, "j": 1, "k": 2, "theta0_deg": 60.0, "k_kJ_mol_deg2": 0.5}],
    "dihedrals": [{"i": 0, "j": 1, "k": 2, "l": 3, "n": 2, "kd_kJ_mol": -1.5}],
    "impropers": [{"i": 0, "j": 1, "k": 2, "l": 3, "psi0_deg": 30.0, "k_kJ_mol_deg2": 0.25}],
    "species": _SPECIES,
    "r_cutoff_nm": _CUTOFF,
}


@pytest.mark.parametrize(("sign", "improper"), [(1, 0.5 * 0.25 * 60**2), (-1, 0.5 * 0.25 * 120**2)])
def test_prior_by_hand(sign, improper):
    """A right angle and a dihedral of 90 degrees of either sign: the improper tells mirror images apart."""
    xyz = torch.tensor(
        [[0.3, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.2, 0.0], [0.0, 0.2, -0.2 * sign]], dtype=torch.float64
    )
    prior = BondedTerms.from_dict(_PRIOR)
    expected = 0.5 * 3 * 0.2**2 + 0.5 * 0.5 * 30**2 + (1.5 - 1.5 * math.cos(math.pi)) + improper
    assert np.isclose(float(prior(xyz)), expected)
    assert torch.allclose(prior(torch.stack((xyz, xyz))), prior(xyz))


def _shared(root):
    folder = root.parent / "shared" / "reference" / "dimenet"
    if not folder.is_dir():
        pytest.skip("the weights of the paper's potential do not lie beside the checkout")
    return folder


def test_the_published_potential(root):
    folder = _shared(root)
    vectors = np.load(folder / "vectors.npz")
    kept = np.setdiff1d(np.arange(len(vectors["energy"])), [16, 76])  # where the authors' program drops triplets
    potential = load_dimenet(folder / "params.npz", folder / "prior.json")
    xyz = torch.tensor(vectors["positions"], requires_grad=True)
    energy = potential(xyz)
    (gradient,) = torch.autograd.grad(energy.sum(), xyz)
    assert np.abs(energy.detach().numpy() - vectors["energy"])[kept].max() < 0.01
    assert np.abs(-gradient.numpy() - vectors["forces"])[kept].max() < 0.1
    assert np.allclose(potential.prior(xyz).detach().numpy(), vectors["prior_energy"], atol=1e-9, rtol=0)
    assert np.abs(potential.network(xyz).detach().numpy() - vectors["gnn_energy"])[[16, 76]].min() > 0.1


def test_files(tmp_path):
    weights, prior = tmp_path / "weights.npz", tmp_path / "prior.json"
    np.savez(weights, **{name: value.numpy() for name, value in _parameters().items()})
    prior.write_text(json.dumps(_PRIOR))
    potential = load_dimenet(weights, prior)
    with pytest.raises(CGFlowError, match="device: torch cannot compute on 'abacus'"):
        load_dimenet(weights, prior, device="abacus")
    assert isinstance(potential, DimeNetWithPrior)
    assert not list(filter(lambda p: p.requires_grad, potential.parameters()))
    parameters = _parameters()
    del parameters["DimeNetPP/~/Interaction_2/~/rbf1/~/linear|w"]
    np.savez(weights, **{name: value.numpy() for name, value in parameters.items()})
    with pytest.raises(CGFlowError, match=r"weights\.npz: not the weights of a DimeNet\+\+: KeyError: .*Interaction_2"):
        load_dimenet(weights, prior)
    prior.write_text(json.dumps(_PRIOR | {"angles": [{"i": 0}]}))
    with pytest.raises(CGFlowError, match=r"prior\.json: not the prior of a DimeNet\+\+: KeyError: 'j'"):
        load_dimenet(weights, prior)
    with pytest.raises(CGFlowError, match=r"none\.json: not the prior"):
        load_dimenet(weights, tmp_path / "none.json")

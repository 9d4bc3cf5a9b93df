"""DimeNet++ for one molecule, with a bonded prior: the all-atom model of the paper's alanine dipeptide (section 3.3).

DimeNet++ (Gasteiger, Giri, Margraf and Günnemann, arXiv:2011.14115) passes messages along directed edges and weighs
them by the angles between edges. Here all pairs of atoms are edges: one beyond the cutoff adds exactly nothing, since
what leaves it is multiplied by radial functions that are zero there. So all structures have tensors of one shape, and a
batch of them is one call. The sum over triplets never forms them: the angular functions are polynomials of cosines, so
at each atom it is one product of matrices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import spherical_jn
from torch import Tensor, nn
from torch.nn.functional import silu

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.paper.bonded_terms import BondedTerms

__all__ = ["DimeNetPP", "DimeNetWithPrior", "load_dimenet"]

_N_ORDERS, _N_ZEROS = 7, 6  # of the spherical basis
_ENVELOPE = 6
_N_INTERACTIONS = 4
_ROOT = "DimeNetPP/~/"

Parameters = Mapping[str, Tensor]


class DimeNetWithPrior(nn.Module):
    """The sum of both: positions (..., n_atoms, 3) nm -> energies (...) kJ/mol."""

    def __init__(self, network: DimeNetPP, prior: BondedTerms) -> None:
        super().__init__()
        self.network, self.prior = network, prior

    def forward(self, positions: Tensor) -> Tensor:
        return self.network(positions) + self.prior(positions)


def load_dimenet(weights: Path, prior: Path, device: str = "cpu") -> DimeNetWithPrior:
    """The potential of ``systems/alanine_dipeptide_heavy``, whose SOURCE.md describes both files.

    Arguments:
        weights: Parameters of the network, npz.
        prior: Bonded terms, types of the atoms and the cutoff, JSON.
        device: Where torch computes it, such as ``cuda``.

    Raises:
        CGFlowError: If a file cannot be read or lacks something, or torch has no such device.
    """
    try:
        described = json.loads(Path(prior).read_text())
        terms = BondedTerms.from_dict(described)
        species, cutoff = described["species"], float(described["r_cutoff_nm"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CGFlowError(f"{prior}: not the prior of a DimeNet++: {type(error).__name__}: {error}") from error
    try:
        with np.load(weights) as file:
            parameters = {name: torch.tensor(file[name]) for name in file.files}
        network = DimeNetPP(parameters, species, cutoff)
    except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise CGFlowError(f"{weights}: not the weights of a DimeNet++: {type(error).__name__}: {error}") from error
    try:
        return DimeNetWithPrior(network, terms).to(device)
    except (RuntimeError, AssertionError) as error:
        raise CGFlowError(f"device: torch cannot compute on {device!r}: {error}") from error


class DimeNetPP(nn.Module):
    """DimeNet++ of a molecule whose atoms have fixed types: positions (..., n_atoms, 3) nm -> energies (...) kJ/mol.

    The bases are computed in the precision of the positions, the messages in that of the parameters. Messages of edges
    j -> i have shape (B, n_atoms, n_atoms, n_channels), with i first.

    Arguments:
        parameters: ``MODULE/PATH|w`` of shape (in, out) and ``|b`` of shape (out,), as Haiku names them.
        species: Row of the embedding for each atom.
        cutoff: nm.

    Raises:
        KeyError: If a parameter is missing.
    """

    def __init__(self, parameters: Parameters, species: Sequence[int], cutoff: float) -> None:
        super().__init__()
        self.bases = _Bases(parameters[f"{_ROOT}BesselRadial|RBF_Frequencies"], len(species), cutoff)
        self.embedding = _Embedding(parameters, species)
        self.interactions = nn.ModuleList(_Interaction(parameters, k) for k in range(_N_INTERACTIONS))
        self.outputs = nn.ModuleList(_Output(parameters, k) for k in range(_N_INTERACTIONS + 1))
        self.requires_grad_(False)  # forces need none with respect to the parameters

    def forward(self, positions: Tensor) -> Tensor:
        rbf, sbf, angular = self.bases(positions.reshape(-1, *positions.shape[-2:]))
        messages = self.embedding(rbf)
        energy = self.outputs[0](messages, rbf)
        for interaction, output in zip(self.interactions, self.outputs[1:], strict=True):
            messages = interaction(messages, rbf, sbf, angular)
            energy = energy + output(messages, rbf)
        return energy.to(positions.dtype).reshape(positions.shape[:-2])


class _Bases(nn.Module):
    """Radial and spherical functions of every edge, zero beyond the cutoff and from an atom to itself."""

    frequencies: Tensor
    zeros: Tensor
    norms: Tensor
    pairs: Tensor
    pair_of_edge: Tensor
    sign_of_edge: Tensor

    def __init__(self, frequencies: Tensor, n_atoms: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff, self.dtype = cutoff, frequencies.dtype
        zeros = _bessel_zeros()
        orders = np.arange(_N_ORDERS)[:, None]
        norms = np.sqrt((2 * orders + 1) / (4 * math.pi)) / np.sqrt(0.5 * spherical_jn(orders + 1, zeros) ** 2)
        self.register_buffer("frequencies", frequencies.double())
        self.register_buffer("zeros", torch.tensor(zeros))
        self.register_buffer("norms", torch.tensor(norms))
        pairs = torch.triu_indices(n_atoms, n_atoms, 1)
        n_pairs = pairs.shape[1]
        pair_of_edge = torch.full((n_atoms, n_atoms), n_pairs)  # a row of zeros, for an atom and itself
        pair_of_edge[pairs[0], pairs[1]] = pair_of_edge[pairs[1], pairs[0]] = torch.arange(n_pairs)
        self.register_buffer("pairs", pairs)
        self.register_buffer("pair_of_edge", pair_of_edge.flatten())
        self.register_buffer("sign_of_edge", torch.ones(n_atoms, n_atoms).triu() - torch.ones(n_atoms, n_atoms).tril())

    def forward(self, xyz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Basis functions at positions (B, n_atoms, 3), nm.

        Returns:
            The radial basis (B, n, n, 6), the radial part of the spherical one (B, n, n, 7, 6), and Legendre
            polynomials (B, n, n, n, 7) of the angle at atom j between i and k, with j first, zero where two are one.
        """
        vectors = xyz[:, self.pairs[1]] - xyz[:, self.pairs[0]]
        lengths = vectors.norm(dim=-1, keepdim=True)
        scaled = lengths / self.cutoff
        envelope = _envelope(scaled)
        rbf = envelope * math.sqrt(2 / self.cutoff) / lengths * torch.sin(self.frequencies * scaled)
        sbf = envelope[..., None] * self.norms * _spherical_bessel(self.zeros * scaled[..., None])
        features = torch.cat((rbf, sbf.flatten(2), vectors / lengths), dim=-1).to(self.dtype)
        features = nn.functional.pad(features, (0, 0, 0, 1)).index_select(1, self.pair_of_edge)
        n = xyz.shape[1]
        features = features.unflatten(1, (n, n))
        rbf, sbf, directions = features.split((len(self.frequencies), self.zeros.numel(), 3), dim=-1)
        directions = directions * self.sign_of_edge[..., None]
        cosines = directions @ directions.transpose(-1, -2)
        apart = 1 - torch.eye(n, dtype=self.dtype, device=xyz.device)
        angular = _legendre(cosines) * (apart[:, :, None] * apart[:, None, :] * apart)[..., None]
        return rbf, sbf.unflatten(-1, self.zeros.shape), angular


def _envelope(d: Tensor) -> Tensor:
    p = _ENVELOPE
    inside = 1 - (p + 1) * (p + 2) / 2 * d**p + p * (p + 2) * d ** (p + 1) - p * (p + 1) / 2 * d ** (p + 2)
    return torch.where(d < 1, inside, 0.0)


def _bessel_zeros() -> np.ndarray:
    """The first zeros of the spherical Bessel functions, shape (7, 6): those of order l lie between those of l - 1."""
    zeros = [np.arange(1, _N_ORDERS + _N_ZEROS) * math.pi]
    for order in range(1, _N_ORDERS):

        def function(x: float, order: int = order) -> float:
            return float(spherical_jn(order, x))

        brackets = zip(zeros[-1][:-1], zeros[-1][1:], strict=True)
        zeros.append(np.array([brentq(function, *bracket, xtol=1e-14) for bracket in brackets]))
    return np.stack([row[:_N_ZEROS] for row in zeros])


def _spherical_bessel(x: Tensor) -> Tensor:
    """j_l(x_l), shape (..., 7, 6), by recurrence in l, which loses digits at distances far below 0.01 nm."""
    sine, cosine = torch.sin(x), torch.cos(x)
    rows = [sine[..., 0, :] / x[..., 0, :]]
    for order in range(1, _N_ORDERS):
        inverse = 1 / x[..., order, :]
        before = sine[..., order, :] * inverse
        now = (before - cosine[..., order, :]) * inverse
        for k in range(1, order):
            before, now = now, (2 * k + 1) * inverse * now - before
        rows.append(now)
    return torch.stack(rows, dim=-2)


def _legendre(x: Tensor) -> Tensor:
    rows = [torch.ones_like(x), x]
    for order in range(2, _N_ORDERS):
        rows.append(((2 * order - 1) * x * rows[-1] - (order - 1) * rows[-2]) / order)
    return torch.stack(rows, dim=-1)


def _dense(parameters: Parameters, name: str) -> nn.Linear:
    weight, bias = parameters[f"{_ROOT}{name}/~/linear|w"], parameters.get(f"{_ROOT}{name}/~/linear|b")
    layer = nn.utils.skip_init(nn.Linear, *weight.shape, bias=bias is not None, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.T.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _product(parameters: Parameters, first: str, second: str) -> Tensor:
    """Two layers without bias and activation as one, shape (in, out)."""
    return parameters[f"{_ROOT}{first}/~/linear|w"] @ parameters[f"{_ROOT}{second}/~/linear|w"]


def _numbered(name: str, k: int) -> str:
    return f"{name}_{k}" if k else name


class _Embedding(nn.Module):
    """Messages from the types of both atoms and their distance."""

    types: Tensor

    def __init__(self, parameters: Parameters, species: Sequence[int]) -> None:
        super().__init__()
        self.radial = _dense(parameters, "Embedding/~/RBF_Dense")
        self.combine = _dense(parameters, "Embedding/~/Concat_Dense")
        rows = parameters[f"{_ROOT}Embedding|Embedding_vect"][torch.tensor(species)]
        n = len(species)
        types = torch.cat((rows[:, None].expand(n, n, -1), rows.expand(n, n, -1)), dim=-1)
        self.register_buffer("types", types)

    def forward(self, rbf: Tensor) -> Tensor:
        radial = self.radial(rbf)
        return silu(self.combine(torch.cat((self.types.expand(len(rbf), -1, -1, -1), radial), dim=-1)))


class _Output(nn.Module):
    """Energies of all atoms from the messages that come in, summed, shape (B,)."""

    def __init__(self, parameters: Parameters, k: int) -> None:
        super().__init__()
        name = _numbered("Output", k)
        self.radial = _dense(parameters, f"{name}/~/RBF_Dense")
        self.up = _dense(parameters, f"{name}/~/Upprojection")
        series = (_dense(parameters, _numbered(f"{name}/~/Dense_Series", layer)) for layer in range(3))
        self.series = nn.ModuleList(series)
        self.final = _dense(parameters, f"{name}/~/Final_output")

    def forward(self, messages: Tensor, rbf: Tensor) -> Tensor:
        atoms = self.up((messages * self.radial(rbf)).sum(2))
        for layer in self.series:
            atoms = silu(layer(atoms))
        return self.final(atoms).sum((1, 2))


class _Residual(nn.Module):
    def __init__(self, parameters: Parameters, name: str) -> None:
        super().__init__()
        self.first = _dense(parameters, f"{name}/~/ResidualSubLayer")
        self.second = _dense(parameters, f"{name}/~/ResidualSubLayer_1")

    def forward(self, x: Tensor) -> Tensor:
        return x + silu(self.second(silu(self.first(x))))


class _Interaction(nn.Module):
    """New messages j -> i from those k -> j, weighted by the angle at j, and from the old ones."""

    radial: Tensor
    spherical: Tensor

    def __init__(self, parameters: Parameters, k: int) -> None:
        super().__init__()
        name = _numbered("Interaction", k)
        self.incoming, self.own = _dense(parameters, f"{name}/~/Dense_kj"), _dense(parameters, f"{name}/~/Dense_ji")
        self.register_buffer("radial", _product(parameters, f"{name}/~/rbf1", f"{name}/~/rbf2"))
        spherical = _product(parameters, f"{name}/~/sbf1", f"{name}/~/sbf2")
        self.register_buffer("spherical", spherical.unflatten(0, (_N_ORDERS, _N_ZEROS)))
        self.down = _dense(parameters, f"{name}/~/Downprojection")
        self.up = _dense(parameters, f"{name}/~/Upprojection")
        self.before_skip = _dense(parameters, f"{name}/~/FinalBeforeSkip")
        self.residuals = nn.ModuleList(_Residual(parameters, _numbered(f"{name}/~/ResLayer", i)) for i in range(3))

    def forward(self, messages: Tensor, rbf: Tensor, sbf: Tensor, angular: Tensor) -> Tensor:
        incoming = silu(self.down(silu(self.incoming(messages)) * (rbf @ self.radial)))
        # Of edge k -> j and order l; all that is left to do at each atom j is to sum over k and l.
        by_order = incoming[..., None, :] * torch.einsum("bjkln,lnc->bjklc", sbf, self.spherical)
        at_atom = angular.flatten(-2) @ by_order.flatten(2, 3)
        x = silu(self.up(at_atom.transpose(1, 2))) + silu(self.own(messages))
        x = silu(self.before_skip(self.residuals[0](x))) + messages
        return self.residuals[2](self.residuals[1](x))

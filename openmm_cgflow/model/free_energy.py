"""The coarse-grained free energy as a function of positions, for simulations that use it as a force.

What is exported is A of the slow atoms' *positions*: a free simulation finds them with density exp(-beta A), rigid
motions aside. The density of the coordinates, exp(-beta A(z)) J(z), has the volume element J besides. So from a flow,
A = -kT (log q(z) - log J(z)); a fitted potential of mean force is A itself and needs no J.

- Beads that move in Cartesian coordinates under A have positions of density exp(-beta A), hence coordinates of density
  q(z): the map of torsions is the flow's own. With -kT log q(z) alone it would be q(z) J(z), bonds and angles shifted.
- On the slow atoms of an all-atom simulation, -s A leaves exp(-beta (1 - s) A) of their density, whatever the fast
  atoms do: barriers are 1 - s times as high, but bonds and angles are 1 / (1 - s) times as soft, too, which nothing
  asks for. It costs weights: with 13 stiff coordinates and s = 0.5, 15 % of the frames are left, with s = 0.8, 0.1 %.
  So for a bias there is the free energy F of the torsions alone. J does not depend on them: -s F leaves their density
  to the power 1 - s, flat for s = 1, and bonds and angles at given torsions as they were.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.networks.pmf import PMF

__all__ = ["Energy", "FlowPotential", "FreeEnergy", "PMFPotential", "TorsionPotential"]

Energy = Literal["pmf", "flow", "torsions"]
"""Which free energy: the fitted one, the flow's, or that of the torsions alone; see the module."""


class PMFPotential(nn.Module):
    """beta A(z) as fitted, in float64.

    It is defined everywhere: beyond where it was fitted, its harmonic part outgrows the networks and brings bonds and
    angles back.
    """

    def __init__(self, pmf: PMF) -> None:
        super().__init__()
        self.pmf = copy.deepcopy(pmf).double()

    def forward(self, z: Tensor) -> Tensor:
        """Shape (n, n_features) -> (n,)."""
        return self.pmf(z)


class FlowPotential(nn.Module):
    """beta A(z) = log J(z) - log q(z) up to a constant, continued beyond the flow's support. In float64.

    The support ends where the base of the bounded coordinates was truncated. The density there is negligible but not
    zero, and a simulation may step over it: the normal density just goes on, and its logarithm pulls back as a
    harmonic well does. The splines are the identity outside their interval and join with slope one.
    """

    def __init__(self, flow: CGFlow, coordinates: Coordinates, barrier_scale: float) -> None:
        super().__init__()
        self.flow, self.coordinates, self.barrier_scale = copy.deepcopy(flow).double(), coordinates, barrier_scale

    def forward(self, z: Tensor) -> Tensor:
        """Shape (n, n_features) -> (n,)."""
        base, ladj = self.flow.inverse(z, self.barrier_scale)
        normals = base[..., self.flow.n_circular :]
        return self.coordinates.log_volume(z) + 0.5 * normals.square().sum(-1) - ladj


class TorsionPotential(nn.Module):
    """beta F(torsions), bonds and angles integrated out with the flow's q(bounded | torsions).

    exp(-beta F) = exp(-beta A(z)) J(z) / q(bounded | torsions) for every z as far as q is right; it is taken where
    the base of q has its mode, once for each set of torsions.

    Arguments:
        potential: beta A, z of shape (n, n_features) -> (n,).
        flow: Of the same coordinates.
        coordinates: For J.
    """

    def __init__(self, potential: nn.Module, flow: CGFlow, coordinates: Coordinates) -> None:
        super().__init__()
        self.potential, self.conditional = potential, copy.deepcopy(flow.conditional).double()
        self.coordinates = coordinates

    def forward(self, z: Tensor) -> Tensor:
        """Shape (n, n_features) -> (n,)."""
        angles, bounded = z.tensor_split([self.coordinates.n_circular], dim=-1)
        bounded, ladj = self.conditional(torch.zeros_like(bounded), self.coordinates.features.see_first(angles))
        z = torch.cat((angles, bounded), dim=-1)
        return self.potential(z) - self.coordinates.log_volume(z) - ladj


class FreeEnergy(nn.Module):
    """A free energy of slow positions in any frame, kJ/mol, in float64.

    Arguments:
        coordinates: z of the positions.
        slow: Indices of the slow atoms in the order in which positions will come.
        potential: beta A, z of shape (n, n_features) -> (n,).
        scale: What it is multiplied with, in kJ/mol; negative for a bias.
        ceiling: kT, where it levels off, within some 1 kT: a bias would pull into contacts that nobody has sampled.
    """

    order: Tensor

    def __init__(
        self,
        coordinates: Coordinates,
        slow: Sequence[int],
        potential: nn.Module,
        scale: float,
        ceiling: float = math.inf,
    ) -> None:
        super().__init__()
        self.coordinates, self.potential, self.scale, self.ceiling = coordinates, potential, scale, ceiling
        self.register_buffer("order", torch.tensor([list(slow).index(atom) for atom in coordinates.atoms]))
        self.requires_grad_(False)

    def forward(self, xyz: Tensor) -> Tensor:
        """Slow positions, nm, shape (..., n_slow, 3) -> (...)."""
        xyz = xyz.to(self.order.device, torch.float64)  # users may give others
        z = self.coordinates.from_xyz(xyz.index_select(-2, self.order))
        return self.of_coordinates(z.reshape(-1, z.shape[-1])).reshape(z.shape[:-1])

    def of_coordinates(self, z: Tensor) -> Tensor:
        """kJ/mol, shape (n, n_features) -> (n,)."""
        value = self.potential(z)
        if math.isfinite(self.ceiling):
            value = self.ceiling - softplus(self.ceiling - value)
        return self.scale * value

"""The density of all atoms at once, q(z, y) = q(z) q(y | z), as in the paper's second version (eqs. 5-8).

Slow coordinates z have the flow, fast ones a Gaussian or a spline flow whose parameters depend on z. Together with the
map x = f(z, y) this is a density of positions: no chain of the fast atoms is needed, and importance weights are exact.
It is conditional on ``beta_ratio``, beta over that of the target: the density at the temperature T / beta_ratio, T the
target. The flow takes it in place of its barrier scale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmm_cgflow.coordinates.all_atom import ThermalMap
from openmm_cgflow.coordinates.features import N_SCALE_FEATURES
from openmm_cgflow.coordinates.geometry import Geometry
from openmm_cgflow.networks.flow import CGFlow, ConditionalFlow
from openmm_cgflow.seeds import Stream, derive_seed
from openmm_cgflow.settings import FlowSettings, JointSettings

__all__ = ["JointFlow", "new_joint"]


class JointFlow(nn.Module):
    """q(z | b) q(r | z, b) with the map to positions; b, the ``beta_ratio``, is one number or one a row, shape (n,).

    Arguments:
        flow: q(z | b).
        conditional: q(r | z, b).
        thermal_map: The map; its parameters, if any, are trained along.
    """

    def __init__(self, flow: CGFlow, conditional: ConditionalFlow, thermal_map: ThermalMap) -> None:
        super().__init__()
        self.flow, self.conditional, self.thermal_map = flow, conditional, thermal_map

    def context(self, z: Tensor, beta_ratio: float | Tensor) -> Tensor:
        """What q(r | z, b) sees, shape (n, n_features) -> (n, n_context)."""
        of_z = self.flow.features(z.to(self.flow.dtype))
        return torch.cat((of_z, self.flow.scale_features(beta_ratio, len(z))), dim=-1)

    def draw_base(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Base samples of z and r."""
        base = self.flow.draw_base(n, generator)
        uniform = torch.rand((n, self.conditional.n_features), generator=generator, dtype=torch.float64)
        return base, self.conditional.draw_base(uniform)

    def forward(self, base: tuple[Tensor, Tensor], beta_ratio: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """z and r, float64, shapes (n, n_features) and (n, n_fast_features)."""
        z, _ = self.flow(base[0], beta_ratio)
        r, _ = self.conditional(base[1].to(z.dtype), self.context(z, beta_ratio))
        return z.double(), r.double()

    def build(self, z: Tensor, r: Tensor, beta_ratio: float | Tensor = 1.0) -> Tensor:
        """All-atom positions, nm, shape (n, n_atoms, 3)."""
        return self.thermal_map.build(z, r, beta_ratio)

    def read(self, xyz: Tensor, beta_ratio: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """z and r of all-atom positions."""
        return self.thermal_map.read(xyz, beta_ratio)

    def log_prob(self, z: Tensor, r: Tensor, beta_ratio: float | Tensor = 1.0) -> Tensor:
        """log q(z, r | b), float64, shape (n,)."""
        log_fast = self.conditional.log_prob(r.to(self.flow.dtype), self.context(z, beta_ratio))
        return (self.flow.log_prob(z, beta_ratio) + log_fast).double()

    def log_volume(self, z: Tensor, r: Tensor, beta_ratio: float | Tensor = 1.0) -> Tensor:
        """log |dx/d(z, r)|, rigid motions included, shape (n,)."""
        return self.thermal_map.log_volume(z, r, beta_ratio)

    def log_prob_xyz(self, xyz: Tensor, beta_ratio: float | Tensor = 1.0) -> Tensor:
        """log density of positions, nm, shape (n, n_atoms, 3) -> (n,)."""
        z, r = self.read(xyz, beta_ratio)
        return self.log_prob(z, r, beta_ratio) - self.log_volume(z, r, beta_ratio)


def new_joint(
    flow: CGFlow,
    settings: JointSettings,
    flow_settings: FlowSettings,
    geometry: Geometry,
    temperature: float,
    seed: int,
) -> JointFlow:
    """An untrained joint density around a flow: y given z is as wide as the energy at the start says.

    Arguments:
        flow: q(z | b).
        settings: The ``joint`` section of the configuration.
        flow_settings: The ``flow`` section.
        geometry: Of the molecule.
        temperature: Of the target, K.
        seed: Of the run.
    """
    thermal_map = geometry.thermal_map(temperature, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Stream.JOINT))
        conditional = ConditionalFlow(
            thermal_map.n_fast_features,
            flow.features.size + N_SCALE_FEATURES,
            geometry.settings.bound,
            settings.n_layers,
            flow_settings.n_bins,
            flow_settings.hidden_features,
            torch.eye(thermal_map.n_fast_features, dtype=torch.float64),
        ).double()
    return JointFlow(flow, conditional, thermal_map)

"""Small joint densities and their maps, with random weights."""

import math

import torch

from openmm_cgflow.coordinates.all_atom import InternalThermalMap
from openmm_cgflow.coordinates.features import N_SCALE_FEATURES, Torsions
from openmm_cgflow.networks.flow import CGFlow, ConditionalFlow
from openmm_cgflow.networks.joint import JointFlow
from openmm_cgflow.paper.box import BoxCoordinates, BoxFeatures
from openmm_cgflow.paper.linear_map import LinearMap

REACH = 4.0


def linear(n_slow=1, n_fast=1, mixing=0.0, learned=True, roughness=0.0, seed=0, widths=None):
    labels = [f"X{i}" for i in range(n_slow + n_fast)]
    slow, fast = range(1, n_slow + 1), (0, *range(n_slow + 1, n_slow + n_fast))
    centre = torch.linspace(0.4, -0.1, n_slow + n_fast).double()
    if widths is None:
        widths = torch.linspace(0.3, 0.9, n_slow + n_fast).double()
    box = BoxCoordinates(slow, labels, 10.0)
    thermal_map = LinearMap(
        box, fast, centre, lambda beta_ratio: widths / math.sqrt(beta_ratio), REACH, mixing, learned
    )
    shaken(thermal_map, roughness, seed)
    return thermal_map


def internal(all_atom, centre, widths):
    return InternalThermalMap(all_atom, centre, lambda beta_ratio: widths / math.sqrt(beta_ratio))


def shaken(module, roughness, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += roughness * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def joint_flow(thermal_map, n_circular=1, n_bounded=0, n_layers=0, roughness=0.1):
    n, kind = thermal_map.n_fast_features, Torsions if isinstance(thermal_map, InternalThermalMap) else BoxFeatures
    features = kind(n_circular, n_bounded)
    context = features.size + N_SCALE_FEATURES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        flow = CGFlow(features, 6.0, 3, 2, 6, [8])
        conditional = ConditionalFlow(n, context, 6.0, n_layers, 6, [8], torch.eye(n).double())
    for part in (flow, conditional.double()):
        shaken(part, roughness)
    return JointFlow(flow, conditional, thermal_map)


def drawn(joint, n, beta_ratio=1.0, seed=3):
    with torch.no_grad():
        return joint(joint.draw_base(n, torch.Generator().manual_seed(seed)), beta_ratio)

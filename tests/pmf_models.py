"""Small potentials of mean force with random weights, and slow coordinates for them."""

import math

import torch

from openmm_cgflow.coordinates.features import Torsions
from openmm_cgflow.networks.pmf import PMF

PRECISION = torch.tensor([[1.0, 0.4], [0.4, 1.2]], dtype=torch.float64)


def new_pmf(n_circular=1, precision=PRECISION, hidden=(16, 16), n_members=4, seed=0, roughness=0.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pmf = PMF(Torsions(n_circular, len(precision)), precision, hidden, n_members)
        with torch.no_grad():
            for parameter in pmf.parameters():
                parameter.add_(roughness * torch.randn_like(parameter))
    return pmf


def random_z(n, generator, n_circular=1, n_bounded=2):
    """Torsions anywhere, bounded features a little wider than thermal, shape (n, n_circular + n_bounded)."""
    torsions = (2 * torch.rand((n, n_circular), generator=generator, dtype=torch.float64) - 1) * math.pi
    bounded = 1.3 * torch.randn((n, n_bounded), generator=generator, dtype=torch.float64)
    return torch.cat((torsions, bounded), dim=1)


def in_a_box(n, generator):
    return (2 * torch.rand((n, 2), generator=generator, dtype=torch.float64) - 1) * math.pi


def pmf_of(features):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PMF(features(2, 0), torch.zeros((0, 0)), (32, 32), 2)

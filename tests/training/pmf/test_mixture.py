"""Training on the paper's Gaussian mixture with its exact mean forces: every mode is found and kept."""

import math

import numpy as np
import pytest
import torch
from analytic import AnalyticMeanForce, advance
from methods import pmf_training

from openmm_cgflow.config import Config
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.networks.pmf import PMF
from openmm_cgflow.networks.response import FastResponse
from openmm_cgflow.networks.weights import relative_ess, weighted_samples
from openmm_cgflow.paper.box import BoxCoordinates, BoxFeatures
from openmm_cgflow.paper.targets import GaussianMixture
from openmm_cgflow.units import thermal_beta

HALF_EDGE = 2.0
ONE_KJ = thermal_beta(1.0)  # K, at which beta is 1 mol/kJ: beta is inverse to the temperature


def new_method(dimensions, layers, hidden, pmf, stopping, n_replicas):
    """Of the mixture whose modes have the seed of ``systems/gmm_*``, and its energy of z, kT."""
    mixture = GaussianMixture(dimensions, 1)
    means = torch.as_tensor(mixture.means)

    def energy(z):
        away = z[..., None, :] * (HALF_EDGE / math.pi) - means
        return -torch.logsumexp(-0.5 * away.square().sum(-1) / mixture.spread**2, dim=-1)

    config = Config(
        temperature=ONE_KJ,
        seed=1,
        pmf={"n_members": 2, "hidden_features": hidden, "n_test": 2048, "flow_learning_rate": 3e-3, **pmf},
        stopping={"free_energy_error": 0.02, "max_evaluations": 1e8, **stopping},
        chains={"n_replicas": n_replicas},
    )
    features = BoxFeatures(dimensions, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        flow = CGFlow(features, math.pi, layers, 2, 8, (32, 32))
        networks = PMF(features, torch.zeros((0, 0)), hidden, 2)
        response = FastResponse(features, torch.zeros((0, 3)), (8,))
    coordinates = BoxCoordinates(range(dimensions), [str(i) for i in range(dimensions)], HALF_EDGE)
    return pmf_training(config, coordinates, flow, networks, response, AnalyticMeanForce(energy)), mixture, energy


def check(trainer, mixture, energy, weight_error, width_error, smallest_ess):
    """Weights, means and widths of all modes, by importance weights, and the effective sample size of the flow."""
    samples = weighted_samples(
        trainer.state.flow, trainer.state.pmf, trainer.state.coordinates, 20000, torch.Generator().manual_seed(2)
    )
    weights = torch.softmax(samples.log_weights, 0).detach().numpy()
    x = trainer.state.coordinates.to_xyz(samples.z)[..., 0].numpy()
    which = mixture.modes(x)
    for k, mean in enumerate(mixture.means):
        share, own = weights[which == k].sum(), x[which == k]
        assert share == pytest.approx(1 / 3, abs=weight_error)
        centre = np.average(own, axis=0, weights=weights[which == k])
        spread = np.sqrt(np.average((own - centre) ** 2, axis=0, weights=weights[which == k]))
        np.testing.assert_allclose(centre, mean, atol=0.02)
        np.testing.assert_allclose(spread, mixture.spread, rtol=width_error)
    assert relative_ess(-energy(samples.z) - samples.log_q) > smallest_ess


@pytest.mark.slow
def test_three_modes_in_two_dimensions():
    trainer, mixture, energy = new_method(
        2,
        layers=4,
        hidden=[32, 32],
        pmf={"n_updates": 80, "final_updates": 800, "flow_updates": 20, "polish_updates": 100, "explore_height": 20},
        stopping={"max_rounds": 5, "max_polish_cycles": 1},
        n_replicas=512,
    )
    advance(trainer)
    check(trainer, mixture, energy, weight_error=0.2, width_error=0.25, smallest_ess=0.6)  # so short a training
    assert trainer.state.estimator.n_energy_evaluations < 1e5

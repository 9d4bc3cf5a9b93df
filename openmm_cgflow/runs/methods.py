"""The training method that a configuration names, at its start."""

from __future__ import annotations

from typing import NamedTuple

from openmm_cgflow.config import Config
from openmm_cgflow.coordinates.geometry import Geometry
from openmm_cgflow.engines.engine import Engine
from openmm_cgflow.forces.estimator import EngineEnergies, MolecularMeanForce
from openmm_cgflow.forces.fast_atoms import FastAtoms
from openmm_cgflow.networks.flow import new_flow
from openmm_cgflow.networks.joint import new_joint
from openmm_cgflow.networks.pmf import new_pmf
from openmm_cgflow.networks.response import new_response
from openmm_cgflow.training.joint import JointTraining
from openmm_cgflow.training.ladder import start_temperature
from openmm_cgflow.training.method import EvaluationBudget, Method
from openmm_cgflow.training.pmf.method import PMFTraining
from openmm_cgflow.training.pmf.state import PMFState
from openmm_cgflow.training.reverse_kl import ReverseKL

__all__ = ["Training", "hottest_temperature", "new_training"]


class Training(NamedTuple):
    """A training method with what runs its fast atoms."""

    method: Method
    fast_atoms: FastAtoms


def new_training(config: Config, geometry: Geometry, engine: Engine) -> Training:
    """What ``training.method`` names, at its start."""
    kind, temperature, seed = config.training.method, config.temperature, config.seed
    flow, chains = new_flow(config.flow, geometry, seed), config.chains
    fast = engine, geometry.all_atom, geometry.draw_fast, chains, seed
    if kind == "pmf":
        pmf = new_pmf(config.pmf, geometry, seed)
        response = new_response(config.pmf, geometry, temperature, seed)
        fast_atoms = FastAtoms(*fast, response.follow)
        estimator = MolecularMeanForce(fast_atoms, chains, chains.adaptive)
        learned = geometry.coordinates, flow, pmf, response, estimator
        state = PMFState(config.pmf, config.stopping, temperature, seed, *learned)
        budget = EvaluationBudget(config.stopping.max_evaluations, estimator)
        return Training(PMFTraining(state, budget, chains), fast_atoms)
    ladder, fast_atoms = (config.training, config.tempering, temperature), FastAtoms(*fast)
    if kind == "joint":
        joint = new_joint(flow, config.joint, config.flow, geometry, temperature, seed)
        learned_at_once = joint, geometry.coordinates, EngineEnergies(engine)
        return Training(JointTraining(*ladder, chains, config.joint.n_replays, seed, *learned_at_once), fast_atoms)
    forces = MolecularMeanForce(fast_atoms, chains)
    return Training(ReverseKL(*ladder, chains.n_replicas, seed, geometry.coordinates, flow, forces), fast_atoms)


def hottest_temperature(config: Config) -> float:
    """Highest temperature of the training, K."""
    if config.training.method == "pmf":
        return config.temperature
    return start_temperature(config.tempering, config.temperature)

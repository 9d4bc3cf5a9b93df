"""Training methods from a whole configuration and the pieces that a test makes itself."""

from openmm_cgflow.training.joint import JointTraining
from openmm_cgflow.training.method import EvaluationBudget
from openmm_cgflow.training.pmf.method import PMFTraining
from openmm_cgflow.training.pmf.state import PMFState
from openmm_cgflow.training.reverse_kl import ReverseKL


def pmf_training(config, coordinates, flow, pmf, response, estimator):
    networks = coordinates, flow, pmf, response, estimator
    state = PMFState(config.pmf, config.stopping, config.temperature, config.seed, *networks)
    return PMFTraining(state, EvaluationBudget(config.stopping.max_evaluations, estimator), config.chains)


def reverse_kl(config, coordinates, flow, estimator):
    ladder = config.training, config.tempering, config.temperature
    return ReverseKL(*ladder, config.chains.n_replicas, config.seed, coordinates, flow, estimator)


def joint_training(config, joint, coordinates, estimator):
    ladder = config.training, config.tempering, config.temperature
    return JointTraining(*ladder, config.chains, config.joint.n_replays, config.seed, joint, coordinates, estimator)

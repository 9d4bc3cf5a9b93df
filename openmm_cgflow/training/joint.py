"""Training of the joint density of all atoms, down the temperature ladder (paper eq. 8): no chains of the fast atoms.

Every sample costs one energy and force. The reverse KL sees their slopes, by the path gradient; because the density of
whole structures is known, importance weights are, too, and a forward KL with these weights sees the mass of separated
modes, which the reverse KL does not. The noise of both gradients vanishes at the optimum. An energy does not depend on
the temperature, nor on the density, so samples of earlier steps serve the forward KL again. A learned map follows the
forward KL of these alone, and before the last stage so do the densities with it: the reverse KL would sooner lose a
mode that the fast coordinates cannot hold than turn the map. In the last stage it takes away what the forward KL hardly
sees, a little mass where there is nothing. Nothing here knows OpenMM.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmm_cgflow.coordinates.slow import Coordinates
from openmm_cgflow.errors import ReplicaError
from openmm_cgflow.forces.estimator import EnergyAndForces
from openmm_cgflow.forces.gradients import shortened
from openmm_cgflow.model.density import JointDensity
from openmm_cgflow.networks.joint import JointFlow
from openmm_cgflow.networks.weights import clipped_softmax, relative_ess, weighted_log
from openmm_cgflow.settings import ChainSettings, TemperingSettings, TrainingSettings
from openmm_cgflow.training.ladder import N_ENERGY_BATCHES, Ladder
from openmm_cgflow.training.method import Row
from openmm_cgflow.training.optimisers import GradientGuard, RunningAverage
from openmm_cgflow.units import thermal_beta

__all__ = ["JointTraining"]

_FORWARD = 0.5  # share of the forward KL where the effective sample size is no smaller
_AT_STAGE = 0.6  # fraction of the updates that train the stage's own temperature
_FROM_SAME = 0.7  # fraction whose proposals have the temperature that is trained
_N_KL = 10  # batches whose KL sets the next temperature
_AVERAGING = 0.99  # of the running average, per update
_N_KEPT = 65_536  # samples of earlier batches
_N_REPLAYED = 1024  # of them in an update
_HOTTER = 2.0  # times the temperature that is trained, the hottest of them
_SPEED_OF_MAP = 10.0  # its learning rate, of plain steps, over that of the densities by Adam
_BETAS = (0.9, 0.99)  # of Adam: the large gradients of the start must be forgotten soon
_ENOUGH_FOR_COVARIANCE = 2.0  # effective samples for each particle
_REGULARITY = 1e-5  # nats, of what keeps the map invertible


class _Evaluated(NamedTuple):
    """Samples that serve later updates.

    Attributes:
        beta_ratio: That each was drawn at, shape (n,).
        xyz: nm, shape (n, n_atoms, 3).
        energy: kJ/mol, shape (n,).
        log_q: Of the density as it was, shape (n,).
    """

    beta_ratio: Tensor
    xyz: Tensor
    energy: Tensor
    log_q: Tensor

    def followed_by(self, more: _Evaluated, n: int) -> _Evaluated:
        """The last n of these and more."""
        return _Evaluated(*(torch.cat(parts)[-n:] for parts in zip(self, more, strict=True)))


class JointTraining(Ladder):
    """Adam on the joint density; its whole state can be saved and continued bit for bit.

    Use: as :class:`openmm_cgflow.training.reverse_kl.ReverseKL`. Every stage trains its own temperature and, now and
    then, all hotter ones: there modes weigh alike, and what is learned of them serves below.

    Arguments:
        training: Lengths of the stages, learning rate, and which gradients are clipped or skipped.
        tempering: The ladder of temperatures.
        target: Temperature of the last stage, K.
        chains: ``n_replicas``, the samples of one update, and ``max_invalid`` are used.
        n_replays: Updates on earlier samples after each update on new ones.
        seed: Of every random number.
        joint: Trained in place, the map included.
        coordinates: Of the slow part.
        estimator: Energies and forces.
    """

    def __init__(
        self,
        training: TrainingSettings,
        tempering: TemperingSettings,
        target: float,
        chains: ChainSettings,
        n_replays: int,
        seed: int,
        joint: JointFlow,
        coordinates: Coordinates,
        estimator: EnergyAndForces,
    ) -> None:
        super().__init__(training, tempering, target, coordinates.n_features)
        self.chains, self.n_replays, self.coordinates = chains, n_replays, coordinates
        self.joint, self.estimator = joint, estimator
        joint.flow.float()
        joint.conditional.float()
        self.networks = RunningAverage(joint, _AVERAGING)
        self.generator = torch.Generator().manual_seed(seed)
        trained = self.networks.trained
        self._densities = [*trained.flow.parameters(), *trained.conditional.parameters()]
        self._map = [parameter for parameter in trained.thermal_map.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(self._densities, lr=training.learning_rate, betas=_BETAS)
        # Gradients of earlier batches, forward KL alone, are much smaller than those of new ones.
        self.guard, self._replay_guard = GradientGuard(training), GradientGuard(training)
        self._kl: list[float] = []
        self._earlier: _Evaluated | None = None

    @property
    def n_energy_evaluations(self) -> int:
        return self.estimator.n_energy_evaluations

    def density(self) -> JointDensity:
        joint = copy.deepcopy(self.joint).double()  # training runs in single precision
        return JointDensity(self.coordinates, joint, self.target, self.temperature)

    @property
    def beta_ratio(self) -> float:
        """The beta ratio of the current stage."""
        return self.target / self.temperature

    def _draw_ratios(self) -> tuple[float, float]:
        """What is trained and what proposals come from, as in ``FlowFitter``."""
        uniform = torch.rand(4, generator=self.generator).tolist()
        if self.stage_length - self.n_stage_steps <= N_ENERGY_BATCHES:  # its energies set the next temperature
            return self.beta_ratio, self.beta_ratio
        hottest = self.target / self.temperatures[0]
        ratio = self.beta_ratio * (1.0 if uniform[0] < _AT_STAGE else (hottest / self.beta_ratio) ** uniform[1])
        ratio_from = ratio * (1.0 if uniform[2] < _FROM_SAME else uniform[3])
        return max(ratio, hottest), max(ratio_from, hottest)

    def step(self) -> Row:
        """One update. Returns a row of metrics.

        ``ess`` is the relative effective sample size of whole structures, and ``kl`` the estimate of KL(q || p) from
        the same samples, nats, both at ``beta_ratio``, the one that was sampled.

        Raises:
            ReplicaError: If too many energies are not finite.
        """
        joint, beta = self.networks.trained, thermal_beta(self.target)
        if not self.n_steps:
            self._look_around()
        ratio, ratio_from = self._draw_ratios()
        z, r = joint(joint.draw_base(self.chains.n_replicas, self.generator), ratio_from)
        xyz = joint.build(z, r, ratio_from)
        energy, forces, valid = self._evaluate(xyz.detach())
        at, n_valid = xyz.detach()[valid].requires_grad_(), int(valid.sum())

        # Reverse KL by the path gradient: the bracket vanishes at the optimum, sample by sample.
        log_old = joint.log_prob_xyz(at, ratio_from)
        (score,) = torch.autograd.grad(log_old.sum(), at, retain_graph=True)
        pull = shortened((-ratio_from * beta * forces).flatten(1), self.training.clip_factor)
        residual = pull.unflatten(1, (-1, 3)) + score
        log_old_values = log_old.detach()
        weights = -ratio_from * beta * energy - log_old_values

        # Forward KL with weights less what they are at the optimum, where its noise vanishes, too.
        log_new = log_old if ratio == ratio_from else joint.log_prob_xyz(at.detach(), ratio)
        target = -ratio * beta * energy - log_old_values
        turning = self._map and not self.at_target
        share = 1.0 if turning else min(_FORWARD, relative_ess(target))
        excess = clipped_softmax(target) - clipped_softmax(log_new.detach() - log_old_values)
        self.networks.trained.zero_grad()
        (-share * weighted_log(excess, log_new)).backward(inputs=self._densities)
        xyz[valid].backward((1 - share) / n_valid * residual, inputs=self._densities)
        norm, usable = self._update(self.guard)
        drawn = _Evaluated(torch.full_like(energy, ratio_from), at.detach(), energy, log_old_values)
        self._earlier = drawn if self._earlier is None else self._earlier.followed_by(drawn, _N_KEPT)
        for _ in range(self.n_replays):
            self._replay(self._earlier)
        row = {"beta_ratio": ratio_from, "ess": relative_ess(weights)}
        row["kl"] = float(torch.logsumexp(weights, 0) - math.log(n_valid) - weights.mean())
        if ratio_from == self.beta_ratio:
            self._kl = [*self._kl, row["kl"]][-_N_KL:]
            self.advance(energy)
        else:
            self.advance()
        stage = {"step": self.n_steps, "stage": self.stage, "temperature": self.temperature}
        return (stage | {"beta": beta * self.beta_ratio} | row) | {
            "residual": float(residual.square().mean(dim=(1, 2)).median().sqrt()),
            "gradient_norm": norm,
            "skipped": int(not usable),
            "energy": float(energy.median()),
            "invalid": int((~valid).sum()),
            "evaluations": self.estimator.n_energy_evaluations,
        }

    def _update(self, guard: GradientGuard) -> tuple[float, bool]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        norm, usable = guard(self.networks.trained)
        if usable:
            self.optimizer.step()
            self._turn()
            self.networks.update()
        return norm, usable

    @torch.no_grad()
    def _turn(self) -> None:
        """A step of the map down its gradient: where all directions are alike, Adam would follow noise."""
        for parameter in self._map:
            if parameter.grad is not None:
                parameter.sub_(_SPEED_OF_MAP * self.learning_rate * parameter.grad)

    def _replay(self, earlier: _Evaluated) -> None:
        """An update by forward KL on earlier samples of the same temperature or somewhat hotter."""
        joint, beta = self.networks.trained, thermal_beta(self.target)
        ratio, _ = self._draw_ratios()
        near = ((earlier.beta_ratio <= ratio) & (_HOTTER * earlier.beta_ratio >= ratio)).nonzero()[:, 0]
        if not len(near):
            return
        rows = near[torch.randint(len(near), (_N_REPLAYED,), generator=self.generator)]
        _, xyz, energy, log_old = (part[rows] for part in earlier)
        weights = clipped_softmax(-ratio * beta * energy - log_old)
        self.networks.trained.zero_grad()
        (
            _REGULARITY * joint.thermal_map.irregularity() - weighted_log(weights, joint.log_prob_xyz(xyz, ratio))
        ).backward()
        self._update(self._replay_guard)

    def _look_around(self) -> None:
        """Measures where structures are at the start, from the density as it is before any training."""
        joint, n = self.networks.trained, N_ENERGY_BATCHES * self.chains.n_replicas
        with torch.no_grad():
            z, r = joint(joint.draw_base(n, self.generator), self.beta_ratio)
            xyz = joint.build(z, r, self.beta_ratio)
            log_q = joint.log_prob_xyz(xyz, self.beta_ratio)
        energy, _, valid = self._evaluate(xyz)
        self._measure(xyz[valid], energy, log_q[valid])

    def _measure(self, xyz: Tensor, energy: Tensor, log_q: Tensor) -> None:
        weights = torch.softmax(-self.beta_ratio * thermal_beta(self.target) * energy - log_q, dim=0)
        # After a large step of a given ladder there may be none that is near.
        if not len(xyz) or float(1 / weights.square().sum()) < _ENOUGH_FOR_COVARIANCE * xyz.shape[1]:
            return  # what was measured before, at the start the harmonic widths, is better than a matrix near singular
        for joint in (self.networks.trained, self.networks.average):
            joint.thermal_map.measure(self.beta_ratio, xyz, weights)

    def _evaluate(self, xyz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Energies and forces of those structures that have them, and which these are, shape (n,) bool."""
        energy, forces = self.estimator(xyz)
        valid = torch.isfinite(energy) & torch.isfinite(forces).flatten(1).all(1)
        n_invalid = int((~valid).sum())
        if n_invalid > self.chains.max_invalid * len(xyz) or n_invalid == len(xyz):
            raise ReplicaError(
                f"{n_invalid} of {len(valid)} samples have no finite energy at {self.temperature:.0f} K, and "
                f"chains.max_invalid is {self.chains.max_invalid}. Try a lower training.learning_rate"
            )
        return energy[valid], forces[valid], valid

    def describe(self, row: Row) -> str:
        text = f"stage {row['stage']} {row['temperature']:.0f} K"
        return text + f", ESS {row['ess']:.2f} and KL {row['kl']:.3f} at {self.target / row['beta_ratio']:.0f} K"

    @property
    def kl(self) -> float | None:
        """Mean estimate of the stage's last batches."""
        return sum(self._kl) / len(self._kl) if self._kl else None

    def next_stage(self) -> None:
        """Lowers the temperature: never past the target."""
        super().next_stage()
        self._kl = []
        assert self._earlier is not None
        near = _HOTTER**2 * self._earlier.beta_ratio >= self.beta_ratio
        _, xyz, energy, log_q = (part[near] for part in self._earlier)
        self._measure(xyz, energy, log_q)

    def state_dict(self) -> dict[str, Any]:
        """The whole state: tensors, numbers and lists only, so that ``torch.load(weights_only=True)`` reads it."""
        return super().state_dict() | {
            "networks": self.networks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "estimator": self.estimator.state_dict(),
            "norms": list(self.guard.norms),
            "replay_norms": list(self._replay_guard.norms),
            "kl": list(self._kl),
            "earlier": None if self._earlier is None else tuple(self._earlier),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.networks.load_state_dict(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.estimator.load_state_dict(state["estimator"])
        self._replay_guard.norms = list(state["replay_norms"])
        self.guard.norms, self._kl = list(state["norms"]), list(state["kl"])
        self._earlier = None if state["earlier"] is None else _Evaluated(*state["earlier"])

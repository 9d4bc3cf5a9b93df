"""Fits to all that was measured: the potential of mean force, and the response that takes the noise out of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmm_cgflow.forces.estimator import ChainParts, MeanForce
from openmm_cgflow.forces.gradients import shortened
from openmm_cgflow.networks.pmf import PMF, SlowFreeEnergy
from openmm_cgflow.networks.response import FastResponse
from openmm_cgflow.training.optimisers import AveragedFit

__all__ = ["AnchorDifferences", "MeanForceBuffer", "PMFFitter", "ResponseFitter", "held_out_error", "squared_aim"]

# A mean force is fitted to within its own noise, but no better than these: close contacts, where forces are a hundred
# times the thermal ones, would otherwise be all the fit looks at. The size is the *predicted* one: weights that depend
# on what was measured, as in a robust loss, bias the fit, because the noise near contacts is skewed.
_RELATIVE_ERROR, _SMALLEST_ERROR = 0.05, 0.1
# Longer mean forces, as multiples of the median, come from slow atoms that overlap and say no more than: not here. A
# nearer limit would be a robust loss on what matters.
_LONGEST = 30.0
# Share of the known differences in the fit. By their number they would have none, but their errors are independent of
# each other, and those of the mean forces are not: what the fast atoms remember is the same in all of a region. On
# alanine dipeptide this share brings Phi within their errors and fits the mean forces as well as without, ten times as
# much does not.
_SHARE_OF_ANCHORS = 0.001
_AVERAGING = 0.995  # of the running average of the networks, per update
_MEDIAN_OF_NORMAL = 0.6745  # of |x|, x a standard normal
_SMALLEST_NOISE = 0.1  # kT per unit of z; less does not matter
_RESPONSE_RATE = 3e-3  # of Adam
_RESPONSE_AVERAGING = 0.99  # of the running average, per update
_RESPONSE_BATCH = 256  # chains of one update


class MeanForceBuffer:
    """All mean forces measured so far, with each ensemble member's random weights of them.

    The first third of all rounds counts no more: their chains started from few others, and slow motions among the fast
    atoms (methyl groups take 1 ps to forget where they were) come to rest along lineages of chains only. On alanine
    dipeptide, rounds 3 to 16 put the left-handed state 0.16 kT too low, rounds 8 to 16 half as much.

    Arguments:
        n_members: Size of the ensemble.
    """

    def __init__(self, n_members: int) -> None:
        self.n_members = n_members
        self.rounds: list[dict[str, Tensor]] = []

    def add(self, z: Tensor, force: MeanForce, generator: torch.Generator) -> None:
        """Adds one round; invalid replicas are left out."""
        valid = force.valid
        one = {"z": z, "gradient": force.gradient, "variance": force.variance}
        if force.parts is not None:
            one |= {"slow": force.parts.slow, "fast": force.parts.fast}
        one = {name: tensor[valid].float() for name, tensor in one.items()}
        one["weights"] = torch.empty((len(one["z"]), self.n_members)).exponential_(generator=generator)
        self.rounds.append(one)

    def data(self) -> dict[str, Tensor]:
        """Everything that counts, float32.

        Returns:
            ``z``, ``gradient`` = d(beta A)/dz and its ``variance``, shapes (n, n_features), ``weights`` (n, n_members)
            and, where they are known, the parts ``slow`` and ``fast`` of the chains, as in ``ChainParts``.
        """
        rounds = self.rounds[len(self.rounds) // 3 :]
        return {name: torch.cat([one[name] for one in rounds]) for name in rounds[0]}

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": [dict(one) for one in self.rounds]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rounds = [dict(one) for one in state["rounds"]]


class AnchorDifferences(NamedTuple):
    """Differences Phi(end) - Phi(start) that are known, with each ensemble member's random weights of them.

    Shapes (n, n_features), the same, (n,), (n,) and (n, n_members).
    """

    start: Tensor
    end: Tensor
    difference: Tensor
    error: Tensor
    weights: Tensor


class PMFFitter(AveragedFit[PMF]):
    """Adam on the weighted squares of predicted minus measured mean force, and difference where some are known.

    The PMF is the running average of what Adam trains: single steps shake free energies of rare states by tenths of a
    kT, the average by hundredths.

    Arguments:
        pmf: Fitted in place.
        learning_rate: Of Adam.
        batch_size: Mean forces of one update.
    """

    def __init__(self, pmf: PMF, learning_rate: float, batch_size: int = 1024) -> None:
        self.pmf, self.learning_rate, self.batch_size = pmf, learning_rate, batch_size
        super().__init__(pmf, _AVERAGING, learning_rate)

    def fit(
        self,
        data: dict[str, Tensor],
        n_updates: int,
        generator: torch.Generator,
        scale: float = 1.0,
        anchors: AnchorDifferences | None = None,
    ) -> float:
        """Continues the fit; returns the mean weighted square of the mean forces, about 1 where all is noise.

        Arguments:
            data: ``z``, ``gradient``, ``variance`` and ``weights`` of :meth:`MeanForceBuffer.data`.
            n_updates: Steps of Adam.
            generator: Source of all randomness.
            scale: Multiplies the learning rate.
            anchors: Known differences.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = scale * self.learning_rate
        z, gradient, weights = data["z"], shortened(data["gradient"], _LONGEST), data["weights"]
        noise = data["variance"].median(0).values
        if self.networks.n_updates == 0:
            for pmf in (self.networks.average, self.networks.trained):
                pmf.measure_background(z, gradient)
        total = 0.0
        for _ in range(n_updates):
            rows = torch.randint(len(z), (min(self.batch_size, len(z)),), generator=generator)
            at = z[rows].expand(self.pmf.n_members, -1, -1).clone().requires_grad_()
            (predicted,) = torch.autograd.grad(self.networks.trained.members(at).sum(), at, create_graph=True)
            squares = (predicted - gradient[rows]).square() / (noise + squared_aim(predicted.detach()))
            loss = (weights[rows].T[..., None] * squares).mean()
            total += float(loss.detach())
            if anchors is not None:
                loss = loss + _SHARE_OF_ANCHORS * self._misfit_of(anchors)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.networks.update()
        return total / n_updates

    def _misfit_of(self, anchors: AnchorDifferences) -> Tensor:
        members = self.networks.trained.members
        expand = (self.pmf.n_members, -1, -1)
        predicted = members(anchors.end.expand(expand)) - members(anchors.start.expand(expand))
        return (anchors.weights.T * ((predicted - anchors.difference) / anchors.error).square()).mean()


def squared_aim(predicted: Tensor) -> Tensor:
    """Squared error that the fit aims at, of predicted mean forces, shape (..., n_features) -> (..., 1)."""
    return _SMALLEST_ERROR**2 + _RELATIVE_ERROR**2 * predicted.square().mean(-1, keepdim=True)


def held_out_error(pmf: SlowFreeEnergy, z: Tensor, force: MeanForce) -> float:
    """How far mean forces that the fit has not seen are from its prediction, in units of their noise.

    The median over all features of all valid replicas of |predicted - measured| / standard error, divided by what it
    is for pure noise: 1 where nothing is left to learn. Noise counts as no smaller than what the fit aims at.
    """
    _, predicted = pmf.value_and_gradient(z[force.valid])
    error = torch.maximum(force.variance[force.valid], squared_aim(predicted)).sqrt()
    ratio = (predicted - force.gradient[force.valid]).abs() / error
    return float(ratio.median() / _MEDIAN_OF_NORMAL)


class ResponseFitter(AveragedFit[FastResponse]):
    """Adam on what fluctuates within a chain: the parts of a chain must give the same force.

    Arguments:
        response: Fitted in place; the running average of what Adam trains.
    """

    def __init__(self, response: FastResponse) -> None:
        super().__init__(response, _RESPONSE_AVERAGING, _RESPONSE_RATE)

    def fit(
        self, z: Tensor, parts: ChainParts, n_updates: int, generator: torch.Generator, final: bool = False
    ) -> float:
        """Continues the fit; returns the share of the noise that is left.

        Arguments:
            z: Slow coordinates of all chains, shape (n, n_features).
            parts: Of the chains at z.
            n_updates: Steps of Adam.
            generator: Source of all randomness.
            final: Lets the learning rate fall to zero.
        """
        thermal = self.networks.trained.thermal(parts.fast)
        if not thermal.any():  # all in close contact, as the first and flat torsions of a long chain may be
            return 1.0
        z, *usual = (tensor[thermal] for tensor in (z, *parts))
        slow, fast = (part.float() - part.float().mean(1, keepdim=True) for part in usual)
        own = slow.square().mean(1, keepdim=True)
        # Chains in close contact, with a hundred times the usual noise, count as one like any other; features without
        # noise do not count.
        weight = 1 / (own + own.median(0, keepdim=True).values + _SMALLEST_NOISE**2)
        before = after = 0.0
        for k in range(n_updates):
            rows = torch.randint(len(z), (min(_RESPONSE_BATCH, len(z)),), generator=generator)
            residual = slow[rows] + self.networks.trained.correction(z[rows], fast[rows], create_graph=True)
            loss = (weight[rows] * residual.square()).mean()
            self.optimizer.zero_grad()
            loss.backward()
            for group in self.optimizer.param_groups:
                group["lr"] = _RESPONSE_RATE * (1 - k / n_updates if final else 1.0)
            self.optimizer.step()
            self.networks.update()
            before += float((weight[rows] * slow[rows].square()).mean())
            after += float(loss.detach())
        return after / max(before, 1e-30)

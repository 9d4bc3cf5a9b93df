"""Samples and models of a synthetic target held against the exact answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import entropy
from torch import Tensor

from openmm_cgflow.analysis.distances import compare
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.model.cg_model import CGModel
from openmm_cgflow.model.density import JointDensity
from openmm_cgflow.networks.joint import JointFlow
from openmm_cgflow.networks.weights import relative_ess
from openmm_cgflow.paper.linear_map import along_x
from openmm_cgflow.paper.targets import Target
from openmm_cgflow.units import thermal_beta

__all__ = ["ExactEvaluation", "Level", "Mode", "compare_exactly"]

_FOR_HISTOGRAMS = 10  # times the draws for averages, over all slow coordinates
_N_BINS = 36  # on each axis of the map of a slow and a fast coordinate
_N_MARGINAL_BINS = 50
_FRACTIONS = (0.03, 0.1, 0.3)  # of the target's beta, at which a model of one temperature is looked at, too


def compare_exactly(
    target: Target,
    models: Sequence[CGModel],
    x: np.ndarray,
    log_weight: np.ndarray | None,
    rng: np.random.Generator,
    *,
    run: str,
    file: str,
    energy_evaluations: int,
    n_draws: int = 100_000,
) -> ExactEvaluation:
    """Compares samples, and the models of a run on a target, with the exact answers.

    Arguments:
        target: The target.
        models: Of all stages of the run, the last one being what the samples are of.
        x: Samples of (z, y), nm, shape (n_frames, n_slow + n_fast).
        log_weight: Logarithms of their importance weights up to a constant, shape (n_frames,), if they have any.
        rng: For exact samples.
        run: The run directory, for the record, as the next two are.
        file: The samples' file.
        energy_evaluations: Of the run.
        n_draws: Exact samples, and draws of each model, behind an average; behind histograms ten times as many.

    Raises:
        CGFlowError: If the target has no density in a model's box.
    """
    model = models[-1]
    slow, beta = x[:, : target.n_slow], thermal_beta(model.temperature)
    weights = None if log_weight is None else np.exp(log_weight - log_weight.max())
    levels = {f"{one.beta:.4g}": _level(target, one, rng, n_draws) for one in _densities(models, target)}
    return ExactEvaluation(
        run,
        {"file": file, "n_frames": len(x)},
        _modes(target, slow, np.ones(len(slow)), beta, rng, n_draws),
        {} if weights is None else _modes(target, slow, weights, beta, rng, n_draws),
        *_joint(target, x, beta, rng, n_draws),
        levels,
        model.describe_map(),
        energy_evaluations,
    )


@dataclass(frozen=True)
class _Density:
    """A model at one temperature, as functions of x, nm, shape (n, n_coordinates) -> (n,).

    Attributes:
        beta: mol/kJ.
        draw: Samples, from their number and a generator.
        log_density: Normalised in the box; -inf outside.
        log_target: Log of the density that its importance weights lead to, up to a constant; None where it has none.
    """

    beta: float
    draw: Callable[[int, torch.Generator], np.ndarray]
    log_density: Callable[[np.ndarray], np.ndarray]
    log_target: Callable[[np.ndarray], np.ndarray] | None


def _densities(models: Sequence[CGModel], target: Target) -> list[_Density]:
    """From hot to the target: stages of a ladder, or one model at fractions of its beta.

    With a potential of mean force the flow at a barrier scale s has exp(-s beta A): the target's density at s beta,
    where the entropy of the fast coordinates does not depend on the slow ones, as in these systems.
    """
    model = models[-1]
    if not model.density.weighted:
        return [_slow_density(one, thermal_beta(one.temperature), 1.0) for one in models]
    beta, fractions = thermal_beta(model.temperature), (*_FRACTIONS, 1.0)
    if isinstance(model.density, JointDensity):
        hottest = (1 - 1e-9) * model.temperature / model.temperatures[0]  # hotter than that it was not trained
        return [
            _joint_density(model.density.joint, target, fraction * beta, fraction)
            for fraction in fractions
            if fraction >= hottest
        ]
    return [_slow_density(model, fraction * beta, fraction) for fraction in fractions]


def _joint_density(joint: JointFlow, target: Target, beta: float, fraction: float) -> _Density:
    @torch.no_grad()
    def draw(n: int, generator: torch.Generator) -> np.ndarray:
        z, r = joint(joint.draw_base(n, generator), fraction)
        return joint.build(z, r, fraction)[..., 0].numpy()

    @torch.no_grad()
    def log_density(x: np.ndarray) -> np.ndarray:
        return joint.log_prob_xyz(along_x(torch.as_tensor(x)), fraction).numpy()

    def log_target(x: np.ndarray) -> np.ndarray:
        return target.log_density(x, beta, 0.0)

    return _Density(beta, draw, log_density, log_target)


def _slow_density(model: CGModel, beta: float, fraction: float) -> _Density:
    coordinates = model.coordinates

    def read(x: np.ndarray) -> Tensor:
        return coordinates.from_xyz(along_x(torch.as_tensor(x)))

    def draw(n: int, generator: torch.Generator) -> np.ndarray:
        z, _ = model.flow.sample(n, generator, fraction)
        return coordinates.to_xyz(z)[..., 0].numpy()

    @torch.no_grad()
    def log_density(x: np.ndarray) -> np.ndarray:
        z = read(x)
        return (model.flow.log_prob(z, fraction) - coordinates.log_volume(z)).numpy()

    @torch.no_grad()
    def log_target(x: np.ndarray) -> np.ndarray:
        return (-fraction * model.density.free_energy(read(x))).numpy()

    return _Density(beta, draw, log_density, log_target if model.density.weighted else None)


def _level(target: Target, model: _Density, rng: np.random.Generator, n_draws: int) -> Level:
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    normaliser = target.log_normaliser(model.beta, rng)
    n_batches = max(1, _FOR_HISTOGRAMS // target.n_slow)
    drawn = np.concatenate([model.draw(n_draws, generator) for _ in range(n_batches)])
    n_columns, first = drawn.shape[1], drawn[:n_draws]
    exact = target.sample(_FOR_HISTOGRAMS * n_draws, model.beta, rng)[:, :n_columns]
    log_model = model.log_density(exact[:n_draws])
    inside = np.isfinite(log_model)
    if not inside.any():
        raise CGFlowError(
            f"at beta {model.beta:.3g} mol/kJ no exact sample has density in the model: is coordinates.half_edge too "
            "small?"
        )
    log_exact = target.log_density(exact[:n_draws], model.beta, normaliser)
    difference = (log_exact - log_model)[inside] - math.log(inside.mean())
    modes = target.modes(drawn[:, : target.n_slow])

    def shares(log_weights: np.ndarray) -> list[float]:
        weights = np.exp(log_weights - log_weights.max())
        return (np.bincount(modes, weights, len(target.mode_names)) / weights.sum()).tolist()

    batches = np.split(drawn, n_batches)  # splines need some kilobytes a sample
    log_q = model.log_density(first)
    weighted = []
    if model.log_target is not None:
        log_q = np.concatenate([log_q, *(model.log_density(batch) for batch in batches[1:])])
        log_target = np.concatenate([model.log_target(batch) for batch in batches])
        weighted = shares(np.where(np.isfinite(log_q), log_target - log_q, -math.inf))
    return Level(
        shares(np.zeros(len(drawn))),
        weighted,
        target.populations(model.beta, rng).tolist(),
        float(difference.mean()),
        float(difference.std() / math.sqrt(inside.sum())),
        max(_marginal(exact[:, k], drawn[:, k]) for k in range(target.n_slow)),
        float(1 - inside.mean()),
        relative_ess(torch.as_tensor(target.log_density(first, model.beta, normaliser) - log_q[:n_draws])),
    )


def _marginal(exact: np.ndarray, drawn: np.ndarray) -> float:
    low, high = np.quantile(exact, (1e-4, 1 - 1e-4))
    inner = np.linspace(low, high, _N_MARGINAL_BINS - 1)  # the outermost bins are open
    ours, theirs = (np.bincount(np.digitize(x, inner), minlength=_N_MARGINAL_BINS) + 0.5 for x in (drawn, exact))
    return float(entropy(theirs, ours))


def _modes(
    target: Target, z: np.ndarray, weights: np.ndarray, beta: float, rng: np.random.Generator, n_draws: int
) -> dict[str, Mode]:
    exact = target.sample_slow(n_draws, beta, rng)
    populations = target.populations(beta, rng)
    of_ours, of_exact = target.modes(z), target.modes(exact)
    result = {}
    for k, name in enumerate(target.mode_names):
        ours, own, theirs = z[of_ours == k], weights[of_ours == k], exact[of_exact == k]
        mean_error = spread = math.nan
        if len(ours) > 1:
            mean = np.average(ours, axis=0, weights=own)
            mean_error = float(np.abs(mean - theirs.mean(0)).max())
            ratios = np.sqrt(np.average((ours - mean) ** 2, axis=0, weights=own)) / theirs.std(0)
            spread = float(ratios[np.abs(np.log(ratios)).argmax()])
        result[name] = Mode(float(own.sum() / weights.sum()), float(populations[k]), mean_error, spread)
    return result


def _joint(target: Target, x: np.ndarray, beta: float, rng: np.random.Generator, n_draws: int) -> tuple[float, float]:
    columns = [0, target.n_slow]
    exact = target.sample(_FOR_HISTOGRAMS * n_draws, beta, rng)[:, columns]
    low, high = np.quantile(exact, (1e-4, 1 - 1e-4), axis=0)
    inner = np.linspace(low, high, _N_BINS - 1)  # the outermost bins are open

    def histogram(points: np.ndarray) -> np.ndarray:
        cells = [np.digitize(points[:, k], inner[:, k]) for k in range(2)]
        counts = np.bincount(cells[0] * _N_BINS + cells[1], minlength=_N_BINS**2)
        return counts.reshape(_N_BINS, _N_BINS) / len(points)

    reference = histogram(exact)
    perfect = histogram(target.sample(len(x), beta, rng)[:, columns])
    return compare(reference, histogram(x[:, columns])).kl, compare(reference, perfect).kl


@dataclass(frozen=True)
class Mode:
    """Population, mean and standard deviation of z in one mode; the largest over its coordinates.

    Attributes:
        population: Of the samples.
        exact: Population.
        mean_error: Largest distance of a coordinate's mean from the exact one, nm.
        spread_ratio: The standard deviation over the exact one that is farthest from 1; nan for fewer than two samples.
    """

    population: float
    exact: float
    mean_error: float
    spread_ratio: float


@dataclass(frozen=True)
class Level:
    """The model at one inverse temperature: its density of z, or of (z, y) after a joint training.

    Attributes:
        populations: Of the modes.
        weighted: The same with the model's own importance weights, of the fitted potential of mean force or, after a
            joint training, of the energies; empty where it has none.
        exact: The same of the target.
        kl: KL(exact || model) of all coordinates the model has, from exact samples in the box and the model's density,
            nats.
        kl_error: Its standard error.
        kl_slow: KL(exact || model) of single slow coordinates on 50 bins, the largest, nats.
        outside: Exact mass outside the box of the coordinates, where the model has none.
        ess: Relative effective sample size of the model's samples weighed with the exact density.
    """

    populations: list[float]
    weighted: list[float]
    exact: list[float]
    kl: float
    kl_error: float
    kl_slow: float
    outside: float
    ess: float


@dataclass(frozen=True)
class ExactEvaluation:
    """What :func:`openmm_cgflow.evaluate_exactly` found.

    Attributes:
        run: The run directory.
        samples: The trajectory, and its number of frames.
        modes: Of the frames, by name.
        weighted_modes: The same with the importance weights that they still have; empty where they have none.
        kl_joint: KL(exact || frames) of the first slow and the first fast coordinate on 36 x 36 bins, nats.
        kl_joint_floor: What as many exact samples score.
        levels: The model by beta, mol/kJ, the target last.
        learned_map: What the slow coordinates are made of, where that was learned.
        energy_evaluations: Of the run, its check and its own samples included.
    """

    run: str
    samples: dict[str, Any]
    modes: dict[str, Mode]
    weighted_modes: dict[str, Mode]
    kl_joint: float
    kl_joint_floor: float
    levels: dict[str, Level]
    learned_map: list[str]
    energy_evaluations: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """The evaluation as text."""
        lines = [
            f"{self.samples['file']}: {self.samples['n_frames']} samples; {self.energy_evaluations:.3g} energy "
            "evaluations of the run",
            f"{'mode':26s}{'population':>12s}{'exact':>10s}{'mean off by, nm':>18s}{'spread / exact':>16s}",
        ]
        weighted = {f"{name}, weighted": mode for name, mode in self.weighted_modes.items()}
        for name, mode in (self.modes | weighted).items():
            lines.append(
                f"{name:26s}{mode.population:12.5f}{mode.exact:10.5f}{mode.mean_error:18.4f}{mode.spread_ratio:16.3f}"
            )
        lines += [
            f"KL(exact || samples) of a slow and a fast coordinate, {_N_BINS} x {_N_BINS} bins: {self.kl_joint:.5f} "
            f"nats; as many exact samples score {self.kl_joint_floor:.5f}",
            "",
            f"{'model at beta, mol/kJ':24s}{'KL(exact || model)':>24s}{'KL slow':>10s}{'ESS':>8s}{'outside':>10s}   "
            "populations of modes",
        ]
        for beta, level in self.levels.items():
            of_modes = {"": level.populations, " weighted": level.weighted, " exact": level.exact}
            shares = "; ".join(
                ", ".join(f"{share:.5f}" for share in shares) + name for name, shares in of_modes.items() if shares
            )
            lines.append(
                f"{beta:24s}{level.kl:15.5f} ±{level.kl_error:.5f}{level.kl_slow:10.5f}{level.ess:8.3f}"
                f"{level.outside:10.5f}   {shares}"
            )
        return "\n".join([*lines, *self.learned_map])

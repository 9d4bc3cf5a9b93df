"""What a comparison with the exact answers of a synthetic target found, as data and as a table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["N_BINS", "ExactEvaluation", "Level", "Mode"]

N_BINS = 36
"""Bins on each axis of the map of a slow and a fast coordinate."""


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
            f"KL(exact || samples) of a slow and a fast coordinate, {N_BINS} x {N_BINS} bins: {self.kl_joint:.5f} "
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

"""Figures of a run. Every function returns a Matplotlib figure of its own; nothing global is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from openmm_cgflow.files.atomic import atomic_path

__all__ = [
    "compared_histograms",
    "compared_maps",
    "convergence",
    "free_energy_map",
    "ramachandran",
    "save",
    "torsion_density",
    "torsion_marginals",
]

# Okabe and Ito's palette, told apart with any colour vision; markers and line styles differ as well.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#666666"
# The reference is an area that the others' lines lie over.
_LOOKS: dict[str, dict[str, Any]] = {
    "reference": {"color": _GREY, "alpha": 0.35, "fill": True},
    "samples": {"color": _BLUE, "linewidth": 1.4},
    "weighted": {"color": _ORANGE, "linewidth": 1.4, "linestyle": "--"},
}
_TICKS = np.arange(-180, 181, 60)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG at 150 dots per inch.

    Raises:
        CGFlowError: If the file cannot be written.
    """
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_figure(str(temporary), dpi=150, bbox_inches="tight")


def convergence(rows: Sequence[Mapping[str, float]]) -> Figure:
    """How a training went, step by step: every column of ``metrics.csv`` that says so and changes, in a panel.

    With a potential of mean force: effective sample size, errors of free energies by the fit and by switching, error of
    predicted mean forces.
    With the reverse KL there is no loss, for only the gradient of the objective is computed: the residual is what the
    mean force and the flow's own slope disagree by; it cannot fall below the noise of the mean forces.

    Arguments:
        rows: Rows of ``metrics.csv``, drawn over ``step``.
    """
    panels = [
        (("ess",), "relative effective\nsample size", False),
        (("free_energy_error", "moved"), "free energy of states\n(kT)", True),
        (("anchor_error", "anchor_misfit"), "differences by switching\n(kT)", True),
        (("held_out",), "held-out error\n(in units of noise)", True),
        (("barrier_scale",), "exploring barrier scale", True),
        (("residual", "noise"), "rms slope mismatch\n(kT per unit of z)", True),
        (("gradient_norm",), "gradient norm", True),
        (("energy",), "median potential energy\n(kJ/mol)", False),
        (("temperature",), "temperature (K)", False),
        (("invalid",), "quarantined\nreplicas", False),
    ]
    found = {name: np.array([row[name] for row in rows], dtype=float) for name in (rows[0] if rows else ())}
    changing = {name for name, values in found.items() if len(np.unique(values[np.isfinite(values)])) > 1}
    panels = [panel for panel in panels if changing.intersection(panel[0])]
    figure = Figure(figsize=(7.5, 1.0 + 1.5 * max(len(panels), 1)), layout="constrained")
    axes = figure.subplots(max(len(panels), 1), 1, sharex=True, squeeze=False)[:, 0]
    step = found.get("step", np.zeros(0))
    stage = found.get("stage", np.zeros(len(rows)))
    for axis, (names, label, logarithmic) in zip(axes, panels, strict=False):
        for name, colour in zip(names, (_BLUE, _ORANGE), strict=False):
            if name not in found:
                continue
            values = found[name]
            smooth = _running_median(values)
            axis.plot(step, values, color=colour, alpha=0.25, linewidth=0.7)
            style = "-" if name == names[0] else "--"
            axis.plot(step, smooth, style, color=colour, linewidth=1.6, label=name.replace("_", " "))
        if len(names) > 1:
            axis.legend(frameon=False, ncols=2, fontsize="small")
        first = found[names[0]]
        if logarithmic and (first[np.isfinite(first)] > 0).all():
            axis.set_yscale("log")
        for start in step[1:][np.diff(stage) != 0]:
            axis.axvline(start, color=_GREY, linewidth=0.5, linestyle=":")
        axis.set_ylabel(label, fontsize="small")
        _open_frame(axis)
    axes[0].set_title("thin: every step; thick: running median; dotted: a new temperature", fontsize="small")
    axes[-1].set_xlabel("training step")
    return figure


def torsion_density(
    values: np.ndarray, *, weights: np.ndarray | None = None, n_bins: int = 72
) -> tuple[np.ndarray, np.ndarray]:
    """Density of a torsion per radian, and the centres of its bins in radians, both of shape (n_bins,).

    Arguments:
        values: Radians, any turn, shape (n,).
        weights: Non-negative weights, not necessarily normalised, shape (n,).
        n_bins: Bins on the circle.
    """
    density, edges = np.histogram(_wrap(values), n_bins, (-np.pi, np.pi), weights=weights, density=True)
    return density, (edges[1:] + edges[:-1]) / 2


def free_energy_map(
    phi: np.ndarray, psi: np.ndarray, *, weights: np.ndarray | None = None, n_bins: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """Density of two torsions per square radian, and its free energy in kT above the minimum.

    Arguments:
        phi: Radians, shape (n,).
        psi: Radians, shape (n,).
        weights: Non-negative weights, not necessarily normalised, shape (n,).
        n_bins: Bins in each direction.

    Returns:
        Density and free energy, shape (n_bins, n_bins), first index φ; empty bins have infinite free energy.
    """
    turn = [[-np.pi, np.pi]] * 2
    density = np.histogram2d(_wrap(phi), _wrap(psi), n_bins, turn, weights=weights, density=True)[0]
    with np.errstate(divide="ignore"):
        return density, -np.log(density / density.max())


def ramachandran(
    phi: np.ndarray,
    psi: np.ndarray,
    *,
    temperature: float | None = None,
    title: str = "",
) -> Figure:
    """Free energy of φ and ψ in kT.

    Arguments:
        phi: Radians, shape (n,).
        psi: Radians, shape (n,).
        temperature: K.
        title: Such as the residue.
    """
    density, energy = free_energy_map(phi, psi)
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axis = figure.subplots()
    highest = max(1.0, np.ceil(energy[density > 0].max()))
    levels = np.degrees(np.linspace(-np.pi, np.pi, len(energy) + 1))
    mesh = axis.pcolormesh(
        levels, levels, np.ma.masked_invalid(energy.T), cmap="viridis", vmin=0.0, vmax=highest, rasterized=True
    )
    label = "free energy (kT)" if temperature is None else f"free energy (kT at {temperature:g} K)"
    figure.colorbar(mesh, ax=axis, label=label)
    axis.set(
        xlabel="φ (degrees)",
        ylabel="ψ (degrees)",
        xticks=_TICKS,
        yticks=_TICKS,
        aspect="equal",
        title=" ".join(part for part in (title, f"({len(phi)} samples)") if part),
    )
    return figure


def torsion_marginals(names: Sequence[str], values: np.ndarray) -> Figure:
    """The density of each torsion.

    Arguments:
        names: One for each torsion.
        values: Radians, shape (n_samples, n_torsions).
    """
    if values.ndim != 2 or values.shape[1] != len(names):
        raise ValueError(f"got values of shape {values.shape}, expected (n_samples, {len(names)})")
    n_columns = min(3, max(1, len(names)))
    n_rows = max(1, -(-len(names) // n_columns))
    figure = Figure(figsize=(max(4.5, 3.2 * n_columns), 0.4 + 2.4 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, sharex=True, squeeze=False).ravel()
    for k, name in enumerate(names):
        density, centres = torsion_density(values[:, k])
        degrees = np.degrees(centres)
        axes[k].stairs(
            density * np.pi / 180, np.linspace(-180, 180, len(density) + 1), fill=True, color=_BLUE, alpha=0.25
        )
        axes[k].plot(degrees, density * np.pi / 180, color=_BLUE, linewidth=1.2, drawstyle="steps-mid")
        axes[k].set(title=name, xlim=(-180, 180), xticks=_TICKS)
        axes[k].set_ylim(bottom=0)
        axes[k].title.set_fontsize("small")
        _open_frame(axes[k])
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    figure.supxlabel("torsion (degrees)", fontsize="medium")
    figure.supylabel("density (1/degree)", fontsize="medium")
    return figure


def compared_maps(
    probabilities: Mapping[str, np.ndarray], axes: Sequence[str], *, temperature: float | None = None, title: str = ""
) -> Figure:
    """Free energies in kT of two torsions side by side on one colour scale; differences from the reference below.

    Arguments:
        probabilities: By name, on equal bins from -180°, first index the first torsion, shape (n_bins, n_bins). The
            others are compared with ``reference``, if it is there; bins that one of the two never visits stay white.
        axes: Names of the two torsions.
        temperature: K.
        title: Such as the residue.
    """
    energies = {name: -np.ma.log(np.ma.masked_equal(values, 0.0)) for name, values in probabilities.items()}
    names = sorted(energies, key=lambda name: name != "reference")
    others = names[1:] if "reference" in energies else []
    n_rows = 2 if others else 1
    figure = Figure(figsize=(1.2 + 3.5 * len(names), 0.5 + 3.3 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, len(names), sharex=True, sharey=True, squeeze=False)
    ranges = {name: float(np.ceil(np.ptp(energy))) for name, energy in energies.items()}
    # A grid can know 50 kT, at which all that samples visit would have one colour.
    highest = max(
        [1.0, min(10.0, ranges.get("reference", 0.0)), *(ranges[name] for name in names if name != "reference")]
    )
    unit = "kT" if temperature is None else f"kT at {temperature:g} K"

    def draw(axis: Axes, values: np.ndarray, name: str, colours: str, low: float, high: float) -> QuadMesh:
        edges = np.linspace(-180, 180, len(values) + 1)
        axis.set(title=name, xticks=_TICKS, yticks=_TICKS, aspect="equal")
        return axis.pcolormesh(edges, edges, values.T, cmap=colours, vmin=low, vmax=high, rasterized=True)

    for axis, name in zip(panels[0], names, strict=True):
        mesh = draw(axis, energies[name] - energies[name].min(), name, "viridis", 0.0, highest)
    above = "max" if max(ranges.values()) > highest else "neither"
    figure.colorbar(mesh, ax=list(panels[0]), label=f"free energy ({unit})", extend=above)
    if others:
        differences = [energies[name] - energies["reference"] for name in others]
        widest = max([1.0, *(float(np.abs(difference).max()) for difference in differences if difference.count())])
        for axis, name, difference in zip(panels[1, 1:], others, differences, strict=True):
            mesh = draw(axis, difference, f"{name} - reference", "RdBu_r", -widest, widest)
        figure.colorbar(mesh, ax=list(panels[1]), label=f"difference ({unit})")
        panels[1, 0].set_visible(False)
        panels[0, 0].tick_params(labelbottom=True)
        panels[1, 1].tick_params(labelleft=True)
    figure.supxlabel(f"{axes[0]} (degrees)", fontsize="medium")
    figure.supylabel(f"{axes[1]} (degrees)", fontsize="medium")
    figure.suptitle(title)
    return figure


def compared_histograms(panels: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]], unit: str) -> Figure:
    """Densities of several ensembles over each other, one panel for each quantity.

    Arguments:
        panels: By quantity: edges of the bins, shape (n_bins + 1,), and by ensemble the probability of each bin, shape
            (n_bins,).
        unit: Of the edges.
    """
    n_columns = min(3, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(max(4.5, 3.4 * n_columns), 0.8 + 2.4 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for axis, (title, (edges, ensembles)) in zip(axes, panels.items(), strict=False):
        for name, probability in ensembles.items():
            density = probability / np.diff(edges)
            axis.stairs(density, edges, label=name, **_LOOKS[name])
        axis.set_title(title, fontsize="small")
        axis.set_xlim(edges[0], edges[-1])
        axis.set_ylim(bottom=0)
        if unit == "degrees":
            axis.set_xticks(_TICKS)
        _open_frame(axis)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize="small")
    figure.supxlabel(unit, fontsize="medium")
    figure.supylabel(f"density (1/{unit.removesuffix('s')})", fontsize="medium")
    return figure


def _wrap(angles: np.ndarray) -> np.ndarray:
    return np.mod(np.asarray(angles, dtype=np.float64) + np.pi, 2 * np.pi) - np.pi


def _running_median(values: np.ndarray) -> np.ndarray:
    """Running median over a twentieth of all steps, at most 25: the few of a PMF stay about as they are."""
    half = min(25, len(values) // 20) // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.median(w[np.isfinite(w)]) if np.isfinite(w).any() else np.nan for w in windows])


def _open_frame(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)

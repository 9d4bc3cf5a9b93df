"""The Ramachandran map on the first page: ``python docs/figures/ramachandran.py runs/ala2``.

Read from the COLVAR table of a run, whatever made it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

N_BINS = 72
BASINS = {"β": (-143, 112), "PPII": (-8, 150), "$α_R$": (-14, -20), "$α_L$": (100, 30)}  # where their names stand
TICKS = np.arange(-180, 181, 60)


def read_torsions(colvar: Path) -> tuple[np.ndarray, np.ndarray]:
    """φ and ψ of the first residue that has both, degrees."""
    with colvar.open() as file:
        names = file.readline().removeprefix("#! FIELDS").split()
    columns = [next(k for k, name in enumerate(names) if name.startswith(start)) for start in ("phi_", "psi_")]
    phi, psi = np.degrees(np.loadtxt(colvar, comments="#", usecols=columns)).T
    return phi, psi


def draw(phi: np.ndarray, psi: np.ndarray) -> Figure:
    """Free energy in kT, as far up as the frames go."""
    turn = [[-180, 180]] * 2
    counts, edges, _ = np.histogram2d(phi, psi, N_BINS, turn)
    with np.errstate(divide="ignore"):
        energy = -np.log(counts / counts.max())
    figure = Figure(figsize=(5.4, 4.5), layout="constrained", facecolor="white")
    axes = figure.subplots()
    mesh = axes.pcolormesh(edges, edges, np.ma.masked_invalid(energy.T), cmap="viridis", rasterized=True)
    for name, (x, y) in BASINS.items():
        outline = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.85}
        axes.text(x, y, name, ha="center", va="center", size=12, bbox=outline)
    axes.set(xlabel="φ (degrees)", ylabel="ψ (degrees)", xticks=TICKS, yticks=TICKS, aspect="equal")
    axes.set_title(f"alanine dipeptide, {len(phi):,} independent frames", size=11)
    figure.colorbar(mesh, ax=axes, label="free energy (kT)", shrink=0.9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    default = Path(__file__).parents[1] / "images/ramachandran_ala2.png"
    parser.add_argument("-o", "--output", type=Path, default=default, help="PNG file (default: %(default)s)")
    options = parser.parse_args()
    draw(*read_torsions(options.run / "samples.colvar")).savefig(options.output, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()

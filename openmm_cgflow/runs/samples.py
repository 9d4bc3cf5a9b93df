"""Samples of a model as files: trajectory, COLVAR table, topology and figures."""

from __future__ import annotations

from pathlib import Path

from openmm_cgflow.analysis import plots
from openmm_cgflow.analysis.states import peptide_torsions
from openmm_cgflow.files.trajectory import colvar_columns, write_colvar, write_trajectory
from openmm_cgflow.model.cg_model import CGModel
from openmm_cgflow.model.sampling import Samples

__all__ = ["plot_samples", "save_samples"]


def save_samples(model: CGModel, samples: Samples, path: Path, topology: Path | None = None) -> list[Path]:
    """Writes a trajectory, its COLVAR table and, if asked, its topology side by side; returns their paths."""
    colvar = path.with_suffix(".colvar")
    write_trajectory(samples.trajectory, path, topology=topology)
    columns = colvar_columns(samples, model.coordinates.names, peptide_torsions(samples.trajectory))
    write_colvar(colvar, columns, {"temperature_K": model.temperature})
    return [path, colvar, *([topology] if topology else [])]


def plot_samples(model: CGModel, samples: Samples, folder: Path) -> None:
    """Writes a Ramachandran map of each residue with φ and ψ, and the densities of the slow torsions, as PNG files."""
    torsions = peptide_torsions(samples.trajectory)
    for name in torsions:
        if name.startswith("phi_"):
            residue = name.removeprefix("phi_")
            figure = plots.ramachandran(
                torsions[name], torsions[f"psi_{residue}"], temperature=model.temperature, title=residue
            )
            plots.save(figure, folder / f"ramachandran_{residue}.png")
    n = model.coordinates.n_circular
    if n:
        names = [name.removeprefix("dihedral ") for name in model.coordinates.names[:n]]
        plots.save(plots.torsion_marginals(names, samples.z[:, :n]), folder / "torsions.png")

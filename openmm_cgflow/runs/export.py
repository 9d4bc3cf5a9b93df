"""Samples and free energies of a model as files and folders, for other programs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import openmm
import torch

from openmm_cgflow.analysis import plots
from openmm_cgflow.analysis.states import peptide_torsions
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.atomic import atomic_path, atomic_write, writing
from openmm_cgflow.files.run_directory import RunDirectory
from openmm_cgflow.files.trajectory import write_colvar, write_trajectory
from openmm_cgflow.model.cg_model import CGModel
from openmm_cgflow.model.force import traced
from openmm_cgflow.model.free_energy import Energy, FreeEnergy
from openmm_cgflow.model.sampling import Samples
from openmm_cgflow.molecule.torch_force import of_all_atoms
from openmm_cgflow.runs.load import load

__all__ = ["Form", "colvar_columns", "export", "plot_samples", "save_samples", "save_torchscript"]

Form = Literal["python-force", "torchscript", "openmmml"]
"""``openmm.PythonForce`` as XML; TorchScript, positions in nm -> kJ/mol; a folder for openmm-ml."""


def export(
    run_directory: Path,
    output: Path,
    form: Form,
    *,
    stage: int | None = None,
    beads: bool = False,
    scale: float = 1.0,
    energy: Energy | None = None,
    ceiling: float | None = None,
    overwrite: bool = False,
) -> tuple[CGModel, str]:
    """Writes the free energy of a trained model.

    Arguments:
        run_directory: What ``train`` wrote.
        output: The file; a folder for openmm-ml.
        form: Of what is written.
        stage: Tempering stage, 0 the hottest; the last finished one by default.
        beads: For a System of the slow atoms alone instead of one of all atoms.
        scale: Factor of the energy; negative for a bias.
        energy: Which one; see :meth:`openmm_cgflow.CGModel.energy_of_positions`.
        ceiling: kJ/mol above the minimum where the energy levels off; nowhere by default.
        overwrite: Replace a file that exists; folders are never replaced.

    Returns:
        The model, and an expression in Python that reads what was written.

    Raises:
        CGFlowError: If there is no such model, the output exists or cannot be written, or an option does not go with
            the form.
    """
    copied = form == "openmmml"
    if copied and (beads, scale, energy, ceiling) != (False, 1.0, None, None):
        raise CGFlowError(
            "--format openmmml copies the model: give scale, energy and ceiling to MLPotential, beads as a topology"
        )
    if output.exists() and (copied or not overwrite):
        raise CGFlowError(
            f"{output}: exists already; choose another name" + ("" if copied else ", or give --overwrite")
        )
    model = load(run_directory, stage=stage)
    if copied:
        _copy_model(run_directory, model.stage, output)
        return model, f"openmmml.MLPotential('cgflow', modelPath='{output}')"
    if form == "python-force":
        own = range(len(model.partition.slow)) if beads else None
        _save_force(model.create_force(scale=scale, atoms=own, energy=energy, ceiling=ceiling), output)
        reader = f"openmm.XmlSerializer.deserialize(open('{output}').read())"
        return model, f"{reader}; it runs code: read only files you trust"
    atoms = None if beads else model.partition.slow
    save_torchscript(model.energy_of_positions(scale, energy, ceiling), output, atoms)
    return model, f"torch.jit.load('{output}') or openmmtorch.TorchForce('{output}')"


def _save_force(force: openmm.Force, path: Path) -> None:
    """Writes a force as OpenMM's XML."""
    atomic_write(path, openmm.XmlSerializer.serialize(force))


def save_torchscript(energy: FreeEnergy, path: Path, atoms: Sequence[int] | None) -> None:
    """Writes TorchScript that ``torch.jit.load`` reads without this package: positions, nm -> energy, kJ/mol.

    Arguments:
        energy: Of the slow atoms.
        path: The file.
        atoms: Indices of the slow atoms where the module shall be given the positions of all, as ``TorchForce`` does;
            None where it shall be given those of the slow atoms alone.
    """
    chosen = range(len(energy.order)) if atoms is None else atoms
    module = torch.jit.freeze(of_all_atoms(traced(energy), chosen).eval())
    with atomic_path(path) as temporary:
        torch.jit.save(module, str(temporary))


def _copy_model(run_directory: Path, stage: int, path: Path) -> None:
    """Copies what ``load`` and openmm-ml's ``MLPotential("cgflow", modelPath=...)`` need of a run, and no more.

    Raises:
        CGFlowError: If the folder cannot be written.
    """
    run, copy = RunDirectory.open(run_directory), RunDirectory(path)
    with writing(path):
        copy.models.mkdir(parents=True)
        for name in ("config", "system_xml", "slow_atoms", "topology", "provenance"):
            shutil.copyfile(getattr(run, name), getattr(copy, name))
        shutil.copyfile(run.stage(stage), copy.stage(stage))


def save_samples(model: CGModel, samples: Samples, path: Path, topology: Path | None = None) -> list[Path]:
    """Writes a trajectory, its COLVAR table and, if asked, its topology side by side; returns their paths."""
    colvar = path.with_suffix(".colvar")
    write_trajectory(samples.trajectory, path, topology=topology)
    columns = colvar_columns(samples, model.coordinates.names, peptide_torsions(samples.trajectory))
    write_colvar(colvar, columns, {"temperature_K": model.temperature})
    return [path, colvar, *([topology] if topology else [])]


def colvar_columns(samples: Samples, names: Sequence[str], torsions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of ``samples.colvar``, each of shape (n,).

    ``log_q``, ``log_weight`` (after training on a potential of mean force), ``energy`` (kJ/mol), φ and ψ of peptides
    (radians), then z: torsions in radians, scaled bounded features.

    Arguments:
        samples: From :meth:`openmm_cgflow.model.cg_model.CGModel.sample`.
        names: Of the features of z, as in ``coordinates.names``.
        torsions: φ and ψ, as :func:`peptide_torsions` names them, each of shape (n,).
    """
    z = {"z." + "_".join(name.split()): samples.z[:, k] for k, name in enumerate(names)}
    weight = {} if samples.log_weight is None else {"log_weight": samples.log_weight}
    return {"log_q": samples.log_q, **weight, "energy": samples.energy, **torsions, **z}


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

"""TorchANI's potentials with all replicas in one call, for ``system.potential: {python: ani:load_ani, ...}``.

openmm-ml has them by name, one structure at a time; needs ``pip install 'torchani<2.3'`` and this folder in PYTHONPATH.
"""

from pathlib import Path

import torch
import torchani
from openmm import app
from torch import Tensor, nn


class ANI(nn.Module):
    """Positions ``(..., n_atoms, 3)`` in nm -> energies ``(...)`` in kJ/mol.

    Arguments:
        model: Of ``torchani.models``, with ``periodic_table_index``; in single precision, as it was trained.
        atomic_numbers: ``(n_atoms,)``.
    """

    def __init__(self, model: nn.Module, atomic_numbers: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("atomic_numbers", atomic_numbers)

    def forward(self, positions: Tensor) -> Tensor:
        structures = 10 * positions.reshape(-1, len(self.atomic_numbers), 3).float()  # angstrom
        energy = self.model((self.atomic_numbers.expand(len(structures), -1), structures)).energies
        return torchani.units.hartree2kjoulemol(energy).reshape(positions.shape[:-2])


def load_ani(structure: Path, name: str = "ANI1ccx", index: int | None = None, device: str = "cpu") -> ANI:
    """The potential for the atoms of a PDB file.

    Arguments:
        structure: The PDB file.
        name: Of a class of ``torchani.models``.
        index: Of one network of the eight; all of them otherwise.
        device: Where torch computes it.
    """
    model = getattr(torchani.models, name)(periodic_table_index=True)
    numbers = [atom.element.atomic_number for atom in app.PDBFile(str(structure)).topology.atoms()]
    return ANI(model if index is None else model[index], torch.tensor(numbers)).to(device)

"""PyTorch energies as OpenMM forces: ``openmm.PythonForce``, or openmmtorch's ``TorchForce`` where it is installed.

Either way the energy is a torch module, positions (n_atoms, 3) in nm -> energy in kJ/mol, a scalar; forces are its
autograd gradient. A ``PythonForce`` takes any module and is all that a plain installation needs; a ``TorchForce`` takes
TorchScript only and calls it without Python.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import openmm
import torch
from torch import Tensor, nn

from openmm_cgflow.errors import CGFlowError

__all__ = ["TorchEnergy", "python_force", "torch_force"]


class TorchEnergy:
    """Energy and forces of a torch module, as ``openmm.PythonForce`` calls them.

    It can be pickled, which is how ``openmm.XmlSerializer`` writes a ``PythonForce``. So reading such XML runs code:
    read only files that you trust, where this package and the class of the module can be imported. What is read back
    is on the CPU, wherever the module was.

    Arguments:
        module: Positions of the chosen atoms, nm, shape (n, 3), float64 and on the module's device -> energy, kJ/mol.
        atoms: 0-based indices of the atoms it acts on, in the module's order; all by default.
    """

    def __init__(self, module: nn.Module, atoms: Sequence[int] | None = None) -> None:
        self.module = module
        self.atoms = None if atoms is None else np.array(atoms, dtype=np.int64)
        self._device = _device(module)

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        """Energy, kJ/mol, and forces on all atoms of the System, kJ/mol/nm, shape (n_atoms, 3)."""
        positions = state.getPositions(asNumpy=True)._value  # in nm; the public way takes as long as a small network
        chosen = positions if self.atoms is None else positions[self.atoms]
        with torch.enable_grad():  # OpenMM may call from a thread of its own, where the mode is another
            xyz = torch.tensor(chosen, dtype=torch.float64, device=self._device, requires_grad=True)
            energy = self.module(xyz)
            (gradient,) = torch.autograd.grad(energy, xyz)
        forces = -gradient.cpu().numpy()
        if self.atoms is not None:
            chosen_forces, forces = forces, np.zeros_like(positions)
            forces[self.atoms] = chosen_forces
        return energy.item(), forces

    def __getstate__(self) -> tuple[bool, bytes, np.ndarray | None]:
        buffer, scripted = io.BytesIO(), isinstance(self.module, torch.jit.ScriptModule)
        (torch.jit.save if scripted else torch.save)(self.module, buffer)
        return scripted, buffer.getvalue(), self.atoms

    def __setstate__(self, state: tuple[bool, bytes, np.ndarray | None]) -> None:
        scripted, data, self.atoms = state
        buffer = io.BytesIO(data)
        if scripted:
            self.module = torch.jit.load(buffer, map_location="cpu")
        else:
            self.module = torch.load(buffer, map_location="cpu", weights_only=False)
        self._device = _device(self.module)


def _device(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def python_force(module: nn.Module, atoms: Sequence[int] | None = None) -> openmm.PythonForce:
    """A torch module as ``openmm.PythonForce``; it runs on every platform.

    Arguments:
        module: See :class:`TorchEnergy`.
        atoms: 0-based indices of the atoms it acts on, in the module's order; all by default.
    """
    return openmm.PythonForce(TorchEnergy(module, atoms))


class _ChosenAtoms(nn.Module):
    """A module that sees only some atoms: ``TorchForce`` gives it all."""

    atoms: Tensor

    def __init__(self, module: nn.Module, atoms: Sequence[int]) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("atoms", torch.tensor(atoms))

    def forward(self, positions: Tensor) -> Tensor:
        return self.module(positions[self.atoms])


def torch_force(module: torch.jit.ScriptModule, atoms: Sequence[int] | None = None) -> openmm.Force:
    """A TorchScript module as ``openmmtorch.TorchForce``.

    Arguments:
        module: Positions of the chosen atoms, nm, shape (n, 3) -> energy, kJ/mol. On GPUs the positions are float32
            unless the Context computes in double precision.
        atoms: 0-based indices of the atoms it acts on, in the module's order; all by default.

    Raises:
        CGFlowError: If openmmtorch is not installed, or does not fit the torch that is.
    """
    library = _openmmtorch()
    return library.TorchForce(module if atoms is None else torch.jit.script(_ChosenAtoms(module, atoms)))


def _openmmtorch() -> ModuleType:
    try:
        import openmmtorch
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "openmmtorch":
            problem = "is not installed"
        else:  # a shared library of another torch, or of CUDA, that is not there
            problem = f"does not fit torch {torch.__version__} ({error})"
        raise CGFlowError(
            f"openmmtorch {problem}: install it with the torch it was built for, pip install "
            "'openmm_cgflow[torchforce]', or use a PythonForce, which needs neither"
        ) from error
    return openmmtorch

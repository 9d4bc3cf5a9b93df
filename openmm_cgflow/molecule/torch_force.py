"""PyTorch energies as OpenMM forces: ``openmm.PythonForce``, or openmmtorch's ``TorchForce`` where it is installed.

Either way the energy is a torch module, positions (n_atoms, 3) in nm -> energy in kJ/mol, a scalar; forces are its
autograd gradient, or what the module returns beside the energy. A ``PythonForce`` takes any module and is all that a
plain installation needs; a ``TorchForce`` takes TorchScript only and calls it without Python.
"""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import openmm
import torch
from torch import Tensor, nn

from openmm_cgflow.errors import CGFlowError

__all__ = ["TorchEnergy", "module_device", "of_all_atoms", "python_force", "torch_force"]


class TorchEnergy:
    """Energy and forces of a torch module, as ``openmm.PythonForce`` calls them.

    It can be pickled, which is how ``openmm.XmlSerializer`` writes a ``PythonForce``. So reading such XML runs code:
    read only files that you trust, where this package and the class of the module can be imported. What is read back
    is on the device where the module was, or on the CPU where there is no such device.

    Arguments:
        module: Positions of the chosen atoms, nm, shape (n, 3), float64 and on the module's device -> energy, kJ/mol.
        atoms: 0-based indices of the atoms it acts on, in the module's order; all by default.
        outputs_forces: Whether the module returns the energy and the forces, kJ/mol/nm, shape (n, 3), instead of the
            energy alone.
    """

    def __init__(self, module: nn.Module, atoms: Sequence[int] | None = None, outputs_forces: bool = False) -> None:
        self.module, self.outputs_forces = module, outputs_forces
        self.atoms = None if atoms is None else np.array(atoms, dtype=np.int64)
        self._device = module_device(module)

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        """Energy, kJ/mol, and forces on all atoms of the System, kJ/mol/nm, shape (n_atoms, 3)."""
        positions = state.getPositions(asNumpy=True)._value  # in nm; the public way takes as long as a small network
        chosen = positions if self.atoms is None else positions[self.atoms]
        energy, forces = self._evaluate(torch.from_numpy(chosen).to(self._device))
        if self.atoms is None:
            return energy, forces
        everywhere = np.zeros_like(positions)
        everywhere[self.atoms] = forces
        return energy, everywhere

    def _evaluate(self, xyz: Tensor) -> tuple[float, np.ndarray]:
        if self.outputs_forces:
            with torch.inference_mode():
                energy, forces = self.module(xyz)
        else:
            with torch.enable_grad():  # OpenMM may call from a thread of its own, where the mode is another
                energy = self.module(xyz.requires_grad_())
                forces = -torch.autograd.grad(energy, xyz)[0]
        return energy.item(), forces.cpu().numpy()

    def __getstate__(self) -> tuple[bytes, bool, str, np.ndarray | None, bool]:
        buffer, scripted = io.BytesIO(), isinstance(self.module, torch.jit.ScriptModule)
        (torch.jit.save if scripted else torch.save)(self.module, buffer)
        return buffer.getvalue(), scripted, str(self._device), self.atoms, self.outputs_forces

    def __setstate__(self, state: tuple[bytes, bool, str, np.ndarray | None, bool]) -> None:
        data, scripted, device, self.atoms, self.outputs_forces = state
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"
        if scripted:
            self.module = torch.jit.load(io.BytesIO(data), map_location=device)
        else:
            self.module = torch.load(io.BytesIO(data), map_location=device, weights_only=False)
        self._device = module_device(self.module)


def module_device(module: nn.Module) -> torch.device:
    """The device of a module's first parameter or buffer; the CPU where it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def python_force(
    module: nn.Module, atoms: Sequence[int] | None = None, outputs_forces: bool = False
) -> openmm.PythonForce:
    """A torch module as ``openmm.PythonForce``, which runs on every platform; see :class:`TorchEnergy`."""
    return openmm.PythonForce(TorchEnergy(module, atoms, outputs_forces))


def torch_force(
    module: torch.jit.ScriptModule, atoms: Sequence[int] | None = None, outputs_forces: bool = False
) -> openmm.Force:
    """A TorchScript module as ``openmmtorch.TorchForce``.

    Arguments:
        module: Positions of the chosen atoms, nm, shape (n, 3) -> energy, kJ/mol. On GPUs the positions are float32
            unless the Context computes in double precision.
        atoms: 0-based indices of the atoms it acts on, in the module's order; all by default.
        outputs_forces: Whether the module returns the energy and the forces, kJ/mol/nm, shape (n, 3).

    Raises:
        CGFlowError: If openmmtorch is not installed, or does not fit the torch or the OpenMM that are.
    """
    library = _openmmtorch()
    force = library.TorchForce(module if atoms is None else of_all_atoms(module, atoms, outputs_forces))
    force.setOutputsForces(outputs_forces)
    return force


class _ChosenAtoms(nn.Module):
    """Positions of some atoms, moved to the module's device and precision, which are not always TorchForce's.

    On GPUs TorchForce gives positions there, and in float32 unless the Context computes in double precision.

    Constants of a frozen module stay on the CPU, whatever device the module is sent to.
    """

    # TorchScript cannot read an annotation of the buffer here, which mypy would want below.
    def __init__(self, module: nn.Module, atoms: Sequence[int]) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("atoms", torch.tensor(atoms))


class _EnergyOfChosenAtoms(_ChosenAtoms):
    def forward(self, positions: Tensor) -> Tensor:
        at = positions[self.atoms].to(device=torch.device("cpu"), dtype=torch.float64)  # type: ignore[index]
        return self.module(at).to(positions.device)


class _ForcesOfChosenAtoms(_ChosenAtoms):
    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        at = positions[self.atoms].to(device=torch.device("cpu"), dtype=torch.float64)  # type: ignore[index]
        energy, forces = self.module(at)
        atoms = self.atoms.to(positions.device)
        everywhere = torch.zeros_like(positions).index_copy(0, atoms, forces.to(positions))  # type: ignore[arg-type]
        return energy.to(positions.device), everywhere


def of_all_atoms(
    module: torch.jit.ScriptModule, atoms: Sequence[int], outputs_forces: bool = False
) -> torch.jit.ScriptModule:
    """A TorchScript module of some atoms as one that is given the positions of all; see :func:`torch_force`."""
    return torch.jit.script((_ForcesOfChosenAtoms if outputs_forces else _EnergyOfChosenAtoms)(module, atoms))


@cache
def _openmmtorch() -> ModuleType:
    try:
        import openmmtorch
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "openmmtorch":
            raise _unusable("is not installed") from error
        # A shared library of another torch, or of CUDA, that is not there.
        raise _unusable(f"does not fit torch {torch.__version__} ({error})") from error
    if _version("openmmtorch") == "1.5" and not openmm.version.version.startswith("8.5"):
        # It was built against 8.5, and a System that is read from XML would end the process.
        raise _unusable(f"1.5 does not fit OpenMM {openmm.version.version}, but 8.5")
    # Where openmm was imported before torch, OpenMM met its plugins before the libraries that torch brings.
    for failure in openmm.Platform.getPluginLoadFailures():
        path = Path(failure.removeprefix("Error loading library ").split(": ")[0])
        if "Torch" in path.name:
            try:
                openmm.Platform.loadPluginLibrary(str(path))
            except openmm.OpenMMException as error:
                if "Reference" in path.name:  # the others are of GPUs that are not here
                    raise _unusable(f"does not fit torch {torch.__version__} ({error})") from error
    return openmmtorch


def _version(distribution: str) -> str | None:
    """Version of openmmtorch; None where it is no Python package, as with conda, which builds it for its own OpenMM."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unusable(problem: str) -> CGFlowError:
    return CGFlowError(
        f"openmmtorch {problem}: install it with the torch and the OpenMM it was built for, "
        "pip install 'openmm_cgflow[torchforce]', or use a PythonForce, which needs neither"
    )

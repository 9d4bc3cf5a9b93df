"""OpenMM's ``PythonForce``: its functions, and what marks one that takes the structures of all replicas in one call."""

from __future__ import annotations

import pickle
import re
import sys
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import openmm

__all__ = [
    "BatchedEnergy",
    "batched_energy",
    "network_on_gpu",
    "python_functions",
    "split_batched",
]


@runtime_checkable
class BatchedEnergy(Protocol):
    """The function of a ``PythonForce`` that can take many copies of its molecule at once."""

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]: ...

    def evaluate(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies ``(n,)`` in kJ/mol and forces in kJ/mol/nm of structures ``(n, n_atoms, 3)`` in nm."""
        ...

    def replicated(self, n_copies: int) -> Self:
        """The function for a System of so many copies, one after another."""
        ...


def python_functions(xml: str) -> list[Any]:
    """The functions of all ``PythonForce`` in OpenMM's XML; reading them runs code, as OpenMM's own reading of it does.

    Where a function cannot be read this raises what ``pickle.loads`` does; OpenMM 8.6 ends the process.
    """
    forces = re.findall(r"<Force\b[^>]*>", xml)
    pickled = [re.search(r'\bfunction="([0-9a-f]*)"', tag) for tag in forces if 'type="PythonForce"' in tag]
    return [pickle.loads(bytes.fromhex(found.group(1))) for found in pickled if found is not None]


def batched_energy(force: openmm.Force) -> BatchedEnergy | None:
    """The function of a ``PythonForce`` if it can take many copies at once, otherwise None."""
    if not isinstance(force, openmm.PythonForce):
        return None
    if hasattr(force, "getParticles") and force.getParticles():  # since OpenMM 8.6 it can act on some atoms
        return None
    (function,) = python_functions(openmm.XmlSerializer.serialize(force))  # OpenMM gives it to its serializer alone
    return function if isinstance(function, BatchedEnergy) else None


def network_on_gpu(system: openmm.System) -> bool:
    """Whether a ``PythonForce`` may hold a network on torch's GPU, where openmm-ml puts them: one for each process."""
    torch = sys.modules.get("torch")  # loaded with the network; force fields do not need it
    has_python = any(isinstance(force, openmm.PythonForce) for force in system.getForces())
    return has_python and torch is not None and torch.cuda.is_initialized()


def split_batched(system: openmm.System) -> tuple[list[BatchedEnergy], openmm.System]:
    """The batched energies of a System, and a copy of it with its other forces."""
    rest = openmm.XmlSerializer.clone(system)
    energies = []
    for i in reversed(range(system.getNumForces())):
        energy = batched_energy(system.getForce(i))
        if energy is not None:
            energies.append(energy)
            rest.removeForce(i)
    return energies, rest

"""Machine-learned potentials as the all-atom model, alone or added to a force field.

A potential is a torch module, positions (n_atoms, 3) in nm, float64 -> energy in kJ/mol, or whatever openmm-ml makes.
It must be smooth, and not change when the molecule is moved and turned.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import openmm
import torch
from openmm import app
from torch import Tensor, nn

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule.topology import copy_topology
from openmm_cgflow.molecule.torch_force import TorchEnergy, module_device, python_force, torch_force
from openmm_cgflow.settings import PotentialSettings

__all__ = ["ReplicaEnergy", "add_potential"]

logger = logging.getLogger(__name__)

_SAME = 1e-4
"""kJ/mol, or relative; of one structure alone and in a batch, also in single precision."""


class ReplicaEnergy(TorchEnergy):
    """Energy of a torch module that takes all replicas at once, (n_replicas, n_atoms, 3) -> (n_replicas,).

    Arguments:
        module: See :class:`TorchEnergy`.
        n_copies: The atoms of the System are so many copies of the module's, one after another.
    """

    def __init__(self, module: nn.Module, n_copies: int = 1) -> None:
        super().__init__(module)
        self.n_copies = n_copies

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        positions = state.getPositions(asNumpy=True)._value
        energy, forces = self.evaluate(positions.reshape(self.n_copies, -1, 3))
        return float(energy.sum()), forces.reshape(-1, 3)

    def evaluate(self, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energies and forces of structures ``(n, n_atoms, 3)`` in nm, in one call of the module."""
        with torch.enable_grad():
            # Copies lie far from the origin, where a module in single precision would lose digits.
            local = torch.tensor(xyz - xyz[:, :1], dtype=torch.float64, device=self._device, requires_grad=True)
            energy = self.module(local)
            (gradient,) = torch.autograd.grad(energy.sum(), local)
        return energy.detach().cpu().double().numpy(), -gradient.cpu().numpy()

    def replicated(self, n_copies: int) -> Self:
        """A function of the same module for a System of so many copies."""
        return type(self)(self.module, n_copies)

    def __getstate__(self) -> Any:
        return super().__getstate__(), self.n_copies

    def __setstate__(self, state: Any) -> None:
        whole, self.n_copies = state
        super().__setstate__(whole)


def add_potential(
    settings: PotentialSettings, topology: app.Topology, system: openmm.System, positions: np.ndarray
) -> list[str]:
    """Adds what ``system.potential`` names to a System.

    Arguments:
        settings: The potential.
        topology: Its atoms are the System's.
        system: Changed: it gets the potential's forces.
        positions: ``(n_atoms, 3)`` in nm, where the potential is tried.

    Returns:
        How it is evaluated, for the log.

    Raises:
        CGFlowError: If the potential cannot be loaded or does not take such positions.
    """
    if settings.openmmml is not None:
        return _add_openmmml(settings.openmmml, settings, topology, system)
    module = _load_torchscript(settings) if settings.torchscript is not None else _call_factory(settings)
    source = str(settings.torchscript or settings.python)
    _refuse_wrong_energy(module, positions, source)
    if isinstance(module, torch.jit.ScriptModule):
        try:
            system.addForce(torch_force(module))
            return [f"{source}: evaluated by openmmtorch.TorchForce"]
        except CGFlowError as error:
            logger.debug("%s", error)
    if _takes_batches(module, positions):
        system.addForce(openmm.PythonForce(ReplicaEnergy(module)))
        return [f"{source}: evaluated by openmm.PythonForce, all replicas in one call"]
    system.addForce(python_force(module))
    return [f"{source}: evaluated by openmm.PythonForce, one structure at a time: it takes no batches"]


def _call_factory(settings: PotentialSettings) -> nn.Module:
    assert settings.python is not None
    name, _, attribute = settings.python.partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(name), attribute)
    except ImportError as error:
        raise CGFlowError(
            f"system.potential.python: the module {name} cannot be imported: {error}; install it, or put its folder "
            "into PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise CGFlowError(f"system.potential.python: the module {name} has no {attribute}") from error
    try:
        module = factory(**settings.files, **settings.options)
    except TypeError as error:
        named = ", ".join((*settings.files, *settings.options)) or "no arguments"
        raise CGFlowError(f"system.potential: {settings.python} cannot be called with {named}: {error}") from error
    if not isinstance(module, nn.Module):
        raise CGFlowError(
            f"system.potential: {settings.python} returned a {type(module).__name__}, expected a torch.nn.Module"
        )
    return module


def _load_torchscript(settings: PotentialSettings) -> torch.jit.ScriptModule:
    assert settings.torchscript is not None
    try:
        return torch.jit.load(settings.torchscript, map_location="cpu")
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CGFlowError(
            f"{settings.torchscript}: not a TorchScript module: {reason}; write one with "
            "torch.jit.script(module).save(...)"
        ) from error


def _refuse_wrong_energy(module: nn.Module, positions: np.ndarray, source: str) -> None:
    try:
        energy, _ = _energy_and_gradient(module, torch.tensor(positions, dtype=torch.float64))
    except Exception as error:  # whatever a user's module raises
        raise CGFlowError(
            f"system.potential: {source} cannot be evaluated at positions of shape {positions.shape} in nm, float64: "
            f"{type(error).__name__}: {error}"
        ) from error
    if energy.shape not in ((), (1,)):
        raise CGFlowError(f"system.potential: {source} gave shape {tuple(energy.shape)}, expected one energy in kJ/mol")


def _takes_batches(module: nn.Module, positions: np.ndarray) -> bool:
    """Whether two structures in one call have the energies and forces that they have alone."""
    shifted = positions + 0.001 * np.random.default_rng(0).standard_normal(positions.shape)
    structures = torch.tensor(np.stack((positions, shifted)), dtype=torch.float64)
    try:
        energy, gradient = _energy_and_gradient(module, structures)
    except Exception:  # a module for one structure may raise anything
        return False
    if energy.shape != (2,):
        return False
    alone = [_energy_and_gradient(module, structure) for structure in structures]
    expected = torch.stack([part[0].reshape(()) for part in alone]), torch.stack([part[1] for part in alone])
    size = 1.0 + expected[1].abs().max()
    same = torch.allclose(energy.double(), expected[0].double(), rtol=_SAME, atol=_SAME)
    return same and bool((gradient - expected[1]).abs().max() < _SAME * size)


def _energy_and_gradient(module: nn.Module, xyz: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        xyz = xyz.to(module_device(module), copy=True).requires_grad_()
        energy = module(xyz)
        (gradient,) = torch.autograd.grad(energy.sum(), xyz)
    return energy.detach().cpu(), gradient.cpu()


def _add_openmmml(name: str, settings: PotentialSettings, topology: app.Topology, system: openmm.System) -> list[str]:
    try:
        from openmmml import MLPotential
    except ImportError as error:
        raise CGFlowError(
            f"system.potential.openmmml: {name} needs the package openmm-ml, which cannot be imported ({error}); "
            "install it: pip install openmmml"
        ) from error
    try:
        potential = MLPotential(name, **{argument: str(path) for argument, path in settings.files.items()})
        # The copy has no box.
        made = potential.createSystem(copy_topology(topology), removeCMMotion=False, **settings.options)
    except Exception as error:  # each potential of openmm-ml raises what its own library does
        if isinstance(error, KeyError) and error.args == (name,):
            reason = "it has no potential of this name; see the list in its documentation"
        else:
            reason = f"{type(error).__name__}: {error}"
        raise CGFlowError(f"system.potential.openmmml: openmm-ml cannot make {name}: {reason}") from error
    for force in made.getForces():
        system.addForce(openmm.XmlSerializer.clone(force))
    given = "".join(f", {option} {value}" for option, value in settings.options.items())
    return [f"{name}: made by openmm-ml{given}"]

"""Torch energies as OpenMM forces: numbers against autograd, through every mechanism and platform."""

import importlib.metadata
import pickle
import sys
from types import ModuleType

import numpy as np
import openmm
import pytest
import torch
from torch import nn

from openmm_cgflow.engines.platforms import PlatformChoice
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.molecule import torch_force as torchforce
from openmm_cgflow.molecule.torch_force import TorchEnergy, python_force, torch_force

_N_ATOMS, _CHOSEN = 5, [4, 0, 2]
_REFERENCE = PlatformChoice("Reference")


class Springs(nn.Module):
    """Anharmonic springs between atoms of different strengths, so that no two atoms can be taken for each other."""

    def __init__(self, n_atoms: int):
        super().__init__()
        strength = torch.arange(1.0, 1 + n_atoms**2, dtype=torch.float64).reshape(n_atoms, n_atoms)
        self.strength = nn.Parameter(strength)

    def forward(self, xyz: torch.Tensor) -> torch.Tensor:
        squares = (xyz[:, None] - xyz[None, :]).square().sum(-1)
        return (self.strength * (squares + torch.sin(squares))).sum()


def positions(seed=0):
    return np.random.default_rng(seed).normal(size=(_N_ATOMS, 3))


def expected(module, atoms, xyz):
    at = torch.tensor(xyz, requires_grad=True)
    energy = module(at[atoms])
    (gradient,) = torch.autograd.grad(energy, at)
    return energy.item(), -gradient.numpy()


def system_of(force, n_atoms=_N_ATOMS):
    system = openmm.System()
    for _ in range(n_atoms):
        system.addParticle(1.0)
    system.addForce(force)
    return system


def context_of(force, platform=_REFERENCE):
    return context_in(system_of(force), platform)


def context_in(system, platform=_REFERENCE):
    return platform.context(system, openmm.VerletIntegrator(0.001))


def evaluate(context, xyz):
    context.setPositions(xyz)
    state = context.getState(energy=True, forces=True)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value


mechanisms = pytest.mark.parametrize(
    "make",
    [
        python_force,
        pytest.param(lambda module, atoms=None: python_force(torch.jit.script(module), atoms), id="scripted"),
        pytest.param(
            lambda module, atoms=None: torch_force(torch.jit.script(module), atoms),
            marks=pytest.mark.torchforce,
            id="torch_force",
        ),
    ],
)


@mechanisms
@pytest.mark.parametrize("atoms", [None, _CHOSEN])
def test_equals_autograd(make, atoms, every_platform):
    module = Springs(_N_ATOMS if atoms is None else len(atoms))
    energy, forces = evaluate(context_of(make(module, atoms), every_platform), positions())
    true_energy, true_forces = expected(module, slice(None) if atoms is None else atoms, positions())
    assert energy == pytest.approx(true_energy, rel=1e-5)
    np.testing.assert_allclose(forces, true_forces, atol=1e-5 * np.abs(true_forces).max())


@mechanisms
def test_forces_are_slopes(make):
    context, xyz, step = context_of(make(Springs(3), _CHOSEN)), positions(), 1e-5
    forces = evaluate(context, xyz)[1]
    moved = np.random.default_rng(1).normal(size=xyz.shape)
    up, down = (evaluate(context, xyz + sign * step * moved)[0] for sign in (1, -1))
    assert -(up - down) / (2 * step) == pytest.approx((forces * moved).sum(), rel=1e-6)


@mechanisms
@pytest.mark.parametrize("atoms", [None, _CHOSEN])
def test_survives_xml(make, atoms):
    system = system_of(make(Springs(_N_ATOMS if atoms is None else len(atoms)), atoms))
    again = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    before, after = (evaluate(context_in(one), positions()) for one in (system, again))
    assert before[0] == after[0]
    np.testing.assert_array_equal(before[1], after[1])


def test_runs_where_gradients_are_off():
    context = context_of(python_force(Springs(_N_ATOMS)))
    with torch.no_grad():
        _, forces = evaluate(context, positions())
    assert np.abs(forces).max() > 0


def test_read_back_where_it_was():
    energy = TorchEnergy(Springs(3), _CHOSEN)
    again = pickle.loads(pickle.dumps(energy))
    assert again.module.strength.device.type == "cpu"
    np.testing.assert_array_equal(again.atoms, _CHOSEN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_read_back_on_the_cpu_where_there_is_no_gpu():
    energy = TorchEnergy(Springs(3), _CHOSEN)
    energy._device = torch.device("cuda:0")  # as the one that wrote it might have been
    assert pickle.loads(pickle.dumps(energy)).module.strength.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no GPU")
def test_networks_on_a_gpu():
    """Torch's, whatever OpenMM's platform."""
    true_energy, true_forces = expected(Springs(3), _CHOSEN, positions())
    force = python_force(Springs(3).to("cuda"), _CHOSEN)
    for made in (force, openmm.XmlSerializer.clone(force)):
        energy, forces = evaluate(context_of(made), positions())
        assert energy == pytest.approx(true_energy, rel=1e-5)
        np.testing.assert_allclose(forces, true_forces, atol=1e-5 * np.abs(true_forces).max())


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmmtorch", None)
    torchforce._openmmtorch.cache_clear()
    with pytest.raises(CGFlowError, match=r"openmmtorch .*pip install 'openmm_cgflow\[torchforce\]'.* PythonForce"):
        torch_force(torch.jit.script(Springs(3)))


def test_library_of_another_torch_is_named(monkeypatch, tmp_path):
    (tmp_path / "openmmtorch.py").write_text("raise ImportError('libnvrtc.so.12: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "openmmtorch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    torchforce._openmmtorch.cache_clear()
    with pytest.raises(CGFlowError, match=r"does not fit torch \d.*libnvrtc.*PythonForce"):
        torch_force(torch.jit.script(Springs(3)))


def test_crash_with_openmm_8_6_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmmtorch", ModuleType("openmmtorch"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.5")
    monkeypatch.setattr(openmm.version, "version", "8.6.1")
    torchforce._openmmtorch.cache_clear()
    with pytest.raises(CGFlowError, match=r"openmmtorch 1.5 does not fit OpenMM 8.6.1, but 8.5"):
        torch_force(torch.jit.script(Springs(3)))

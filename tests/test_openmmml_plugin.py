"""The model as a potential of openmm-ml, found by its entry point."""

import importlib

import numpy as np
import openmm
import pytest
import torch
from butane_model import all_atoms, butane_model, close, evaluate, expected
from openmm import app

from openmm_cgflow import CGFlowError

openmmml = pytest.importorskip("openmmml", reason="openmm-ml is not installed; the extra [test] has it")


@pytest.fixture(scope="module")
def model(systems):
    return butane_model(systems)


@pytest.fixture
def potential(model, root, monkeypatch):
    """``MLPotential("cgflow", ...)`` of the model, by what setup.cfg says of the entry point."""
    text = (root / "setup.cfg").read_text().split("openmmml.potentials =\n")[1].splitlines()[0]
    name, target = text.split(" = ")
    module, factory = target.split(":")
    module = importlib.import_module(module)
    monkeypatch.setattr(module, "load", lambda path: model)
    openmmml.MLPotential.registerImplFactory(name.strip(), getattr(module, factory)())
    return lambda **options: openmmml.MLPotential("cgflow", modelPath="run", **options)


def test_beads(potential, model):
    beads = model.create_cg_system()
    system = potential().createSystem(beads.topology, removeCMMotion=False)
    positions = all_atoms(model)[list(model.partition.slow)]
    close(evaluate(system, positions), expected(model, positions, range(4)))


def test_slow_atoms_of_the_molecule(potential, model):
    topology = model.molecular_system.topology
    system = potential(scale=-0.5, energy="torsions").createSystem(topology)
    positions = all_atoms(model)
    close(evaluate(system, positions), expected(model, positions, model.partition.slow, -0.5, "torsions"))
    limited = potential(ceiling=0.1).createSystem(topology)
    wanted = model.energy_of_positions(ceiling=0.1)(torch.tensor(positions[list(model.partition.slow)]))
    assert evaluate(limited, positions)[0] == pytest.approx(wanted.item(), rel=1e-6)


def test_beads_inside_a_larger_system(potential, model):
    """As ``createMixedSystem`` calls it, with any iterable of atoms."""
    topology, atoms = app.Topology(), [5, 3, 2, 4]
    residue = topology.addResidue("MIX", topology.addChain())
    for symbol in "HHCCCC":
        topology.addAtom(symbol, app.Element.getBySymbol(symbol), residue)
    system = openmm.System()
    for _ in range(6):
        system.addParticle(12.0)
    potential()._impl.addForces(topology, system, iter(atoms), 2)
    positions = np.random.default_rng(0).normal(size=(6, 3))
    positions[atoms] = all_atoms(model)[list(model.partition.slow)]
    close(evaluate(system, positions, groups={2}), expected(model, positions, atoms))


def test_other_molecules_and_options_are_refused(potential, model):
    topology = app.Topology()
    topology.addAtom("O", app.element.oxygen, topology.addResidue("HOH", topology.addChain()))
    with pytest.raises(CGFlowError, match="got the elements O, expected those of the 4 slow atoms, C C C C"):
        potential().createSystem(topology)
    with pytest.raises(CGFlowError, match="unknown options cutoff"):
        potential().createSystem(model.molecular_system.topology, cutoff=1.0)
    with pytest.raises(CGFlowError, match="say which model"):
        openmmml.MLPotential("cgflow")

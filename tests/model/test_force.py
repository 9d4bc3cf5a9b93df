"""A model as OpenMM force, as a System of beads and as files, on n-butane with networks of random weights."""

import json
import math
import subprocess
import sys

import numpy as np
import openmm
import pytest
import torch
from butane_model import all_atoms, butane_model, close, evaluate, expected, system_of
from joint_models import joint_flow, linear

from openmm_cgflow import CGFlowError
from openmm_cgflow.model.cg_model import CGModel
from openmm_cgflow.model.density import FlowDensity, JointDensity
from openmm_cgflow.model.force import traced, traced_with_forces
from openmm_cgflow.molecule.torch_force import of_all_atoms
from openmm_cgflow.runs.export import save_torchscript
from openmm_cgflow.units import thermal_beta

ENERGIES = ("pmf", "flow", "torsions")
MECHANISMS = ("python", pytest.param("torchforce", marks=pytest.mark.torchforce))


@pytest.fixture(scope="module")
def model(systems):
    return butane_model(systems)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("energy", ENERGIES)
def test_force_equals_autograd(model, mechanism, energy, every_platform):
    positions, slow = all_atoms(model), model.partition.slow
    system = system_of(model.create_force(scale=-0.7, energy=energy, mechanism=mechanism), len(positions))
    found = evaluate(system, positions, every_platform)
    close(found, expected(model, positions, slow, -0.7, energy))
    assert not found[1][list(model.partition.fast)].any()


def test_table_of_torsions(model):
    positions, slow = all_atoms(model), model.partition.slow
    system = system_of(model.create_force(scale=-0.7, energy="torsions", mechanism="table"), len(positions))
    again = openmm.XmlSerializer.clone(system)
    true = expected(model, positions, slow, -0.7, "torsions")
    assert evaluate(again, positions)[0] == pytest.approx(true[0], abs=1e-3)


@pytest.fixture(scope="module")
def drawn(model):
    return model.sample(400, seed=2).trajectory.xyz.astype(np.float64)


@pytest.mark.parametrize("energy", ENERGIES)
def test_an_energy_levels_off_at_its_ceiling(model, drawn, energy):
    """As it was below, flat above, and the same in a force; kJ/mol."""
    slow, xyz = list(model.partition.slow), drawn
    free, ceiling = model.energy_of_positions(energy=energy), 2.0
    limited = model.energy_of_positions(energy=energy, ceiling=ceiling)
    with torch.no_grad():
        whole, cut = (one(torch.as_tensor(xyz[:, slow])) for one in (free, limited))
    kt, lowest = 1 / thermal_beta(model.temperature), whole.min()
    top = limited.ceiling * kt
    assert abs(top - ceiling - lowest) < 2.0  # the lowest of other samples
    torch.testing.assert_close(cut, top - kt * torch.log1p(torch.exp((top - whole) / kt)))
    assert (whole > top).any() and (cut < top).all()
    highest = xyz[int(whole.argmax())]
    value, forces = evaluate(system_of(model.create_force(energy=energy, ceiling=ceiling), len(highest)), highest)
    assert value == pytest.approx(float(cut.max()), rel=1e-5)
    steep = expected(model, highest, slow, energy=energy)[1]
    np.testing.assert_allclose(forces, steep / (1 + math.exp((float(whole.max()) - top) / kt)), atol=1e-4)
    with pytest.raises(CGFlowError, match="ceiling: got -1"):
        model.energy_of_positions(energy=energy, ceiling=-1)


def test_a_table_levels_off_at_its_ceiling(model):
    positions, slow = all_atoms(model), model.partition.slow
    options = {"energy": "torsions", "scale": -0.7, "ceiling": 1.0}
    system = system_of(model.create_force(mechanism="table", **options), len(positions))
    at = torch.as_tensor(positions[list(slow)])
    true = float(model.energy_of_positions(**options)(at))
    assert evaluate(system, positions)[0] == pytest.approx(true, abs=1e-3)
    assert abs(true - float(model.energy_of_positions(-0.7, "torsions")(at))) > 0.01


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_forces_are_slopes(model, mechanism):
    positions = all_atoms(model)
    system = system_of(model.create_force(mechanism=mechanism), len(positions))
    move = np.random.default_rng(1).normal(size=positions.shape)
    up, down = (evaluate(system, positions + sign * 1e-5 * move)[0] for sign in (1, -1))
    assert -(up - down) / 2e-5 == pytest.approx((evaluate(system, positions)[1] * move).sum(), rel=1e-5)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_other_atoms_of_another_system(model, mechanism):
    atoms, positions = [9, 3, 7, 5], np.random.default_rng(2).normal(size=(12, 3))
    positions[atoms] = all_atoms(model)[list(model.partition.slow)]
    force = model.create_force(atoms=atoms, mechanism=mechanism)
    close(evaluate(system_of(force, 12), positions), expected(model, positions, atoms))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_added_to_the_force_field_it_survives_xml(model, mechanism):
    system = openmm.XmlSerializer.clone(model.molecular_system.system)
    bias = model.create_force(scale=-0.5, mechanism=mechanism)
    assert bias.getName() == "CGFreeEnergy"
    bias.setForceGroup(3)
    system.addForce(bias)
    again = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    positions = all_atoms(model)
    true = expected(model, positions, model.partition.slow, -0.5)
    close(evaluate(again, positions, groups={3}), true)


def another(model, density):
    """A model of the same molecule with another density."""
    same = model.molecular_system, model.partition, model.geometry
    return CGModel(*same, density, model.temperatures, [], model.defaults)


def test_default_is_the_pmf_and_without_one_the_flow(model):
    positions = all_atoms(model)[list(model.partition.slow)]
    without = another(model, FlowDensity(model.coordinates, model.flow))
    close(evaluate(model.create_cg_system().system, positions), expected(model, positions, range(4), 1.0, "pmf"))
    at = torch.tensor(positions)
    assert without.energy_of_positions()(at) == model.energy_of_positions(energy="flow")(at)
    with pytest.raises(CGFlowError, match="no potential of mean force"):
        without.create_force(energy="pmf")


def test_beads(model):
    beads = model.create_cg_system()
    names = [atom.name for atom in beads.topology.atoms()]
    labels = [model.molecular_system.labels[i].split(":")[1] for i in model.partition.slow]
    assert names == labels
    assert beads.topology.getNumBonds() == 3
    masses = [beads.system.getParticleMass(i)._value for i in range(4)]
    # CH3 and CH2, whatever the order of the atoms is.
    assert sorted(masses) == pytest.approx([14.027, 14.027, 15.035, 15.035], abs=0.01)
    assert sum(masses) == pytest.approx(model.molecular_system.masses.sum())
    np.testing.assert_array_equal(beads.positions, model.molecular_system.positions[list(model.partition.slow)])


def test_beads_stay_whole(model):
    """At three times the temperature."""
    beads = model.create_cg_system()
    integrator = openmm.LangevinMiddleIntegrator(3 * model.temperature, 1.0, 0.003)
    integrator.setRandomNumberSeed(1)
    context = openmm.Context(beads.system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(beads.positions)
    context.setVelocitiesToTemperature(3 * model.temperature, 1)
    for _ in range(30):
        integrator.step(10)
        xyz = context.getState(positions=True).getPositions(asNumpy=True)._value
        bonds = [np.linalg.norm(xyz[a.index] - xyz[b.index]) for a, b in beads.topology.bonds()]
        assert min(bonds) > 0.1 and max(bonds) < 0.22


_PLAIN = """
import json, sys, torch
path, positions = sys.argv[1], json.loads(sys.argv[2])
module = torch.jit.load(path)
answers = []
for _ in range(3):  # TorchScript compiles while it is called
    xyz = torch.tensor(positions, dtype=torch.float64, requires_grad=True)
    energy = module(xyz)
    answers.append([energy.item(), torch.autograd.grad(energy, xyz)[0].tolist()])
assert "openmm_cgflow" not in sys.modules and "zuko" not in sys.modules
print(json.dumps(answers))
"""


@pytest.mark.parametrize(("energy", "beads"), [("pmf", True), ("pmf", False), ("flow", False)])
def test_torchscript_needs_nothing_else(model, tmp_path, energy, beads):
    path, slow = tmp_path / "model.pt", list(model.partition.slow)
    save_torchscript(model.energy_of_positions(0.5, energy), path, None if beads else slow)
    positions = all_atoms(model)[slow] if beads else all_atoms(model)
    # In the folder of the file, and without the environment's variables and the user's packages.
    command = [sys.executable, "-W", "ignore", "-I", "-c", _PLAIN, str(path), json.dumps(positions.tolist())]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    for value, gradient in json.loads(printed):
        true = expected(model, positions, range(len(slow)) if beads else slow, 0.5, energy)
        close((value, -np.array(gradient)), true)


@pytest.mark.parametrize("energy", ENERGIES)
def test_modules_take_single_precision(model, energy):
    """As TorchForce gives it on GPUs."""
    slow, single = list(model.partition.slow), all_atoms(model).astype(np.float32)
    at = torch.tensor(single, requires_grad=True)
    true = expected(model, single.astype(np.float64), slow, 1.0, energy)
    value = of_all_atoms(traced(model.energy_of_positions(1.0, energy)), slow)(at)
    (gradient,) = torch.autograd.grad(value, at)
    close((value.item(), -gradient.numpy()), true)
    value, forces = of_all_atoms(traced_with_forces(model.energy_of_positions(1.0, energy)), slow, True)(at.detach())
    assert forces.dtype == torch.float32
    close((value.item(), forces.numpy()), true)


@pytest.mark.parametrize("atoms", [[0, 1, 2], [0, 0, 1, 2], [0, 1, 2, -1]])
def test_wrong_atoms_are_refused(model, atoms):
    with pytest.raises(CGFlowError, match=r"atoms: got .* expected 4 different indices, of BUT1:C1"):
        model.create_force(atoms=atoms)


def test_unknown_words_are_refused(model):
    with pytest.raises(CGFlowError, match="energy: got 'PMF', expected"):
        model.create_force(energy="PMF")
    with pytest.raises(CGFlowError, match="mechanism: got 'torch', expected"):
        model.create_force(mechanism="torch")


def test_learned_combinations_are_refused(model):
    joint = joint_flow(linear())
    learned = another(model, JointDensity(model.coordinates, joint, 300.0, 300.0))
    with pytest.raises(CGFlowError, match="combinations of all particles"):
        learned.create_force()

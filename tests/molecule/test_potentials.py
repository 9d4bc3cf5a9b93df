"""Machine-learned potentials: every way into a System, what they add up to, and all replicas in one call."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import learned
import numpy as np
import openmm
import pytest
import torch
import yaml
from molecules import BUTANE, BUTANE_FORCEFIELD
from settings import TINY
from toys import HarmonicBath

from openmm_cgflow import CGFlowError, MolecularSystem, load, load_config, train
from openmm_cgflow.config import dump_config
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.engine import Schedule
from openmm_cgflow.molecule.force_fields import read_system_xml
from openmm_cgflow.molecule.potentials import ReplicaEnergy
from openmm_cgflow.molecule.python_forces import batched_energy
from openmm_cgflow.molecule.sanitize import energy_and_forces
from openmm_cgflow.molecule.torch_force import TorchEnergy, python_force
from openmm_cgflow.settings import ChainSettings

SHORT = Schedule(300.0, n_relax=2, n_equilibration=3, n_frames=2, stride=2)


@pytest.fixture(scope="module")
def butane():
    """Settings of n-butane without an energy."""
    return {"structure": BUTANE}


@pytest.fixture(scope="module")
def force_field():
    return {"forcefield": BUTANE_FORCEFIELD}


def molecule(settings, kind="python", value="learned:all_pairs", **potential):
    return MolecularSystem.from_files(**settings, potential={kind: value, **potential})


def expected(module, xyz):
    at = torch.tensor(np.array(xyz), requires_grad=True)
    energy = module(at)
    return energy.detach().numpy(), -torch.autograd.grad(energy.sum(), at)[0].numpy()


def settings(**changes):
    return ChainSettings(**({"platform": "Reference", "n_workers": 1, "n_replicas": 6} | changes))


# ---------------------------------------------------------------- into a System


def test_alone(butane):
    found = molecule(butane)
    energy, forces = energy_and_forces(found.system, found.positions)
    wanted, wanted_forces = expected(learned.all_pairs(), found.positions)
    assert np.isclose(energy, wanted, rtol=1e-12)
    assert np.allclose(forces, wanted_forces, rtol=0, atol=1e-9)
    assert np.allclose(found.masses[[0, 4]], [12.011, 1.008], atol=0.01)
    assert found.notes == ("learned:all_pairs: evaluated by openmm.PythonForce, all replicas in one call",)


def test_added_to_a_force_field(butane, force_field):
    plain, both = MolecularSystem.from_files(**butane, **force_field), molecule(butane | force_field)
    energy, forces = energy_and_forces(plain.system, plain.positions)
    wanted, wanted_forces = expected(learned.all_pairs(), plain.positions)
    total, total_forces = energy_and_forces(both.system, both.positions)
    assert np.isclose(total, energy + wanted, rtol=1e-9)
    assert np.allclose(total_forces, forces + wanted_forces, rtol=0, atol=1e-6)
    assert both.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize("options", [{}, {"scale": 2}])
def test_files_and_options_are_arguments(butane, tmp_path, options):
    table = tmp_path / "table.json"
    table.write_text(json.dumps([(0, 1, 5.0), (3, 13, 7.0)]))
    found = molecule(butane, value="learned:from_table", files={"table": table}, options=options)
    wanted, _ = expected(learned.from_table(table, **options), found.positions)
    assert np.isclose(energy_and_forces(found.system, found.positions)[0], wanted)


def _script(tmp_path):
    path = tmp_path / "model.pt"
    learned.scripted().save(str(path))
    return path


def _without_openmmtorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "openmmtorch", None)


def test_torchscript_without_openmmtorch(butane, tmp_path, monkeypatch):
    _without_openmmtorch(monkeypatch)
    path = _script(tmp_path)
    found = molecule(butane, "torchscript", path)
    assert np.isclose(
        energy_and_forces(found.system, found.positions)[0], expected(learned.all_pairs(), found.positions)[0]
    )
    assert found.notes == (f"{path}: evaluated by openmm.PythonForce, all replicas in one call",)


@pytest.mark.torchforce
def test_torchscript_with_openmmtorch(butane, tmp_path, monkeypatch):
    path = _script(tmp_path)
    found = molecule(butane, "torchscript", path)
    assert found.notes == (f"{path}: evaluated by openmmtorch.TorchForce",)
    energy, forces = energy_and_forces(found.system, found.positions)
    with monkeypatch.context() as patch:
        _without_openmmtorch(patch)
        other = molecule(butane, "torchscript", path)
    other_energy, other_forces = energy_and_forces(other.system, other.positions)
    assert np.isclose(energy, other_energy, rtol=1e-6)
    assert np.allclose(forces, other_forces, rtol=1e-5, atol=1e-3)


@pytest.fixture
def springs_of_openmmml(monkeypatch):
    """A potential that openmm-ml knows as ``springs``: its own need libraries and weights that are not on PyPI."""
    openmmml = pytest.importorskip("openmmml", reason="openmm-ml is not installed; the extra [test] has it")
    base = importlib.import_module("openmmml.mlpotential")

    class Springs(base.MLPotentialImpl):
        def __init__(self, module):
            self.module = module

        def addForces(self, topology, system, atoms, forceGroup, charge=0):
            assert topology.getPeriodicBoxVectors() is None
            self.module.strength += charge
            system.addForce(python_force(self.module))

    class Factory(base.MLPotentialImplFactory):
        def createImpl(self, name, modelPath=None):
            return Springs(learned.all_pairs() if modelPath is None else learned.from_table(Path(modelPath)))

    monkeypatch.setitem(openmmml.MLPotential._implFactories, "springs", Factory())


@pytest.mark.usefixtures("springs_of_openmmml")
def test_openmmml(butane, force_field, tmp_path):
    found = molecule(butane | force_field, "openmmml", "springs")
    plain = MolecularSystem.from_files(**butane, **force_field)
    wanted = expected(learned.all_pairs(), found.positions)[0] + energy_and_forces(plain.system, plain.positions)[0]
    assert np.isclose(energy_and_forces(found.system, found.positions)[0], wanted)
    assert "springs: made by openmm-ml" in found.notes
    table = tmp_path / "table.json"
    table.write_text(json.dumps([[0, 3, 5.0]]))
    found = molecule(butane, "openmmml", "springs", files={"modelPath": table})
    wanted = expected(learned.from_table(table), found.positions)[0]
    assert np.isclose(energy_and_forces(found.system, found.positions)[0], wanted)
    charged = molecule(butane, "openmmml", "springs", files={"modelPath": table}, options={"charge": -1})
    assert np.isclose(energy_and_forces(charged.system, charged.positions)[0], 0.8 * wanted)
    assert "springs: made by openmm-ml, charge -1" in charged.notes
    with pytest.raises(CGFlowError, match=r"openmm-ml cannot make springs: TypeError: .*'spin'"):
        molecule(butane, "openmmml", "springs", options={"spin": 2})
    with pytest.raises(CGFlowError, match=r"openmm-ml cannot make springs: TypeError: .*'weights'"):
        molecule(butane, "openmmml", "springs", files={"weights": table})
    with pytest.raises(CGFlowError, match="openmm-ml cannot make other: it has no potential of this name"):
        molecule(butane, "openmmml", "other")


class WrongForces:
    """Springs whose forces are in another unit."""

    def __init__(self, factor):
        self.factor, self.right = factor, TorchEnergy(learned.all_pairs())

    def __call__(self, state):
        energy, forces = self.right(state)
        return energy, self.factor * forces


@pytest.mark.parametrize("factor", [0.1, 1 / 4.184, -1.0, 1.0])
def test_forces_that_are_not_the_slope_are_refused(butane, force_field, factor):
    """As those of openmm-ml 1.8's ANI, in kJ/mol/angstrom: dynamics would go on, at another temperature."""
    molecule = MolecularSystem.from_files(**butane, **force_field)
    system = openmm.System()
    for mass in molecule.masses:
        system.addParticle(mass)
    system.addForce(openmm.PythonForce(WrongForces(factor)))
    if factor == 1.0:
        MolecularSystem.from_openmm(molecule.topology, system, molecule.positions)
        return
    with pytest.raises(CGFlowError, match=r"the forces are not those of the energy: .*kJ/mol/angstrom"):
        MolecularSystem.from_openmm(molecule.topology, system, molecule.positions)


def test_without_openmmml(butane, monkeypatch):
    monkeypatch.setitem(sys.modules, "openmmml", None)
    with pytest.raises(CGFlowError, match=r"ani2x needs the package openmm-ml.*pip install openmmml"):
        molecule(butane, "openmmml", "ani2x")


def test_a_python_force_of_openmm_8_5_is_found(butane, monkeypatch):
    """Before 8.6 it acted on all atoms, and could not be asked."""
    monkeypatch.delattr(openmm.PythonForce, "getParticles")
    assert batched_energy(molecule(butane).system.getForce(0)) is not None


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("potential", "says"),
    [
        ({"python": "no_such_module:make"}, "the module no_such_module cannot be imported"),
        ({"python": "learned:no_factory"}, "the module learned has no no_factory"),
        ({"python": "learned:from_table"}, "learned:from_table cannot be called with no arguments"),
        ({"python": "learned:not_a_module"}, "returned a int, expected a torch.nn.Module"),
        ({"python": "learned:bath", "files": {"table": "none.json"}}, "none.json: no such file"),
        ({"python": "learned:per_atom"}, "learned:per_atom gave shape (14,), expected one energy in kJ/mol"),
        ({"python": "learned:field"}, "the energy changes by"),
        ({"torchscript": "none.pt"}, "none.pt: no such file"),
        ({"python": "learned"}, "system.potential.python: String should match pattern"),
        ({}, "give exactly one of python (module:factory), torchscript (a file) and openmmml (a name)"),
        ({"python": "learned:bath", "openmmml": "ani2x"}, "give exactly one of python"),
        ({"torchscript": "model.pt", "files": {"a": "b"}}, "files are arguments of a python factory or of openmmml"),
        ({"torchscript": "model.pt", "options": {"a": 1}}, "options are arguments of a python factory or of openmmml"),
        ({"python": "learned:bath", "files": {"a": "b"}, "options": {"a": 1}}, "a: in files and in options"),
        ({"python": "learned:from_table", "options": {"a": 1}}, "learned:from_table cannot be called with a: "),
        ({"pyton": "learned:bath"}, "system.potential.pyton: unknown key; did you mean 'python'?"),
    ],
)
def test_what_can_be_wrong(butane, potential, says):
    with pytest.raises(CGFlowError) as caught:
        MolecularSystem.from_files(**butane, potential=potential)
    assert says in str(caught.value)


def test_too_few_atoms(butane, tmp_path):
    table = tmp_path / "table.json"
    table.write_text("[[0, 14, 5.0]]")
    with pytest.raises(CGFlowError, match=r"cannot be evaluated at positions of shape \(14, 3\) in nm, float64"):
        molecule(butane, value="learned:from_table", files={"table": table})


def test_not_torchscript(butane, tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("no archive")
    with pytest.raises(CGFlowError, match=r"model\.pt: not a TorchScript module: .*torch\.jit\.script"):
        molecule(butane, "torchscript", path)


def test_functions_that_cannot_be_pickled(butane):
    found = molecule(butane)
    system = openmm.System()
    for mass in found.masses:
        system.addParticle(mass)
    system.addForce(openmm.PythonForce(lambda state: (0.0, np.zeros((14, 3)))))
    with pytest.raises(CGFlowError, match="its function could not be pickled"):
        MolecularSystem.from_openmm(found.topology, system, found.positions)


def test_an_energy_is_needed(butane):
    with pytest.raises(CGFlowError, match="or a potential"):
        MolecularSystem.from_files(**butane)


def test_atoms_need_elements(butane, tmp_path):
    text = butane["structure"].read_text().splitlines()
    path = tmp_path / "strange.pdb"
    path.write_text("\n".join(line[:76].replace(" C1 ", " Q1 ") if line[:6] == "HETATM" else line for line in text))
    with pytest.raises(CGFlowError, match=r"strange\.pdb: atom 0 \(Q1\) has no element"):
        molecule({"structure": path})


def test_module_missing_where_a_system_is_read(butane, tmp_path):
    path = tmp_path / "system.xml"
    path.write_text(molecule(butane).to_xml())
    code = "from pathlib import Path; from openmm_cgflow.molecule.force_fields import read_system_xml; "
    code += f"read_system_xml(Path({str(path)!r}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "its potential cannot be read" in ran.stderr and "No module named 'learned'" in ran.stderr
    assert np.isclose(
        energy_and_forces(read_system_xml(path), molecule(butane).positions)[0],
        expected(learned.all_pairs(), molecule(butane).positions)[0],
    )


def test_a_potential_of_another_version_is_told_from_a_missing_module(tmp_path):
    """Its modules had other names, and what is pickled finds them by name."""
    pickled = b"copenmm_cgflow.torchforce\nTorchEnergy\n."
    path = tmp_path / "system.xml"
    path.write_text(f'<System><Forces><Force function="{pickled.hex()}" type="PythonForce"/></Forces></System>')
    with pytest.raises(CGFlowError, match=r"another version.*openmm_cgflow\.torchforce now; make the file anew"):
        read_system_xml(path)


def test_paths_are_relative_to_the_file(butane, tmp_path):
    tree = {
        "system": {
            "structure": str(butane["structure"]),
            "potential": {"python": "learned:from_table", "files": {"table": "table.json"}},
        }
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path)
    assert config.system.potential.files == {"table": tmp_path / "table.json"}
    copied = tmp_path / "elsewhere"
    copied.mkdir()
    (copied / "config.yaml").write_text(dump_config(config))
    assert load_config(copied / "config.yaml").system == config.system
    changed = load_config(path, ["system.potential.files.table=other.json"])
    assert changed.system.potential.files == {"table": tmp_path / "other.json"}


def test_force_fields_do_not_need_torch(butane, force_field):
    code = "import sys; from openmm_cgflow import MolecularSystem; "
    code += f"MolecularSystem.from_files({str(butane['structure'])!r}, {force_field['forcefield']!r}); "
    code += "import openmm_cgflow.engines.choose; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


# ---------------------------------------------------------------- all replicas in one call


@pytest.mark.parametrize("name", ["one_at_a_time", "mixing"])
def test_who_takes_no_batches(butane, name):
    found = molecule(butane, value=f"learned:{name}")
    assert "one structure at a time" in found.notes[0]
    assert batched_energy(found.system.getForce(0)) is None
    wanted, _ = expected(getattr(learned, name)(), found.positions)
    assert np.isclose(energy_and_forces(found.system, found.positions)[0], wanted)


def test_one_call_a_step(butane):
    found = molecule(butane)
    with create_engine(found, [0, 1, 2, 3], settings()) as engine:
        assert "6 replicas at once" in engine.description and "one call for all" in engine.description
        learned.Springs.calls.clear()
        before = engine.n_energy_evaluations
        engine.run(np.repeat(found.positions[None], 6, axis=0), SHORT, seed=1)
    steps = SHORT.n_relax + SHORT.n_equilibration + SHORT.n_frames * SHORT.stride
    assert set(learned.Springs.calls[:-1]) == {(6, 14, 3)}
    assert learned.Springs.calls[-1] == (6 * SHORT.n_frames, 14, 3)  # the frames' own energies
    assert len(learned.Springs.calls) <= steps + 3  # OpenMM computes forces once more where positions are set
    assert engine.n_energy_evaluations - before == 6 * (steps + SHORT.n_frames)


@pytest.mark.parametrize("with_force_field", [False, True])
def test_engines_agree(butane, force_field, with_force_field):
    found = molecule(butane | force_field if with_force_field else butane)
    rng = np.random.default_rng(1)
    xyz = found.positions + 0.005 * rng.standard_normal((5, *found.positions.shape)) + rng.standard_normal((5, 1, 3))
    xyz[3] = np.nan
    results = []
    for engine_name in ("auto", "contexts"):
        with create_engine(found, [0, 1, 2, 3], settings(engine=engine_name)) as engine:
            results.append(engine.evaluate(xyz))
            frames = engine.run(xyz, SHORT, seed=1)
            assert frames.valid.tolist() == [True, True, True, False, True]
            results.append(engine.evaluate(frames.xyz[:3, 0]))
            assert np.allclose(results[-1][0], frames.energy[:3, 0], rtol=1e-9)
            assert np.allclose(results[-1][1], frames.forces[:3, 0], atol=1e-6)
    for batched, single in zip(results[0], results[2], strict=True):
        assert np.isnan(batched[3]).all() and np.isnan(single[3]).all()
        assert np.allclose(np.delete(batched, 3, 0), np.delete(single, 3, 0), rtol=1e-9, atol=1e-6)


def test_samples_the_closed_form():
    bath = HarmonicBath()
    toy = bath.toy
    toy.system.removeForce(0)
    toy.system.addForce(openmm.PythonForce(ReplicaEnergy(learned.bath())))
    starts = np.repeat(toy.positions[None], 200, axis=0)
    with create_engine(toy, bath.slow, settings(n_replicas=200)) as engine:
        assert "lattice engine" in engine.description
        frames = engine.run(starts, Schedule(300.0, 5, 150, 8, 40), seed=1)
    deviations = bath.deviations(frames, 300.0)
    assert max(deviations.values()) < 4.5, deviations
    assert bath.deviations(frames, 400.0)["covariance"] > 5


def test_single_precision_far_from_the_origin(butane):
    module = learned.all_pairs().float()

    class Cast(torch.nn.Module):
        def forward(self, positions):
            return module(positions.float())

    xyz = molecule(butane).positions
    near, far = (ReplicaEnergy(Cast()).evaluate(np.stack((xyz + shift, xyz))) for shift in (0.0, 1000.0))
    assert np.allclose(near[0], far[0], rtol=1e-6)
    assert np.allclose(near[1], far[1], atol=1e-3)


@pytest.mark.parametrize("name", ["all_pairs", "one_at_a_time"])
def test_worker_processes(butane, name):
    """Potentials come to them with the System, and their number changes nothing."""
    found = molecule(butane, value=f"learned:{name}")
    starts = np.repeat(found.positions[None], 20, axis=0)
    results = []
    for n_workers in (1, 2):
        with create_engine(found, [0, 1, 2, 3], settings(engine="contexts", n_workers=n_workers)) as engine:
            results.append(engine.run(starts, SHORT, seed=1))
    assert results[0].valid.all()
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


def test_a_run(butane, force_field, tmp_path):
    """Trained, read back, sampled: the potential is in the run's System."""
    system = butane | force_field | {"potential": {"python": "learned:all_pairs"}}
    tree = {"system": json.loads(json.dumps(system, default=str)), "partition": {"slow": "heavy"}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    model = train(load_config(path, TINY), tmp_path / "run", progress=False)
    again = load(tmp_path / "run")
    samples = again.sample(4, seed=1)
    assert np.isclose(
        energy_and_forces(model.molecular_system.system, samples.trajectory.xyz[0].astype(float))[0],
        samples.energy[0],
        atol=0.1,
    )
    log = (tmp_path / "run" / "run.log").read_text()
    assert "learned:all_pairs: evaluated by openmm.PythonForce, all replicas in one call" in log

"""The benchmark scripts: their estimators and samplers against closed forms, their commands on alanine dipeptide."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import baselines
import learned
import mdtraj
import numpy as np
import openmm
import pytest
import reference
import reference_residues
from conformers import write_run
from estimators import (
    bias_at,
    bin_centres,
    mbar,
    populations,
    rotamer_populations,
    umbrella_bias,
    wham,
)
from md import Molecule, exit_code, load, parallel_map, steps
from openmm import app, unit
from samplers import ReplicaExchange, final_bias, metadynamics, plain_md, replica_exchange
from scipy.special import erfc
from umbrella import (
    Settings,
    hold,
    lower_barriers,
    restrain,
    run_together,
    run_window,
    sample,
    spread,
    unbias,
)

from openmm_cgflow.analysis.distances import circle_histogram
from openmm_cgflow.analysis.reference import GridReference, load_frames, load_reference
from openmm_cgflow.molecule.potentials import ReplicaEnergy
from openmm_cgflow.runs.evaluate import evaluate
from openmm_cgflow.units import thermal_beta

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

ALANINE = "alanine_dipeptide/alanine_dipeptide.yaml"
TETRAPEPTIDE = "alanine_tetrapeptide/alanine_tetrapeptide.yaml"
SIGMAS = 5.0


# A density of two coupled torsions on a grid, from which frames under any bias can be drawn exactly.


def _cells(n):
    axis = bin_centres(n)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)


def _toy_energy(angles):
    """kT; no symmetry between the two torsions."""
    a, b = angles.T
    return 1.5 * np.cos(a - 0.5) + 2.5 * np.cos(2 * b + 1.0) + np.cos(b) + 0.8 * np.cos(a - b)


def _draw(energy, cells, n, rng):
    weights = np.exp(-energy)
    chosen = rng.choice(len(cells), n, p=weights / weights.sum())
    width = 2 * np.pi / np.sqrt(len(cells))
    return cells[chosen] + rng.uniform(-width / 2, width / 2, (n, 2))


def _exact(energy, cells):
    weights = np.exp(-energy)
    return populations(cells, weights)


@pytest.fixture(scope="module")
def windows():
    """Frames of 144 umbrella windows on the toy density: many repeats, centres, strength, exact free energies."""
    rng = np.random.default_rng(1)
    cells, strength, n_frames, n_repeats = _cells(180), 6.0, 40, 8
    centres = _cells(12)
    energy, bias = _toy_energy(cells), umbrella_bias(cells, centres, strength)
    frames = [_draw(energy + one, cells, n_frames * n_repeats, rng) for one in bias]
    repeats = np.array(frames).reshape(len(centres), n_repeats, n_frames, 2).swapaxes(0, 1)
    free_energy = -np.log(np.exp(-energy - bias).sum(1))
    return repeats, centres, strength, free_energy - free_energy[0]


def test_wham_finds_the_free_energies_and_populations_of_a_known_density(windows):
    repeats, centres, strength, exact = windows
    solved = [unbias(angles, centres, strength) for angles in repeats]
    found = np.array([free_energy for free_energy, _ in solved])
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    assert np.abs(found.mean(0) - exact)[1:].max() < 0.05 + SIGMAS * error.max()
    assert np.sqrt(np.mean(((found.mean(0) - exact)[1:] / error[1:]) ** 2)) < 2.5
    shares = np.array(
        [populations(angles.reshape(-1, 2), weights) for angles, (_, weights) in zip(repeats, solved, strict=True)]
    )
    error = shares.std(0, ddof=1) / np.sqrt(len(shares))
    wanted = _exact(_toy_energy(_cells(180)), _cells(180))
    assert error.max() < 0.01
    assert np.abs((shares.mean(0) - wanted) / error).max() < SIGMAS


def test_wham_is_mbar_up_to_the_width_of_its_bins(windows):
    repeats, centres, strength, _ = windows
    angles = repeats[0][:, :20]
    free_energy, weights = unbias(angles, centres, strength)
    flat = angles.reshape(-1, 2)
    exact, _ = mbar(umbrella_bias(flat, centres, strength), np.full(len(centres), 20))
    np.testing.assert_allclose(free_energy, exact, atol=0.02)
    # With every frame in a bin of its own, at its own place, nothing is left between them.
    same, probability = wham(np.ones(len(flat)), np.full(len(centres), 20), umbrella_bias(flat, centres, strength))
    np.testing.assert_allclose(same, exact, atol=1e-5)
    np.testing.assert_allclose(populations(flat, probability), populations(flat, weights), atol=2e-3)


def test_wham_says_when_windows_do_not_overlap():
    """Two windows whose frames the other one never sees: the free energy between them is anything."""
    bias = np.array([[0.0, 1e6], [1e6, 0.0]])
    with pytest.raises(ValueError, match="overlap"):
        wham(np.array([30.0, 70.0]), np.array([50, 50]), bias)


def test_mbar_weighs_hot_frames_to_the_first_state():
    """A Gaussian at four temperatures: the tail of the coldest from frames of all."""
    rng = np.random.default_rng(3)
    temperatures = np.array([1.0, 1.6, 2.5, 4.0])
    found, free = [], []
    for _ in range(16):
        x = rng.normal(0, np.sqrt(temperatures)[:, None], (4, 500)).ravel()
        free_energy, weights = mbar(0.5 * x**2 / temperatures[:, None], np.full(4, 500))
        assert weights.sum() == pytest.approx(1.0)
        found.append(weights[np.abs(x) > 2.5].sum())
        free.append(free_energy)
    error = np.std(found, ddof=1) / 4
    wanted = erfc(2.5 / np.sqrt(2))
    assert error < 0.05 * wanted
    assert abs(np.mean(found) - wanted) < SIGMAS * error
    error = np.std(free, axis=0, ddof=1)[1:] / 4
    assert (np.abs(np.mean(free, axis=0)[1:] + 0.5 * np.log(temperatures[1:])) < SIGMAS * error).all()


def test_bias_is_interpolated_across_the_border():
    n = 100
    axis = -np.pi + 2 * np.pi * np.arange(n) / n

    def smooth(a, b):
        return 3 * np.cos(a - 0.3) * np.sin(2 * b) + np.cos(3 * a + b)

    table = smooth(*np.meshgrid(axis, axis, indexing="ij"))
    angles = np.random.default_rng(4).uniform(-np.pi, np.pi, (500, 2))
    angles[:3] = [[np.pi, -np.pi], [np.pi - 1e-3, 0.0], [0.0, -np.pi + 1e-3]]
    np.testing.assert_allclose(bias_at(table, angles), smooth(*angles.T), atol=2e-5)


def test_frames_under_a_tabulated_bias_are_reweighted():
    """What metadynamics ends with: frames of U + V and the table of V."""
    rng = np.random.default_rng(5)
    n = 100
    axis = -np.pi + 2 * np.pi * np.arange(n) / n
    nodes = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    table = -0.8 * _toy_energy(nodes).reshape(n, n)
    cells = _cells(180)
    found = []
    for _ in range(12):
        angles = _draw(_toy_energy(cells) + bias_at(table, cells), cells, 4000, rng)
        found.append(populations(angles, np.exp(bias_at(table, angles))))
    error = np.std(found, axis=0, ddof=1) / np.sqrt(12)
    assert error.max() < 0.01
    assert np.abs((np.mean(found, axis=0) - _exact(_toy_energy(cells), cells)) / error).max() < SIGMAS


def test_populations_of_frames():
    degrees = np.array([[-60, -40], [-130, 150], [-70, 140], [60, 40], [-150, -130], [-60, 49]])
    weights = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    np.testing.assert_allclose(populations(np.radians(degrees), weights), np.array([7.0, 7.0, 3.0, 4.0]) / 21)
    chi1 = np.radians([180.0, -175.0, 60.0, -60.0])
    np.testing.assert_allclose(rotamer_populations(chi1, np.array([1.0, 2.0, 3.0, 4.0])), [0.3, 0.3, 0.4])


# A chain of five atoms whose two torsions are independent of everything else: its density is known, and OpenMM runs it.

TORSIONS = ((0, 1, 2, 3), (1, 2, 3, 4))
# Order, phase, kJ/mol: wells of unequal depth behind barriers of a few kT.
TERMS = (((1, 0.6, 1.5), (2, 0.4, 4.0)), ((1, -0.8, 1.0), (3, 0.5, 3.0)))


@pytest.fixture(scope="module")
def chain():
    topology = app.Topology()
    residue = topology.addResidue("CHN", topology.addChain())
    atoms = [topology.addAtom(f"C{i}", app.element.carbon, residue) for i in range(5)]
    system = openmm.System()
    bonds, angles, torsions = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
    for i in range(5):
        system.addParticle(12.0)
        if i:
            topology.addBond(atoms[i - 1], atoms[i])
            bonds.addBond(i - 1, i, 0.15, 1e5)
        if i > 1:
            angles.addAngle(i - 2, i - 1, i, 1.9, 300.0)
    for four, terms in zip(TORSIONS, TERMS, strict=True):
        for order, phase, strength in terms:
            torsions.addTorsion(*four, order, phase, strength)
    for force in (bonds, angles, torsions):
        system.addForce(force)
    positions = np.array([[0.0, 0.0, 0.0], [0.15, 0.0, 0.0], [0.2, 0.14, 0.0], [0.35, 0.14, 0.03], [0.4, 0.27, 0.05]])
    return Molecule(
        openmm.XmlSerializer.serialize(system),
        positions,
        mdtraj.Topology.from_openmm(topology),
        300.0,
        dict(zip(("first", "second"), TORSIONS, strict=True)),
    )


def _chain_energy(angles):
    """kT."""
    total = np.zeros(len(angles))
    for column, terms in zip(angles.T, TERMS, strict=True):
        for order, phase, strength in terms:
            total += strength * (1 + np.cos(order * column - phase))
    return total * thermal_beta(300.0)


def _assert_right(found, largest_error):
    """Populations (n_seeds, 4) agree with those of the chain."""
    cells = _cells(360)
    error = np.std(found, axis=0, ddof=1) / np.sqrt(len(found))
    difference = np.mean(found, axis=0) - _exact(_chain_energy(cells), cells)
    assert error.max() < largest_error
    # Of a few seeds the smallest of four errors is small by chance.
    assert np.abs(difference / np.maximum(error, error.max() / 4)).max() < SIGMAS, (difference, error)


def _ladder(molecule, n_evaluations, seed):
    return replica_exchange(molecule, n_evaluations, seed, 4, 900.0)


def _lowered(molecule, n_evaluations, seed):
    torsions = list(molecule.torsions.values())
    chains = ReplicaExchange(molecule, seed, 4, 600.0, lowered=torsions, height=15.0)
    chains.run((n_evaluations - chains.n_settle) // chains.n_each)
    return chains.sampled()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "n_evaluations"),
    [(plain_md, 500_000), (_ladder, 300_000), (_lowered, 300_000), (metadynamics, 240_000)],
)
def test_samplers_find_the_density_of_a_chain(chain, method, n_evaluations):
    found = []
    for seed in range(6):
        sampled = method(chain, n_evaluations, seed)
        assert 0.97 * n_evaluations < sampled.n_evaluations <= n_evaluations
        assert sampled.weights.sum() == pytest.approx(1.0)
        found.append(populations(chain.angles(sampled.xyz), sampled.weights))
    _assert_right(found, 0.04)


def test_replica_exchange_marks_the_frames_at_the_target(chain):
    """They hold half of the frames of two replicas, and alone have the mean energy of 300 K."""
    sampled = replica_exchange(chain, 200_000, 7, 2, 900.0)
    assert sampled.at_target.sum() == len(sampled.xyz) / 2
    assert sampled.at_target[0]
    assert not sampled.at_target[1]
    angles = chain.angles(sampled.xyz)
    cells = _cells(360)
    energy = _chain_energy(cells)
    for mask, scale in ((sampled.at_target, 1.0), (~sampled.at_target, 1 / 3)):
        weights = np.exp(-scale * energy)
        at_frames = _chain_energy(angles[mask])
        blocks = at_frames[: len(at_frames) // 16 * 16].reshape(16, -1).mean(1)
        assert abs(blocks.mean() - weights @ energy / weights.sum()) < SIGMAS * blocks.std(ddof=1) / 4


def test_replica_exchange_in_pieces_is_the_same_as_in_one(chain):
    """Also where others draw from Python's own generator in between."""
    whole, pieces = (ReplicaExchange(chain, 5, 3, 600.0, 20) for _ in range(2))
    whole.run(12)
    for n_exchanges in (5, 7):
        random.seed(n_exchanges)
        pieces.run(n_exchanges)
    expected, found = (one.sampled() for one in (whole, pieces))
    np.testing.assert_array_equal(found.xyz, expected.xyz)
    np.testing.assert_array_equal(found.weights, expected.weights)
    assert found.n_evaluations == expected.n_evaluations == 3 * (5000 + 12 * 21)


def test_replica_exchange_leaves_out_what_comes_first(chain):
    chains = ReplicaExchange(chain, 5, 3, 600.0, 20)
    chains.run(12)
    everything, late = chains.sampled(), chains.sampled(0.3)
    assert len(late.xyz) == 3 * 9
    np.testing.assert_array_equal(late.xyz, everything.xyz[9:])
    assert late.weights.sum() == pytest.approx(1.0)
    assert late.n_evaluations == everything.n_evaluations
    assert late.at_target.tolist() == [True, False, False] * 9


@pytest.mark.slow
def test_samplers_repeat_themselves(chain):
    for method in (plain_md, _ladder, metadynamics):
        first, again, other = (method(chain, 60_000, seed) for seed in (3, 3, 4))
        np.testing.assert_array_equal(first.xyz, again.xyz)
        np.testing.assert_array_equal(first.weights, again.weights)
        assert not np.array_equal(first.xyz[-1], other.xyz[-1])


def _energies(context, frames, groups):
    energies = []
    for xyz in frames:
        context.setPositions(xyz)
        state = context.getState(energy=True, groups=groups)
        energies.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
    return np.array(energies)


def test_final_bias_is_the_energy_that_the_frames_felt(chain):
    variables = []
    for atoms in TORSIONS:
        force = openmm.CustomTorsionForce("theta")
        force.addTorsion(*atoms, [])
        variables.append(app.BiasVariable(force, -np.pi, np.pi, 0.5, True, 201))
    system = chain.system()
    meta = app.Metadynamics(system, variables, 300.0, 5.0, 3.0, 100)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.002)
    integrator.setRandomNumberSeed(1)
    platform = openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(chain.topology.to_openmm(), system, integrator, platform)
    simulation.context.setPositions(chain.positions)
    meta.step(simulation, 5000)
    frames = plain_md(chain, 10_000, 1).xyz
    felt = _energies(simulation.context, frames, {system.getForce(system.getNumForces() - 1).getForceGroup()})
    assert np.ptp(felt) > 5
    np.testing.assert_allclose(bias_at(final_bias(meta), chain.angles(frames)), felt, atol=0.02)


def with_chi1(chain):
    """The same chain with its second torsion named a third time, as the one whose barriers are lowered."""
    return replace(chain, torsions=chain.torsions | {"chi1": TORSIONS[1]})


def test_windows_feel_the_bias_that_is_taken_away(chain):
    settings = Settings(chain, spacing=30.0, force_constant=20.0)
    system = chain.system()
    for force in system.getForces():
        force.setForceGroup(1)
    restrain(system, TORSIONS, settings.force_constant)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    frames = plain_md(chain, 10_000, 1).xyz
    for cell in ((0, 0), (2, 9), (9, 2)):
        hold(context, settings.centre(cell))
        wanted = settings.bias([cell], chain.angles(frames))[0] / thermal_beta(300.0)
        np.testing.assert_allclose(_energies(context, frames, {0}), wanted, atol=1e-3)


def test_barriers_are_lowered_by_the_bias_that_is_taken_away(chain):
    settings = Settings(with_chi1(chain), flatten=7.0)
    system = chain.system()
    for force in system.getForces():
        force.setForceGroup(1)
    lower_barriers(system, TORSIONS[1:], settings.flatten)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    frames = plain_md(chain, 10_000, 1).xyz
    felt = _energies(context, frames, {0})
    np.testing.assert_allclose(felt, settings.flattening(chain.angles(frames)) / thermal_beta(300.0), atol=1e-3)
    assert -7.0 <= felt.min() < -3.5 < felt.max() <= 0.0  # whole barriers, and nothing at the staggered states
    np.testing.assert_allclose(settings.flattening(np.radians([[0, 0, 60], [0, 0, 180], [0, 0, -60]])), 0, atol=1e-9)


@pytest.fixture(scope="module")
def learned_chain(chain):
    """The same chain as a torch module that takes many of them at once."""
    system = openmm.System()
    for _ in range(5):
        system.addParticle(12.0)
    system.addForce(openmm.PythonForce(ReplicaEnergy(learned.ReplicaContext(list(TERMS)))))
    return replace(chain, system_xml=openmm.XmlSerializer.serialize(system))


def test_the_learned_chain_is_the_same(chain, learned_chain):
    assert learned_chain.takes_all and not chain.takes_all
    frames = plain_md(chain, 10_000, 1).xyz
    reference_platform = openmm.Platform.getPlatformByName("Reference")
    energies = [
        _energies(openmm.Context(one.system(), openmm.VerletIntegrator(0.001), reference_platform), frames, -1)
        for one in (chain, learned_chain)
    ]
    np.testing.assert_allclose(*energies, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("together", "flatten"), [(False, 0.0), (True, 0.0), (False, 5.0), (True, 5.0)])
def test_umbrella_sampling_finds_the_density_of_a_chain(chain, learned_chain, together, flatten):
    molecule = learned_chain if together else chain
    settings = Settings(with_chi1(molecule) if flatten else molecule, 30.0, 20.0, flatten=flatten)
    with parallel_map(1) as run_map:
        run_all = run_together if together else partial(run_map, run_window)
        passes = [reference.by_umbrella(settings, 1.0, 1.0, seed, run_all) for seed in range(4)]
    assert passes[0].n_evaluations == 144 * 1000
    _assert_right([populations(one.angles[:, :2], one.weights) for one in passes], 0.03)
    for one in passes:
        np.testing.assert_allclose(chain.angles(one.xyz), one.angles[:, :2], atol=1e-3)


@pytest.mark.slow
def test_windows_spread_to_where_the_free_energy_is_low_and_no_further(chain):
    settings = Settings(chain, spacing=30.0, force_constant=20.0, cutoff=4.0)
    with parallel_map(1) as run_all:
        kept, n_steps = spread(settings, steps(2.0), 1, partial(run_all, run_window))
    cells = _cells(360)
    every = [(i, j) for i in range(12) for j in range(12)]
    free_energy = -np.log(np.exp(-_chain_energy(cells) - settings.bias(every, cells)).sum(1))
    exact = dict(zip(every, free_energy - free_energy.min(), strict=True))
    assert {cell for cell in every if exact[cell] < 2.8} <= set(kept) <= {cell for cell in every if exact[cell] < 5.2}
    assert len(kept) < 144
    assert len(kept) * 1000 < n_steps <= 144 * 1000
    # Each equilibrated where it belongs: within some thermal widths (0.35 rad) of its centre.
    for cell, window in kept.items():
        away = np.angle(np.exp(1j * (chain.angles(window.xyz[None])[0] - settings.centre(cell))))
        assert np.abs(away).max() < 1.8


@pytest.mark.slow
def test_umbrella_sampling_is_the_same_with_any_number_of_workers(chain):
    settings = Settings(chain, spacing=60.0, force_constant=10.0)
    results = []
    for n_workers in (1, 2):
        with parallel_map(n_workers) as run_all:
            windows, _ = spread(settings, 200, 5, partial(run_all, run_window))
            results.append(sample(settings, windows, 200, 5, partial(run_all, run_window))[0])
    assert list(results[0]) == list(results[1])
    for cell, window in results[0].items():
        np.testing.assert_array_equal(window.angles, results[1][cell].angles)
        np.testing.assert_array_equal(window.xyz, results[1][cell].xyz)


# The commands.


def _run(monkeypatch, script, *words):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
    return exit_code(script.main)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="module")
def grid(systems, folder):
    """A reference of alanine dipeptide, too short to be right."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        words = ["--spacing", "45", "--force-constant", "8", "--ps", "0.2", "--equilibration", "0.2"]
        assert _run(monkeypatch, reference, systems / ALANINE, "-o", folder / "new" / "ala2.npz", *words) == 0
    return folder / "new" / "ala2.npz"


SCRIPTS = ["reference.py", "reference_residues.py", "baselines.py", "mirror.py", "synthetic.py", "schedules.py"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_a_script(name):
    environment = os.environ | {"COLUMNS": "120"}
    command = [sys.executable, str(BENCHMARKS / name), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert f"python benchmarks/{name} " in done.stdout
    assert done.stderr == ""


def test_reference_writes_a_map_that_the_package_reads(grid, systems):
    structure = mdtraj.load(str(systems / "alanine_dipeptide" / "alanine_dipeptide.pdb"))
    loaded = load_reference(grid, structure)
    assert isinstance(loaded, GridReference)
    with np.load(grid) as arrays:
        assert sorted(arrays) == ["P", "P_passes", "centers", "n_evaluations", "temperature", "torsions"]
        assert arrays["P"].shape == (100, 100)
        np.testing.assert_allclose(arrays["P_passes"].sum((1, 2)), 1.0)
        np.testing.assert_allclose(arrays["P_passes"].mean(0), arrays["P"])
        assert not np.array_equal(*arrays["P_passes"])
        assert arrays["n_evaluations"] > 64 * 2 * 150
        assert arrays["temperature"] == 300.0
        assert arrays["torsions"].tolist() == ["phi", "psi"]
    # φ is the first index: there is next to nothing at φ = 120°, and much at ψ = 120°.
    assert loaded.probability[70:95].sum() < 0.02 < loaded.probability[:, 70:95].sum()


def test_reference_compares(grid, systems, folder, monkeypatch, capsys):
    words = ["--spacing", "45", "--force-constant", "8", "--ps", "0.2", "--equilibration", "0.2", "--compare", grid]
    assert _run(monkeypatch, reference, systems / ALANINE, "-o", folder / "same.npz", *words) == 0
    printed = capsys.readouterr().out
    rows = {line[:12].strip(): line[12:].split() for line in printed.splitlines()}
    names = ["pass 1", "pass 2", "mean", "+-", "+- in kT", "compared", "off by, kT"]
    assert [name for name in rows if name in names] == names
    passes = np.array([rows["pass 1"], rows["pass 2"]], dtype=float)
    np.testing.assert_allclose(passes.sum(1), 1.0, atol=2e-4)
    np.testing.assert_allclose(np.array(rows["+-"], dtype=float), np.abs(passes[0] - passes[1]) / 2, atol=2e-4)
    # The same seed gives the same map.
    assert np.nanmax(np.abs(np.array(rows["off by, kT"], dtype=float))) == 0
    assert "KL(compared || this) 0.00000 and back 0.00000 on 36 x 36 bins" in printed


def test_reference_by_replica_exchange_has_the_side_chain(systems, folder, monkeypatch, capsys):
    path = systems / "valine_dipeptide" / "valine_dipeptide.yaml"
    words = ["--method", "remd", "--ps", "13", "--replicas", "2", "--hottest", "330"]
    assert _run(monkeypatch, reference, path, "-o", folder / "valine.npz", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6].split() == ["trans", "gauche+", "gauche-"]
    with np.load(folder / "valine.npz") as arrays:
        np.testing.assert_allclose(arrays["chi1_passes"].sum(1), 1.0)
        thirds = arrays["chi1_passes"].reshape(2, 6, 6).sum(2)
        trans, plus, minus = thirds[:, 0] + thirds[:, 5], thirds[:, 3] + thirds[:, 4], thirds[:, 1] + thirds[:, 2]
        printed = np.array([line[12:].split() for line in lines[-5:-3]], dtype=float)
        np.testing.assert_allclose(printed, np.column_stack([trans, plus, minus]), atol=1e-4)


@pytest.fixture(scope="module")
def residues(systems, folder):
    """A reference of three residues, too short to be right."""
    path = systems / TETRAPEPTIDE
    words = ["--replicas", "2", "--hottest", "330", "--ps", "2", "--pieces", "2", "--exchange", "25"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert _run(monkeypatch, reference_residues, path, "-o", folder / "new" / "ala3", *words) == 0
    return folder / "new" / "ala3"


def test_reference_of_residues_holds_populations_and_maps_of_each(residues):
    with np.load(residues / "residues.npz") as arrays:
        assert arrays["residues"].tolist() == ["ALA2", "ALA3", "ALA4"]
        assert arrays["basins"].tolist() == ["alphaR", "beta", "PPII", "phi > 0"]
        assert arrays["maps"].shape == (2, 3, 36, 36)
        np.testing.assert_allclose(arrays["maps"].sum((2, 3)), 1.0)
        assert arrays["populations"].shape == (2, 3, 4)
        np.testing.assert_allclose(arrays["populations"].sum(2), 1.0)
        # φ is the first index, and its last half is positive.
        np.testing.assert_allclose(arrays["maps"][:, :, 18:].sum((2, 3)), arrays["populations"][:, :, 3], atol=1e-6)
        assert arrays["n_evaluations"].tolist() == [2 * (5000 + 2 * 40 * 27)] * 2
        assert arrays["temperature"] == 300.0
        found = arrays["populations"]
    lines = (residues / "table.txt").read_text().splitlines()
    assert lines[0] == "2.86e+04 energy evaluations at 300 K"
    for k, name in enumerate(("ALA2", "ALA3", "ALA4")):
        rows = [line[12:].split() for line in lines[lines.index(name) + 2 :][:4]]
        expected = [*found[:, k], found[:, k].mean(0), np.abs(found[0, k] - found[1, k]) / 2]
        np.testing.assert_allclose(np.array(rows, dtype=float), expected, atol=6e-5)


def test_a_run_is_evaluated_against_frames_of_several_residues(residues, systems):
    structure = mdtraj.load(str((systems / TETRAPEPTIDE).with_suffix(".pdb")))
    weights = np.load(residues / "weights.npy")
    frames = load_frames(residues / "frames.dcd", structure)
    assert frames.n_frames == len(weights) == 2 * 2 * 72  # of two passes and two replicas, without the first tenth
    np.testing.assert_allclose(weights.reshape(2, -1).sum(1), 1.0)
    run = write_run(residues.parent / "run", structure, structure.topology.select("backbone").tolist(), frames[::2])
    found = evaluate(run.path, residues / "frames.dcd", weights=residues / "weights.npy")
    with np.load(residues / "residues.npz") as arrays:
        for name, populations_of, each in zip(
            arrays["residues"], arrays["populations"].mean(0), arrays["maps"].mean(0), strict=True
        ):
            basins = found.basins[name]
            assert list(basins) == arrays["basins"].tolist()
            np.testing.assert_allclose([one["reference"].population for one in basins.values()], populations_of)
            np.testing.assert_allclose(found.maps[name].probabilities["reference"], each, atol=1e-6)
            assert all(basin["samples"].population_error is not None for basin in basins.values())
            assert f" {name} " in found.table()


def test_side_chain_torsion_is_chi1(systems):
    molecule = load(systems / "valine_dipeptide" / "valine_dipeptide.yaml", ("phi", "psi"))
    names = {name: [molecule.topology.atom(i).name for i in atoms] for name, atoms in molecule.torsions.items()}
    assert names == {"phi": ["C", "N", "CA", "C"], "psi": ["N", "CA", "C", "N"], "chi1": ["N", "CA", "CB", "CG1"]}


def test_heavy_hydrogens_only(systems):
    system = load(systems / ALANINE, ("phi", "psi")).system()
    masses = sorted(system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(22))
    assert masses[:12] == [4.0] * 12
    assert 12.0 < masses[12] < masses[-1] < 16.0


@pytest.mark.slow
def test_baselines_print_a_table_and_save_frames(grid, systems, folder, monkeypatch, capsys):
    words = ["--evaluations", "4e4", "--reference", grid, "--save", folder / "frames", "-o", folder / "table.txt"]
    assert _run(monkeypatch, baselines, systems / ALANINE, *words) == 0
    printed = capsys.readouterr().out
    assert (folder / "table.txt").read_text() == printed
    lines = [line.split() for line in printed.splitlines()]
    assert [line[0] for line in lines] == ["method", "reference", "md", "remd", "metad", "md,", "remd,", "metad,"]
    structure = mdtraj.load(str(systems / "alanine_dipeptide" / "alanine_dipeptide.pdb"))
    known = load_reference(grid, structure).populations()
    for row in lines[2:5]:
        assert 3.8e4 < float(row[2]) <= 4e4
        shares = np.array(row[3:7], dtype=float)
        assert shares.sum() == pytest.approx(1.0, abs=2e-4)
        seen = (shares > 0.01) & (known > 0.01)
        assert seen.sum() >= 2
        differences = np.array(row[7:11], dtype=float)[seen]
        np.testing.assert_allclose(differences, -np.log(shares[seen] / known[seen]), atol=6e-3)
        assert float(row[11]) > 0
        assert float(row[12]) > 0
    assert sorted(path.name for path in (folder / "frames").iterdir()) == [
        "md_seed1.dcd",
        "remd_seed1.dcd",
        "topology.pdb",
    ]
    frames = load_frames(folder / "frames" / "md_seed1.dcd", structure, topology=folder / "frames" / "topology.pdb")
    assert len(frames) == 700
    angles = np.column_stack([mdtraj.compute_phi(frames)[1], mdtraj.compute_psi(frames)[1]])
    shares = populations(angles, np.ones(len(frames)))
    np.testing.assert_allclose(shares, np.array(lines[2][3:7], dtype=float), atol=1e-4)


def test_distance_of_a_run_is_that_of_its_map():
    """A run that holds exactly the reference's map is at distance zero and has no error; a lost basin is infinite."""
    cells = _cells(36)
    known = circle_histogram(cells, np.exp(-_toy_energy(cells)))
    known = GridReference(Path("toy.npz"), known, bin_centres(36))
    result = baselines.Result("md", 1, 10, known.populations(), known.probability, (known.probability,) * 2)
    assert [float(value) for value in baselines.line(result, known).split()[7:]] == [0.0] * 6
    # A run without the basin at φ > 0.
    right_lost = known.probability.copy()
    right_lost[18:] = 0
    right_lost /= right_lost.sum()
    shares = np.append(known.populations()[:3] / known.populations()[:3].sum(), 0.0)
    result = baselines.Result("md", 1, 10, shares, right_lost, (right_lost,) * 2)
    *left, right, distance, floor = map(float, baselines.line(result, known).split()[7:])
    mass = known.populations()[:3].sum()
    np.testing.assert_allclose(left, np.log(mass), atol=1e-3)
    assert right == np.inf
    assert distance > (1 - mass) * np.log(10)
    assert floor == 0


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (reference, ["-o", "x.npz", "--spacing", "50"], "--spacing 50: expected a fraction of 360 degrees"),
        (reference, ["-o", "x.npz", "--spacing", "nan"], "--spacing nan: expected a fraction of 360 degrees"),
        (reference, ["-o", "x.npz", "--force-constant", "0"], "--force-constant 0: expected a positive number"),
        (reference, ["-o", "x.npz", "--force-constant", "300"], "neighbouring windows are 2.9 thermal widths apart"),
        (reference, ["-o", "x.npz", "--passes", "1"], "--passes 1: at least 2"),
        (reference, ["-o", "x.npz", "--ps", "0.1"], "--ps and --equilibration: expected at least 0.2 ps"),
        (reference, ["-o", "x.npz", "--ps", "nan"], "--ps and --equilibration: expected at least 0.2 ps"),
        (reference, ["-o", "x.npz", "--workers", "0"], "--workers 0: expected at least 1"),
        (reference, ["-o", "x.npz", "--torsions", "phi", "phi"], "--torsions phi phi: expected different ones"),
        (reference, ["-o", "x.npz", "--torsions", "phi", "xi"], "--torsions xi: unknown; known are phi, psi, chi1"),
        (reference, ["-o", "x.npz", "--torsions", "phi", "chi1"], "the molecule has 0 torsions chi1, expected one"),
        (reference, ["-o", "x.npz", "--platform", "Abacus"], "--platform Abacus: not here; available: Reference"),
        (reference, ["-o", "x.npz", "--compare", "no.npz"], "no.npz: no such file"),
        (reference, ["-o", "x.npz", "--method", "remd", "--ps", "1"], "replica exchange: the energy evaluations end"),
        (reference, ["-o", "x.npz", "--method", "remd", "--hottest", "300"], "the highest above that"),
        (reference_residues, ["-o", "x", "--passes", "1"], "--passes 1: at least 2"),
        (reference_residues, ["-o", "x", "--pieces", "0"], "--pieces 0 --exchange 250: expected at least 1 each"),
        (reference_residues, ["-o", "x", "--ps", "0.9"], "--ps 0.9: expected at least two exchanges"),
        (reference_residues, ["-o", "x", "--hottest", "300"], "the highest above that"),
        (reference_residues, ["-o", "x", "--lower-phi", "-1"], "--lower-phi -1: expected a number of kJ/mol"),
        (baselines, ["--evaluations", "100"], "molecular dynamics: the energy evaluations end before its first frame"),
        (baselines, ["--evaluations", "inf"], "--evaluations inf: expected a positive number"),
        (baselines, ["--evaluations", "1e5", "--reference", "no.npz"], "no.npz: no such file"),
    ],
)
def test_what_the_user_can_mend(script, words, message, systems, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert _run(monkeypatch, script, systems / ALANINE, *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []

"""`openmm-cgflow evaluate`: numbers against what was put into the frames, and one clear message for what is wrong."""

import json
import re
import shutil

import mdtraj
import numpy as np
import pytest
import torch
from conformers import CENTRES, alanine_frames, atoms_of, basin_frames, repeated, turned, write_run, write_samples
from molecules import ALANINE, BUTANE, frame
from settings import TINY_WITH_FRAMES

from openmm_cgflow import load_config, train
from openmm_cgflow.analysis.observables import measure, radius_of_gyration
from openmm_cgflow.analysis.states import peptide_bonds
from openmm_cgflow.cli import main
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.trajectory import read_colvar
from openmm_cgflow.networks.weights import relative_ess
from openmm_cgflow.runs.evaluate import evaluate
from openmm_cgflow.units import thermal_beta

TRUTH = {"alphaR": 0.40, "beta": 0.32, "PPII": 0.25, "phi > 0": 0.03}
FLOW = {"alphaR": 0.35, "beta": 0.35, "PPII": 0.24, "phi > 0": 0.06}
N = 5000


@pytest.fixture(scope="module")
def alanine():
    return frame(ALANINE)


@pytest.fixture(scope="module")
def slow(alanine):
    return sorted(atoms_of(alanine.topology, "ACE1-CH3", "ACE1-C", "ALA2-N", "ALA2-CA", "ALA2-C", "NME3-N", "NME3-C"))


def draw(structure, shares, n, seed):
    """Frames spread by 10° around the basins' centres, drawn with these shares, and the basin of each."""
    rng = np.random.default_rng(seed)
    basin = rng.choice(len(shares), n, p=list(shares.values()))
    angles = np.radians(np.array([CENTRES[name] for name in shares])[basin] + rng.normal(0, 8, (n, 2)))
    return alanine_frames(structure, angles[:, 0], angles[:, 1]), basin


@pytest.fixture(scope="module")
def run(alanine, slow, tmp_path_factory):
    """A run whose samples have the shares of FLOW, and weights that turn them into TRUTH. Not to be changed."""
    samples, basin = draw(alanine, FLOW, N, 1)
    ratios = np.array([TRUTH[name] / FLOW[name] for name in FLOW])
    columns = {"log_weight": np.log(ratios[basin]) + 7.0}
    return write_run(tmp_path_factory.mktemp("runs") / "ala2", alanine, slow, samples, columns)


@pytest.fixture(scope="module")
def md(alanine, run):
    """A reference trajectory with the shares of TRUTH."""
    path = run.path.parent / "md.dcd"
    draw(alanine, TRUTH, 20_000, 2)[0].save(str(path))
    return path


@pytest.fixture(scope="module")
def grid(run):
    """The same as a grid, from the density that the frames are drawn from."""
    edges = np.linspace(-180, 180, 101)
    centres = (edges[1:] + edges[:-1]) / 2

    def normal(mean):
        away = (centres - mean + 180) % 360 - 180
        density = np.exp(-((away / 8) ** 2) / 2)
        return density / density.sum()

    P = sum(TRUTH[name] * np.outer(normal(phi), normal(psi)) for name, (phi, psi) in CENTRES.items())
    path = run.path.parent / "grid.npz"
    np.savez(path, P=P, centers=np.radians(centres))
    return path


@pytest.fixture(scope="module")
def against_md(run, md):
    return evaluate(run.path, md, output=run.path.parent / "md")


@pytest.fixture(scope="module")
def against_grid(run, grid):
    return evaluate(run.path, grid, output=run.path.parent / "grid")


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["samples", "weighted"])
def test_populations_and_their_errors(against_grid, key):
    shares = FLOW if key == "samples" else TRUTH
    ratios = [TRUTH[name] / FLOW[name] for name in FLOW]
    for k, (name, share) in enumerate(shares.items()):
        basin = against_grid.basins["ALA2"][name][key]
        # The variance of a self-normalised average of weights w over n samples: E[w^2 (1[k] - p)^2] / n.
        weights = ratios if key == "weighted" else [1.0] * 4
        variance = sum(
            FLOW[other] * weights[m] ** 2 * ((m == k) - share) ** 2 for m, other in enumerate(FLOW)
        ) / N  # fmt: skip
        assert abs(basin.population_error / np.sqrt(variance) - 1) < 4 / np.sqrt(2 * 200)
        assert abs(basin.population - share) < 4 * np.sqrt(variance)


def test_free_energies_and_differences(against_grid, against_md):
    beta = thermal_beta(300.0)
    for name in TRUTH:
        found = against_grid.basins["ALA2"][name]
        for key, basin in found.items():
            exact = -np.log(basin.population / found_population(against_grid, key))
            assert basin.free_energy_kT == pytest.approx(exact)
            assert basin.free_energy_kJ_per_mol == pytest.approx(exact / beta)
        reference = found["reference"]
        assert reference.free_energy_kT == pytest.approx(-np.log(TRUTH[name] / TRUTH["alphaR"]), abs=0.02)
        assert reference.free_energy_error_kT is reference.population_error is reference.difference_kT is None
        samples = found["samples"]
        assert samples.difference_kT == pytest.approx(samples.free_energy_kT - reference.free_energy_kT)
        assert samples.difference_error_kT == samples.free_energy_error_kT
        if name != "alphaR":
            # The logarithm of the ratio of two counts.
            expected = np.sqrt(1 / (N * FLOW[name]) + 1 / (N * FLOW["alphaR"]))
            assert abs(samples.free_energy_error_kT / expected - 1) < 4 / np.sqrt(2 * 200)
            assert abs(found["weighted"].difference_kT) < 4 * found["weighted"].difference_error_kT
        noisy = against_md.basins["ALA2"][name]
        combined = np.hypot(noisy["samples"].free_energy_error_kT, noisy["reference"].free_energy_error_kT)
        assert noisy["samples"].difference_error_kT == pytest.approx(combined)
    lowered = against_grid.basins["ALA2"]["phi > 0"]["samples"]
    exact = -np.log(FLOW["phi > 0"] / FLOW["alphaR"]) + np.log(TRUTH["phi > 0"] / TRUTH["alphaR"])
    assert abs(lowered.difference_kT - exact) < 4 * lowered.difference_error_kT
    assert lowered.difference_kT < -5 * lowered.difference_error_kT


def found_population(evaluation, key):
    return evaluation.basins["ALA2"]["alphaR"][key].population


def test_weights_lead_to_the_noise_floor(against_grid):
    density = against_grid.maps["ALA2"]
    for name in ("kl", "js", "tv"):
        weighted, floor = (getattr(d["weighted"], name) for d in (density.distances, density.noise_floor))
        unweighted, its_floor = (getattr(d["samples"], name) for d in (density.distances, density.noise_floor))
        assert abs(weighted / floor - 1) < 0.3
        assert unweighted - its_floor > 3 * abs(weighted - floor)
    # What the shares alone differ by, above the floor.
    exact = sum(TRUTH[name] * np.log(TRUTH[name] / FLOW[name]) for name in TRUTH)
    above = density.distances["samples"].kl - density.noise_floor["samples"].kl
    assert abs(above / exact - 1) < 0.4


def test_effective_sample_size(against_grid, run):
    log_weight = read_colvar(run.colvar)["log_weight"]
    assert against_grid.samples["relative_ess"] == pytest.approx(relative_ess(torch.tensor(log_weight)))
    exact = 1 / sum(TRUTH[name] ** 2 / FLOW[name] for name in TRUTH)
    assert against_grid.samples["relative_ess"] == pytest.approx(exact, abs=0.02)


def test_a_trajectory_is_no_distance_from_itself(run, tmp_path):
    found = evaluate(run.path, run.samples, output=tmp_path)
    density = found.maps["ALA2"]
    assert density.distances["samples"].kl == density.distances["samples"].tv == 0.0
    assert density.distances["weighted"].tv > 0.02
    for size in found.sizes.values():
        assert max(size.ks["samples"], size.wasserstein_nm["samples"]) < 1e-15
        assert size.ks["weighted"] > 0
        assert 0 < size.ks["halves"] < 1.95 / np.sqrt(N / 4)  # Kolmogorov's distribution, p = 0.001
    assert {state.met_by for state in found.states.values()} == {"both"}


def test_sizes(against_md, run, alanine, slow):
    samples = mdtraj.load(str(run.samples), top=alanine)
    masses = np.array([atom.element.mass for atom in alanine.topology.atoms])
    centre = (samples.xyz * masses[:, None]).sum(axis=1) / masses.sum()
    rg = np.sqrt((masses * ((samples.xyz - centre[:, None]) ** 2).sum(axis=2)).sum(axis=1) / masses.sum())
    assert against_md.sizes["Rg"].mean_nm["samples"] == pytest.approx(rg.mean(), rel=1e-5)
    assert against_md.sizes["Rg"].std_nm["samples"] == pytest.approx(rg.std(), rel=1e-3)
    assert np.allclose(radius_of_gyration(samples), rg, rtol=1e-5)
    # The RMSD of frames that are moved as a whole is zero, and that of the slow atoms alone.
    moved = repeated(alanine, 2)
    moved.xyz[:, :, :] += 3.0
    moved.xyz[1, atoms_of(alanine.topology, "ALA2-HA")[0]] += 0.2
    assert np.allclose(measure(moved, alanine, slow).sizes["RMSD"], 0, atol=1e-3)
    for name, size in against_md.sizes.items():
        assert size.ks["weighted"] < size.ks["samples"], name
        assert size.wasserstein_nm["weighted"] < size.wasserstein_nm["samples"], name
        centres = (size.edges_nm[1:] + size.edges_nm[:-1]) / 2
        shift = centres @ (size.probabilities["weighted"] - size.probabilities["samples"])
        assert shift == pytest.approx(size.mean_nm["weighted"] - size.mean_nm["samples"], rel=0.2)
        assert np.isclose(size.probabilities["reference"].sum(), 1)
        assert len(size.edges_nm) == len(size.probabilities["samples"]) + 1


def test_weights_of_the_reference(run, alanine, tmp_path):
    frames, basin = draw(alanine, FLOW, 20_000, 3)
    frames.save(str(tmp_path / "md.dcd"))
    np.savetxt(tmp_path / "w.txt", np.array([TRUTH[name] / FLOW[name] for name in FLOW])[basin])
    found = evaluate(run.path, tmp_path / "md.dcd", weights=tmp_path / "w.txt", output=tmp_path / "out")
    for name, share in TRUTH.items():
        basin = found.basins["ALA2"][name]["reference"]
        assert abs(basin.population - share) < 4 * basin.population_error
    assert found.reference["n_effective"] < 0.99 * found.reference["n_frames"]
    density = found.maps["ALA2"]
    assert density.distances["weighted"].tv < density.distances["samples"].tv


def test_errors_of_a_trajectory_come_from_blocks(run, alanine, tmp_path):
    """Each frame of the reference stands 100 times in a row: its errors must be those of the distinct ones."""
    frames, _ = draw(alanine, TRUTH, 200, 4)
    frames[np.repeat(np.arange(200), 100)].save(str(tmp_path / "md.dcd"))
    found = evaluate(run.path, tmp_path / "md.dcd", output=tmp_path / "out")
    basin = found.basins["ALA2"]["alphaR"]["reference"]
    expected = np.sqrt(basin.population * (1 - basin.population) / 200)
    assert abs(basin.population_error / expected - 1) < 4 / np.sqrt(2 * 20)
    density = found.maps["ALA2"]
    assert density.noise_floor["halves"].tv > density.noise_floor["samples"].tv
    assert density.noise_floor["samples"].tv > 0.5 * density.distances["weighted"].tv


def test_all_weight_in_one_frame(run, alanine, tmp_path):
    basin_frames(alanine, {"alphaR": 30, "beta": 10}).save(str(tmp_path / "md.dcd"))
    weights = np.zeros(40)
    weights[3] = 1
    np.savetxt(tmp_path / "w.txt", weights)
    found = evaluate(run.path, tmp_path / "md.dcd", weights=tmp_path / "w.txt", output=tmp_path / "out")
    assert found.basins["ALA2"]["alphaR"]["reference"].population == 1.0
    assert found.states["beta ALA2"].met_by == "samples only"
    assert found.states["beta ALA2"].upper_bound == 1.0
    assert "halves" not in found.maps["ALA2"].noise_floor


# --- states -------------------------------------------------------------------------------------------------------


def test_states_that_only_one_side_meets(alanine, slow, tmp_path):
    counts = {"alphaR": 400, "beta": 300, "PPII": 300}
    samples, reference = basin_frames(alanine, counts), basin_frames(alanine, {**counts, "phi > 0": 1000})
    bond = peptide_bonds(alanine.topology)["ACE1-ALA2"]
    samples.xyz[:50] = turned(samples[:50], bond, np.zeros(50)).xyz
    samples.xyz[100:102, :, 0] *= -1
    samples = samples[np.arange(1000) != 50]
    run = write_run(tmp_path / "run", alanine, slow, samples)
    reference.save(str(tmp_path / "md.dcd"))
    found = evaluate(run.path, tmp_path / "md.dcd")
    cis = found.states["cis ACE1-ALA2"]
    assert cis.fractions == {"samples": pytest.approx(50 / 999), "reference": 0.0}
    assert (cis.met_by, cis.upper_bound, cis.beyond_bound) == ("samples only", pytest.approx(3 / 2000), True)
    mirror = found.states["mirror image ALA2:CA"]
    assert mirror.fractions["samples"] == pytest.approx(2 / 999)
    assert (mirror.met_by, mirror.beyond_bound) == ("samples only", True)
    assert "cis ALA2-NME3" not in found.states
    # A mirror image turns φ into -φ: two of the samples are there.
    assert found.states["phi > 0 ALA2"].met_by == "both"
    assert found.states["trans ALA2-NME3"].met_by == "both"
    text = (run.evaluation / "evaluation.txt").read_text()
    assert re.search(r"cis ACE1-ALA2 +0\.05005 +0\.00000 +samples only; reference < 1\.5e-03$", text, re.MULTILINE)
    other = evaluate(run.path, samples_path(tmp_path, samples[200:]), output=tmp_path / "other")
    assert other.states["mirror image ALA2:CA"].upper_bound == pytest.approx(3 / 799)
    assert not other.states["mirror image ALA2:CA"].beyond_bound
    assert "may be chance" in (tmp_path / "other" / "evaluation.txt").read_text()


def samples_path(folder, frames):
    frames.save(str(folder / "frames.dcd"))
    return folder / "frames.dcd"


def test_states_that_the_samples_miss(alanine, slow, tmp_path):
    run = write_run(tmp_path / "run", alanine, slow, basin_frames(alanine, {"alphaR": 60, "beta": 40}))
    basin_frames(alanine, {"alphaR": 50, "PPII": 49, "phi > 0": 1}).save(str(tmp_path / "md.dcd"))
    found = evaluate(run.path, tmp_path / "md.dcd")
    assert found.states["PPII ALA2"].met_by == "reference only"
    assert found.states["PPII ALA2"].beyond_bound
    assert found.states["phi > 0 ALA2"].upper_bound == pytest.approx(3 / 100)
    assert not found.states["phi > 0 ALA2"].beyond_bound
    missed = found.basins["ALA2"]["PPII"]["samples"]
    assert missed.population == 0.0
    assert missed.free_energy_kT is missed.difference_kT is missed.free_energy_error_kT is None


def test_a_grid_knows_its_own_basins_only(against_grid):
    assert against_grid.states["phi > 0 ALA2"].fractions["reference"] == pytest.approx(0.03, abs=0.002)
    assert against_grid.states["phi > 0 ALA2"].met_by == "both"
    trans = against_grid.states["trans ACE1-ALA2"]
    assert "reference" not in trans.fractions
    assert trans.met_by == "samples"
    assert set(against_grid.basins["omega ACE1-ALA2"]["trans"]) == {"samples", "weighted"}
    assert against_grid.sizes["Rg"].ks == {}


# --- other molecules ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def butane_run(systems, tmp_path_factory):
    """A real run, tiny."""
    output = tmp_path_factory.mktemp("runs") / "butane"
    train(load_config(systems / "butane" / "butane.yaml", TINY_WITH_FRAMES), output, progress=False)
    return output


def test_slow_torsions_without_a_peptide(butane_run, tmp_path, capsys):
    structure = frame(BUTANE)
    angles = np.random.default_rng(5).choice(np.radians([180, 65, -65]), 600, p=[0.6, 0.3, 0.1])
    turned(repeated(structure, 600), (0, 1, 2, 3), angles).save(str(tmp_path / "md.xtc"))
    assert main(["evaluate", str(butane_run), "--reference", str(tmp_path / "md.xtc")]) == 0
    printed = capsys.readouterr().out
    folder = butane_run / "evaluation"
    name = "BUT1:C1-C2-C3-C4"
    assert f"{name}  gauche-" in printed
    table = read_colvar(butane_run / "samples.colvar")
    (column,) = (values for key, values in table.items() if key.startswith("z.dihedral"))
    with np.load(folder / "histograms.npz") as arrays:
        histogram = arrays[f"{name}/samples"]
    expected = np.histogram(column, 36, (-np.pi, np.pi))[0] / 200
    # The frames are single precision: a value on a border may fall to the other side.
    assert np.abs(histogram - expected).sum() <= 2 / 200
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["maps"] == {}
    shares = [found["basins"][name][kind]["reference"]["population"] for kind in ("trans", "gauche+", "gauche-")]
    assert shares == pytest.approx([np.mean(np.isclose(angles, a)) for a in np.radians([180, 65, -65])])
    assert found["torsions"][name]["noise_floor"]["halves"]["tv"] < 0.15
    assert not list(folder.glob("map*"))


def test_two_slow_torsions_make_a_map(alanine, slow):
    """Alanine dipeptide as one residue has no φ and ψ by name, but two slow torsions."""
    topology = mdtraj.Topology()
    residue = topology.add_residue("LIG", topology.add_chain(), 1)
    atoms = [
        topology.add_atom(f"{atom.element.symbol}{atom.index}", atom.element, residue)
        for atom in alanine.topology.atoms
    ]
    for first, second in alanine.topology.bonds:
        topology.add_bond(atoms[first.index], atoms[second.index])
    structure = mdtraj.Trajectory(alanine.xyz, topology)
    frames = alanine_frames(alanine, np.full(4, -1.2), np.array([0.3, 0.4, 0.5, 2.0]))
    found = measure(mdtraj.Trajectory(frames.xyz, topology), structure, slow)
    (torsion_map,) = found.maps.values()
    ordered = torsion_map.angles[:, np.argsort(torsion_map.angles[0])]
    assert np.allclose(ordered, np.column_stack((np.full(4, -1.2), [0.3, 0.4, 0.5, 2.0])), atol=2e-3)
    assert set(torsion_map.axes) < set(found.torsions)
    assert sum(name.startswith("omega") for name in found.torsions) == 2


def test_a_residue_can_be_chosen(run, grid, refused, tmp_path):
    found = evaluate(run.path, grid, residue="ALA2", output=tmp_path)
    assert list(found.maps) == ["ALA2"]
    refused("evaluate", run.path, "--residue", "ALA3", says=["residue 'ALA3'", "the run has ALA2"])


# --- the command --------------------------------------------------------------------------------------------------


def test_what_is_written_and_printed(run, grid, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert main(["evaluate", str(run.path), "--reference", str(grid), "-o", str(folder)]) == 0
    printed = capsys.readouterr().out
    text = (folder / "evaluation.txt").read_text()
    assert text in printed
    assert str(folder) in printed.splitlines()[-1]
    assert sorted(path.name for path in folder.iterdir()) == [
        "evaluation.json", "evaluation.txt", "histograms.npz", "map_ALA2.png", "rg_rmsd.png", "torsions.png",
    ]  # fmt: skip
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for words in ("5000 samples at 300 K", "relative effective sample size 0.9", "100 x 100 grid of ALA2", "phi > 0"):
        assert words in text, text
    with np.load(folder / "histograms.npz") as arrays:
        for key in ("samples", "weighted", "reference"):
            assert arrays[f"ALA2/{key}"].shape == (36, 36)
            assert np.isclose(arrays[f"ALA2/{key}"].sum(), 1)

    def no_constant(name):
        raise AssertionError(name)

    found = json.loads((folder / "evaluation.json").read_text(), parse_constant=no_constant)
    assert found["samples"]["n_frames"] == N
    assert found["settings"]["temperature_K"] == 300.0
    assert found["units"]["kl"] == "nats"
    row = found["basins"]["ALA2"]["phi > 0"]["weighted"]
    assert f"{row['population']:.4f} ± {row['population_error']:.4f}" in text
    assert f"{row['difference_kT']:.2f} ± {row['difference_error_kT']:.2f}" in text
    distances = found["maps"]["ALA2"]["distances"]["samples"]
    assert f"{distances['kl']:.4f}" in text


def test_without_a_reference(run, tmp_path, capsys):
    assert main(["evaluate", str(run.path), "-o", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "no reference" in printed
    assert "KL" not in printed
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["reference"] is None
    assert found["maps"]["ALA2"]["distances"] == {}
    # The samples' own main basin is the zero of the free energies.
    basins = found["basins"]["ALA2"]
    main_basin = max(basins, key=lambda name: basins[name]["samples"]["population"])
    assert basins[main_basin]["weighted"]["free_energy_kT"] == 0.0
    assert basins["beta"]["samples"]["difference_kT"] is None


def test_without_weights(run, md, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    table = read_colvar(folder / "samples.colvar")
    write_samples(folder / "samples.dcd", mdtraj.load(str(run.samples), top=str(run.topology)), {"z": table["time"]})
    found = evaluate(folder, md)
    assert "relative_ess" not in found.samples
    assert set(found.maps["ALA2"].distances) == {"samples"}
    assert (folder / "evaluation" / "evaluation.json").is_file()


def test_other_samples_of_the_run(run, alanine, grid, tmp_path):
    write_samples(tmp_path / "more.dcd", basin_frames(alanine, {"alphaR": 3, "beta": 1}))
    found = evaluate(run.path, grid, samples=tmp_path / "more.dcd", output=tmp_path / "out")
    assert found.samples == {"file": str(tmp_path / "more.dcd"), "n_frames": 4}
    assert found.basins["ALA2"]["alphaR"]["samples"].population == 0.75


def test_same_seed_same_numbers(run, grid, tmp_path):
    def text(name, seed):
        evaluate(run.path, grid, output=tmp_path / name, seed=seed)
        return (tmp_path / name / "evaluation.json").read_text()

    first, again, other = text("a", 3), text("b", 3), text("c", 4)
    assert first == again
    assert first.replace('"seed": 3', '"seed": 4') != other


def test_overwriting_a_run_deletes_its_evaluation(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    evaluate(folder)
    assert (folder / "evaluation").is_dir()
    type(run).create(folder, run.config.read_text(), overwrite=True)
    assert not (folder / "evaluation").exists()


def test_wrong_options(run, md, grid, refused, tmp_path):
    (tmp_path / "md.txt").touch()
    np.savetxt(tmp_path / "w.txt", np.ones(3))
    for options, says in (
        (["--reference", tmp_path / "none.dcd"], ["none.dcd", "no such file"]),
        (["--reference", tmp_path / "md.txt"], ["md.txt", "unknown format", ".dcd"]),
        (["--reference", md, "--weights", tmp_path / "w.txt"], ["w.txt", "3 weights", "20000 frames"]),
        (["--reference", grid, "--weights", tmp_path / "w.txt"], ["w.txt", "takes no weights"]),
        (["--weights", tmp_path / "w.txt"], ["give --reference"]),
        (["--samples", tmp_path / "none.dcd"], ["none.dcd", "no such file", "openmm-cgflow sample"]),
    ):
        refused("evaluate", run.path, *options, says=says)
    refused("evaluate", tmp_path / "nothing", says=["no such run directory"])
    refused("evaluate", tmp_path, says=["not a run directory"])


def test_spoiled_runs(run, grid, refused, tmp_path, alanine):
    def spoiled(name):
        return shutil.copytree(run.path, tmp_path / name)

    folder = spoiled("without samples")
    (folder / "samples.dcd").unlink()
    refused("evaluate", folder, says=["samples.dcd", "openmm-cgflow sample '", "-n 10000"])
    folder = spoiled("without colvar")
    (folder / "samples.colvar").unlink()
    refused("evaluate", folder, says=["samples.colvar", "no such file"])
    folder = spoiled("other lengths")
    basin_frames(alanine, {"alphaR": 3}).save(str(folder / "samples.dcd"))
    refused("evaluate", folder, says=["5000 rows", "3 frames"])
    folder = spoiled("no weights")
    write_samples(folder / "samples.dcd", basin_frames(alanine, {"beta": 2}), {"log_weight": np.full(2, -np.inf)})
    refused("evaluate", folder, says=["samples.colvar", "log_weight"])
    write_samples(folder / "samples.dcd", basin_frames(alanine, {"beta": 2}), {"log_weight": np.array([0.0, -np.inf])})
    assert evaluate(folder).samples["relative_ess"] == 0.5
    folder = spoiled("no partition")
    (folder / "slow_atoms.json").write_text("{}")
    refused("evaluate", folder, says=["slow_atoms.json", "restore"])
    folder = spoiled("no topology")
    (folder / "topology.pdb").unlink()
    refused("evaluate", folder, says=["topology.pdb", "no such file"])
    folder = spoiled("a file in the way")
    (folder / "evaluation").write_text("")
    refused("evaluate", folder, says=["evaluation", "cannot write"])


def test_a_grid_of_which_residue(butane_run, grid):
    with pytest.raises(CGFlowError, match="no residue of the run has both"):
        evaluate(butane_run, grid)

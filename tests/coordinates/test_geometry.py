"""What a molecule and a configuration determine: which torsions are free, and the scales of the rest."""

import math

import numpy as np
import pytest
import torch

from openmm_cgflow import CGFlowError, MolecularSystem, Partition, load_config
from openmm_cgflow.coordinates.geometry import MoleculeGeometry
from openmm_cgflow.molecule.sanitize import energy_and_forces
from openmm_cgflow.networks.flow import new_flow
from openmm_cgflow.networks.pmf import new_pmf
from openmm_cgflow.runs.build import build_geometry
from openmm_cgflow.runs.loop import hottest_temperature
from openmm_cgflow.settings import FlowSettings, PMFSettings

OMEGAS = ["dihedral ACE1:CH3-ACE1:C-ALA2:N-ALA2:CA", "dihedral ALA2:CA-ALA2:C-NME3:N-NME3:C"]
PHI_PSI = ["dihedral ACE1:C-ALA2:N-ALA2:CA-ALA2:C", "dihedral ALA2:N-ALA2:CA-ALA2:C-NME3:N"]


@pytest.fixture(scope="module")
def build(systems):
    """A geometry of alanine dipeptide with these settings, and perhaps another input structure."""

    def build(*settings, positions=None):
        config = load_config(systems / "alanine_dipeptide" / "alanine_dipeptide.yaml", settings)
        molecule = MolecularSystem.from_files(config.system)
        if positions is not None:
            molecule = MolecularSystem.from_openmm(molecule.topology, molecule.system, positions)

        def evaluate(xyz):
            results = [energy_and_forces(molecule.system, frame) for frame in xyz]
            return np.array([energy for energy, _ in results]), np.array([forces for _, forces in results])

        return build_geometry(
            config, molecule, Partition.resolve(molecule, config.partition.slow), hottest_temperature(config), evaluate
        )

    return build


@pytest.fixture(scope="module")
def kept(build):
    return build()


@pytest.fixture(scope="module")
def sampled(build):
    return build("coordinates.peptide_bonds=sample")


def names_of(geometry, circular):
    coordinates = geometry.all_atom.coordinates
    return [n for n, c in zip(coordinates.names, coordinates.circular.tolist(), strict=True) if c == circular]


def input_z(geometry):
    xyz = torch.tensor(geometry.molecule.positions)
    return geometry.all_atom.read_slow(xyz[None])[0]


def test_peptide_bonds_are_kept_by_default(kept):
    """They are bounded features, centred where the input structure has them."""
    assert sorted(names_of(kept, True)) == sorted(PHI_PSI)
    assert set(OMEGAS) < set(names_of(kept, False))
    coordinates, z = kept.all_atom.coordinates, input_z(kept)
    for name in OMEGAS:
        k = coordinates.names.index(name)
        middle = float(((coordinates.low + coordinates.high) / 2)[k])
        found = float(coordinates.to_physical(z)[k])
        assert abs(math.remainder(middle - math.pi, 2 * math.pi)) < 0.3  # trans
        assert abs(found - middle) < 0.3
        assert float((coordinates.high - coordinates.low)[k]) < math.pi  # cis is out of reach
        assert abs(float(z[k])) < 3


def test_peptide_bonds_are_torsions_if_sampled(sampled, kept):
    assert sorted(names_of(sampled, True)) == sorted(PHI_PSI + OMEGAS)
    assert set(names_of(sampled, False)) == set(names_of(kept, False)) - set(OMEGAS)


def test_a_cis_bond_of_the_input_stays_cis(sampled, build):
    """The first omega turned by half a turn in the sampled description, then held."""
    coordinates = sampled.all_atom.coordinates
    z = input_z(sampled).clone()
    k = coordinates.names.index(OMEGAS[0])
    z[k] = math.remainder(float(z[k]) + math.pi, 2 * math.pi)
    assert abs(float(z[k])) < 0.5
    fast = sampled.all_atom.read_fast(torch.tensor(sampled.molecule.positions)[None, None])
    xyz = sampled.all_atom.build(z[None, None], fast)[0, 0].numpy()
    held = build(positions=xyz).all_atom.coordinates
    middle = ((held.low + held.high) / 2).tolist()
    assert abs(math.remainder(middle[held.names.index(OMEGAS[0])], 2 * math.pi)) < 0.6
    assert abs(math.remainder(middle[held.names.index(OMEGAS[1])] - math.pi, 2 * math.pi)) < 0.6


def test_covariance_of_bounded_features(kept):
    """In thermal widths: ones on the diagonal, couplings beside it, and what the flow and the PMF start from."""
    covariance = kept.bounded_covariance()
    n = len(names_of(kept, False))
    assert covariance.shape == (n, n) and covariance.dtype == torch.float64
    torch.testing.assert_close(covariance, covariance.T)
    assert float(torch.linalg.eigvalsh(covariance).min()) > 0
    torch.testing.assert_close(covariance.diagonal(), torch.ones(n).double(), rtol=1e-6, atol=1e-6)
    assert float((covariance - torch.eye(n)).abs().max()) > 0.1

    flow, pmf = new_flow(FlowSettings(), kept, 0), new_pmf(PMFSettings(), kept, 0)
    z, _ = flow.sample(4000, torch.Generator().manual_seed(0))
    assert float((torch.cov(z[:, 2:].T) - covariance).abs().max()) < 0.2
    torch.testing.assert_close(pmf.precision.double(), torch.linalg.inv(covariance), rtol=1e-4, atol=1e-3)


def test_widths_are_those_of_the_hottest_temperature_of_the_method(kept, build):
    """With a learned PMF nothing is hotter than the target; the reverse KL starts at tempering.start."""
    hot = build("training.method=reverse_kl", "tempering.start=1200 K")
    ratio = (hot.all_atom.coordinates.scale / kept.all_atom.coordinates.scale)[2:]
    unclipped = (ratio - 2).abs() < 1e-6  # sqrt(1200 / 300), but for intervals that end where geometry does
    assert float(unclipped.double().mean()) > 0.5
    torch.testing.assert_close(
        hot.bounded_covariance()[unclipped][:, unclipped].diagonal(), torch.ones(int(unclipped.sum())).double()
    )


def test_cartesian_coordinates_have_no_covariance(build):
    geometry = build("coordinates=cartesian", "training.method=reverse_kl")
    assert geometry.bounded_covariance() is None
    assert new_flow(FlowSettings(), geometry, 0).conditional.linear is None
    with pytest.raises(CGFlowError, match="coordinates: internal"):
        new_pmf(PMFSettings(), geometry, 0)


def test_a_saved_geometry_is_the_same(kept):
    slow, fast, hottest = kept.slow, kept.fast, kept.hottest
    again = MoleculeGeometry.build(kept.settings, kept.molecule, slow, fast, hottest, saved=kept.saved_arrays())
    assert again.all_atom.coordinates.names == kept.all_atom.coordinates.names
    assert torch.equal(again.bounded_covariance(), kept.bounded_covariance())


def test_networks_come_from_the_seed(kept):
    for new, settings in ((new_flow, FlowSettings()), (new_pmf, PMFSettings())):
        before = torch.get_rng_state()
        states = [list(new(settings, kept, 0).parameters()) for _ in range(2)]
        other = list(new(settings, kept, 1).parameters())
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(states[0], other, strict=True))

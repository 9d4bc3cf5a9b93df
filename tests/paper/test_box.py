"""Particles in a box: coordinates that end at walls, features that know it, widths that the energy allows."""

import math

import numpy as np
import pytest
import torch

from openmm_cgflow.config import Config
from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.molecule.partition import Partition
from openmm_cgflow.networks.flow import CGFlow
from openmm_cgflow.paper.box import BoxCoordinates, BoxFeatures, BoxMap
from openmm_cgflow.runs.build import build_geometry, load_molecule
from openmm_cgflow.runs.loop import hottest_temperature

UNIT = 120.27236  # K: kT is 1 kJ/mol


def test_box_coordinates_end_at_walls():
    coordinates = BoxCoordinates((0, 2), ("a", "b", "c"), 5.0)
    z = torch.tensor([[-3.0, 0.1], [2.0, -math.pi]], dtype=torch.float64)
    xyz = coordinates.to_xyz(z)
    assert xyz.shape == (2, 2, 3)
    assert float(xyz[0, 0, 0]) == pytest.approx(-3.0 * 5 / math.pi) and (xyz[..., 1:] == 0).all()
    torch.testing.assert_close(coordinates.from_xyz(xyz), z)
    beyond = xyz + torch.tensor([10.0, 0, 0])
    torch.testing.assert_close(coordinates.from_xyz(beyond), z + 2 * math.pi)
    flow = CGFlow(coordinates.features, 6.0, 2, 1, 6, [8])
    assert (flow.log_prob(coordinates.from_xyz(beyond)) == -math.inf).all() and flow.log_prob(z).isfinite().all()
    torch.testing.assert_close(coordinates.log_volume(z), torch.full((2,), 2 * math.log(5 / math.pi)).double())
    assert coordinates.n_circular == coordinates.n_features == 2 and coordinates.names == ("x a", "x c")


def test_particles_are_put_where_they_belong():
    all_atom = BoxMap(BoxCoordinates((1, 3), ("a", "b", "c", "d"), 5.0), (0, 2))
    generator = torch.Generator().manual_seed(0)
    z = math.pi * (2 * torch.rand((3, 2), generator=generator, dtype=torch.float64) - 1)
    y = torch.randn((3, 2, 3), generator=generator, dtype=torch.float64)
    xyz = all_atom.build(z, y)
    torch.testing.assert_close(xyz[:, [1, 3], 0], z * 5 / math.pi)
    torch.testing.assert_close(xyz[:, [0, 2]], y)
    torch.testing.assert_close(all_atom.read_fast(xyz), y)
    torch.testing.assert_close(all_atom.read_slow(xyz), z)
    assert all_atom.same_handedness(xyz).all() and (all_atom.log_volume_fast(y) == 0).all()


@pytest.mark.parametrize("dimensions", [2, 4])
def test_fast_particles_start_with_the_widths_of_the_energy(dimensions):
    config = _config({"name": "gaussian_mixture", "dimensions": dimensions}, list(range(dimensions)))
    system = load_molecule(config)
    partition = Partition.resolve(system, config.partition.slow)
    with create_engine(system, partition.slow, config.chains) as engine:
        geometry = build_geometry(config, system, partition, hottest_temperature(config), engine.evaluate)
    expected = torch.full((dimensions, 3), 0.1, dtype=torch.float64)
    torch.testing.assert_close(geometry.fast_widths(UNIT), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(geometry.fast_widths(4 * UNIT), 2 * expected, rtol=1e-3, atol=0)
    again = build_geometry(config, system, partition, hottest_temperature(config), saved=geometry.saved_arrays())
    torch.testing.assert_close(again.fast_widths(UNIT), geometry.fast_widths(UNIT))
    y = geometry.draw_fast(torch.zeros(4000, dimensions), 4 * UNIT, torch.Generator().manual_seed(0))
    torch.testing.assert_close(y.std(0), 2 * expected, rtol=0.1, atol=0)


def test_widths_where_the_start_is_the_top_of_a_barrier():
    """x1 of the double well: a quartic that holds far more than its curvature says."""
    config = _config("double_well", [1])
    system = load_molecule(config)
    partition = Partition.resolve(system, config.partition.slow)
    with create_engine(system, partition.slow, config.chains) as engine:
        geometry = build_geometry(config, system, partition, hottest_temperature(config), engine.evaluate)
    for beta in (1.0, 0.01):
        exact = math.sqrt(6 + math.sqrt(36 + 2 / beta))  # where x^4/4 - 3 x^2 is half of kT
        assert float(geometry.fast_widths(UNIT / beta)[0, 0]) == pytest.approx(exact, rel=0.06)


def _config(target, slow, **sections):
    return Config(
        system={"target": target},
        temperature=UNIT,
        partition={"slow": slow},
        coordinates={"kind": "box", "half_edge": 6},
        chains={"platform": "Reference", "n_workers": 1},
        **sections,
    )


def test_what_networks_see_differs_at_both_walls_and_is_smooth_between():
    features, walls = BoxFeatures(1, 2), torch.tensor([[-math.pi, 0.2, 0.4], [math.pi, 0.2, 0.4]]).double()
    seen = features(walls)
    assert seen.shape == (2, features.size) == (2, 9) and features.size_first == 7
    assert float((seen[0] - seen[1])[:7].abs().max()) > 1
    torch.testing.assert_close(seen[:, 7:], walls[:, 1:] / 2)


def test_positions_are_not_wrapped_and_there_is_no_density_beyond_the_walls():
    features, x = BoxFeatures(2, 0), torch.tensor([[0.0, 3.0], [3.2, 0.0], [0.0, -math.pi]]).double()
    assert features.outside(x).tolist() == [False, True, False]
    assert not features.outside(torch.tensor([[math.pi, -math.pi]])).any()  # in single precision
    torch.testing.assert_close(features.wrap(x), x)
    np.testing.assert_array_equal(features.unwrap(x.numpy()), x.numpy())
    torch.testing.assert_close(features.embed_first(x), x)

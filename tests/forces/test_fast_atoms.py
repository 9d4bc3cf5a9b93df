"""Chains of the fast atoms: the pool they start from, the quarantine, and seeds."""

import math

import pytest
import torch
from analytic import EchoEngine, chiral_chains, some_z

from openmm_cgflow.engines.engine import Schedule
from openmm_cgflow.errors import ReplicaError
from openmm_cgflow.forces import fast_atoms as fast_atoms_module
from openmm_cgflow.seeds import derive_seed

TEMPERATURE = 300.0


def go(fast_atoms, z, temperature=TEMPERATURE, **values):
    return fast_atoms.run(z, Schedule(temperature, n_relax=11, n_equilibration=7, n_frames=3, stride=2), **values)


def test_the_first_call_equilibrates_a_pool():
    engine = EchoEngine()
    chains = chiral_chains(engine)
    z = some_z(chains, 6)
    frames = go(chains, z, 450.0)
    pool, call = engine.calls
    assert (pool["n_equilibration"], pool["n_frames"], pool["temperature"]) == (500, 1, 450.0)
    assert (call["n_equilibration"], call["n_frames"], call["stride"], call["n_relax"]) == (7, 3, 2, 11)
    assert frames.xyz.shape == (6, 3, 6, 3) and frames.energy.shape == (6, 3)
    go(chains, z)
    assert len(engine.calls) == 3  # once


def test_chains_start_at_z():
    engine = EchoEngine()
    chains = chiral_chains(engine)
    for seed in range(3):
        z = some_z(chains, 6, seed)
        go(chains, z)
        start = torch.as_tensor(engine.calls[-1]["xyz"])
        torch.testing.assert_close(chains.all_atom.read_slow(start), z, rtol=0, atol=1e-9)


def test_fast_atoms_start_from_the_nearest_neighbour_in_the_pool():
    engine = EchoEngine()
    chains = chiral_chains(engine)
    go(chains, some_z(chains, 20, 1))
    pool_z = torch.cat([entry[0] for entry in chains.pool])
    pool_y = torch.cat([entry[1] for entry in chains.pool])
    assert float(pool_y.std(0).min()) > 0
    z = some_z(chains, 200, 2)
    z[:, 0] += 2 * math.pi  # the same torsions
    go(chains, z)
    found = chains.all_atom.read_fast(torch.as_tensor(engine.calls[-1]["xyz"]))
    away = (pool_y - found[:, None]).abs().amax((2, 3))
    assert float(away.amin(1).max()) < 1e-9  # all from the pool
    torsion = torch.stack((z[:, 0].cos(), z[:, 0].sin()), 1)
    pool_torsion = torch.stack((pool_z[:, 0].cos(), pool_z[:, 0].sin()), 1)
    distance = (torsion[:, None] - pool_torsion).square().sum(-1)
    distance = distance + 0.05**2 * (z[:, None, 1:] - pool_z[:, 1:]).square().sum(-1)
    chosen = distance.gather(1, away.argmin(1)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance.amin(1), rtol=0, atol=1e-9)


def test_fast_atoms_are_taken_along_from_their_neighbour():
    engine, asked = EchoEngine(), []

    def follow(y, start, end):
        asked.append((y, start, end))
        return y + torch.tensor([0.001, 0.02, 0.03])

    chains = chiral_chains(engine, follow=follow)
    go(chains, some_z(chains, 20, 1))
    asked.clear()
    z = some_z(chains, 5, 2)
    go(chains, z)
    ((y, start, end),) = asked
    assert torch.equal(end, z)
    pool_z = torch.cat([entry[0] for entry in chains.pool[:-1]])
    pool_y = torch.cat([entry[1] for entry in chains.pool[:-1]])
    for row in range(5):
        those = pool_y[(pool_z == start[row]).all(1)]
        assert (those == y[row]).flatten(1).all(1).any()
    found = chains.all_atom.read_fast(torch.as_tensor(engine.calls[-1]["xyz"]))
    moved = torch.remainder(found - y + math.pi, 2 * math.pi) - math.pi
    torch.testing.assert_close(moved, torch.tensor([0.001, 0.02, 0.03]).double().expand_as(moved), rtol=0, atol=1e-9)


def test_the_pool_holds_where_chains_ended_and_forgets():
    chains = chiral_chains()
    for seed in range(fast_atoms_module._N_POOLS + 2):
        z = some_z(chains, 5, seed)
        frames = go(chains, z)
        assert torch.equal(chains.pool[-1][0], z)
        assert torch.equal(chains.pool[-1][1], chains.all_atom.read_fast(frames.xyz[:, -1]))
    assert len(chains.pool) == fast_atoms_module._N_POOLS


@pytest.mark.parametrize(("n", "n_pool", "expected"), [(30, 10, 10), (25, 10, 13), (6, 10, 6), (30, 1, 1)])
def test_the_first_pool_is_a_part_of_the_batch_evenly(n, n_pool, expected):
    """At least n_pool of the batch's z where there are so many, from its beginning to its end."""
    engine = EchoEngine()
    chains = chiral_chains(engine, n_pool=n_pool)
    z = some_z(chains, n)
    go(chains, z)
    pool = engine.calls[0]["xyz"]
    assert len(pool) == expected
    found = chains.all_atom.read_slow(torch.as_tensor(pool))
    torch.testing.assert_close(found, z[:: max(1, n // n_pool)], rtol=0, atol=1e-9)
    assert len(engine.calls[1]["xyz"]) == n


def test_quarantine_counts_and_keeps_bad_replicas_out_of_the_pool():
    engine = EchoEngine()
    chains = chiral_chains(engine, max_invalid=0.5)
    go(chains, some_z(chains, 10))
    assert vars(chains.quarantine) == {"total": 20, "not_finite": 0, "flipped": 0}
    engine.broken, engine.mirrored = [1, 4], [7]
    z = some_z(chains, 10, 1)
    frames = go(chains, z)
    good = torch.tensor([True, False, True, True, False, True, True, False, True, True])
    assert torch.equal(frames.valid, good)
    assert vars(chains.quarantine) == {"total": 30, "not_finite": 2, "flipped": 1}
    assert torch.equal(chains.pool[-1][0], z[good])
    assert torch.isfinite(chains.pool[-1][1]).all()


def test_flips_may_be_allowed():
    engine = EchoEngine()
    chains = chiral_chains(engine, keep_chirality=False)
    go(chains, some_z(chains, 4))
    engine.mirrored = [2]
    assert go(chains, some_z(chains, 4)).valid.all()
    assert chains.quarantine.flipped == 1  # counted all the same


def test_too_many_failures_are_a_named_error():
    engine = EchoEngine()
    chains = chiral_chains(engine, max_invalid=0.2)
    z = some_z(chains, 10)
    go(chains, z)
    engine.broken, engine.mirrored = [0], [1]
    go(chains, z)  # just allowed
    engine.broken = [0, 2]
    message = r"3 of 10 replicas failed at 300 K \(1 changed their handedness, 2 diverged"
    with pytest.raises(ReplicaError, match=message):
        go(chains, z)


def test_seeds():
    engine = EchoEngine()
    chains = chiral_chains(engine)
    z = some_z(chains, 3)
    go(chains, z)
    go(chains, z)
    go(chains, z, seed=77)
    seeds = [call["seed"] for call in engine.calls]
    assert len(set(seeds)) == 4 and seeds[-1] == 77
    other = EchoEngine()
    go(chiral_chains(other), z)
    assert [call["seed"] for call in other.calls] == seeds[:2]  # the same configuration, the same seeds
    third = EchoEngine()
    go(chiral_chains(third, seed=6), z)
    assert not {call["seed"] for call in third.calls} & set(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    many = {derive_seed(5, purpose, call) for purpose in range(10) for call in range(1000)}
    assert len(many) > 9990


def test_chains_continue_from_their_state():
    first = chiral_chains()
    go(first, some_z(first, 6))
    second = chiral_chains()
    second.load_state_dict(first.state_dict())
    for seed in (1, 2):
        z = some_z(first, 6, seed)
        for found, expected in zip(go(second, z), go(first, z), strict=True):
            assert torch.equal(found, expected)
    assert second.quarantine == first.quarantine and second.n_calls == first.n_calls


def test_a_state_does_not_change_with_what_comes_later():
    chains = chiral_chains()
    go(chains, some_z(chains, 6))
    state = chains.state_dict()
    go(chains, some_z(chains, 6, 1))
    assert state["n_calls"] == 2 and len(state["pool"]) == 2 and state["quarantine"]["total"] == 12

"""What practitioners use without this package: molecular dynamics, replica exchange, metadynamics.

Each runs for a given number of energy evaluations, equilibration and all replicas included, and hands back weighted
frames.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import openmm
from estimators import bias_at, mbar
from md import STRIDE, Molecule, finite, langevin, steps
from openmm import app, unit

from openmm_cgflow.engines.platforms import platform_choice
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.seeds import derive_seed
from openmm_cgflow.units import thermal_beta

__all__ = ["METHODS", "ReplicaExchange", "Sampled", "final_bias", "metadynamics", "plain_md", "replica_exchange"]

EQUILIBRATION = 10.0
"""ps, before the first frame; of each replica in replica exchange."""
BIAS_FACTOR = 8.0
HILL_HEIGHT = 1.2
"""kJ/mol"""
HILL_WIDTH = 0.35
"""rad"""
HILL_PERIOD = 500
"""Steps."""
_BIAS_GRID = 101
"""Points from -π to π, both included."""
_FILLING = 0.2
"""The first part of a metadynamics run, in which the bias still grows fast; its frames are left out."""

_DYNAMICS, _VELOCITIES, _EXCHANGES = range(3)  # what a seed is derived for


@dataclass(frozen=True)
class Sampled:
    """Frames of one run.

    Attributes:
        xyz: ``(n_frames, n_atoms, 3)`` in nm, float32, in order of time.
        weights: ``(n_frames,)``, of sum 1.
        at_target: ``(n_frames,)``, which of them were drawn from the target itself: equal weights, on their own.
        n_evaluations: Energy evaluations in all.
    """

    xyz: np.ndarray
    weights: np.ndarray
    at_target: np.ndarray
    n_evaluations: int


def plain_md(molecule: Molecule, n_evaluations: int, seed: int) -> Sampled:
    """Langevin dynamics from the input structure.

    Raises:
        CGFlowError: If ``n_evaluations`` ends before the first frame, or the dynamics diverges.
    """
    n_settle = steps(EQUILIBRATION)
    n_frames = _frames(n_evaluations - n_settle, STRIDE, "molecular dynamics")
    context = platform_choice(molecule.platform).context(
        molecule.system(), langevin(molecule.temperature, derive_seed(seed, _DYNAMICS))
    )
    context.setPositions(molecule.positions)
    context.setVelocitiesToTemperature(molecule.temperature, derive_seed(seed, _VELOCITIES))
    context.getIntegrator().step(n_settle)
    xyz = np.empty((n_frames, *molecule.positions.shape), dtype=np.float32)
    for frame in xyz:
        context.getIntegrator().step(STRIDE)
        frame[:] = finite(context)
    return _equal(xyz, n_settle + n_frames * STRIDE)


class ReplicaExchange:
    """OpenMM's replica exchange between geometrically spaced temperatures, run piece by piece.

    The replicas start from successive pieces of one run at the highest temperature, not from one structure.

    Arguments:
        molecule: The molecule.
        seed: Of everything random.
        n_replicas: Temperatures, at least 2.
        hottest: The highest of them in K.
        steps_per_exchange: Steps of every replica between exchanges.
        lowered: Torsions, four atoms each, whose barrier at 0 is lowered, by nothing at the temperature of the
            molecule and in equal steps up to the hottest.
        height: By how much there, kJ/mol.

    Attributes:
        n_settle: Energy evaluations before the first exchange.
        n_each: Energy evaluations of all replicas from one exchange to the next.

    Raises:
        CGFlowError: If OpenMM is older than 8.6, or the settings make no ladder.
    """

    def __init__(
        self,
        molecule: Molecule,
        seed: int,
        n_replicas: int = 6,
        hottest: float = 900.0,
        steps_per_exchange: int = 100,
        lowered: Sequence[Sequence[int]] = (),
        height: float = 0.0,
    ) -> None:
        if not hasattr(app, "ReplicaExchangeSampler"):
            raise CGFlowError(f"replica exchange needs OpenMM 8.6 or newer; this is {openmm.version.short_version}")
        if n_replicas < 2 or hottest <= molecule.temperature:
            raise CGFlowError(
                f"replica exchange: got {n_replicas} temperatures from {molecule.temperature:g} to {hottest:g} K, "
                "expected at least 2, the highest above that of the configuration"
            )
        self._temperatures = np.geomspace(molecule.temperature, hottest, n_replicas)
        self.n_settle = steps(EQUILIBRATION) * n_replicas
        self._states = [{"temperature": temperature * unit.kelvin} for temperature in self._temperatures]
        if lowered:
            for state, by in zip(self._states, np.linspace(0, height, n_replicas), strict=True):
                state["lowered"] = by
        # The energy of every replica once, or in every state.
        self.n_each = n_replicas * (steps_per_exchange + (n_replicas if lowered else 1))
        self._molecule, self._seed, self._steps_per_exchange = molecule, seed, steps_per_exchange
        self._lowered = lowered
        self._random = random.Random(derive_seed(seed, _EXCHANGES)).getstate()
        self._chains: app.ReplicaExchangeSampler | None = None
        self._xyz: list[np.ndarray] = []  # of each exchange (n_replicas, n_atoms, 3)
        self._energy: list[np.ndarray] = []  # of each exchange (n_replicas, n_replicas), the second in which state

    def run(self, n_exchanges: int) -> None:
        """Goes on for so many exchanges.

        Raises:
            CGFlowError: If the dynamics diverges.
        """
        if self._chains is None:
            self._chains = self._start()
        # OpenMM draws its exchanges from Python's own generator, which other runs draw from as well.
        random.setstate(self._random)
        self._chains.simulate(n_exchanges)
        self._random = random.getstate()
        if not np.isfinite(self._energy).all():
            raise CGFlowError("replica exchange: the dynamics diverged: energies are not finite; lower the temperature")

    def sampled(self, settling: float = 0.0) -> Sampled:
        """The frames so far, in order of time, all replicas' by MBAR.

        Arguments:
            settling: The first part of the frames that is left out, 0 to 1.
        """
        first = int(settling * len(self._xyz))
        xyz, energy = np.array(self._xyz[first:]), np.array(self._energy[first:])
        n_exchanges, n_replicas = energy.shape[:2]
        beta = np.array([thermal_beta(temperature) for temperature in self._temperatures])
        reduced = beta[:, None] * energy.transpose(2, 1, 0).reshape(n_replicas, -1)
        _, weights = mbar(reduced, np.full(n_replicas, n_exchanges))
        return Sampled(
            xyz.reshape(-1, *xyz.shape[2:]),
            weights.reshape(n_replicas, n_exchanges).T.ravel(),
            np.tile(np.arange(n_replicas) == 0, n_exchanges),
            self.n_settle + len(self._xyz) * self.n_each,
        )

    def _start(self) -> app.ReplicaExchangeSampler:
        molecule, seed, hottest = self._molecule, self._seed, self._temperatures[-1]
        system = molecule.system()
        if self._lowered:
            _lower_barriers_at_0(system, self._lowered)
        simulation = app.Simulation(
            molecule.topology.to_openmm(),
            system,
            langevin(molecule.temperature, derive_seed(seed, _DYNAMICS)),
            *_platform(molecule),
        )
        simulation.context.setPositions(molecule.positions)
        chains = app.ReplicaExchangeSampler(self._states, simulation, self._steps_per_exchange)
        if self._lowered:
            simulation.context.setParameter("lowered", self._states[-1]["lowered"])
        simulation.integrator.setTemperature(hottest)
        simulation.context.setVelocitiesToTemperature(hottest, derive_seed(seed, _VELOCITIES))
        for i, temperature in enumerate(self._temperatures):
            simulation.integrator.step(steps(EQUILIBRATION))
            finite(simulation.context)
            hot = simulation.context.getState(positions=True, velocities=True)
            simulation.context.setVelocitiesToTemperature(temperature, derive_seed(seed, _VELOCITIES, 1 + i))
            chains.replicaConformation[i] = simulation.context.getState(
                positions=True, velocities=True, parameters=True, integratorParameters=True
            )
            simulation.context.setState(hot)
        chains.reporters.append(self._record)
        return chains

    def _record(self, now: app.ReplicaExchangeSampler) -> None:
        n_replicas = len(self._temperatures)
        xyz = np.empty((n_replicas, *self._molecule.positions.shape), dtype=np.float32)
        energy = np.empty((n_replicas, n_replicas))
        for replica, state in enumerate(now.replicaStateIndex):
            positions = now.replicaConformation[replica].getPositions(asNumpy=True)
            xyz[state] = positions.value_in_unit(unit.nanometer)
            potentials = now.replicaStateEnergy[replica]
            energy[state] = [potential.value_in_unit(unit.kilojoule_per_mole) for potential in potentials]
        self._xyz.append(xyz)
        self._energy.append(energy)


def _lower_barriers_at_0(system: openmm.System, torsions: Sequence[Sequence[int]]) -> None:
    """Lowers the barriers of torsions at 0, some 30° wide to either side, by the parameter ``lowered`` in kJ/mol."""
    force = openmm.CustomTorsionForce("-lowered*exp(4*(cos(theta)-1))")
    force.addGlobalParameter("lowered", 0.0)
    for torsion in torsions:
        force.addTorsion(*torsion, [])
    system.addForce(force)


def replica_exchange(
    molecule: Molecule, n_evaluations: int, seed: int, n_replicas: int = 6, hottest: float = 900.0
) -> Sampled:
    """:class:`ReplicaExchange` for a number of energy evaluations of all replicas together.

    Raises:
        CGFlowError: As there, or if ``n_evaluations`` ends too soon.
    """
    chains = ReplicaExchange(molecule, seed, n_replicas, hottest)
    chains.run(_frames(n_evaluations - chains.n_settle, chains.n_each, "replica exchange"))
    return chains.sampled()


def metadynamics(molecule: Molecule, n_evaluations: int, seed: int) -> Sampled:
    """Well-tempered metadynamics on the first two torsions; frames are reweighted by the final bias.

    Raises:
        CGFlowError: If ``n_evaluations`` ends before the first frame, or the dynamics diverges.
    """
    period = HILL_PERIOD + 1  # the energy of the bias, for the height of the next hill
    n_hills = _frames(n_evaluations, period, "metadynamics")
    variables = []
    for atoms in list(molecule.torsions.values())[:2]:
        force = openmm.CustomTorsionForce("theta")
        force.addTorsion(*atoms, [])
        variables.append(app.BiasVariable(force, -np.pi, np.pi, HILL_WIDTH, True, _BIAS_GRID))
    system = molecule.system()
    meta = app.Metadynamics(system, variables, molecule.temperature, BIAS_FACTOR, HILL_HEIGHT, HILL_PERIOD)
    simulation = app.Simulation(
        molecule.topology.to_openmm(),
        system,
        langevin(molecule.temperature, derive_seed(seed, _DYNAMICS)),
        *_platform(molecule),
    )
    simulation.context.setPositions(molecule.positions)
    simulation.context.setVelocitiesToTemperature(molecule.temperature, derive_seed(seed, _VELOCITIES))
    frames = []
    for _ in range(n_hills * HILL_PERIOD // STRIDE):
        meta.step(simulation, STRIDE)
        frames.append(finite(simulation.context).astype(np.float32))
    xyz = np.array(frames[int(_FILLING * len(frames)) :])
    bias = final_bias(meta) * thermal_beta(molecule.temperature)
    at_frames = bias_at(bias, molecule.angles(xyz)[:, :2])
    weights = np.exp(at_frames - at_frames.max())
    return Sampled(xyz, weights / weights.sum(), np.zeros(len(xyz), dtype=bool), n_hills * period)


def final_bias(meta: app.Metadynamics) -> np.ndarray:
    """The bias that a run on two periodic variables has built, the table for ``bias_at``: ``(n, n)`` in kJ/mol."""
    free_energy = meta.getFreeEnergy().value_in_unit(unit.kilojoule_per_mole)
    # OpenMM puts the second variable first, repeats the first row and column at the end, and scales to the free energy.
    return -(1 - 1 / meta.biasFactor) * free_energy.T[:-1, :-1]


def _equal(xyz: np.ndarray, n_evaluations: int) -> Sampled:
    return Sampled(xyz, np.full(len(xyz), 1 / len(xyz)), np.ones(len(xyz), dtype=bool), n_evaluations)


def _frames(n_evaluations: int, each: int, name: str) -> int:
    if n_evaluations < each:
        raise CGFlowError(f"{name}: the energy evaluations end before its first frame; give it more")
    return n_evaluations // each


def _platform(molecule: Molecule) -> tuple[openmm.Platform, dict[str, str]]:
    choice = platform_choice(molecule.platform)
    return openmm.Platform.getPlatformByName(choice.name), dict(choice.properties)


METHODS: dict[str, Callable[[Molecule, int, int], Sampled]] = {
    "md": plain_md,
    "remd": replica_exchange,
    "metad": metadynamics,
}

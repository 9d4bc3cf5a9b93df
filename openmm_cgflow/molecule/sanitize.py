"""Makes any ``openmm.System`` fit for frozen-slow dynamics, on a copy: the caller's System is never touched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import openmm
from openmm import unit

from openmm_cgflow.errors import CGFlowError

__all__ = ["angle_term_ends", "bond_term_pairs", "energy_and_forces", "sanitize"]

_STRIPPED = {
    "CMMotionRemover": "it would bias the fast atoms while others are frozen",
    "MonteCarloBarostat": "there is no box",
    "MonteCarloAnisotropicBarostat": "there is no box",
    "MonteCarloMembraneBarostat": "there is no box",
    "MonteCarloFlexibleBarostat": "there is no box",
    "AndersenThermostat": "the fast atoms have a Langevin thermostat of their own",
}
_CUTOFF_FORCES = (openmm.NonbondedForce, openmm.CustomNonbondedForce, openmm.GBSAOBCForce, openmm.CustomGBForce)
_OFFSET = 0.009
"""nm, the OBC radius offset in OpenMM's GBSAOBC2Force."""


def sanitize(
    system: openmm.System, positions: np.ndarray, label: Callable[[int], str]
) -> tuple[openmm.System, list[str]]:
    """A copy of ``system`` without constraints, CMMotionRemover, barostats and thermostats, with a fast OBC2 force.

    Arguments:
        system: Any System; left unchanged.
        positions: ``(n_atoms, 3)`` in nm, where the converted OBC2 force is compared with the original.
        label: Names atom ``i`` in messages.

    Returns:
        The copy and one sentence for each change or finding.

    Raises:
        CGFlowError: If the System has massless particles, virtual sites, Drude particles, periodic boundaries or
            constraints between atoms that no bonded term holds together.
    """
    try:
        system = openmm.XmlSerializer.clone(system)
    except (openmm.OpenMMException, ValueError, TypeError) as error:
        raise CGFlowError(f"the System cannot be copied by openmm.XmlSerializer: {error}") from error
    _refuse_particles(system, label)
    notes = _strip_forces(system)
    _refuse_periodic(system)
    system.setDefaultPeriodicBoxVectors(*openmm.System().getDefaultPeriodicBoxVectors())  # a leftover without meaning
    notes += _remove_constraints(system, label)
    notes += _cutoff_notes(system)
    notes += _convert_obc2(system, positions)
    return system, notes


def energy_and_forces(system: openmm.System, positions: np.ndarray) -> tuple[float, np.ndarray]:
    """Potential energy (kJ/mol) and forces ``(n_atoms, 3)`` (kJ/mol/nm) on the Reference platform.

    Arguments:
        system: The System.
        positions: ``(n_atoms, 3)`` in nm.

    Raises:
        CGFlowError: If OpenMM cannot evaluate the System.
    """
    integrator = openmm.VerletIntegrator(0.001)
    try:
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(positions)
        state = context.getState(energy=True, forces=True)
    except openmm.OpenMMException as error:
        raise CGFlowError(f"OpenMM cannot evaluate the System: {error}") from error
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    return energy, state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)


def bond_term_pairs(system: openmm.System) -> set[tuple[int, int]]:
    """Sorted atom pairs held by a two-particle bonded term, Urey-Bradley terms included."""
    pairs: set[tuple[int, int]] = set()
    for force in system.getForces():
        for first, second in _bond_terms(force):
            pairs.add((min(first, second), max(first, second)))
    return pairs


def angle_term_ends(system: openmm.System) -> set[tuple[int, int]]:
    """Sorted pairs of the outer atoms of all angle terms."""
    pairs: set[tuple[int, int]] = set()
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicAngleForce):
            terms = [force.getAngleParameters(i) for i in range(force.getNumAngles())]
            terms = [term for term in terms if term[4].value_in_unit_system(unit.md_unit_system) != 0]
        elif isinstance(force, openmm.CustomAngleForce):
            terms = [force.getAngleParameters(i) for i in range(force.getNumAngles())]
        else:
            continue
        pairs.update((min(term[0], term[2]), max(term[0], term[2])) for term in terms)
    return pairs


def _bond_terms(force: openmm.Force) -> Iterator[tuple[int, int]]:
    if isinstance(force, openmm.HarmonicBondForce):
        for i in range(force.getNumBonds()):
            first, second, _, strength = force.getBondParameters(i)
            if strength.value_in_unit_system(unit.md_unit_system) != 0:
                yield first, second
    elif isinstance(force, openmm.CustomBondForce):
        for i in range(force.getNumBonds()):
            first, second, *_ = force.getBondParameters(i)
            yield first, second
    elif isinstance(force, openmm.CustomCompoundBondForce) and force.getNumParticlesPerBond() == 2:
        for i in range(force.getNumBonds()):
            (first, second), *_ = force.getBondParameters(i)
            yield first, second


def _refuse_particles(system: openmm.System, label: Callable[[int], str]) -> None:
    if any(type(force).__name__ == "DrudeForce" for force in system.getForces()):
        raise CGFlowError(
            "the System has Drude particles (DrudeForce), which are not supported; use a non-polarizable force field"
        )
    virtual = [i for i in range(system.getNumParticles()) if system.isVirtualSite(i)]
    if virtual:
        raise CGFlowError(
            f"the System has {len(virtual)} virtual site(s) ({_some(virtual, label)}), which are not "
            "supported; use a force field without extra points or lone pairs"
        )
    massless = [i for i in range(system.getNumParticles()) if system.getParticleMass(i).value_in_unit(unit.dalton) <= 0]
    if massless:
        raise CGFlowError(
            f"{len(massless)} particle(s) have no mass ({_some(massless, label)}): give every atom its "
            "mass; slow atoms are frozen by openmm-cgflow itself, not by the caller's System"
        )


def _some(atoms: list[int], label: Callable[[int], str]) -> str:
    return ", ".join(label(i) for i in atoms[:4]) + (", ..." if len(atoms) > 4 else "")


def _strip_forces(system: openmm.System) -> list[str]:
    notes = []
    for i in reversed(range(system.getNumForces())):
        name = type(system.getForce(i)).__name__
        if name in _STRIPPED:
            system.removeForce(i)
            notes.append(f"{name} removed: {_STRIPPED[name]}")
    return notes


def _refuse_periodic(system: openmm.System) -> None:
    periodic = []
    for force in system.getForces():
        try:
            if force.usesPeriodicBoundaryConditions():
                periodic.append(force.getName())
        except openmm.OpenMMException:  # this Force type has no notion of periodicity
            continue
    if periodic:
        raise CGFlowError(
            f"the System uses periodic boundary conditions ({', '.join(periodic)}), which are not "
            "supported yet: remove water, ions and box vectors, build the System with "
            "nonbondedMethod=NoCutoff and use an implicit solvent"
        )


def _remove_constraints(system: openmm.System, label: Callable[[int], str]) -> list[str]:
    n_constraints = system.getNumConstraints()
    if n_constraints == 0:
        return []
    held = bond_term_pairs(system) | angle_term_ends(system)
    loose = []
    for i in range(n_constraints):
        first, second, _ = system.getConstraintParameters(i)
        if (min(first, second), max(first, second)) not in held:
            loose.append(f"{label(first)}-{label(second)}")
    if loose:
        raise CGFlowError(
            f"the System has constraints that cannot be removed: {len(loose)} of {n_constraints} constrained pairs "
            f"have no bond term ({', '.join(loose[:3])}{', ...' if len(loose) > 3 else ''}); rebuild it with "
            "createSystem(..., constraints=None, rigidWater=False)"
        )
    for i in reversed(range(n_constraints)):
        system.removeConstraint(i)
    return [f"{n_constraints} constraint(s) removed: every pair is held by a bonded term"]


def _cutoff_notes(system: openmm.System) -> list[str]:
    return [
        f"{force.getName()} has a cutoff ({force.getCutoffDistance()}) without periodicity; kept as it is"
        for force in system.getForces()
        if isinstance(force, _CUTOFF_FORCES) and force.getNonbondedMethod() == openmm.NonbondedForce.CutoffNonPeriodic
    ]


def _convert_obc2(system: openmm.System, positions: np.ndarray) -> list[str]:
    notes = []
    for i in reversed(range(system.getNumForces())):
        custom = system.getForce(i)
        converted = _gbsa_obc(custom) if isinstance(custom, openmm.CustomGBForce) else None
        if converted is None:
            continue
        if _same_force(system, custom, converted, positions):
            system.addForce(converted)
            system.removeForce(i)
            notes.append("the OBC2 CustomGBForce was replaced by the faster GBSAOBCForce, equal in energy and forces")
        else:
            notes.append("the CustomGBForce resembles OBC2 but differs from GBSAOBCForce numerically; kept as it is")
    return notes


def _gbsa_obc(force: openmm.CustomGBForce) -> openmm.GBSAOBCForce | None:
    """The built-in equivalent of OpenMM's own ``GBSAOBC2Force`` without salt, or None if ``force`` is not that."""
    parameters = [force.getPerParticleParameterName(i) for i in range(force.getNumPerParticleParameters())]
    extras = force.getNumGlobalParameters() + force.getNumExclusions() + force.getNumTabulatedFunctions()
    if (
        parameters != ["charge", "or", "sr"]
        or extras
        or force.getNumComputedValues() != 2
        or force.getNumEnergyTerms() not in (2, 3)
        or force.getNonbondedMethod() != openmm.CustomGBForce.NoCutoff
    ):
        return None
    radius = force.getComputedValueParameters(1)[1].replace(" ", "")
    terms = [force.getEnergyTermParameters(i)[0].replace(" ", "") for i in range(force.getNumEnergyTerms())]
    solvent = re.search(r"solventDielectric=([\d.eE+-]+)", terms[0])
    solute = re.search(r"soluteDielectric=([\d.eE+-]+)", terms[0])
    if "tanh(psi-0.8*psi^2+4.85*psi^3)" not in radius or any("kappa*" in term for term in terms):
        return None
    if solvent is None or solute is None:
        return None
    result = openmm.GBSAOBCForce()
    result.setNonbondedMethod(openmm.GBSAOBCForce.NoCutoff)
    result.setSolventDielectric(float(solvent.group(1)))
    result.setSoluteDielectric(float(solute.group(1)))
    result.setForceGroup(force.getForceGroup())
    if len(terms) == 2:
        result.setSurfaceAreaEnergy(0)
    for i in range(force.getNumParticles()):
        charge, offset_radius, scaled_radius = force.getParticleParameters(i)
        if offset_radius <= 0:
            return None
        result.addParticle(charge, offset_radius + _OFFSET, scaled_radius / offset_radius)
    return result


def _same_force(system: openmm.System, first: openmm.Force, second: openmm.Force, positions: np.ndarray) -> bool:
    # The two forces carry Coulomb constants that differ by 2e-7.
    noise = np.random.default_rng(0).normal(scale=0.005, size=positions.shape)
    for xyz in (positions, positions + noise):
        energy, forces = _force_alone(system, first, xyz)
        other_energy, other_forces = _force_alone(system, second, xyz)
        if not np.isclose(energy, other_energy, rtol=2e-6, atol=1e-3):
            return False
        if not np.allclose(forces, other_forces, rtol=0, atol=1e-3 + 2e-6 * np.abs(forces).max()):
            return False
    return True


def _force_alone(system: openmm.System, force: openmm.Force, positions: np.ndarray) -> tuple[float, np.ndarray]:
    alone = openmm.System()
    for i in range(system.getNumParticles()):
        alone.addParticle(system.getParticleMass(i))
    alone.addForce(openmm.XmlSerializer.clone(force))
    return energy_and_forces(alone, positions)

"""Which OpenMM platform runs the replicas: an explicit setting, the environment, or a short timing probe."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import openmm

from openmm_cgflow.errors import CGFlowError

__all__ = [
    "GPU_PLATFORMS",
    "PlatformChoice",
    "available_platforms",
    "choose_platform",
    "fastest_platform",
    "keep_platform",
    "platform_choice",
]

logger = logging.getLogger(__name__)

GPU_PLATFORMS = ("CUDA", "HIP", "OpenCL")
_ENVIRONMENT = "OPENMM_DEFAULT_PLATFORM"
# A later platform must beat the best so far by this factor, so that noise in the probe does not change the choice.
_MARGIN = 1.2


@dataclass(frozen=True)
class PlatformChoice:
    """A platform and how it was chosen.

    Attributes:
        name: OpenMM's name, such as ``"Reference"``.
        properties: The platform properties to create a Context with.
        reason: Why this platform, for the log.
    """

    name: str
    properties: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def is_gpu(self) -> bool:
        """Whether it is one of the platforms for GPUs."""
        return self.name in GPU_PLATFORMS

    def context(self, system: openmm.System, integrator: openmm.Integrator) -> openmm.Context:
        """A new Context of ``system`` on this platform."""
        return openmm.Context(system, integrator, openmm.Platform.getPlatformByName(self.name), dict(self.properties))

    def __str__(self) -> str:
        settings = "".join(f", {key}={value}" for key, value in self.properties.items())
        return f"{self.name}{settings} ({self.reason})"


def available_platforms() -> list[str]:
    """Names of the platforms that OpenMM has registered, in its order (slowest first)."""
    return [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


def platform_choice(name: str, precision: str = "mixed", reason: str = "") -> PlatformChoice:
    """A registered platform with the properties that this package wants of it.

    Forces are asked to be deterministic and precision to be as given where the platform knows these properties
    (others refuse them), and the CPU platform gets one thread, as processes run side by side.

    Arguments:
        name: Name of a registered platform.
        precision: ``single``, ``mixed`` or ``double``.
        reason: Why it was chosen.
    """
    known = openmm.Platform.getPlatformByName(name).getPropertyNames()
    wanted = {"Precision": precision, "DeterministicForces": "true", "Threads": "1"}
    return PlatformChoice(name, {key: value for key, value in wanted.items() if key in known}, reason)


def keep_platform(requested: str | None, earlier: str) -> str | None:
    """The platform to ask for so that a run goes on where it was: another probe could choose another one.

    Arguments:
        requested: Name set by the user, or None; it wins.
        earlier: Name of the platform of the checkpoint or model.
    """
    if requested is not None:
        return requested
    problem = "is not here" if earlier not in available_platforms() else _problem(platform_choice(earlier))
    if problem:
        logger.warning("the run was on OpenMM's platform %s, which %s: results will differ bitwise", earlier, problem)
        return None
    return earlier


def choose_platform(
    requested: str | None, precision: str, seconds_per_step: Callable[[PlatformChoice], float]
) -> PlatformChoice:
    """Chooses the platform: ``requested``, otherwise ``OPENMM_DEFAULT_PLATFORM``, otherwise the fastest one.

    Arguments:
        requested: Name set by the user, or None.
        precision: ``single``, ``mixed`` or ``double``; ignored by platforms without such a property.
        seconds_per_step: The probe: seconds for one step of one replica. It is called for every registered platform
            when the choice is free; a platform whose probe raises ``openmm.OpenMMException`` is passed over.

    Raises:
        CGFlowError: If the named platform does not exist or cannot be used on this machine.
    """
    if requested:
        return _named(requested, precision, "chains.platform")
    if from_environment := os.environ.get(_ENVIRONMENT):
        return _named(from_environment, precision, _ENVIRONMENT)
    for failure in openmm.Platform.getPluginLoadFailures():
        # OpenCL's plugin comes with every OpenMM; those of CUDA and HIP were installed on purpose.
        if "libOpenMMCUDA" in failure or "libOpenMMHIP" in failure:
            logger.warning("A GPU plugin of OpenMM did not load; looking for another platform: %s", failure)
    choices = [platform_choice(name, precision) for name in available_platforms()]
    return fastest_platform(choices, seconds_per_step, "replica and step")


def _named(name: str, precision: str, source: str) -> PlatformChoice:
    available = available_platforms()
    match = {item.lower(): item for item in available}.get(name.lower())
    if match is None:
        raise CGFlowError(_absent(name, source, available))
    choice = platform_choice(match, precision, f"set by {source}")
    if problem := _problem(choice):
        raise CGFlowError(
            f"{source}: the platform {match} {problem}. Available: {', '.join(available)}; leave the setting out to "
            "have one chosen."
        )
    return choice


def _problem(choice: PlatformChoice) -> str:
    """Why a registered platform does not work, such as CUDA without a device; empty where it does."""
    particle = openmm.System()
    particle.addParticle(1.0)
    try:
        choice.context(particle, openmm.VerletIntegrator(0.001))
    except openmm.OpenMMException as error:
        return f"is installed but cannot be used on this machine: {error}"
    return ""


def _absent(name: str, source: str, available: list[str]) -> str:
    message = f"{source}: OpenMM has no platform '{name}' here; available: {', '.join(available)}."
    known = {item.lower(): item for item in (*available, *GPU_PLATFORMS)}
    near = difflib.get_close_matches(name.lower(), list(known), n=2, cutoff=0.5)
    if name.lower() not in known:
        names = " or ".join(f"'{known[item]}'" for item in near)
        return message + (f" Did you mean {names}?" if names else "")
    name = known[name.lower()]
    failures = [line for line in openmm.Platform.getPluginLoadFailures() if name in line]
    message += " " + (" ".join(failures) if failures else f"No {name} plugin is installed.")
    if name == "CUDA":
        message += (
            " With an NVIDIA driver for CUDA 12 or 13: pip install 'openmm-cgflow[cuda12]' or 'openmm-cgflow[cuda13]'."
        )
    return message


def fastest_platform(
    choices: Iterable[PlatformChoice], seconds: Callable[[PlatformChoice], float], what: str
) -> PlatformChoice:
    """The one of several platforms that takes the fewest seconds; of two that are alike, the earlier.

    Arguments:
        choices: The platforms; one whose probe raises ``openmm.OpenMMException`` is passed over.
        seconds: The probe.
        what: What it times, for the log.

    Raises:
        CGFlowError: If none of them works.
    """
    best: PlatformChoice | None = None
    best_time = float("inf")
    timings = []
    for choice in choices:
        try:
            taken = seconds(choice)
        except openmm.OpenMMException as error:
            logger.warning("OpenMM's platform %s cannot be used on this machine: %s", choice.name, error)
            continue
        timings.append(f"{choice.name} {1e6 * taken:.2g}")
        if best is None or taken * _MARGIN < best_time:
            best, best_time = choice, taken
    if best is None:
        raise CGFlowError("None of OpenMM's platforms works on this machine; see: python -m openmm.testInstallation")
    return PlatformChoice(best.name, best.properties, f"timed, µs per {what}: {', '.join(timings)}")

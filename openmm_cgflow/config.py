"""The configuration: one validated tree of settings, read from YAML and written back resolved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, model_validator

from openmm_cgflow.describe import commented_yaml, describe, validated
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.settings import (
    ChainSettings,
    CoordinatesSettings,
    FlowSettings,
    Free,
    JointSettings,
    Mark,
    PartitionSettings,
    PMFSettings,
    PotentialSettings,
    SampleSettings,
    Section,
    Shown,
    StoppingSettings,
    SystemSettings,
    TemperingSettings,
    TrainingSettings,
)
from openmm_cgflow.units import Temperature

__all__ = ["Config", "apply_overrides", "dump_config", "free_settings", "load_config", "template", "validate"]


# Names of version 0.1 and what they are now.
_RENAMED = {
    "sampler": "chains",
    "sampling": "samples",
    "coordinates.box": "coordinates.half_edge",
}


class Config(Section):
    """Everything a run depends on."""

    system: Free[SystemSettings | None] = None
    temperature: Shown[Temperature] = Field(300.0, gt=0)
    """Temperature of the samples and of the free energy.

    With training.method reverse_kl and joint, the last one of the ladder."""
    seed: Shown[int] = Field(2025, ge=0, lt=2**31)
    """Seed of all random numbers: on a CPU the same seed gives the same run, bit for bit."""
    partition: PartitionSettings = PartitionSettings()
    coordinates: CoordinatesSettings = CoordinatesSettings()
    flow: FlowSettings = FlowSettings()
    chains: ChainSettings = ChainSettings()
    training: TrainingSettings = TrainingSettings()
    joint: JointSettings = JointSettings()
    pmf: PMFSettings = PMFSettings()
    stopping: StoppingSettings = StoppingSettings()
    tempering: TemperingSettings = TemperingSettings()
    samples: Free[SampleSettings] = SampleSettings()

    @property
    def has_exact_answers(self) -> bool:
        """Whether what is simulated is a synthetic target instead of a molecule."""
        return self.system is not None and self.system.target is not None

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, value: Any) -> Any:
        old = [name for name in _RENAMED if _has(value, name)]
        if old:
            raise ValueError("\n".join(map(_renamed, old)))
        return value

    @model_validator(mode="after")
    def _method_fits(self) -> Self:
        if self.training.method == "pmf" and self.coordinates.kind == "cartesian":
            raise ValueError(
                "coordinates: cartesian has no torsions to explore; it goes with training.method reverse_kl"
            )
        if self.training.method == "pmf" and self.chains.n_frames < 2:
            raise ValueError("chains.n_frames: training.method pmf needs at least 2, their spread is the noise")
        if self.training.method == "joint" and self.joint.map == "linear" and self.coordinates.kind != "box":
            raise ValueError("joint.map linear goes with coordinates.kind box, that is with a system.target")
        if self.system is not None and self.has_exact_answers != (self.coordinates.kind == "box"):
            raise ValueError("coordinates.kind box goes with system.target, and the other way round")
        return self


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML configuration; relative paths in its ``system`` section are relative to the file.

    Arguments:
        path: The YAML file.
        overrides: ``section.key=value`` strings, the value in YAML syntax.

    Raises:
        CGFlowError: If the file cannot be read or any setting is unknown, missing or out of range.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise CGFlowError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CGFlowError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise CGFlowError(f"{path}: expected a mapping of settings, got {type(tree).__name__}")
    config = validate(apply_overrides(tree, overrides), source=str(path))
    if config.system is None:
        return config
    return config.model_copy(update={"system": _absolute(config.system, path.resolve().parent)})


def validate(tree: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validates a tree of settings.

    Raises:
        CGFlowError: One line for each wrong setting; unknown keys name the nearest known one.
    """
    return validated(Config, tree, source)


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``tree`` with ``section.key=value`` settings replaced, values in YAML syntax."""
    result = yaml.safe_load(yaml.safe_dump(dict(tree)))
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise CGFlowError(f"--set {item}: expected section.key=value")
        for old in _RENAMED:
            if f"{name}.".startswith(f"{old}."):
                raise CGFlowError(f"--set {item}: {_renamed(old)}")
        *sections, key = name.split(".")
        node = result
        for section in sections:
            child = node.setdefault(section, {})
            if isinstance(child, str) and section == "coordinates":  # the `coordinates: cartesian` shorthand
                child = node[section] = {"kind": child}
            if not isinstance(child, dict):
                raise CGFlowError(f"--set {item}: {section} is not a section")
            node = child
        try:
            node[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise CGFlowError(f"--set {item}: not valid YAML: {error}") from None
    return result


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every number in the unit named at the top."""
    units = dict.fromkeys(setting.unit for setting in describe(Config) if setting.unit not in ("", "s"))
    header = f"# Resolved configuration. Units: {', '.join(units)}; checkpoint_interval in s.\n"
    return header + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def free_settings() -> tuple[str, ...]:
    """Names of the settings and sections that may differ when a run is continued.

    Nothing that is learned depends on them. Files may have moved: that they still hold the same molecule and force
    field is checked by its fingerprint.
    """
    return tuple(setting.path for setting in describe(Config) if Mark.FREE in setting.marks)


def template(given: Mapping[str, Any], command: str = "") -> str:
    """The commented configuration that ``openmm-cgflow init`` writes: what a first run may want to change.

    Arguments:
        given: A tree of settings to write instead of the defaults.
        command: How the file was made, for its first line.
    """
    heading = [
        *([f"Made by: {command}"] if command else []),
        "Check it with `openmm-cgflow check FILE.yaml`, train it with `openmm-cgflow train FILE.yaml -o RUN`.",
        "Paths are relative to this file. Values carry their unit, or are plain numbers in K, ps, 1/ps, Da and kT.",
        "There are more settings, with good defaults: the config.yaml of a run has all of them.",
    ]
    return commented_yaml(Config, given, heading)


def _absolute(system: SystemSettings, folder: Path) -> SystemSettings:
    def resolve(value: Any) -> Any:
        if isinstance(value, Path):
            return folder / value
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if isinstance(value, dict):
            return {name: resolve(item) for name, item in value.items()}
        if isinstance(value, PotentialSettings):
            return value.model_copy(update={name: resolve(item) for name, item in value})
        return value

    paths = {name: resolve(value) for name, value in system if name != "forcefield"}
    # A force-field name stays a name for OpenMM to find unless such a file lies beside the configuration.
    names = [str(folder / name) if (folder / name).is_file() else name for name in system.forcefield]
    return system.model_copy(update=paths | {"forcefield": names})


def _has(tree: Any, path: str) -> bool:
    section, dot, rest = path.partition(".")
    return isinstance(tree, Mapping) and section in tree and (not dot or _has(tree[section], rest))


def _renamed(old: str) -> str:
    return f"{old}: written for version 0.1; the name is now {_RENAMED[old]}"

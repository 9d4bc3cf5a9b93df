"""The configuration: one validated tree of settings, read from YAML and written back resolved."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.settings import (
    ChainSettings,
    CoordinatesSettings,
    FlowSettings,
    JointSettings,
    PartitionSettings,
    PMFSettings,
    PotentialSettings,
    SampleSettings,
    Section,
    StoppingSettings,
    SystemSettings,
    TemperingSettings,
    TrainingSettings,
)
from openmm_cgflow.units import Temperature

__all__ = ["Config", "apply_overrides", "dump_config", "load_config", "validate"]


class Config(Section):
    """Everything a run depends on."""

    system: SystemSettings | None = None
    """May be missing only where a MolecularSystem is handed over in Python."""
    temperature: Temperature = Field(300.0, gt=0)
    seed: int = Field(2025, ge=0, lt=2**31)
    partition: PartitionSettings = PartitionSettings()
    coordinates: CoordinatesSettings = CoordinatesSettings()
    flow: FlowSettings = FlowSettings()
    chains: ChainSettings = ChainSettings()
    training: TrainingSettings = TrainingSettings()
    joint: JointSettings = JointSettings()
    pmf: PMFSettings = PMFSettings()
    stopping: StoppingSettings = StoppingSettings()
    tempering: TemperingSettings = TemperingSettings()
    samples: SampleSettings = SampleSettings()

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
        if self.system is not None and (self.system.target is not None) != (self.coordinates.kind == "box"):
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
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise CGFlowError("\n".join([f"{source}: {len(lines)} problem(s) in the settings:", *lines])) from None


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``tree`` with ``section.key=value`` settings replaced, values in YAML syntax."""
    result = yaml.safe_load(yaml.safe_dump(dict(tree)))
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise CGFlowError(f"--set {item}: expected section.key=value")
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
    header = "# Resolved configuration. Units: K, ps, 1/ps, Da, kJ/mol/nm; checkpoint_interval in s.\n"
    return header + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


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


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"  {name}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"  {name}: required, but missing"
    return f"  {name or 'configuration'}: {problem['msg'].removeprefix('Value error, ')}"


def _known_keys(sections: list[str]) -> list[str]:
    model: type[BaseModel] = Config
    for section in sections:
        annotation = model.model_fields[section].annotation
        choices = get_args(annotation) or (annotation,)
        models = [item for item in choices if isinstance(item, type) and issubclass(item, BaseModel)]
        if not models:
            return []
        model = models[0]
    return list(model.model_fields)

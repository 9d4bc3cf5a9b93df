"""What the settings are, in words, read from their models: for `init`, the documentation and error messages."""

from __future__ import annotations

import difflib
import reprlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.settings import Mark, Section
from openmm_cgflow.units import Unit

__all__ = ["Setting", "commented_yaml", "describe", "find_setting", "section_of", "validated"]

S = TypeVar("S", bound=Section)

_WIDTH = 120  # of a line of YAML
_COMMENTS = 28  # column where comments begin, where a setting leaves room for them
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_TYPES = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
}


@dataclass(frozen=True)
class Setting:
    """A setting or a section of settings.

    Attributes:
        path: Names from the top of the YAML file, such as ``chains.timestep``.
        type: In words, such as ``whole number``, ``list of paths`` or ``section``.
        default: The default as YAML text, with its unit; empty where there is none.
        unit: Of plain numbers, such as ``ps``; empty where there is none.
        allowed: Words to choose from, or bounds, such as ``>= 1``; empty where all values are allowed.
        summary: One sentence.
        details: Further sentences; may be empty.
        marks: What else is to be known.
        example: A value as YAML text where the default is to leave the setting out; may be empty.
    """

    path: str
    type: str
    default: str
    unit: str
    allowed: tuple[str, ...]
    summary: str
    details: str
    marks: frozenset[Mark]
    example: str

    @property
    def name(self) -> str:
        """The last of its names."""
        return self.path.rpartition(".")[-1]

    @property
    def is_section(self) -> bool:
        return self.type == "section"

    @property
    def is_choice(self) -> bool:
        """Whether it is given in words that need to be explained."""
        return self.type == "word" or " or " in self.type


def describe(section: type[Section], prefix: str = "") -> Iterator[Setting]:
    """All settings of a section in their order, each section of it followed by its own settings.

    ``describe(Config)`` describes all settings there are.

    Arguments:
        section: The model.
        prefix: Its own path with a dot behind; empty for the whole configuration.
    """
    for name, field in section.model_fields.items():
        yield _setting(f"{prefix}{name}", field)
        inner = section_of(field)
        if inner is not None:
            yield from describe(inner, f"{prefix}{name}.")


def find_setting(root: type[Section], path: Sequence[str]) -> Setting | None:
    """The setting that a path of names leads to, the last of them that is one; None where there is none.

    Arguments:
        root: The model of the whole configuration.
        path: Names; numbers of list items and whatever else follows the name of a setting are passed over.
    """
    section: type[Section] | None = root
    found = None
    for depth, name in enumerate(path):
        if section is None or name not in section.model_fields:
            break
        field = section.model_fields[name]
        found = _setting(".".join(path[: depth + 1]), field)
        section = section_of(field)
    return found


def section_of(field: FieldInfo) -> type[Section] | None:
    """The model of a field that is a section, or may be one; else None."""
    for choice in _choices(field.annotation):
        if isinstance(choice, type) and issubclass(choice, Section):
            return choice
    return None


def commented_yaml(root: type[Section], given: Mapping[str, Any], heading: Sequence[str] = ()) -> str:
    """A configuration as YAML, every setting with its description as a comment.

    It has the settings marked as shown, with their defaults, and those that are given.

    Arguments:
        root: The model of the whole configuration.
        given: A tree of values to be written instead of defaults.
        heading: Lines of comment at the top.
    """
    lines = [f"# {line}" for line in heading]
    settings = list(describe(root))
    shown = {setting.path for setting in settings if Mark.SHOWN in setting.marks or _given(given, setting.path)}
    previous = ""
    for setting in settings:
        if not any(f"{path}.".startswith(f"{setting.path}.") for path in shown):
            continue
        text, words = "", setting.summary
        if not setting.is_section:
            text = _given(given, setting.path, setting.unit) or setting.default
            words = f"{words} {setting.details}".strip() if setting.is_choice else words
        if "." not in setting.path and (setting.is_section or "." in previous or not previous):
            lines.append("")
        entry = f"{setting.name}: {text}".strip()
        if not (text or setting.is_section):
            entry = f"# {setting.name}: {setting.example}"
        lines += _commented(entry, words, 2 * setting.path.count("."))
        previous = setting.path
    return "\n".join(lines) + "\n"


def validated(root: type[S], tree: Mapping[str, Any], source: str) -> S:
    """The settings of a tree, which is called ``source`` in messages.

    Raises:
        CGFlowError: One line for each wrong setting; unknown keys name the nearest known one.
    """
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        problems = dict(reversed([_explain(root, problem) for problem in error.errors()]))
        lines = [f"  {line}" for text in reversed(problems.values()) for line in text.splitlines()]
        raise CGFlowError("\n".join([f"{source}: {len(lines)} problem(s) in the settings:", *lines])) from None


def _setting(path: str, field: FieldInfo) -> Setting:
    inner = section_of(field)
    text = field.description or cleandoc((inner and inner.__doc__) or "")
    summary, _, details = text.partition("\n\n")
    unit = _unit(field)
    default = "" if inner or field.is_required() or field.default is None else _text(field.default, unit)
    return Setting(
        path,
        "section" if inner else _type(field.annotation),
        default,
        unit,
        () if inner else _allowed(field.annotation, field.metadata),
        " ".join(summary.split()),
        " ".join(details.split()),
        frozenset(mark for mark in field.metadata if isinstance(mark, Mark)),
        _text(field.examples[0], "") if field.examples else "",
    )


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, but for None; the type itself otherwise."""
    if get_origin(annotation) is Annotated:
        return _choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(choice for choice in get_args(annotation) if choice is not NoneType)
    return (annotation,)


def _type(annotation: Any) -> str:
    return " or ".join(dict.fromkeys(_type_of_one(choice) for choice in _choices(annotation)))


def _type_of_one(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "word"
    if origin is list:
        return f"list of {_type(arguments[0])}s"
    if origin is tuple:
        return f"list of {len(arguments)} {_type(arguments[0])}s"
    if origin is dict:
        return f"mapping of names to {_type(arguments[1])}s"
    return _TYPES.get(annotation, str(annotation))


def _allowed(annotation: Any, metadata: Sequence[Any]) -> tuple[str, ...]:
    words = [word for choice in _choices(annotation) if get_origin(choice) is Literal for word in get_args(choice)]
    if words:
        return tuple(map(str, words))
    if get_origin(annotation) is list and get_origin(get_args(annotation)[0]) is Annotated:
        metadata = get_args(get_args(annotation)[0])[1:]
    bounds = [
        f"{sign} {getattr(item, name)}" for item in metadata for name, sign in _BOUNDS.items() if hasattr(item, name)
    ]
    return (" and ".join(bounds),) if bounds else ()


def _unit(field: FieldInfo) -> str:
    found = [item.name for item in field.metadata if isinstance(item, Unit)]
    for argument in get_args(field.annotation):  # of the items of a list
        found += [item.name for item in get_args(argument) if isinstance(item, Unit)]
    return found[0] if found else ""


def _text(value: Any, unit: str) -> str:
    """A value as YAML, as one would write it by hand."""
    if isinstance(value, float):
        if unit == "ps" and value < 1:
            value, unit = round(1000 * value, 9), "fs"
        number = str(int(value)) if value.is_integer() else repr(value)
        return f"{number} {unit.removeprefix('1')}".strip()
    if isinstance(value, Path):
        value = str(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _given(tree: Mapping[str, Any], path: str, unit: str = "") -> str:
    """What a tree has at a path, as YAML; empty where it has nothing."""
    node: Any = tree
    for name in path.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return "" if node in (None, [], {}) else _text(node, unit)


def _commented(entry: str, comment: str, indent: int) -> list[str]:
    """The comment behind the entry where there is room for it, otherwise above."""
    margin = indent * " "
    line = f"{margin}{entry:<{_COMMENTS - indent}}  # {comment.removesuffix('.')}"
    if len(line) <= _WIDTH:
        return [line]
    above = textwrap.wrap(comment, _WIDTH, initial_indent=f"{margin}# ", subsequent_indent=f"{margin}# ")
    return [*above, f"{margin}{entry}"]


def _explain(root: type[Section], problem: Any) -> tuple[str, str]:
    """The path of the wrong setting and what is wrong with it."""
    location = [str(part) for part in problem["loc"]]
    setting = find_setting(root, location)
    name, message = ".".join(location), problem["msg"].removeprefix("Value error, ")
    if not name:
        return name, message
    if problem["type"] == "extra_forbidden":
        known = _known_keys(root, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        return name, f"{name}: unknown key; " + (
            f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        )
    about, got = "", f"got {reprlib.repr(problem['input'])}, expected"
    if setting is not None and not setting.is_section:
        about = f" ({_in_a_sentence(setting.summary)})"
        if " or " in setting.type:  # one problem for each of its types, named after it
            return setting.path, f"{setting.path}: {got} {setting.type}{about}"
    if problem["type"] == "missing":
        message = "required, but missing"
    elif message.startswith("Input should be "):
        unit = f" {setting.unit}" if setting and setting.unit else ""
        message = f"{got} {message.removeprefix('Input should be ')}{unit}"
    return name, f"{name}: {message}{'' if message.endswith(')') else about}"


def _in_a_sentence(summary: str) -> str:
    first = summary.partition(" ")[0]
    plain = summary[0].lower() + summary[1:] if first[1:].islower() or len(first) == 1 else summary
    return plain.removesuffix(".")


def _known_keys(root: type[Section], path: list[str]) -> list[str]:
    section: type[Section] | None = root
    for name in path:
        section = section_of(section.model_fields[name]) if section and name in section.model_fields else None
    return list(section.model_fields) if section else []

"""The directive ``all-settings``: every setting with its type, default and description, read from the models.

Each becomes a target of the role ``setting``, so that a page that names one that does not exist fails the build.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from docutils import nodes
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.addnodes import desc_name, desc_signature
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from openmm_cgflow import units
from openmm_cgflow.config import Config

_logger = logging.getLogger(__name__)

_WORDS = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`", Path: "path"}
_UNITS = {units.Temperature: "K", units.Time: "ps", units.Friction: "1/ps", units.Mass: "Da", units.Seconds: "s"}
_BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


class AllSettings(SphinxDirective):
    """Takes no arguments; fills the page with a section for each section of the settings."""

    def run(self) -> list[nodes.Node]:
        text = "\n".join(_sections(Config))
        missing = re.findall(r"^`{4}\{setting\} (\S+)\n[^\n]*\n`{4}$", text, re.MULTILINE)
        if missing and Config.model_config.get("use_attribute_docstrings"):
            _logger.warning("settings without a description: %s", ", ".join(missing), location=self.get_location())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def _sections(config: type[BaseModel]) -> Iterator[str]:
    yield "## The whole run\n"
    for name, field in config.model_fields.items():
        if _model(field.annotation) is None:
            yield from _setting(name, field)
    for name, field in config.model_fields.items():
        if model := _model(field.annotation):
            yield from _section(name, model, field)


def _section(path: str, model: type[BaseModel], field: FieldInfo) -> Iterator[str]:
    yield f"## {path}\n"
    yield f"{_markdown(inspect.getdoc(model) or '')} {_markdown(field.description or '')}\n"
    inner = {name: child for name, child in model.model_fields.items() if _model(child.annotation)}
    for name, child in model.model_fields.items():
        if name not in inner:
            yield from _setting(f"{path}.{name}", child)
    for name, child in inner.items():
        yield from _section(f"{path}.{name}", _model(child.annotation), child)


def _setting(path: str, field: FieldInfo) -> Iterator[str]:
    kind = _kind(field.annotation, tuple(field.metadata))
    if field.is_required():
        default = "required"
    elif (value := field.get_default(call_default_factory=True)) in (None, [], {}):
        default = "not set"
    else:
        default = f"default `{_scalar(value)}`"
    examples = "".join(f"; such as `{_scalar(value)}`" for value in (field.examples or [])[:1])
    description = _markdown(field.description or "")
    yield f"````{{setting}} {path}\n{kind}; {default}{examples}\n\n{description}".rstrip() + "\n````"


def _model(annotation: Any) -> type[BaseModel] | None:
    choices = get_args(annotation) or (annotation,)
    return next((item for item in choices if inspect.isclass(item) and issubclass(item, BaseModel)), None)


def _kind(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Type and bounds in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _kind(arguments[0], (*annotation.__metadata__, *metadata))
    if origin in (Union, UnionType):
        return " or ".join(_kind(item, metadata) for item in arguments if item is not NoneType)
    if origin is Literal:
        return "one of " + ", ".join(f"`{item}`" for item in arguments)
    if origin in (list, tuple) and Ellipsis not in arguments:
        first, comma, rest = _kind(arguments[0]).partition(",")
        return f"{'list of' if origin is list else len(arguments)} {first}s{comma}{rest}"
    if origin is dict:
        return "names, each with a " + _kind(arguments[1]).replace("`true` or `false` or", "truth value,")
    word = _WORDS.get(
        annotation, "file or folder" if getattr(annotation, "__name__", "") == "Path" else str(annotation)
    )
    unit = [name for quantity, name in _UNITS.items() if quantity.__metadata__[0] in metadata]
    bounds = [
        text.format(_scalar(getattr(item, name)))
        for name, text in _BOUNDS.items()
        for item in metadata
        if getattr(item, name, None) is not None
    ]
    return ", ".join([f"quantity, {unit[0]}" if unit else word, *bounds])


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _markdown(text: str) -> str:
    """A docstring's reStructuredText as Markdown: what it uses are paragraphs, literals and roles."""
    text = re.sub(r":\w+(?::\w+)?:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _parse(env: BuildEnvironment, signature: str, node: desc_signature) -> str:
    section, dot, name = signature.rpartition(".")
    node += desc_name(section + dot, section + dot, classes=["sig-prename"])
    node += desc_name(name, name)
    return signature


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_object_type("setting", "setting", "single: %s (setting)", _parse)
    app.add_directive("all-settings", AllSettings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

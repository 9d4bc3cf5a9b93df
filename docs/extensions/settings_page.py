"""The directive ``all-settings``: every setting with its type, default and description, read from the models.

Each becomes a target of the role ``setting``, so that a page that names one that does not exist fails the build. The
directive ``free-settings`` lists those that may change when a run is continued.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from docutils import nodes
from sphinx.addnodes import desc_name, desc_signature
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

from openmm_cgflow.config import Config, free_settings
from openmm_cgflow.describe import Setting, describe, find_setting
from openmm_cgflow.settings import Mark

_KNOWN = {setting.path for setting in describe(Config)}


class AllSettings(SphinxDirective):
    """Takes no arguments; fills the page with a section for each section of the settings."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(_page(list(describe(Config)))), allow_section_headings=True)


class FreeSettings(SphinxDirective):
    """Takes no arguments; a list of what may change when a run is continued."""

    def run(self) -> list[nodes.Node]:
        lines = []
        for path in free_settings():
            setting = find_setting(Config, path.split("."))
            assert setting is not None  # both come from the same models
            name = f"{{ref}}`{path} <section-{path}>`, all of it" if setting.is_section else f"{{setting}}`{path}`"
            lines.append(f"- {name}: {_markdown(setting.summary, '')}")
        return self.parse_text_to_nodes("\n".join(lines))


def _page(settings: list[Setting]) -> Iterator[str]:
    """Settings outside of sections first, then section by section."""
    yield "## The whole run\n"
    yield from _entries(settings, "")
    for section in (setting for setting in settings if setting.is_section):
        yield f"(section-{section.path})=\n## {section.path}\n\n{_description(section)}\n"
        yield from _entries(settings, section.path)


def _entries(settings: list[Setting], section: str) -> Iterator[str]:
    for setting in settings:
        if not setting.is_section and setting.path.rpartition(".")[0] == section:
            yield f"````{{setting}} {setting.path}\n{_facts(setting)}\n\n{_description(setting)}\n````"


def _facts(setting: Setting) -> str:
    kind, allowed = setting.type, " ".join(setting.allowed).replace(">=", "≥").replace("<=", "≤")
    if kind == "word":
        kind, allowed = "one of " + ", ".join(f"`{word}`" for word in setting.allowed), ""
    elif kind.startswith("mapping") and " or " in kind:
        kind = "mapping of names to plain values"
    each = "each " if kind.startswith("list") else ""
    facts = [" in ".join(filter(None, (kind, setting.unit))) + (f", {each}{allowed}" if allowed else "")]
    if setting.default in ("[]", "{}"):
        facts.append("empty by default")
    elif setting.default:
        # A third is not known to sixteen digits.
        facts.append("default `" + re.sub(r"(\.\d{4})\d+", r"\1", setting.default) + "`")
    else:  # what may be left out has an example
        facts.append("not set" if setting.example else "required")
    if setting.example:
        facts.append(f"such as `{setting.example}`")
    if Mark.SHOWN in setting.marks:
        facts.append("in the file of `init`")
    return "; ".join(facts)


def _description(setting: Setting) -> str:
    section = setting.path if setting.is_section else setting.path.rpartition(".")[0]
    return f"{_markdown(setting.summary, section)}\n\n{_markdown(setting.details, section)}".strip()


def _markdown(text: str, section: str) -> str:
    """Words that are explained one by one stand out, and names of settings lead to them."""
    text = re.sub(r"(^|; )([a-z_]+):(?= )", r"\1`\2`:", text)

    def linked(found: re.Match[str]) -> str:
        name = found[0]
        path = name if "." in name else f"{section}.{name}"
        return f"{{setting}}`{name} <{path}>`" if path in _KNOWN else name

    return re.sub(r"(?<![\w.`])[a-z]+(?:[._][a-z]+)+(?![\w`])", linked, text)


def _parse(env: BuildEnvironment, signature: str, node: desc_signature) -> str:
    section, dot, name = signature.rpartition(".")
    node += desc_name(section + dot, section + dot, classes=["sig-prename"])
    node += desc_name(name, name)
    return signature


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_object_type("setting", "setting", "single: %s (setting)", _parse)
    app.add_directive("all-settings", AllSettings)
    app.add_directive("free-settings", FreeSettings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Sphinx settings of the site; ``python tools/build_site.py`` builds it.

The source directory is the whole repository, so that links from a page to ``results/`` and ``examples/`` work on the
site as they do in a checkout.
"""

from __future__ import annotations

import re
import sys
from functools import reduce
from pkgutil import resolve_name
from typing import Any

from docutils import nodes  # type: ignore[import-untyped]
from pydantic import BaseModel
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import dist_moe

project = "dist_moe"
author = "the authors of dist_moe"
version = release = dist_moe.__version__
root_doc = "docs/index"
include_patterns = ["CHANGELOG.md", "docs/**.md", "examples/*.md", "results/**.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
highlight_language = "text"

autodoc_default_options = {"exclude-members": "model_config, model_post_init"}  # pydantic's
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures would be longer than their docstrings, which give shapes and units
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
html_title = f"dist_moe {version}"
html_copy_source = True
html_show_copyright = False
html_show_sphinx = False

INDENTED = re.compile(r"^ {4,}\S")
PROPERTIES = ("attribute", "data", "property")
AS_WRITTEN: dict[str, list[str]] = {}


def use_rst(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Make a docstring what Sphinx reads: literal blocks, code in backticks, and the fields of settings."""
    lines[:] = AS_WRITTEN.pop(name, lines)
    text: list[str] = []
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else "."
        if INDENTED.match(line) and not before.strip() and not INDENTED.match(next(filter(str.strip, text[::-1]), "")):
            text += ["::", ""]
        text.append(line)
    lines[:] = [re.sub(r"(?<![`:\w])`([^`]+)`(?![`_])", r"``\1``", line) for line in text]
    if isinstance(thing, type) and issubclass(thing, BaseModel):
        fields = {key: field for key, field in thing.model_fields.items() if field.description}
        lines += ["", *(f"* ``{key}``: {_literal(str(field.description))}" for key, field in fields.items()), ""]


def _literal(description: str) -> str:
    return re.sub(r"([*_|`\\])", r"\\\1", description)


def hide_fields(app: Sphinx, what: str, name: str, thing: Any, *_: Any) -> tuple[str, None] | None:
    """Leave the signature of settings away: their fields are listed below it."""
    return ("", None) if isinstance(thing, type) and issubclass(thing, BaseModel) else None


def keep_properties(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Remember what stands at a property before napoleon reads "Number of slots: ..." as its type."""
    if what in PROPERTIES:
        AS_WRITTEN[name] = list(lines)


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> nodes.Element | None:
    """Resolve references by short names, and accept those to what exists without an entry; a stale one is reported."""
    if node.get("refdomain") != "py":
        return None
    domain, target = env.domains.python_domain, node["reftarget"]
    found = domain.find_obj(env, "", "", target, None, 1)
    if sum(not entry.aliased for _, entry in found) == 1:
        node["refspecific"] = True
        return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], target, node, text)
    return text if _exists(target) else None


def _exists(dotted: str) -> bool:
    """Whether ``dotted`` can be imported, or one of our modules has what is called that."""
    try:
        resolve_name(dotted)
    except (ImportError, AttributeError, ValueError):
        ours: list[Any] = [module for name, module in sys.modules.items() if name.startswith("dist_moe.")]
        return any(reduce(lambda thing, part: getattr(thing, part, None), dotted.split("."), one) for one in ours)
    return True


def setup(app: Sphinx) -> None:
    """Connect the functions above; the default priority is 500, napoleon's."""
    app.connect("autodoc-process-docstring", keep_properties, priority=100)
    app.connect("autodoc-process-docstring", use_rst, priority=900)
    app.connect("autodoc-process-signature", hide_fields)
    app.connect("missing-reference", resolve)

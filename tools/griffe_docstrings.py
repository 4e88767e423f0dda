"""Docstrings as Markdown for the API reference: cross-references, equations and examples written in reStructuredText.

An extension of griffe, which mkdocstrings loads (see ``mkdocs.yml``). Equations become MathML, which browsers render
without a script, so that the pages also work without a network.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

__all__ = ["Docstrings", "markdown_of"]

_ROLE = re.compile(r":(class|func|meth|attr|data|mod|obj):`(~?)([^`<>]+)`")
_MATH = re.compile(r":math:`([^`]+)`")
_DIRECTIVE = re.compile(r"^(?P<indent> *)\.\. (?P<kind>math|code-block)::(?P<rest>.*)$")


def markdown_of(text: str, scope: str = "") -> str:
    """A docstring in Markdown.

    Args:
        text: The docstring, without the indentation of its first line.
        scope: Address of the object that has it; names without a module are looked up there.
    """
    lines, done = text.splitlines(), []
    while lines:
        line = lines.pop(0)
        match = _DIRECTIVE.match(line)
        if match is None:
            done.append(line)
            continue
        inside = []
        while lines and (not lines[0].strip() or lines[0].startswith(match["indent"] + " ")):
            inside.append(lines.pop(0))
        body = textwrap.dedent("\n".join(inside)).strip()
        if match["kind"] == "math":
            block = "\n\n".join(_equation(part) for part in re.split(r"\n\s*\n", f"{match['rest'].strip()}\n{body}"))
        else:
            block = f"```{match['rest'].strip()}\n{body}\n```"
        done += ["", *textwrap.indent(block, match["indent"]).splitlines(), ""]
    text = _MATH.sub(lambda m: convert(" ".join(m[1].split())), "\n".join(done))
    return _ROLE.sub(lambda m: _reference(m[2], m[3], scope), text)


def _equation(latex: str) -> str:
    return convert(" ".join(latex.split()), display="block")


def _reference(tilde: str, address: str, scope: str) -> str:
    """A link where the reference has a place for the name, else the name alone."""
    address = " ".join(address.split()).removesuffix("()")
    shown = address.rpartition(".")[2] if tilde else address.lstrip(".")
    full = address if address.startswith("torchmdnet") else f"{scope}.{address.lstrip('.')}"
    return f'<autoref identifier="{full}" optional><code>{shown}</code></autoref>'


class Docstrings(griffe.Extension):
    """Turns each docstring into Markdown before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute that is loaded."""
        if obj.docstring is not None:
            scope = obj.parent.path if obj.parent is not None and not obj.is_class else obj.path
            obj.docstring.value = markdown_of(obj.docstring.value, scope)

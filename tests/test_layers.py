"""Imports point down: what a layer may know is drawn once, here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "torchmdnet"

#: From the ground up; parts of one layer may only know each other where a pair says so.
LAYERS = [
    {
        "_version",
        "errors",
        "elements",
        "files",
        "limits",
        "loop_cache",
        "memory",
        "page",
        "parse",
        "processes",
        "text",
        "tracing",
        "typing",
    },
    {"arguments", "catalogue", "options", "units"},
    {"neighbors", "ops", "graph"},
    {"nn", "recording", "forces"},
    {"tape"},
    {"models", "heads", "priors", "datasets"},
    {
        "predictions",
        "energy",
        "whole_calls",
        "potential",
        "ensemble",
        "compiled",
        "properties",
        "stacking",
        "build",
        "checkpoint",
    },
    {"config", "data", "training", "calculators", "labelling", "testing", "optimize", "export", "scripting"},
    {"scripts"},
]
NEIGHBOURS = {
    ("elements", "errors"),
    ("limits", "errors"),
    ("memory", "errors"),
    ("parse", "errors"),
    ("files", "errors"),
    ("files", "text"),
    ("parse", "text"),
    ("text", "errors"),
    ("loop_cache", "files"),
    ("graph", "neighbors"),
    ("ops", "graph"),  # kernels run along edges
    ("neighbors", "ops"),  # loops are compiled in one place
    ("neighbors", "graph"),  # the module OptimizedDistance stands on the same function as graphs
    ("heads", "models"),  # heads read Features
    ("energy", "predictions"),
    ("whole_calls", "energy"),
    ("whole_calls", "predictions"),
    ("potential", "energy"),
    ("potential", "predictions"),
    ("potential", "whole_calls"),
    ("ensemble", "potential"),
    ("ensemble", "predictions"),
    ("ensemble", "stacking"),
    ("compiled", "potential"),
    ("compiled", "predictions"),
    ("build", "potential"),
    ("build", "properties"),
    ("checkpoint", "build"),
    ("checkpoint", "potential"),
    ("checkpoint", "ensemble"),
    ("neighbors", "scripting"),  # torch.jit.script asks a module for the form it can read
    ("potential", "scripting"),
    ("data", "config"),  # words for booleans
    ("config", "training"),  # names of losses
    ("training", "config"),
    ("training", "data"),
    ("training", "calculators"),
}
#: Established addresses that only forward; nothing inside the package imports through one.
FORWARDS = {"module", "loss", "utils", "extensions", "models.model", "models.output_modules", "models.utils"}

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torchmdnet"):
            found.append(node.module.removeprefix("torchmdnet").lstrip("."))
        elif isinstance(node, ast.Import):
            found += [
                a.name.removeprefix("torchmdnet").lstrip(".") for a in node.names if a.name.startswith("torchmdnet")
            ]
    return [name for name in found if name]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_down(path: Path) -> None:
    name = name_of(path)
    if name in FORWARDS or name.startswith("extensions") or name in ("", "__init__"):
        return
    part = name.split(".")[0]
    assert part in RANK, f"{name}: draw its place in LAYERS"
    for imported in imports_of(path):
        assert imported not in FORWARDS, f"{name} imports through the forwarding module {imported}"
        other = imported.split(".")[0]
        allowed = other == part or RANK[other] < RANK[part] or (part, other) in NEIGHBOURS
        assert allowed, f"{name} (layer {RANK[part]}) must not know {imported} (layer {RANK[other]})"


@pytest.mark.parametrize("module", ["", ".models", ".heads", ".priors", ".datasets", ".checkpoint", ".config"])
def test_light_imports_do_not_load_pytorch(module: str) -> None:
    heavy = ("torch", "lightning", "ase", "numba")
    code = f"import sys, torchmdnet{module}; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"

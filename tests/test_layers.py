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
        "domains",
        "errors",
        "elements",
        "files",
        "limits",
        "loop_cache",
        "memory",
        "page",
        "parse",
        "processes",
        "switches",
        "text",
        "tracing",
        "typing",
        "viewer",
    },
    {"arguments", "catalogue", "options", "units"},
    {"losses", "neighbors", "ops", "graph"},
    {"nn", "recording", "forces", "scripting"},
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
    {
        "config",
        "data",
        "training",
        "calculators",
        "labelling",
        "testing",
        "optimize",
        "export",
        "timing",
        "simulation",
        "evaluation",
    },
    {"scripts"},
]
NEIGHBOURS = {
    ("elements", "errors"),
    ("limits", "errors"),
    ("memory", "errors"),
    ("memory", "switches"),
    ("switches", "errors"),
    ("typing", "switches"),
    ("parse", "errors"),
    ("files", "errors"),
    ("files", "text"),
    ("parse", "text"),
    ("text", "errors"),
    ("loop_cache", "files"),
    ("graph", "neighbors"),
    ("neighbors", "ops"),  # loops are compiled in one place
    ("graph", "ops"),  # sums over the atoms of a system
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
    ("nn", "scripting"),  # torch.jit.script asks a module for the form it can read
    ("scripting", "recording"),
    ("data", "config"),  # words for booleans
    ("training", "config"),
    ("training", "data"),
    ("training", "calculators"),
    ("calculators", "export"),  # the file for metatomic is made of a recording of edges
    ("timing", "calculators"),  # they are timed
    ("evaluation", "data"),
    ("evaluation", "calculators"),
    ("simulation", "calculators"),
    ("labelling", "simulation"),  # whether dynamics have exploded
}
#: Established addresses that only forward; nothing inside the package imports through one.
FORWARDS = {"module", "loss", "utils", "extensions", "models.model", "models.output_modules", "models.utils"}

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> list[str]:
    """Modules of the package that a file imports, also inside of functions, but not for type checkers alone."""
    found: list[str] = []

    def collect(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children: list[ast.AST] = [*node.orelse]
        else:
            children = [*ast.iter_child_nodes(node)]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name of {ast.unparse(node)}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.extend(name if name in HERE else str(node.module) for name in names)
        elif isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        for child in children:
            collect(child)

    collect(ast.parse(path.read_text(encoding="utf-8")))
    ours = [name.removeprefix("torchmdnet").lstrip(".") for name in found if name.split(".")[0] == "torchmdnet"]
    return [name for name in dict.fromkeys(ours) if name]


#: Modules of the package, by their whole names.
HERE = {f"torchmdnet.{name_of(path)}".removesuffix(".__init__") for path in modules()}


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


def circles(graph: dict[str, list[str]]) -> list[list[str]]:
    """Ways from a node back to itself: one through every group of nodes that can all be reached from each other."""
    state: dict[str, int] = {}
    way: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        state[node] = 1
        way.append(node)
        for other in graph[node]:
            if state.get(other) == 1:
                found.append([*way[way.index(other) :], other])
            elif other not in state:
                visit(other)
        way.pop()
        state[node] = 2

    for node in graph:
        if node not in state:
            visit(node)
    return found


def test_a_circle_is_found() -> None:
    assert circles({"a": ["b"], "b": ["c"], "c": ["b", "d"], "d": []}) == [["b", "c", "b"]]
    assert circles({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_no_module_needs_itself_by_way_of_others() -> None:
    """Neither at its top nor in any function."""
    graph = {name_of(path): imports_of(path) for path in modules()}
    graph = {name: [other for other in others if other in graph and other != name] for name, others in graph.items()}
    assert [" -> ".join(circle) for circle in circles(graph)] == []


def test_parts_of_one_layer_do_not_need_each_other_in_circles() -> None:
    graph: dict[str, list[str]] = {part: [] for layer in LAYERS for part in layer}
    for part, other in NEIGHBOURS:
        graph[part].append(other)
    assert [" -> ".join(circle) for circle in circles(graph)] == []


def test_every_pair_is_needed() -> None:
    used = {(name_of(path).split(".")[0], other.split(".")[0]) for path in modules() for other in imports_of(path)}
    assert set() == NEIGHBOURS - used


@pytest.mark.parametrize("module", ["", ".models", ".heads", ".priors", ".datasets", ".checkpoint", ".config"])
def test_light_imports_do_not_load_pytorch(module: str) -> None:
    heavy = ("torch", "lightning", "ase", "numba")
    code = f"import sys, torchmdnet{module}; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"

"""Triton's kernels compile for GPUs, also on a machine without one; the interpreter accepts more than the compiler."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton.compiler")

#: Sizes of a batch or a graph; the others are those of a network.
VARYING = {"num_edges", "size", "SIZE", "E", "P"}
NUMBERS = {"F", "C", "D", "num_edges", "size", "SIZE", "num_cells", "width", "E", "P"}
INDICES = {"cell", "sender", "row", "rows", "back", "reverse", "row_start", "receiver", "order", "of_edge"}
INDICES |= {"item_cell", "item_start", "edge_start"}

TILE = {"EDGES": 4, "CHANNELS": 64}
GRID = {"START": 0.0, "STOP": 5.0, "CELLS": 256, "LOWER": 0.0, "UPPER": 5.0}
#: The module of a kernel, its name, and the constants it is compiled for.
LARGEST: list[tuple[str, str, dict[str, Any]]] = [
    ("edges", "message", {"L": 3, "K": 6, "D": 0, "SUMS": True, "SLOPES": True, **TILE}),
    ("edges", "embed", {"L": 3, "K": 6, "SUMS": False, "DIRECTIONS": True, "SLOPES": True, **TILE}),
    (
        "edges",
        "table_items",
        {"C": 9, "L": 3, "K": 6, "D": 0, "ROWS": 8, "CHANNELS": 64, "Y": None, "Z": None, "S": None},
    ),
    ("nodes", "interact_backward", {"BOTH": True, "BLOCK": 128}),
]
KERNELS = [
    *LARGEST,
    ("edges", "message", {"L": 1, "K": 6, "D": 16, "C": 1, "SUMS": True, "SLOPES": False, **TILE}),
    ("edges", "message", {"L": 3, "K": 1, "D": 0, "F": 1, "SUMS": False, "SLOPES": True, **TILE}),
    ("edges", "embed", {"L": 1, "K": 6, "SUMS": True, "DIRECTIONS": False, "SLOPES": False, **TILE}),
    ("edges", "embed_factor", {"C": 9, "L": 3, "K": 6, "IS_SHARED": False, **TILE}),
    ("edges", "contract_edges", {"K": 6, "EDGES": 4, "CHANNELS": 16}),
    ("edges", "table_items", {"C": 9, "L": 3, "K": 6, "D": 0, "ROWS": 8, "CHANNELS": 64, "X": None, "S": None}),
    (
        "edges",
        "table_items",
        {"C": 1, "L": 1, "K": 6, "D": 16, "ROWS": 8, "CHANNELS": 64, "Y": None, "Z": None},
    ),
    ("edges", "table_sum", {"K": 6, "BLOCK": 128}),
    ("nodes", "matrix_product", {"X_IS_TURNED": False, "Y_IS_TURNED": True, "BOTH": False, "BLOCK": 128}),
    ("nodes", "interact", {"BOTH": False, "BLOCK": 128}),
    *(
        ("nodes", f"{name}{kind}", {"BLOCK": 128})
        for name in ("normalize", "part_norms", "refine")
        for kind in ("", "_backward")
    ),
    ("nodes", "normalize_twice", {"BLOCK": 128}),
    *(("nodes", name, {"BLOCK": 128}) for name in ("scale", "scale_backward", "square_norm", "square_norm_backward")),
    ("geometry", "pairs_forward", {**GRID, "BLOCK": 128}),
    ("geometry", "pairs_forward", {**GRID, "LOWER": 0.5, "BLOCK": 128}),
    ("geometry", "edges_forward", {"SIGN": -1, "BLOCK": 128}),
    ("geometry", "geometry_backward", {"SIGN": -1, "NUM_Y": 2, "NUM": 6, "BLOCK": 128}),
    *(("geometry", "pull_back", {"HAS_VIRIAL": has, "EDGES": 32}) for has in (False, True)),
]


def compile_for_gpu(module: str, name: str, constants: dict[str, Any], dtype: str, capability: int = 80) -> Any:
    """A kernel of :mod:`torchmdnet.ops.triton`, compiled for a GPU, in a process without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"torchmdnet.ops.triton.{module}"), name)
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: "*i64" if name in INDICES else f"*{dtype}" for name in names}
    signature |= {
        name: "i32" for name in names if name in NUMBERS and not (name == "D" and "refine" in kernel.__name__)
    }
    if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 3):
        source = ASTSource(kernel, signature, constants)
    else:
        ordered = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
        places = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
        aligned = {places[name]: [["tt.divisibility", 16]] for name in names if signature[name].startswith("*")}
        source = ASTSource(kernel, ordered, {places[name]: value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def compile_all(kernels: list[tuple[str, str, dict[str, Any]]], dtype: str) -> None:
    """To be called in a process without the interpreter."""
    for module, name, constants in kernels:
        ptx = compile_for_gpu(module, name, constants, dtype).asm["ptx"]
        is_double = "fma.rn.f64" in ptx or "add.f64" in ptx or "mul.f64" in ptx
        assert is_double == (dtype == "fp64"), f"{name} computes in another precision than {dtype}"


def find_specialized() -> list[str]:
    """Arguments that differ from call to call, and with which kernels would be compiled again."""
    from triton.runtime.jit import JITFunction

    found = []
    for module in ("edges", "geometry", "nodes"):
        kernels = vars(importlib.import_module(f"torchmdnet.ops.triton.{module}"))
        for name in (name for name, kernel in kernels.items() if isinstance(kernel, JITFunction)):
            source = inspect.getsource(kernels[name].fn)
            if "tl.store" not in source and "put" not in source:
                continue  # kernels call it
            for parameter in kernels[name].params:
                is_size = parameter.name in VARYING and not parameter.is_constexpr
                is_index = parameter.name in INDICES
                if (is_size and not parameter.do_not_specialize) or (
                    is_index and not parameter.do_not_specialize_on_alignment
                ):
                    found.append(f"{module}.{name}: {parameter.name}")
    return found


def run(kernels: str, dtype: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = f"import test_triton_compilation as t; t.compile_all({kernels}, {dtype!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_sizes_that_vary_compile_nothing_again() -> None:
    """Neither a number that is 1 or a multiple of 16, nor a row of an array that begins at an odd place."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = "import test_triton_compilation as t; print(t.find_specialized(), t.VARYING)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("[] "), done.stdout + done.stderr


def test_the_largest_kernels_compile_for_gpus() -> None:
    run("t.LARGEST", "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_every_kernel_compiles_for_gpus_in_its_own_precision(dtype: str) -> None:
    run("t.KERNELS", dtype)

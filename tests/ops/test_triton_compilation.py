"""Triton's kernels compile for GPUs, also on a machine without one; the interpreter accepts more than the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton.compiler")

NUMBERS = {"F", "C", "D", "num_edges", "size", "SIZE", "num_cells"}
INDICES = {"cell", "sender", "row", "rows", "back", "reverse", "row_start", "receiver", "order"}
INDICES |= {"item_cell", "item_start", "edge_start"}

TILE = {"EDGES": 4, "CHANNELS": 64}
EDGES = [
    ("message", {"L": 3, "K": 6, "D": 0, "SUMS": True, "SLOPES": True, **TILE}),
    ("embed", {"L": 3, "K": 6, "SUMS": False, "DIRECTIONS": True, "SLOPES": True, **TILE}),
    ("table_items", {"C": 9, "L": 3, "K": 6, "D": 0, "ROWS": 8, "CHANNELS": 64, "Y": None, "Z": None, "S": None}),
]
FURTHER_EDGES = [
    ("message", {"L": 1, "K": 6, "D": 16, "C": 1, "SUMS": True, "SLOPES": False, **TILE}),
    ("message", {"L": 3, "K": 1, "D": 0, "F": 1, "SUMS": False, "SLOPES": True, **TILE}),
    ("embed", {"L": 1, "K": 6, "SUMS": True, "DIRECTIONS": False, "SLOPES": False, **TILE}),
    ("embed_factor", {"C": 9, "L": 3, "K": 6, "IS_SHARED": False, **TILE}),
    ("contract_edges", {"K": 6, "EDGES": 4, "CHANNELS": 16}),
    ("table_items", {"C": 9, "L": 3, "K": 6, "D": 0, "ROWS": 8, "CHANNELS": 64, "X": None, "S": None}),
    ("table_items", {"C": 1, "L": 1, "K": 6, "D": 16, "ROWS": 8, "CHANNELS": 64, "Y": None, "Z": None}),
    ("table_sum", {"K": 6, "BLOCK": 128}),
]
NODES = [("interact_backward", {"BOTH": True, "BLOCK": 128})]
FURTHER_NODES = [
    ("matrix_product", {"X_IS_TURNED": False, "Y_IS_TURNED": True, "BOTH": False, "BLOCK": 128}),
    ("interact", {"BOTH": False, "BLOCK": 128}),
    *(
        (f"{name}{kind}", {"BLOCK": 128})
        for name in ("normalize", "part_norms", "refine")
        for kind in ("", "_backward")
    ),
    ("normalize_twice", {"BLOCK": 128}),
]


def compile_for_gpu(kernel: Any, constants: dict[str, Any], dtype: str) -> str:
    """Assembly for a GPU of compute capability 8.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: "*i64" if name in INDICES else f"*{dtype}" for name in names}
    signature |= {
        name: "i32" for name in names if name in NUMBERS and not (name == "D" and "refine" in kernel.__name__)
    }
    if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 3):
        source = ASTSource(kernel, signature, constants)
    else:
        ordered = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
        source = ASTSource(kernel, ordered, {(kernel.arg_names.index(name),): x for name, x in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]


def compile_all(edges: list[tuple[str, dict[str, Any]]], nodes: list[tuple[str, dict[str, Any]]], dtype: str) -> None:
    """To be called in a process without the interpreter."""
    from torchmdnet.ops.triton import edges as edge_kernels
    from torchmdnet.ops.triton import nodes as node_kernels

    for module, kernels in ((edge_kernels, edges), (node_kernels, nodes)):
        for name, constants in kernels:
            ptx = compile_for_gpu(getattr(module, name), constants, dtype)
            is_double = "fma.rn.f64" in ptx or "add.f64" in ptx or "mul.f64" in ptx
            assert is_double == (dtype == "fp64"), f"{name} computes in another precision than {dtype}"


def run(lists: str, dtype: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    code = f"import test_triton_compilation as t; t.compile_all({lists}, {dtype!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_largest_kernels_compile_for_gpus() -> None:
    run("t.EDGES, t.NODES", "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_every_kernel_compiles_for_gpus_in_its_own_precision(dtype: str) -> None:
    run("t.EDGES + t.FURTHER_EDGES, t.NODES + t.FURTHER_NODES", dtype)

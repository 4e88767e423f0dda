"""The kernels that search for neighbours, and those of sums, compile for GPUs, also on a machine without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton.compiler")

REALS = {"x", "out", "guard", "q", "s", "box", "pos", "vec", "edge_dist", "dist", "shifts"}
DOUBLES = {"cells", "limits", "home", "moved", "then", "box_then"}
SHORT = {"sizes", "bucket", "bounds", "near", "image", "count", "here", "where", "rank", "counts", "flag", "flags"}
LONG = {"batch", "key", "order", "notes", "starts", "index", "of_edge", "reverse", "row_start", "atoms", "sign"}
LONG |= {"z", "elements", "systems", "start"}
BLOCKS = {"ATOMS": 4, "TILE": 32}
KERNELS = [
    ("lattices", {"INFINITE": False, "BLOCK": 32}),
    ("moves", {"BLOCK": 128}),
    ("places", {"HAS_BOX": True, "SKIN": True, "BLOCK": 128}),
    ("rows", {"HAS_BOX": True, "SKIN": True, **BLOCKS}),
    ("measured", {"HAS_BOX": True, "LOOP": True, **BLOCKS}),
    ("edges", {"HAS_BOX": True, "SKIN": True, "LOOP": True, "FIXED": True, "LISTS": True, "SIZE": 64, "TILE": 16}),
]
FURTHER = [
    ("lattices", {"INFINITE": True, "BLOCK": 32}),
    ("places", {"HAS_BOX": False, "SKIN": False, "BLOCK": 128}),
    ("rows", {"HAS_BOX": False, "SKIN": False, **BLOCKS}),
    ("measured", {"HAS_BOX": False, "LOOP": False, **BLOCKS}),
    ("edges", {"HAS_BOX": False, "SKIN": False, "LOOP": False, "FIXED": False, "LISTS": False, "SIZE": 64, "TILE": 16}),
]
SUMS = [
    ("by_index", {"ROWS": 512, "COLUMNS": 4}),
    ("by_row", {"NUM": 2, "K": 6, "ROWS": 16, "COLUMNS": 8}),
    ("mark", {"FARTHEST": 8e4, "HAS_BOX": True, "HAS_Q": True, "HAS_S": True, "BLOCK": 128}),
    ("spread", {"BLOCK": 128}),
]


def kind_of(name: str, real: str) -> str:
    """The type of an argument."""
    kinds = ((REALS, f"*{real}"), (DOUBLES, "*fp64"), (SHORT, "*i32"), (LONG, "*i64"))
    return next((kind for names, kind in kinds if name in names), "i32")


def compile_all(kernels: list[tuple[str, dict[str, Any]]], real: str) -> None:
    """To be called in a process without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torchmdnet.neighbors import device_kernels
    from torchmdnet.ops.triton import sums

    for name, constants in kernels:
        kernel = getattr(device_kernels, name, None) or getattr(sums, name)
        signature = {argument: kind_of(argument, real) for argument in kernel.arg_names if argument not in constants}
        if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 3):
            source = ASTSource(kernel, signature, constants)
        else:
            ordered = {x: "constexpr" if x in constants else signature[x] for x in kernel.arg_names}
            source = ASTSource(kernel, ordered, {(kernel.arg_names.index(x),): y for x, y in constants.items()})
        assert ".entry" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]


def run(code: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"import test_device_compilation as t; t.compile_all({code})"]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_kernels_of_a_captured_step_compile_for_gpus() -> None:
    run("t.KERNELS + t.SUMS, 'fp32'")


@pytest.mark.slow
def test_their_other_forms_compile_too() -> None:
    run("t.FURTHER, 'fp32'")
    run("t.KERNELS + t.SUMS, 'fp64'")

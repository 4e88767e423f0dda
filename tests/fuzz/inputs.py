"""Inputs for the targets: bytes, mutations of valid files, and values that were trouble somewhere."""

from __future__ import annotations

import re
from typing import Any

import targets
import yaml
from hypothesis import strategies as st

from torchmdnet.config.flags import OPTIONS

KEYS = sorted(OPTIONS)
#: YAML that stands for something odd.
ODD = [
    "null", "~", "", "[]", "{}", "[[]]", "{a: {b: c}}", "[a, null]", "[1, [2]]", "nan", ".nan", ".inf", "-.inf", "-1",
    "0", "1e300", "1e-300", "1e999", "0x_", "0x10", "0b_", "1_0", "1:2:3", "9" * 400, "9" * 5000, "1.5", "true", "no",
    "off", "2024-13-45", "!!int abc", "!!float x", "!!bool x", "!!timestamp x", "!!binary '='", "!!set {a}",
    "!!omap []", "!!python/object:os.system x", "!!python/tuple [1]", "&a [*a]", "&a {b: *a}", '"\\0"', '"\\ud800"',
    "'" + "a" * 500 + "'", "[" * 70 + "]" * 70, "os:system", "torch:nope", "no_such_module:X", ":", "a:b", "../..", "/",
    "/dev/null", "~", "~no_such_user/x", "*", "[*]", "%", "@", "`", "a\tb", "é", "😀", "- a", "? a", "! a", "<<", "=",
    "|", ">", "[tensornet]", "{tensornet: 1}", "all", "none", "None", "random", "dataset", "auto", "mse_loss",
    "ZBL", "D2", "{ZBL: {}}", "{ZBL: 3}", "[ZBL, D2]", "{Coulomb: {alpha: x}}", "{Atomref: {max_z: -1}}", "dipole",
    "{dipole: {}}", "{dipole: {weight: nan}}", "{a: {head: Scalar, nope: 1}}", "{label: {loss: [a]}}",
    "[[1,0,0],[0,1,0],[0,0,0]]",
    "[[1e-3,0,0],[0,1,0],[0,0,1]]", "[[1,2],[3]]", "float32", "16", "32", "64", "1000000000", "4294967296", "-2",
]  # fmt: skip

odd = st.sampled_from(ODD)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _as_yaml(value: Any) -> str:
    try:
        return (
            yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("...").strip()
        )
    except (yaml.YAMLError, ValueError):
        return "x"


scalars = odd | junk.map(_as_yaml)


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with a few replaced, left out, doubled or put in, or an end that is missing."""
    size = len(content)
    one = st.tuples(st.integers(0, size), st.integers(0, 12), st.binary(max_size=6), st.booleans())

    def applied(changes: list[tuple[int, int, bytes, bool]]) -> bytes:
        found = content
        for place, length, new, is_end in changes:
            found = found[:place] if is_end and place % 3 == 0 else found[:place] + new + found[place + length :]
        return found

    return st.lists(one, min_size=1, max_size=4).map(applied)


@st.composite
def settings_files(draw: st.DrawFn) -> bytes:
    """A valid file with some values replaced by odd ones, and perhaps with further lines or bytes."""
    lines = {key: _as_yaml(value) for key, value in targets.BASE.items()}
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=4)):
        lines[key] = draw(scalars)
    text = "".join(f"{key}: {value}\n" for key, value in lines.items())
    text += draw(st.sampled_from(["", "", "", "lr: 1\n", "---\n", "...\n", "nope: 1\n", "? [a]\n: b\n", "  x: 1\n"]))
    content = text.encode("utf-8", "surrogatepass")
    return draw(mutated(content)) if draw(st.integers(0, 4)) == 0 else content


settings = settings_files() | settings_files() | st.binary(max_size=200) | st.text(max_size=100).map(
    lambda text: text.encode("utf-8", "surrogatepass")
)  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Flags with odd values, in one word or two."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        flag = draw(st.sampled_from(KEYS).map(lambda key: f"--{key.replace('_', '-')}") | st.text(max_size=6))
        value = draw(scalars | st.text(max_size=12))
        found += draw(st.sampled_from([[f"{flag}={value}"], [flag, value], [flag], [flag, value, value]]))
    return [word for word in found if word not in ("-h", "--help")]


NUMBERS = [
    "-3", "0", "1e300", "-1e300", "nan", "inf", "1e-3", "1e-30", "1e20", "1e30", "-1e40", "999999999999", "9" * 400, "",
    "x", "1.5", "-0.0", "T", '"', "0x10", "1e400", "é", "999", "H", "119", "Xx", "3\n", "²",
]  # fmt: skip


@st.composite
def texts(draw: st.DrawFn, valid: str) -> bytes:
    """A text of structures with some of its words replaced."""
    parts = re.split(r"([\s=\":]+)", valid)
    for place in draw(st.lists(st.integers(0, len(parts) - 1), min_size=1, max_size=4)):
        parts[place] = draw(st.sampled_from(NUMBERS) | st.text(max_size=4))
    content = "".join(parts).encode("utf-8", "surrogatepass")
    return draw(mutated(content)) if draw(st.integers(0, 3)) == 0 else content


@st.composite
def changed_arrays(draw: st.DrawFn) -> dict[str, Any]:
    """Arrays of which some have another shape, type, value or name."""
    import numpy as np

    found = targets.arrays()
    for name in draw(st.lists(st.sampled_from(sorted(found)), min_size=1, max_size=3)):
        array = found.get(name)
        if array is None or not array.ndim or array.dtype.kind in "SU":
            continue
        how = draw(st.integers(0, 8))
        if how == 0:
            del found[name]
        elif how == 1:
            found[name] = array[: draw(st.integers(0, 1))]
        elif how == 2:
            found[name] = array.astype(draw(st.sampled_from(["f2", "f4", "i1", "u8", "c16", "?", "S3", "U3"])))
        elif how == 3:
            found[name] = np.full_like(array, draw(st.sampled_from([-1, 0, 119, 127])))
        elif how == 4:
            found[name] = array.astype(float) * draw(st.sampled_from([1e300, 1e30, 1e15, 1e-30, 1e-300, -1]))
        elif how == 5:
            found[name] = array.reshape(-1)
        elif how == 6:
            found[name] = np.array(draw(st.sampled_from([0, 3, "text", b"x"])))
        elif how == 7:
            found[name] = array[..., None]
        else:
            found[draw(st.sampled_from(["", "box", "cell", "pbc", "q", "s", "a/b", "N", "charges", "é"]))] = array
    return found


def _as_npz(named: dict[str, Any]) -> bytes:
    return targets.npz(**{name or "x": values for name, values in named.items() if name not in ("file", "a/b")})


HDF5_NAMES = {"z": "types", "R": "pos", "E": "energy", "F": "forces"}


def _as_hdf5(named: dict[str, Any]) -> bytes:
    try:
        return targets.hdf5(**{HDF5_NAMES.get(name, name or "x"): values for name, values in named.items()})
    except (TypeError, ValueError):  # h5py has no such type
        return b""


def structures() -> st.SearchStrategy[tuple[bytes, str]]:
    """Content and suffix of a file."""
    valid = _as_npz(targets.arrays()), _as_hdf5(targets.arrays())
    return st.one_of(
        st.tuples(texts(targets.EXTXYZ), st.sampled_from([".extxyz", ".xyz"])),
        st.tuples(texts(targets.XYZ), st.just(".xyz")),
        st.tuples(changed_arrays().map(_as_npz) | mutated(valid[0]), st.just(".npz")),
        st.tuples(changed_arrays().map(_as_hdf5) | mutated(valid[1]), st.just(".h5")),
        st.tuples(st.binary(max_size=80), st.sampled_from([".xyz", ".npz", ".h5", ".extxyz"])),
    )


def checkpoints() -> st.SearchStrategy[tuple[bytes, str]]:
    """Content and suffix of a file."""
    import torch

    keys = sorted(torch_hyper_parameters())
    plain = junk.filter(lambda value: not isinstance(value, bytes)) | st.sampled_from(
        [
            -1,
            0,
            10**9,
            10**30,
            1.5,
            float("nan"),
            "x",
            "",
            None,
            [],
            {},
            [None],
            {"a": None},
            True,
            torch.zeros(2),
            "a:b",
        ]
    )
    wrong = st.one_of(
        st.dictionaries(st.sampled_from(keys), plain, min_size=1, max_size=3),
        st.lists(st.sampled_from(keys), min_size=1, max_size=3),
        plain,
    )
    return st.one_of(
        st.tuples(wrong.map(targets.with_hyper_parameters), st.just(".ckpt")),
        st.tuples(wrong.map(targets.with_hyper_parameters), st.just(".ckpt")),
        *(
            st.tuples(flipped(targets.model_bytes(suffix)), st.just(suffix))
            for suffix in (".ckpt", ".safetensors", ".zip")
        ),
    )


def torch_hyper_parameters() -> dict[str, Any]:
    """The options in the checkpoint that is changed."""
    import io

    import torch

    return torch.load(io.BytesIO(targets.model_bytes(".ckpt")), weights_only=True)["hyper_parameters"]


def flipped(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with some bits turned over, or with an end missing."""
    places = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 7)), min_size=1, max_size=5)

    def turned(found: list[tuple[int, int]]) -> bytes:
        changed = bytearray(content)
        for place, bit in found:
            changed[place] ^= 1 << bit
        return bytes(changed)

    return places.map(turned) | st.integers(0, len(content) - 1).map(lambda size: content[:size])

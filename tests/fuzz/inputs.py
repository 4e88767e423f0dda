"""Inputs for the targets: bytes, mutations of valid files, and values that were trouble somewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import targets
import yaml
from hypothesis import strategies as st

from torchmdnet.options import OPTIONS

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
    '""', "' '", "1e308", "1e-308", "5e-324", "9223372036854775808", "1e5", "100000", "torch:nn", "math:pi",
    "builtins:dict", "json:JSONDecoder", "torchmdnet.models.tensornet:TensorNet", "torchmdnet.priors:ZBL", "[{}]",
    "{cutoff_distance: .nan}", "[{max_num_neighbors: 1e300}]", "[{a: .nan}]", "{delta: .nan}", "{delta: -1}",
]  # fmt: skip

#: Values that may be right, so that more of the program is reached.
VALID: dict[str, Sequence[str]] = {
    "model": ["graph-network", "transformer", "equivariant-transformer", "tensornet", "tensornet2"],
    "output_model": ["Scalar", "EquivariantScalar", "DipoleMoment", "ElectronicSpatialExtent", "VectorOutput", "Dipole",
                     "Polarizability", "PartialCharges", "AtomScalar", "ScalarPlusWeightedCoulomb"],
    "prior_model": ["ZBL", "[ZBL]", "{ZBL: {cutoff_distance: 4, max_num_neighbors: 20}}", "Atomref", "D2", "[Atomref]",
                    "LearnableAtomref", "{Coulomb: {alpha: 1.8, max_num_neighbors: 9}}", "D3", "{Atomref: {enable: 0}}",
                    "[Coulomb]", "{ZBL: {cutoff_distance: 1e300}}"],
    "prior_args": ["{}", "[{}]", "{cutoff_distance: 4, max_num_neighbors: 20}", "[{cutoff_distance: 4}]"],
    "properties": ["dipole", "[dipole]", "charges", "polarizability", "{dipole: {weight: 2}}", "[dipole, charges]"],
    "derivative": ["true", "false"], "charge": ["true"], "spin": ["true"], "precision": ["32", "64"],
    "system_embedding": ["auto", "none", "charge", "spin", "charge+spin"], "remove_ref_energy": ["true"],
    "standardize": ["true"], "static_shapes": ["true"], "radial": ["grid", "exact"], "reduce_op": ["mean", "average"],
    "box_vecs": ["[[9,0,0],[0,9,0],[0,0,9]]", "[[9,0,0],[0,9,0],[0,0,0]]", "[[1,0,0],[0,1,0],[0,0,1]]"],
    "batch_size": ["1", "2", "3", "100"], "inference_batch_size": ["1", "7"], "seed": ["0", "4294967295"],
    "train_size": ["1", "3", "0.002", "null", "0", "1.0"], "val_size": ["0", "1", "null", "0.001", "2"],
    "test_size": ["0", "1", "null", "0.001", "2"], "split_by": ["formula", "time", "connectivity", "file", "y", "z"],
    "split_gap": ["1", "100", "9999999"], "splits": ["dataset", "random", "data.npz", "water.xyz", "none.npz"],
    "lr": ["0", "1e-3", "1e3", "1e30", "1e300"], "lr_warmup_steps": ["1", "100000"], "weight_decay": ["0.1", "1e30"],
    "gradient_clipping": ["1", "1e-300", "1e300"], "lr_metric": ["train", "val"], "lr_factor": ["0.5", "1e-300"],
    "early_stopping_patience": ["0", "1"], "early_stopping_monitor": ["null", "train_total_mse_loss"],
    "checkpoint_monitor": ["null", "train_total_mse_loss"], "train_loss": ["l1_loss", "huber_loss", "mse_loss"],
    "train_loss_arg": ["{delta: 0.5}", "{beta: 0}", "{reduction: sum}", "{delta: 1e300}"],
    "ema_alpha_y": ["0", "0.5"], "ema_alpha_neg_dy": ["0", "0.5"], "y_weight": ["0", "1e30", "1e-30"],
    "neg_dy_weight": ["0", "1e30"], "stress_weight": ["0", "1"], "y_loss_per_atom": ["true"],
    "test_interval": ["1", "0", "-1"], "save_interval": ["1", "100"], "keep_checkpoints": ["0", "1"],
    "num_epochs": ["0", "-1", "1", "2"], "num_workers": ["0", "1"], "shuffle_block": ["1", "1000000"],
    "embedding_dimension": ["1", "7", "16", "100000", "1000000000"], "num_layers": ["0", "2", "1000000000"],
    "num_rbf": ["1", "2", "33", "1000000000"],
    "activation": ["ssp", "tanh", "mish"], "rbf_type": ["gauss", "expnorm"], "trainable_rbf": ["true"],
    "neighbor_embedding": ["true"], "aggr": ["mean", "max", "average"], "num_heads": ["1", "2", "3"],
    "distance_influence": ["keys", "none"], "vector_cutoff": ["true"], "equivariance_invariance_group": ["SO(3)"],
    "q_dim": ["1", "2"], "q_weights": ["[1, 1]", "[[1], [1]]"], "coulomb_cutoff": ["5", "1e-300", "1e308"],
    "coulomb_max_num_neighbors": ["1"], "coulomb_neighbor_strategy": ["cell", "shared"], "repulsion": ["true"],
    "cutoff_lower": ["0.5", "3.9", "4.0"], "cutoff_upper": ["1e-3", "20", "1", "1e308", "1e-300"],
    "atom_filter": ["0", "6", "200"], "max_z": ["1", "9", "10", "130", "1000000000"],
    "max_num_neighbors": ["1", "500"], "report": ["true"], "redirect": ["true"],
    "overwrite": ["true"], "load_weights": ["model.ckpt", "model.safetensors", "model.zip", "water.xyz", "given.ckpt"],
    "load_model": ["model.ckpt", "model.safetensors", "given.ckpt", "folder"], "tensorboard_use": ["true"],
    "dataset": ["ASE", "ASE", "ASE", "Custom", "HDF5", "TinyQM", "MD17", "QM9"],
    "dataset_root": ["water.extxyz", "given.extxyz", "given.extxyz", "data.npz", "data.h5", "water.xyz", "[]"],
    "dataset_arg": ["{energy_key: energy}", "{index: ':1'}", "{label: energy}", "{energy_unit: Hartree}", "{x: 1}",
                    "{val: water.extxyz}", "{test: water.xyz}", "{files: [{path: water.extxyz, weight: 0}]}",
                    "{files: [{path: water.extxyz, split: test}]}", "{forces_key: '-forces'}", "{atomref: {O: .inf}}",
                    "{atomref: isolated}", "{cache: false}", "{stress_key: false}", "{charge_key: charge}"],
    "coord_files": ["*.npy", "none*", "water.xyz"], "dataset_preload_limit": ["0", "1"], "num_nodes": ["2"],
    "ngpus": ["1", "-1", "2"], "log_dir": ["null", "run", "a b"],
}  # fmt: skip
#: Files that people start from.
EXAMPLES = [path.read_text() for path in sorted(Path(__file__).parents[2].glob("examples/*.yaml"))]


def uniform(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of some values, the first and the last no more often than others, which hypothesis would prefer."""
    values = list(values)
    return st.integers(0, 2**16 - 1).map(lambda number: values[(number * 40503 >> 3) % len(values)])


def rarely(draw: st.DrawFn, often: int) -> bool:
    """True once in so many times."""
    return draw(uniform(range(often))) == 0


odd = uniform(ODD)
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


def values_of(key: str) -> st.SearchStrategy[str]:
    """Values of a setting, many of them right."""
    usual = VALID.get(key)
    if not usual:
        return scalars
    right = uniform(usual)
    return right | right | right | scalars


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
    for key in draw(st.lists(uniform(KEYS), max_size=4)):
        lines[key] = draw(values_of(key))
    text = "".join(f"{key}: {value}\n" for key, value in lines.items())
    if rarely(draw, 10):
        text = draw(uniform(EXAMPLES))
    text += draw(uniform(["", "", "", "lr: 1\n", "---\n", "...\n", "nope: 1\n", "? [a]\n: b\n", "  x: 1\n"]))
    content = text.encode("utf-8", "surrogatepass")
    return draw(mutated(content)) if rarely(draw, 5) else content


settings = settings_files() | settings_files() | st.binary(max_size=200) | st.text(max_size=100).map(
    lambda text: text.encode("utf-8", "surrogatepass")
)  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Flags with odd values, in one word or two."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        key = draw(uniform(KEYS))
        flag, value = f"--{key.replace('_', '-')}", draw(values_of(key) | st.text(max_size=12))
        if rarely(draw, 10):
            flag = draw(st.text(max_size=6))
        found += draw(uniform([[f"{flag}={value}"], [flag, value], [flag], [flag, value, value]]))
    return [word for word in found if word not in ("-h", "--help")]


NUMBERS = [
    "-3", "0", "1e300", "-1e300", "nan", "inf", "1e-3", "1e-30", "1e20", "1e30", "-1e40", "999999999999", "9" * 400, "",
    "x", "1.5", "-0.0", "T", '"', "0x10", "1e400", "é", "999", "H", "119", "Xx", "3\n", "²", "forces:R:999999999",
    "species:S:1:pos:R:99999999", "forces:R:0", "pos:I:3", "x:L:1000000000000", "energy", "nan nan nan", "1e308",
]  # fmt: skip


@st.composite
def texts(draw: st.DrawFn, valid: str) -> bytes:
    """A text of structures with some of its words replaced."""
    parts = re.split(r"([\s=\":]+)", valid)
    for place in draw(st.lists(st.integers(0, len(parts) - 1), min_size=1, max_size=4)):
        parts[place] = draw(uniform(["0.1", "2", "-1.5", "H", "O"]) | uniform(NUMBERS) | st.text(max_size=4))
    content = "".join(parts).encode("utf-8", "surrogatepass")
    return draw(mutated(content)) if rarely(draw, 4) else content


@st.composite
def changed_arrays(draw: st.DrawFn) -> dict[str, Any]:
    """Arrays of which some have another shape, type, value or name."""
    import numpy as np

    found = targets.arrays()
    for name in draw(st.lists(uniform(sorted(found)), min_size=1, max_size=3)):
        array = found.get(name)
        if array is None or not array.ndim or array.dtype.kind in "SU":
            continue
        how = draw(st.integers(0, 8))
        if how == 0:
            del found[name]
        elif how == 1:
            found[name] = array[: draw(st.integers(0, 1))]
        elif how == 2:
            found[name] = array.astype(draw(uniform(["f2", "f4", "i1", "u8", "c16", "?", "S3", "U3"])))
        elif how == 3:
            found[name] = np.full_like(array, draw(uniform([-1, 0, 119, 127])))
        elif how == 4:
            found[name] = array.astype(float) * draw(uniform([1e300, 1e30, 1e15, 1e-30, 1e-300, -1]))
        elif how == 5:
            found[name] = array.reshape(-1)
        elif how == 6:
            found[name] = np.array(draw(uniform([0, 3, "text", b"x"])))
        elif how == 7:
            found[name] = array[..., None]
        else:
            found[draw(uniform(["", "box", "cell", "pbc", "q", "s", "a/b", "N", "charges", "é"]))] = array
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
        st.tuples(texts(targets.EXTXYZ), uniform([".extxyz", ".xyz"])),
        st.tuples(texts(targets.XYZ), st.just(".xyz")),
        st.tuples(changed_arrays().map(_as_npz) | mutated(valid[0]), st.just(".npz")),
        st.tuples(changed_arrays().map(_as_hdf5) | mutated(valid[1]), st.just(".h5")),
        st.tuples(st.binary(max_size=80), uniform([".xyz", ".npz", ".h5", ".extxyz"])),
    )


def checkpoints() -> st.SearchStrategy[tuple[bytes, str]]:
    """Content and suffix of a file."""
    import torch

    keys = sorted(torch_hyper_parameters())
    plain = junk.filter(lambda value: not isinstance(value, bytes)) | uniform(
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
        st.dictionaries(uniform(keys), plain, min_size=1, max_size=3),
        st.lists(uniform(keys), min_size=1, max_size=3),
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

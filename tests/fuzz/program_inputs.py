"""Inputs for whole programs: lines, settings of small trainings, damaged folders and caches, odd environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import inputs
import programs
import targets
import yaml
from hypothesis import strategies as st

#: Names of files and folders that are unusual, but names.
NAMES = [
    "run", "a b", " a", "a ", "é", "😀", "-run", "--lr", "#run", "a=b", "a,b", "a;b", "a:b", "a%b", "%(x)s", "{run}",
    "a[b]", "[b]", "*", "?", "a*b", "$HOME", "~x", "a'b", 'a"b', "a\\b", "a\nb", "a\tb", ".hidden", "run.ckpt", "last",
    "last.ckpt", "epoch=1", "version_0", "null", "~", "1", "1.5", "true", "x" * 200, "a/b", "./a", "a/../b", "\u202e",
    "run.yaml", "@x", "!x", "&x", "|", ">", "`x`", "a\rb", "\x1b[31m", "con", "run_20260102-030405", "[", "]", "%",
]  # fmt: skip
#: Names that cannot be those of a result.
NO_NAMES = ["", "folder", "no/such/folder/x", "/dev/null", "a\0b", "\ud800", "x" * 300, "folder/", ".", "..", "x/"]

names = inputs.uniform(NAMES)
plain_words = inputs.uniform(
    ["", "x", "-1", "0", "1", "1.5", "nan", "inf", "-inf", "1e300", "1e-300", "9" * 400, "H,C", "H C", "Xx", "eV",
     "kcal/mol", "kcal/mol/A", "Hartree/Bohr", "/", ",", "1,2", "0,1", "cpu", "cuda", "cuda:99", "meta", "float32",
     "float64", "tf32", "é", "\ud800", "a\0b", "{}", "[1", "None", "1e5", "-0", "0x10", "1_0", "٣"]
)  # fmt: skip


def _options(draw: st.DrawFn, table: dict[str, Any], most: int = 3) -> list[str]:
    """Some options of a command, each with one of its values or with a word; None is a switch."""
    found: list[str] = []
    for flag in draw(st.lists(inputs.uniform(sorted(table)), max_size=most, unique=True)):
        values = table[flag]
        if values is None:
            found.append(flag)
            continue
        right = inputs.uniform(values)
        value = draw(right | right | right | right | plain_words)
        found += [f"{flag}={value}"] if draw(st.booleans()) else [flag, value]
    return found


def _structures() -> st.SearchStrategy[str]:
    return inputs.uniform([*programs.FILES, *["water.extxyz", "water.xyz"] * 7, "none.xyz", "folder", "*.xyz",
                            "", "given.extxyz", "given.extxyz", "water.extxyz@:", "x@y", "water.extxyz@9"])  # fmt: skip


def _models() -> st.SearchStrategy[str]:
    return inputs.uniform([*programs.MODELS * 7, "given.ckpt", "given.safetensors",
                            "given.zip", "water.xyz", "none.ckpt", "folder", "", "conf.yaml"])  # fmt: skip


def _targets(*suffixes: str) -> st.SearchStrategy[str]:
    right = inputs.uniform([f"new{suffix}" for suffix in suffixes])
    return st.one_of(
        *[right] * 5,
        st.tuples(names, inputs.uniform(suffixes)).map("".join),
        inputs.uniform(NO_NAMES),
        inputs.uniform([*programs.MODELS, "water.extxyz", "new.nope", "new"]),
    )


CALCULATORS = [
    *["emt"] * 20,
    *["lj"] * 10,
    "gfn2-xtb",
    "nope",
    "",
    ":",
    "os:system",
    "math:pi",
    "torch:nn",
    "a:b",
    "builtins:dict",
    "ase.calculators.emt:EMT",
    "ase.calculators.lj:LennardJones",
    "ase:Atoms",
    "emt:",
    "json:JSONDecoder",
    "os:abort_",
    "water.xyz:x",
    "é:é",
    "..:x",
    "ase.calculators.calculator:Calculator",
]
_LABELLING = {
    "--option": ["sigma=1.0", "epsilon=1e300", "rc=nan", "rc=-1", "sigma=0", "asap_cutoff=true", "x=1", "x", "=1",
                 "sigma=[1]", "sigma={a: &a [*a]}", "sigma=" + "9" * 400, "smooth=yes", "sigma=null", "sigma=a: b: c"],
    "--level-of-theory": ["PBE", "", "é", "a\nb", "\x1b[31m", "x" * 5000],
    "--retry": None,
    "--timeout": ["1", "5", "inf", "-1"],
    "--memory": ["1", "1e-9", "0"],
    "-p": ["1", "2", "0", "-1", "5000"],
}  # fmt: skip


@st.composite
def _journals(draw: st.DrawFn) -> bytes:
    """The journal of a labelling that was interrupted, damaged."""
    header = {"journal": 1, "calculator": "emt", "options": {}, "level_of_theory": "EMT", "properties": []}
    lines = [
        header,
        {"key": "0" * 64, "result": {"energy": -1.0, "forces": [[0.0] * 3] * 3}},
        {"key": "1", "error": "x"},
    ]
    text = "".join(yaml.safe_dump(line, default_flow_style=True, width=10**6) for line in lines)
    return draw(inputs.uniform([text.encode()]) | inputs.mutated(text.encode()) | st.binary(max_size=60))


@st.composite
def commands(draw: st.DrawFn) -> tuple[list[str], dict[str, bytes], dict[str, str | None], bool]:
    """Words, files, variables, and whether worker processes are started."""
    name = draw(inputs.uniform(["label", "label", "sample", "sample", "convert", "export", "bench", "info", "data"]))
    files: dict[str, bytes] = {}
    words = [name]
    if name in ("label", "sample"):
        words += draw(st.lists(_structures(), min_size=1, max_size=2, unique=True))
        target = draw(_targets(".extxyz", ".h5"))
        words += [f"-o{target}"] if draw(st.booleans()) else ["-o", target]
        if inputs.rarely(draw, 6) and "\0" not in target and 0 < len(target) < 100 and "/" not in target:
            files[f"{target}.journal"] = draw(_journals())
        words += _options(draw, _LABELLING, 2)
    if name == "label":
        words += ["-c", draw(inputs.uniform(CALCULATORS))]
        words += _options(draw, {"--properties": ["energy", "energy,forces", "stress", "dipole,charges", "x", ",",
                                                  "energy,energy"]}, 1)  # fmt: skip
    elif name == "sample":
        words += ["-m", draw(inputs.uniform(["md", "modes", *["rattle"] * 6, "x", ""]))]
        words += ["-c", draw(inputs.uniform(CALCULATORS))] if draw(st.booleans()) else []
        words += ["-n", draw(inputs.uniform([*["1", "2", "3"] * 6, "0", "-1", "x", "9" * 50]))]
        table = {
            "--seed": ["0", "5", "9223372036854775807", "-1"], "--relax": None, "--min-distance": ["0", "0.5", "1e300"],
            "-t": ["300", "1e-300", "1e300", "0", "5"], "--timestep": ["0.5", "1e-300", "1e300", "10"],
            "--interval": ["1", "1e-300", "1e300", "5"], "--equilibration": ["0", "1", "1e300"],
            "--friction": ["0.02", "1e300", "1e-300"], "--stdev": ["0.05", "1e300", "1e-300", "1"],
            "--strain": ["0.01", "0", "1e300", "1"],
        }  # fmt: skip
        words += _options(draw, table)
    elif name == "convert":
        words += draw(st.lists(_models(), min_size=1, max_size=2, unique=True))
        words.append(draw(_targets(".safetensors", ".ckpt", ".zip")))
        table = {
            "--units": ["eV", "kcal/mol", "Hartree", "x"], "--level-of-theory": ["PBE", "", "x" * 9000, "a\nb"],
            "--citation": ["x", ""], "--elements": ["H,C", "Xx", "", "H H", "Og"], "--compatibility-load": None,
            "--overwrite": None,
        }  # fmt: skip
        words += _options(draw, table)
    elif name == "export":
        words += [draw(_models()), draw(_targets(".pt2"))]
        words += _options(draw, {"--inputs": ["edges", "positions"], "--dtype": ["float32", "float64"],
                                 "--device": ["cpu", "cuda", "meta", "cuda:99", "mps", "xpu", "cpu:0", "cpu:7"],
                                 "--overwrite": None})  # fmt: skip
    elif name == "bench":
        words += [draw(_models()), *draw(st.lists(_structures(), max_size=1))]
        words += ["--seconds", draw(inputs.uniform([*["0.01"] * 9, "1e-300", "-1", "1e9"])), "--threads=1"]
        table = {
            "--index": ["-1", "0", "99", "-99", "9" * 18], "--charge": ["0", "1e300", "nan", "-3"],
            "--spin": ["0", "1e300", "nan", "-1"], "--through": ["call", "ase", "external", "graph", "call,x", ","],
            "--dtype": ["float32", "float64", "tf32,bf16", "int8", ""], "--radial": ["grid", "exact", "x"],
            "--threads": ["1", "1,1", "0", "99999", "9999", "x"], "--device": ["cpu", "cuda", "x"],
            "--timestep": ["1", "1e-300", "1e300"], "--replicate": ["1", "2", "1,2", "9999", "0", "1,9999", "60"],
            "--units": ["eV", "kcal/mol", "x"], "--differentiate": None, "--json": None,
        }  # fmt: skip
        words += _options(draw, table, 4)
    elif name == "info":
        words += [draw(_models()), *_options(draw, {"--json": None, "--check": None})]
    else:
        words += draw(st.lists(_structures(), max_size=2))
        table = {
            "--conf": ["conf.yaml", "none.yaml", "given.yaml", "given.yaml", "water.xyz", "folder"],
            "--dataset": ["TinyQM", "ASE", "Custom", "HDF5", "nope", "os:system", ":"],
            "--dataset-root": ["water.extxyz", "folder", "none", "", "data.h5", "*"],
            "--dataset-arg": ['{"energy_key": "x"}', "{", "[]", "3", '{"a": 1}', "energy_unit=x", "{index: ':'}",
                              "{energy_unit: 5}", "{files: [{path: 3}]}", "{columns: []}", "{labels: {a: 1}}"],
            "--fix": ["new.extxyz", "new.h5", "water.extxyz", "x", "folder", ""],
            "--html": ["page.html", "folder", "", "no/such/x"], "--json": None, "--strict": None, "--quiet": None,
        }  # fmt: skip
        words += _options(draw, table, 4)
    if any("given.extxyz" in word for word in words):
        files["given.extxyz"] = draw(inputs.texts(targets.EXTXYZ))
    if any("given.yaml" in word for word in words):
        files["given.yaml"] = draw(inputs.settings_files())
    for suffix in (".ckpt", ".safetensors", ".zip"):
        if f"given{suffix}" in words:
            content, _ = draw(inputs.checkpoints().filter(lambda found, suffix=suffix: found[1] == suffix))
            files[f"given{suffix}"] = content
    if inputs.rarely(draw, 20):
        words.insert(draw(inputs.uniform(range(len(words) + 1))), draw(plain_words | st.text(max_size=6)))
    has_workers = name in ("label", "sample") and inputs.rarely(draw, 10)
    return [word for word in words if word not in ("-h", "--help")], files, {}, has_workers


# ----------------------------------------------------------------------------------------------------------- trainings

_KEYS = [key for key in inputs.KEYS if key not in ("compile", "conf", "wandb_use", "ngpus", "num_workers")]


@st.composite
def trainings(draw: st.DrawFn) -> tuple[bytes, dict[str, bytes], dict[str, str | None]]:
    """Settings, files and variables."""
    lines = {key: inputs._as_yaml(value) for key, value in programs.TRAINING.items()}
    if inputs.rarely(draw, 3):
        lines |= {"dataset": "ASE", "dataset_root": draw(inputs.uniform(["given.extxyz", "water.extxyz"])),
                  "train_size": "1", "val_size": "1", "test_size": "null", "derivative": "true"}  # fmt: skip
    for key in draw(st.lists(inputs.uniform(_KEYS), max_size=3, unique=True)):
        lines[key] = draw(inputs.values_of(key))
    if inputs.rarely(draw, 41):
        lines["ngpus"] = draw(inputs.uniform(["2", "1", "-1"]))
    if inputs.rarely(draw, 21):
        lines["num_workers"] = draw(inputs.uniform(["1", "2"]))
    if inputs.rarely(draw, 4):
        lines["log_dir"] = inputs._as_yaml(draw(names))
    content = "".join(f"{key}: {value}\n" for key, value in lines.items()).encode("utf-8", "surrogatepass")
    if inputs.rarely(draw, 7):
        content = draw(inputs.mutated(content))
    files: dict[str, bytes] = {}
    if b"given.extxyz" in content:
        files["given.extxyz"] = draw(st.just(targets.EXTXYZ.encode()) | inputs.texts(targets.EXTXYZ))
    if b"given.ckpt" in content:
        files["given.ckpt"] = draw(inputs.checkpoints().filter(lambda found: found[1] == ".ckpt"))[0]
    variables = draw(environments()) if inputs.rarely(draw, 7) else {}
    return content, files, variables


# ---------------------------------------------------------------------------------------------------------------- runs


def _damage(content: bytes) -> st.SearchStrategy[bytes | None]:
    """A file that is missing, a folder, empty, of another kind, or changed in some bytes."""
    return st.one_of(
        st.none(),
        inputs.uniform([b"/", b"", b"x", b"{}", b"[]\n", b"\0" * 100, b"null\n", b"\xff\xfe"]),
        inputs.mutated(content),
        inputs.flipped(content) if content else st.just(b"x"),
    )


@st.composite
def runs(draw: st.DrawFn) -> tuple[str, dict[str, bytes | None], list[str], dict[str, str | None]]:
    """Name of a folder, files in it that are damaged, words, and variables."""
    whole = programs.finished_run()
    damaged: dict[str, bytes | None] = {}
    files = [*sorted(whole), "last.ckpt", "hparams.yaml", "input.yaml", "splits.npz", "metrics.csv"]
    for name in draw(st.lists(inputs.uniform(files), max_size=2)):
        damaged[name] = draw(_damage(whole[name]))
    if inputs.rarely(draw, 4):
        for name in ("hparams.yaml", "input.yaml"):
            damaged[name] = draw(inputs.texts(whole[name].decode()))
    words: list[str] = []
    if draw(st.booleans()):
        words = draw(
            inputs.uniform(
                [
                    ["--load-model={run}/last.ckpt", "--num-epochs=3"],
                    ["--load-model={run}/best.ckpt", "--num-epochs=3"],
                    ["--load-model={run}", "--num-epochs=3"],
                    ["--load-model={run}/last.ckpt", "--num-epochs=3", "--reset-trainer"],
                    ["--conf={run}/input.yaml", "--num-epochs=1"],
                    ["--conf={run}/hparams.yaml", "--num-epochs=1", "--splits={run}/splits.npz"],
                    ["--conf={run}/input.yaml", "--load-weights={run}/potential.safetensors", "--num-epochs=1"],
                    ["--conf={run}/input.yaml", "--load-weights={run}/best.ckpt", "--log-dir={run}", "--num-epochs=1"],
                    ["--load-model={run}/last.ckpt", "--conf={run}/input.yaml", "--num-epochs=3", "--overwrite"],
                ]
            )
        )
        for key in draw(st.lists(inputs.uniform(_KEYS), max_size=2)):
            if key not in ("num_epochs", "log_dir", "dataset_root"):
                words = [*words, f"--{key.replace('_', '-')}={draw(inputs.values_of(key))}"]
    variables = draw(environments()) if inputs.rarely(draw, 10) else {}
    return draw(names), damaged, words, variables


# --------------------------------------------------------------------------------------------------------------- cache


@st.composite
def caches(draw: st.DrawFn) -> dict[str, bytes | None]:
    """Files of a cache that are damaged, and perhaps others that do not belong there."""
    whole = programs.cache_files()
    damaged: dict[str, bytes | None] = {}
    for name in draw(st.lists(inputs.uniform(sorted(whole)), min_size=1, max_size=3)):
        content = whole[name]
        if name.endswith(".json") and draw(st.booleans()):
            damaged[name] = draw(inputs.texts(content.decode()))
        else:
            damaged[name] = draw(_damage(content))
    return damaged


# --------------------------------------------------------------------------------------------------------- environment

#: Variables that are read when a program runs, and those that modules read while they are loaded.
VARIABLES = ["NODE_RANK", "GROUP_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT",
             "MASTER_ADDR", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NNODES",
             "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_STEP_NUM_NODES", "TORCHELASTIC_RUN_ID",
             "TORCHELASTIC_RESTART_COUNT", "TORCHMDNET_RENDEZVOUS_TIMEOUT", "TORCHMDNET_CACHE", "TORCHMDNET_LOG_DIR",
             "TORCHMDNET_MIRROR", "TORCHMDNET_MEMORY_CHECK", "XDG_CACHE_HOME", "HOME", "TMPDIR",
             "COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CXX",
             "PATH", "TZ"]  # fmt: skip
AT_LOAD = ["TORCHMDNET_PLAIN_OPS", "TORCHMDNET_CHECK_LOOPS", "TORCHMDNET_CHECK_SHAPES", "NUMBA_CACHE_DIR",
           "NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LANG", "LC_ALL", "PYTHONIOENCODING",
           "PYTHONWARNINGS", "MPLCONFIGDIR", "MPLBACKEND", "HOME", "XDG_CACHE_HOME", "TMPDIR", "TORCHMDNET_CACHE",
           "COLUMNS", "PYTHONOPTIMIZE", "TERM"]  # fmt: skip
#: Variables that libraries read, and refuse in their own way, as the interpreter does.
_FOREIGN = {"NUMBA_NUM_THREADS", "MPLBACKEND", "PYTHONIOENCODING", "PYTHONWARNINGS"}
VALUES = ["", " ", "x", "-1", "0", "1", "2", "1.5", "nan", "inf", "9" * 400, "65535", "65536", "29511", "1e9", "é", "²",
          "/dev/null", "/dev/null/x", "/proc/x", "no/such/folder", "a" * 5000, "localhost", "127.0.0.1", "::1", "None",
          "true", "auto", "[", "%(x)s", "$HOME", "~", "~nobody_x", "\udc80", "a b", "a\nb", "water.xyz", "folder", ":",
          "0x10", "+1", "1_0", "٣", "C", "dumb", "http://127.0.0.1:9", "file:///none", "ftp://x"]  # fmt: skip


@st.composite
def environments(draw: st.DrawFn, known: Sequence[str] = tuple(VARIABLES)) -> dict[str, str | None]:
    """Variables with odd values, or without any."""
    chosen = draw(st.lists(inputs.uniform(list(known)), min_size=1, max_size=3, unique=True))
    found: dict[str, str | None] = {}
    for name in chosen:
        value = draw(inputs.uniform(VALUES) | st.just(None))
        found[name] = None if name in _FOREIGN and value not in ("1", "2") else value
    return found


LINES = [
    ["train"], ["train"], ["train"], ["train", "--num-nodes=2"], ["train", "--log-dir=null"],
    ["train", "--dataset=ASE", "--dataset-root=water.extxyz", "--train-size=1", "--val-size=1", "--test-size=0"],
    ["train", "--report=true"], ["info", "model.ckpt"], ["info", "model.safetensors", "--check"],
    ["data", "water.extxyz"], ["data", "--conf", "conf.yaml", "--html", "page.html"],
    ["label", "water.xyz", "-o", "new.extxyz", "-c", "emt"],
    ["sample", "water.xyz", "-o", "new.extxyz", "-m", "rattle"],
    ["convert", "model.ckpt", "new.safetensors"], ["export", "model.ckpt", "new.pt2"],
    ["bench", "model.ckpt", "water.xyz", "--seconds=0.01", "--threads=1", "--through=call"],
    ["data", "--dataset=QM9", "--dataset-root=folder"],
]  # fmt: skip


@st.composite
def surroundings(draw: st.DrawFn) -> tuple[dict[str, str | None], list[str], bool]:
    """Variables, a line, and whether it runs in a new process."""
    is_new = inputs.rarely(draw, 12)
    line = draw(inputs.uniform(LINES))
    if is_new and line[0] == "export":
        line = ["info", "model.ckpt"]
    return draw(environments(AT_LOAD if is_new else tuple(VARIABLES))), list(line), is_new

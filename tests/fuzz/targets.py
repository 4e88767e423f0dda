"""What is fuzzed: one function for each kind of input, and the property that all of them have.

Whatever the input holds, the package gives a right result or one of its own errors, within a time and a memory limit.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import resource
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torchmdnet.errors import CheckpointError, ConfigError, DataError, NotEnoughMemory

#: Seconds of the processor that an input may take (waiting does not count), and bytes that may be allocated for it.
SECONDS, BYTES = 20, 4 * 2**30
#: What the package may answer.
ANSWERS = (ConfigError, DataError, CheckpointError, NotEnoughMemory)
#: No message is longer, and none repeats what PyTorch advises.
LONGEST, UNWANTED = 6000, ("weights_only=False", "Traceback")


class TooLong(BaseException):
    """An input that takes more than its time."""


class Wrong(AssertionError):
    """A result or a message that is not right."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Time and memory for one input."""

    def late(*_: Any) -> None:
        raise TooLong(f"more than {SECONDS} s of the processor")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    before = signal.signal(signal.SIGPROF, late)
    resource.setrlimit(resource.RLIMIT_DATA, (used + BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def answered(function: Callable[[], Any]) -> Any:
    """The result of a call, or None where the package refuses it; anything else is raised."""
    try:
        with warnings.catch_warnings(), limited():
            warnings.simplefilter("ignore")
            return function()
    except ANSWERS as error:
        told = str(error)
        if not told.strip() or (any(words in told for words in UNWANTED) and "convert --trust" not in told):
            raise Wrong(f"{type(error).__name__} says {told[:200]!r}") from error
        return None


def command(words: list[str]) -> int:
    """The status of ``torchmd-net``, run in this process; what it prints is looked at and dropped."""
    from torchmdnet.scripts.main import main

    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with warnings.catch_warnings(), limited():
                warnings.simplefilter("ignore")
                main(words)
        except SystemExit as end:
            status = end.code or 0
    told = err.getvalue()
    if status not in (0, 1, 2) or (status and not (told + out.getvalue()).strip()) or "Traceback" in told:
        raise Wrong(f"status {status!r}: {told[:200]!r}")
    return status


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A working folder that is gone afterwards, with a cache of its own."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        os.environ["TORCHMDNET_CACHE"] = f"{name}/cache"
        try:
            yield Path(name)
        finally:
            os.chdir(here)


# ------------------------------------------------------------------------------------------------------------ settings

#: A model small enough to be built for every input.
BASE: dict[str, Any] = {
    "dataset": "TinyQM",
    "model": "tensornet",
    "embedding_dimension": 8,
    "num_layers": 1,
    "num_rbf": 4,
    "cutoff_upper": 4.0,
    "log_dir": "run",
    "train_size": 10,
    "val_size": 5,
}
#: Sizes up to which a model is built.
SMALL = {"embedding_dimension": 64, "num_layers": 3, "num_rbf": 64, "max_z": 200, "num_heads": 64, "q_dim": 64}


def settings(content: bytes) -> bool:
    """A settings file: read, checked, built from if that is little work, written and read back."""
    with folder():
        Path("conf.yaml").write_bytes(content)
        return _resolved(["--conf", "conf.yaml"])


def words(given: list[str]) -> bool:
    """A command line."""
    with folder():
        return _resolved([f"--{key.replace('_', '-')}={value}" for key, value in BASE.items()] + given)


def _resolved(argv: list[str]) -> bool:
    from torchmdnet.build import create_model
    from torchmdnet.config import resolve
    from torchmdnet.config.reader import read_yaml, write_yaml
    from torchmdnet.config.settings import hyper_parameters
    from torchmdnet.config.values import coerce

    def read() -> Any:
        try:
            return resolve(argv)
        except SystemExit as end:  # --version
            if end.code not in (0, None):
                raise Wrong(f"status {end.code!r}") from end
            return None

    with contextlib.redirect_stdout(io.StringIO()):
        args = answered(read)
    if args is None:
        return False
    values = hyper_parameters(args)
    write_yaml("again.yaml", values)
    again = read_yaml("again.yaml")
    from torchmdnet.options import OPTIONS

    for key, setting in again.items():
        if key in OPTIONS and coerce(key, setting.value, "again") != coerce(key, copy.deepcopy(values[key]), "first"):
            raise Wrong(f"{key} is {values[key]!r} and is read back as {setting.value!r}")
    if all(isinstance(values.get(key, 0), int) and values.get(key, 0) <= most for key, most in SMALL.items()):
        answered(lambda: create_model(values))
    return True


# ---------------------------------------------------------------------------------------------------------- structures

EXTXYZ = (
    '3\nLattice="5.0 0.0 0.0 0.0 6.0 0.0 0.0 0.0 7.0" Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.5 '
    'pbc="T T T" stress="0 0 0 0 0 0 0 0 0" charge=0\n'
    "O 0.0 0.0 0.1 0.1 0.0 0.0\nH 0.0 0.7 -0.5 -0.1 0.2 0.0\nH 0.0 -0.7 -0.5 0.0 -0.2 0.0\n"
) * 2
XYZ = "3\ncomment\nO 0.0 0.0 0.1\nH 0.0 0.7 -0.5\nH 0.0 -0.7 -0.5\n1\n\nH 0 0 0\n"


def npz(**arrays: Any) -> bytes:
    """The bytes of an archive."""
    import numpy as np

    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def arrays() -> dict[str, Any]:
    """Two molecules of three atoms."""
    import numpy as np

    pos = np.array([[[0, 0, 0.1], [0, 0.7, -0.5], [0, -0.7, -0.5]], [[0, 0, 0.2], [0, 0.7, -0.5], [0, -0.8, -0.5]]])
    return {"z": np.array([8, 1, 1]), "R": pos, "E": np.array([-1.0, -2.0]), "F": 0.1 * pos}


def hdf5(**named: Any) -> bytes:
    """The bytes of a file with one group."""
    import h5py

    file = io.BytesIO()
    with h5py.File(file, "w") as stored:
        for name, values in named.items():
            stored[f"group/{name}"] = values
    return file.getvalue()


def structures(content: bytes, suffix: str) -> bool:
    """A file of structures: examined with ``torchmd-net data``, and looked at as labellers do."""
    from torchmdnet.labelling.label import key_of, read_all
    from torchmdnet.labelling.sample import closest_contact
    from torchmdnet.labelling.sound import check_structure

    def look() -> None:
        for _, atoms in read_all([Path(f"data{suffix}")]):
            key_of(atoms)
            check_structure(atoms)
            if len(atoms) < 100:
                closest_contact(atoms)

    with folder():
        Path(f"data{suffix}").write_bytes(content)
        status = command(["data", f"data{suffix}", "--json", "--html", "page.html"])
        if suffix not in (".h5", ".hdf5"):
            answered(look)
        return status == 0


# --------------------------------------------------------------------------------------------------------- checkpoints

_FILES: dict[str, bytes] = {}


def model_bytes(suffix: str) -> bytes:
    """A model file, the same each time."""
    if suffix not in _FILES:
        import torch

        from torchmdnet.checkpoint import save_model
        from torchmdnet.ensemble import Ensemble
        from torchmdnet.testing import tiny_model

        torch.manual_seed(0)
        model: Any = tiny_model("tensornet")
        model = Ensemble([model, model]) if suffix == ".zip" else model
        with folder():
            save_model(model, f"model{suffix}")
            _FILES[suffix] = Path(f"model{suffix}").read_bytes()
    return _FILES[suffix]


def checkpoint(content: bytes, suffix: str) -> bool:
    """A model file: described, loaded, and taken settings from."""
    from torchmdnet.checkpoint import describe, load_model
    from torchmdnet.config.settings import read_saved_settings

    with folder():
        path = f"model{suffix}"
        Path(path).write_bytes(content)
        command(["info", path])
        answered(lambda: describe(path))
        model = answered(lambda: load_model(path))
        if suffix == ".ckpt":
            answered(lambda: read_saved_settings(path))
        return model is not None


def with_hyper_parameters(changed: Any) -> bytes:
    """A checkpoint whose ``hyper_parameters`` are changed: a mapping is merged, a list names keys to leave out."""
    import torch

    content = torch.load(io.BytesIO(model_bytes(".ckpt")), weights_only=True)
    stored = dict(content["hyper_parameters"])
    if isinstance(changed, dict):
        content["hyper_parameters"] = stored | changed
    elif isinstance(changed, list):
        content["hyper_parameters"] = {key: value for key, value in stored.items() if key not in changed}
    else:
        content["hyper_parameters"] = changed
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()

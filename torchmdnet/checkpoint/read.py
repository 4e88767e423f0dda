"""Reading checkpoint files without running any code they may hold."""

from __future__ import annotations

import argparse
import collections
import itertools
import logging
import math
import pathlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchmdnet.checkpoint.card import provenance_of
from torchmdnet.checkpoint.native import is_native, read_native
from torchmdnet.checkpoint.sound import check_kinds
from torchmdnet.errors import CheckpointError, ConfigError, DataError
from torchmdnet.files import expanded
from torchmdnet.parse import check_plain

__all__ = ["as_model_file", "check_sizes", "hyper_parameters_of", "model_file", "read_checkpoint"]

log = logging.getLogger(__name__)

#: The attribute of a record of an archive that makes it a folder.
_FOLDER = 0x10
#: Bytes of an archive in which its end begins, at the most.
_LONGEST_END = 65_557


def _harmless() -> list[Any]:
    """Types that older files hold beside tensors and plain Python values; building one runs no code of the file."""
    scalar = getattr(np, "_core", np).__dict__.get("multiarray") or np.core.multiarray  # type: ignore[attr-defined]
    types: list[Any] = [
        argparse.Namespace,
        collections.OrderedDict,
        collections.defaultdict,
        pathlib.PosixPath,
        pathlib.PurePosixPath,
        np.dtype,
        np.ndarray,
        scalar.scalar,
        scalar._reconstruct,
    ]
    types += [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    return types


def model_file(path: str | Path) -> Path:
    """The model in the folder of a run: ``potential.safetensors``, else the best or last checkpoint; or the file given.

    Raises:
        FileNotFoundError: If there is none of them in the folder.
    """
    path = expanded(path)
    if not path.is_dir():
        return path
    names = ("potential.safetensors", "best.ckpt", "last.ckpt")
    for name in names:
        if (path / name).is_file():
            log.info("%s is a folder; its %s is read.", path, name)
            return path / name
    raise FileNotFoundError(f"{path} is a folder without {', '.join(names[:-1])} or {names[-1]}. Name a model file.")


def read_checkpoint(path: str | Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint or a native model file onto the CPU.

    Args:
        path: A Lightning checkpoint, any file with ``hyper_parameters`` and ``state_dict``, or a native file, whose
            content is given the same form: ``state_dict``, ``hyper_parameters``, facts about the data under
            ``torchmdnet``, and ``card``.
        weights_only: Refuse files that need more than tensors and plain values. Set it to False only for a file you
            trust like a program: unpickling it can run code.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, is no checkpoint, or needs objects that are not trusted; the message
            names them.
    """
    path = model_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    if is_native(path):
        state, card = read_native(path)
        return {
            "state_dict": state,
            "hyper_parameters": dict(card["hyper_parameters"]),
            "torchmdnet": {"version": card.get("written_by"), **provenance_of(card)},
            "card": card,
        }
    _check_records(path)
    try:
        with ExitStack() as stack:
            if weights_only:
                stack.enter_context(torch.serialization.safe_globals(_harmless()))
            content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from None
    except PermissionError:
        raise
    except Exception as error:  # damaged pickles raise whatever their bytes happen to ask for
        raise _damaged(path, _first_line(error)) from error
    if not isinstance(content, Mapping) or "state_dict" not in content:
        found = f"keys {sorted(map(str, content))[:8]}" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path} is no checkpoint: expected a dictionary with 'state_dict', found {found}.")
    return dict(content)


def _check_records(path: Path) -> None:
    """Compare every record of a zip archive with its checksum: PyTorch itself would load altered weights.

    Raises:
        CheckpointError: If the file is neither an archive nor a pickle; if a record was altered, or the archive cannot
            be walked; the message names the record.
    """
    flaw = _flaw_of(path)
    if flaw is not None:
        raise _damaged(path, flaw)


def _flaw_of(path: Path) -> str | None:
    """What is damaged in a file, None for nothing; files that are no model files are refused."""
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80":
        return None  # a pickle: files of PyTorch before 1.6 carry no checksums
    if not b"PK\x03\x04".startswith(start):
        raise _no_model_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
            entries = archive.infolist()
    except Exception as error:  # damaged headers raise many kinds
        return _first_line(error) if _has_end(path) else "its end is missing"
    if record is not None:
        return f"the record {_short(record)} does not match its checksum"
    for entry in entries:
        if entry.external_attr & _FOLDER or entry.is_dir():  # of which PyTorch reads no byte into the memory it returns
            return f"the record {_short(entry.filename)} is marked as a folder"
    if not any(entry.filename.endswith("data.pkl") for entry in entries):
        raise _no_model_file(path)
    return None


def _short(record: str) -> str:
    """The name of a record without that of the archive, under which the file was first written."""
    return repr(record.partition("/")[2] or record)


def _has_end(path: Path) -> bool:
    """Whether the list of records is there, which an archive ends with."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _LONGEST_END, 0))
        return b"PK\x05\x06" in file.read()


def _no_model_file(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a model file: it is neither a checkpoint (.ckpt) nor a native file (.safetensors)."
    )


def _damaged(path: Path, reason: str) -> CheckpointError:
    """The error for a file whose bytes are wrong; it offers the checkpoints beside it, newest first."""
    beside = [other for other in path.parent.glob("*.ckpt") if other != path]
    newest = sorted(beside, key=lambda other: other.stat().st_mtime, reverse=True)
    whole = [*itertools.islice((other.name for other in newest if _is_whole(other)), 3)]
    others = f" Undamaged checkpoints in its folder, newest first: {', '.join(whole)}." if whole else ""
    return CheckpointError(f"{path} cannot be read as a checkpoint; it is truncated or damaged ({reason}).{others}")


def _is_whole(path: Path) -> bool:
    try:
        return _flaw_of(path) is None
    except (CheckpointError, OSError):
        return False


def _first_line(error: Exception) -> str:
    """What an error says, unless it is PyTorch's advice to read the file without care."""
    line = (str(error).splitlines() or [""])[0]
    return "its content cannot be read" if "weights" in line.lower() else line or type(error).__name__


def _refusal(path: Path, error: Exception) -> CheckpointError:
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:
        names = []
    if not names:
        return _damaged(path, "its content cannot be read")
    return CheckpointError(
        f"{path} is refused: beside tensors it holds {', '.join(names)}, and loading such objects can run code. "
        "If you trust the file like a program, bring it into another format with `torchmd-net convert --trust`, or in "
        "Python pass weights_only=False."
    )


@contextmanager
def as_model_file(path: str | Path) -> Iterator[None]:
    """Turn whatever building a model from the content of a file runs into, into an error that names the file.

    Options and weights can be anything: a file may lack what its model needs, or hold values of another kind.

    Raises:
        CheckpointError: Naming the file, and the option or tensor that is missing. A ``ConfigError`` stays one.
    """
    try:
        yield
    except (CheckpointError, ConfigError, DataError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    except (OSError, MemoryError, ImportError):
        raise
    except KeyError as error:
        what = error.args[0] if error.args else "something"
        raise CheckpointError(
            f"{path}: {what!r} is missing among its hyper_parameters or tensors, so the model cannot be rebuilt."
        ) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise CheckpointError(
            f"{path}: its hyper_parameters and tensors do not make a model ({reason}). The file is damaged, or another "
            "program wrote it."
        ) from error


def check_sizes(options: Mapping[str, Any], state: Mapping[str, Any], path: str | Path) -> None:
    """Refuse options of a wrong kind, or of a model much larger than the weights in the file, before it is built.

    Raises:
        CheckpointError: Naming the option.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: its state_dict is no table of tensors, so it is not a model file.")
    check_kinds(options, path)
    numbers = max(sum(value.numel() for value in state.values()), 1)
    for key in ("embedding_dimension", "num_layers", "num_rbf", "max_z", "num_heads", "num_filters"):
        size = options.get(key)
        most = 2 * math.isqrt(numbers) if key == "embedding_dimension" else numbers
        if isinstance(size, int) and size > most:
            raise CheckpointError(
                f"{path}: {key}={size} describes a larger model than the file holds, which has {numbers:,} numbers."
            )


def hyper_parameters_of(checkpoint: Mapping[str, Any], path: str | Path = "the checkpoint") -> dict[str, Any]:
    """The hyper-parameters of a checkpoint as a new dictionary; older files keep a Namespace.

    Args:
        checkpoint: What :func:`read_checkpoint` returns.
        path: Name of the file for the message of an error.

    Raises:
        CheckpointError: If there are none.
    """
    stored = checkpoint.get("hyper_parameters")
    if isinstance(stored, argparse.Namespace):
        stored = vars(stored)
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{path} holds no hyper_parameters, so the model cannot be rebuilt. Pass args=.")
    check_plain(stored, f"{path}: hyper_parameters", CheckpointError)
    return {str(key): value for key, value in stored.items()}

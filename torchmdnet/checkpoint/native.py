"""The native model file: weights in safetensors, and beside them a card that says in JSON what they are.

Nothing in such a file can run: tensors are numbers, the card is text. Two digests tell whether either was changed after
the file was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from torchmdnet.errors import CheckpointError
from torchmdnet.files import draft_of
from torchmdnet.parse import check_plain, parse_json
from torchmdnet.text import check_text

__all__ = ["CARD_KEY", "FORMAT", "card_digest", "is_native", "read_native", "tensor_digest", "write_native"]

#: Version of the card. A reader refuses newer ones; a change of the layout adds one.
FORMAT = 1
#: Where the card lies in the metadata of the file.
CARD_KEY = "torchmdnet"
_BYTES = torch.uint8

_REQUIRED = ("architecture", "hyper_parameters", "units", "elements", "sha256")


def is_native(path: str | Path) -> bool:
    """Whether a file is in the safetensors format, which its first bytes decide, not its name."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:9] == b"{" or (path.suffix == ".safetensors" and not start.startswith(b"PK"))


def write_native(path: str | Path, state: Mapping[str, Tensor], card: Mapping[str, Any]) -> dict[str, Any]:
    """Write weights and card; the file is whole or, if writing fails, as it was before.

    Args:
        path: The file.
        state: Tensors by name.
        card: What to say of them, plain values only; format and digests are added.

    Returns:
        The card as written.
    """
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    card = {"format": FORMAT, **{key: value for key, value in card.items() if key not in ("format", "sha256")}}
    card["sha256"] = {"tensors": tensor_digest(tensors), "card": card_digest(card)}
    content = save(tensors, metadata={CARD_KEY: _text(card)})  # one key: the order of several is random
    with draft_of(path) as draft:
        draft.write_bytes(content)
    return card


def read_native(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and card of a native file.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, has been changed since it was written, comes from another program or
            from a newer release.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No model file at {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a model file; it may be truncated or damaged ({error})."
        ) from error
    card = _card_in(metadata, path)
    for what, found in (("card", card_digest(card)), ("tensors", tensor_digest(state))):
        if card["sha256"].get(what) != found:
            raise CheckpointError(
                f"{path}: the {what} of the file do not have the digest the file states, so it was damaged or changed "
                "after it was written. Get it again from where it came from. (To state units and the like, use "
                "`torchmd-net convert`.)"
            )
    return state, card


def _card_in(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    if CARD_KEY not in metadata:
        raise CheckpointError(
            f"{path} holds tensors, but no card of this package (metadata {CARD_KEY!r}), so it says nothing of the "
            "model they belong to. It was written by another program."
        )
    card = parse_json(metadata[CARD_KEY], f"{path} is damaged: the card of the file is no JSON", CheckpointError)
    check_plain(card, f"{path}: the card of the file", CheckpointError)
    version = card.get("format") if isinstance(card, dict) else None
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path}: the card of the file does not state its format; the file is damaged.")
    if version > FORMAT:
        raise CheckpointError(
            f"{path} has a card of format {version}, written by {card.get('written_by', 'a newer release')}; this "
            f"release reads formats up to {FORMAT}. Update torchmd-net."
        )
    missing = [key for key in _REQUIRED if key not in card]
    if missing or not isinstance(card["hyper_parameters"], dict) or not isinstance(card["sha256"], dict):
        raise CheckpointError(
            f"{path}: the card of the file lacks {', '.join(missing) or 'its tables'}; the file is damaged."
        )
    return card


def tensor_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of tensors, in the order of their names."""
    whole = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.reshape(-1).view(_BYTES).numpy().tobytes() if tensor.numel() else b"")
    return whole.hexdigest()


def card_digest(card: Mapping[str, Any]) -> str:
    """SHA-256 over everything in a card but its digests."""
    text = _text({key: value for key, value in card.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _text(card: Mapping[str, Any], *, sort_keys: bool = False) -> str:
    return check_text(json.dumps(card, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys), "card")

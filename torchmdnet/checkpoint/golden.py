"""Golden numbers: small systems that travel with a model, and what it said of them when it was written."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchmdnet.errors import CheckpointError
from torchmdnet.potential import TorchMD_Net

__all__ = ["Example", "check_golden", "default_examples", "deviation_from", "golden_numbers"]

log = logging.getLogger(__name__)

#: Allowed deviation in double precision, relative to 1 + max|golden|.
TOLERANCE_64 = 1e-7
#: The least that is allowed in single precision; models that are less accurate in it say so in their card.
TOLERANCE_32 = 1e-4


class Example(NamedTuple):
    """One system to ask a model about, in the model's unit of length."""

    name: str
    z: Tensor  # (N,)
    pos: Tensor  # (N, 3)
    box: Tensor | None = None  # (3, 3)
    q: float | None = None  # e
    s: float | None = None
    extra: Mapping[str, Tensor] = {}  # whatever priors and heads ask for, by name


def golden_numbers(model: TorchMD_Net, examples: Iterable[Example]) -> dict[str, Any]:
    """What a model says of systems, in double precision.

    Args:
        model: Asked through a copy in double precision on the CPU.
        examples: The systems.

    Returns:
        ``systems``, one dictionary of plain values each, and ``single_precision``, the largest relative deviation of
        the same model in single precision.

    Raises:
        ValueError: If an answer is not a finite number.
    """
    exact = _copy(model, torch.float64)
    systems = []
    for example in examples:
        answers = _ask(exact, example)
        for name, values in answers.items():
            if not bool(values.isfinite().all()):
                raise ValueError(f"the {name} of {example.name!r} is not a finite number")
        systems.append({**_plain(example), "answers": {name: values.tolist() for name, values in answers.items()}})
    golden = {"systems": systems}
    return {**golden, "single_precision": deviation_from(golden, _copy(model, torch.float32))}


def deviation_from(golden: Mapping[str, Any], model: TorchMD_Net) -> float:
    """Largest deviation of a model's answers from golden numbers, relative to 1 + max|golden|."""
    worst = 0.0
    for system in golden["systems"]:
        for name, values in _ask(model, _example(system)).items():
            if name not in system["answers"]:
                continue
            reference = torch.tensor(system["answers"][name], dtype=torch.float64)
            if reference.shape != values.shape:
                return float("inf")
            error = (values.double() - reference).abs().max() / (1 + reference.abs().max())
            worst = max(worst, float(error)) if bool(error.isfinite()) else float("inf")
    return worst


def check_golden(model: TorchMD_Net, golden: Mapping[str, Any], path: str | Path) -> float:
    """Compare the answers of a model on the CPU with the numbers in its file.

    Returns:
        The largest relative deviation.

    Raises:
        CheckpointError: If they deviate by more than the precision of the model explains.
    """
    found = deviation_from(golden, model)
    allowed = TOLERANCE_64
    if model.dtype != torch.float64:
        allowed = max(TOLERANCE_32, 10 * float(golden.get("single_precision") or 0.0))
    if not found <= allowed:
        raise CheckpointError(
            f"{path}: the model gives other numbers here than where the file was written; they deviate by {found:.1e} "
            f"of their size ({allowed:.0e} would be rounding). Do not use it. TORCHMDNET_PLAIN_OPS=1 turns compiled "
            "loops off, should they be at fault; check=False loads the model as it is."
        )
    return found


def default_examples(
    model: TorchMD_Net,
    *,
    elements: Sequence[int] | None = None,
    is_periodic: bool = False,
    has_charges: bool = False,
    has_spins: bool = False,
) -> list[Example]:
    """A random molecule and, for models of periodic systems, a small triclinic cell; no structure of the data.

    Args:
        model: Says which atomic numbers it knows, and how far it sees.
        elements: Atomic numbers the model was trained on.
        is_periodic: Whether it was trained on periodic systems.
        has_charges: Whether total charges are given to it, also where they are not embedded.
        has_spins: Whether spins are given to it, likewise.
    """
    representation = model.representation_model
    embedded = getattr(getattr(representation, "system_embedding", None), "quantities", ())
    has_charges, has_spins = has_charges or "charge" in embedded, has_spins or "spin" in embedded
    max_z = int(getattr(representation, "max_z", 0) or getattr(getattr(representation, "model", None), "max_z", 100))
    numbers = [z for z in (elements or (8, 1, 6, 7)) if 0 <= z < max_z] or list(range(max_z))[:8]
    numbers = numbers if len(numbers) <= 8 else numbers[:: -(-len(numbers) // 8)]
    scale = min(1.0, float(getattr(representation, "cutoff_upper", 5.0)) / 4)  # also where lengths are in nm
    needs_charges = any(type(prior).__name__ == "Coulomb" for prior in model.prior_model or ())
    generator = torch.Generator().manual_seed(1)
    examples = []
    for name, box in (("molecule", None), ("cell", _CELL))[: 2 if is_periodic else 1]:
        pos = _places(8, box, generator)
        z = torch.tensor([numbers[n % len(numbers)] for n in range(8)])
        extra = {"partial_charges": 0.3 * torch.linspace(-1, 1, 8, dtype=torch.float64)} if needs_charges else {}
        examples.append(
            Example(
                name,
                z,
                scale * pos,
                None if box is None else scale * box,
                1.0 if has_charges else None,
                1.0 if has_spins else None,
                extra,
            )
        )
    return examples


_CELL = torch.tensor([[5.2, 0.3, -0.2], [-0.4, 5.6, 0.5], [0.1, -0.6, 5.4]], dtype=torch.float64)


def _places(count: int, box: Tensor | None, generator: torch.Generator) -> Tensor:
    """Random places at least 1.1 Å apart, images included, in the cell or in a cluster: (count, 3)."""
    images = torch.zeros(1, 3, dtype=torch.float64)
    if box is not None:
        images = torch.cartesian_prod(*[torch.arange(-1.0, 2.0, dtype=torch.float64)] * 3) @ box
    kept: list[Tensor] = []
    while len(kept) < count:
        place = torch.rand(3, generator=generator, dtype=torch.float64)
        place = place @ box if box is not None else 3.2 * place
        if all(bool(((place - other + images).norm(dim=1) > 1.1).all()) for other in kept):
            kept.append(place)
    return torch.stack(kept)


def _copy(model: TorchMD_Net, dtype: torch.dtype) -> TorchMD_Net:
    return copy.deepcopy(model).to(device="cpu", dtype=dtype).eval()


def _ask(model: TorchMD_Net, example: Example) -> dict[str, Tensor]:
    """Energy, forces if the model gives them, and further properties."""

    def number(value: float | None) -> Tensor | None:
        return None if value is None else torch.tensor([value], dtype=model.dtype)

    extra = {name: values.to(model.dtype) if values.is_floating_point() else values
             for name, values in example.extra.items()}  # fmt: skip
    has_properties = bool(model.property_heads)
    with torch.no_grad():
        output = model(
            example.z,
            example.pos.to(model.dtype),
            torch.zeros_like(example.z),
            box=None if example.box is None else example.box.to(model.dtype),
            q=number(example.q),
            s=number(example.s),
            extra_args=extra or None,
            **({"properties": True} if has_properties else {}),
        )
    answers = {"energy": output.energy, **(output.properties if has_properties else {})}
    if model.derivative:
        answers["forces"] = output.forces
    return {name: values.detach() for name, values in answers.items()}


def _plain(example: Example) -> dict[str, Any]:
    """An example as plain values; what it does not have is left out."""
    values = {"name": example.name, "z": example.z.tolist(), "pos": example.pos.double().tolist()}
    if example.box is not None:
        values["box"] = example.box.double().tolist()
    values |= {key: value for key in ("q", "s") if (value := getattr(example, key)) is not None}
    if example.extra:
        values["extra"] = {name: tensor.tolist() for name, tensor in example.extra.items()}
    return values


def _example(system: Mapping[str, Any]) -> Example:
    """The inverse of :func:`_plain`."""

    def real(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    extra = {name: torch.tensor(values) for name, values in system.get("extra", {}).items()}
    return Example(
        str(system.get("name", "")),
        torch.tensor(system["z"]),
        real(system["pos"]).reshape(-1, 3),
        real(system["box"]) if "box" in system else None,
        system.get("q"),
        system.get("s"),
        {name: values.double() if values.is_floating_point() else values for name, values in extra.items()},
    )

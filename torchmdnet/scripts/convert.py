"""``torchmd-net convert``: a model file in another format, verified."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmdnet.errors import CheckpointError, ConfigError, WriteError
from torchmdnet.files import check_target, is_one_of, unwritten

if TYPE_CHECKING:
    from torchmdnet.ensemble import Ensemble
    from torchmdnet.potential import TorchMD_Net
from torchmdnet.scripts.argument_types import CommandParser
from torchmdnet.text import check_text

__all__ = ["convert", "get_parser", "main"]

#: Largest relative deviation, in double precision, with which a conversion counts as verified.
TOLERANCE = 1e-12


def main(argv: Sequence[str] | None = None) -> None:
    """Convert a file and print how well old and new agree.

    Raises:
        ConfigError: If an argument cannot work.
        CheckpointError: If the old file cannot be read, or the new one would give other numbers.
    """
    args = get_parser().parse_args(argv)
    stated = {
        "units": _units(args.units),
        "level_of_theory": _readable(args.level_of_theory, "--level-of-theory"),
        "citation": _readable(args.citation, "--citation"),
        "elements": _elements(args.elements),
    }
    deviation = convert(
        args.old if len(args.old) > 1 else args.old[0],
        args.new,
        provenance={key: value for key, value in stated.items() if value is not None},
        overwrite=args.overwrite,
        weights_only=not args.trust,
        **({"compatibility_load": True} if args.compatibility_load else {}),
    )
    print(f"{args.new}: energies and forces agree with the old file to {deviation:.0e} of their size")


def _readable(text: str | None, flag: str) -> str | None:
    """Text that a file can hold."""
    return None if text is None else check_text(text, flag)


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net convert``."""
    parser = CommandParser(
        prog="torchmd-net convert",
        description="Bring a model file of any release into another format, and verify that it gives the same numbers.",
    )
    parser.add_argument("old", nargs="+", help="a checkpoint, a native file or a .zip; several make an ensemble")
    parser.add_argument(
        "new", help="ends in .safetensors (native), .zip (native, ensembles) or .ckpt (the layout of release 3)"
    )
    parser.add_argument("--units", help="units the model predicts in, for files that do not say: eV, kcal/mol/A, ...")
    parser.add_argument("--level-of-theory", help="what the reference energies were computed with")
    parser.add_argument("--citation", help="what to cite for model or data")
    parser.add_argument("--elements", help="elements the model was trained on: H,C,N,O")
    parser.add_argument(
        "--compatibility-load", action="store_true", help="the old file is a TensorNet of release 2.6.2"
    )
    parser.add_argument(
        "--trust", action="store_true", help="read a file that can run code, which you trust like a program"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the new file if it exists")
    return parser


def convert(
    old: str | Path | Sequence[str | Path],
    new: str | Path,
    *,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
    **load_options: Any,
) -> float:
    """Write the model in ``old`` to ``new`` in the format that its name asks for, and compare the two.

    Args:
        old: A model file of any release, or several.
        new: The file to write.
        provenance: What the old file does not say; see :func:`torchmdnet.checkpoint.save.save_model`.
        overwrite: Whether an existing file may be replaced.
        **load_options: For reading the old file; see :func:`torchmdnet.checkpoint.load.load_model`.

    Returns:
        The largest relative deviation of energies and forces in double precision.

    Raises:
        ConfigError: If ``new`` exists, its folder does not, or its name does not fit.
        CheckpointError: If the old file cannot be read, or the new one would give other numbers; it is not left there.
    """
    from torchmdnet.checkpoint import load_model, save_model

    target = check_target(new, "new")
    if is_one_of(target, [old] if isinstance(old, (str, Path)) else old):
        raise ConfigError(f"{target} is the file that is read; the new one may hold less. Choose another name.")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists. Pass --overwrite to replace it, or choose another name.")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {str(target.parent)!r}. Make it, or choose another name.")
    model = load_model(old, **load_options)
    _refuse_contradictions(model, provenance or {})
    draft = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        save_model(model, draft, provenance=provenance)
        deviation = _deviation(model, load_model(draft, check=False))
        if not deviation <= TOLERANCE:
            raise CheckpointError(
                f"{target} was not written: it would deviate from {old} by {deviation:.1e} of the size of the answers."
            )
        os.replace(draft, target)
    except (CheckpointError, ConfigError) as error:  # the file that was asked for, not the draft of it
        words = str(error).replace(str(draft), str(target)).replace(draft.name, target.name)
        raise type(error)(words) from error
    except OSError as error:
        if draft.name not in str(error):
            raise
        reason = error.reason if isinstance(error, WriteError) else error.strerror or str(error)
        raise unwritten(target, reason, error.errno) from error
    finally:
        draft.unlink(missing_ok=True)
    return deviation


def _refuse_contradictions(model: TorchMD_Net | Ensemble, stated: Mapping[str, Any]) -> None:
    """Facts of the command line are for what a file does not say: a conversion changes no numbers.

    Raises:
        ConfigError: Naming the flag, what the file states and what was asked for.
    """
    known = getattr(model, "provenance", {})
    for key, value in stated.items():
        before = known.get(key)
        if before and key != "citation" and before != value:
            flag = key.replace("_", "-")
            raise ConfigError(
                f"--{flag}: the file states {_shown(before)}, not {_shown(value)}. A conversion changes no numbers: "
                "leave the flag out."
            )


def _shown(fact: Any) -> str:
    if isinstance(fact, Mapping):
        return ", ".join(map(str, fact.values()))
    return ", ".join(map(str, fact)) if isinstance(fact, list | tuple) else str(fact)


def _deviation(old: TorchMD_Net | Ensemble, new: TorchMD_Net | Ensemble) -> float:
    """Largest relative deviation of two models on made-up systems, members of ensembles one by one."""
    from torchmdnet.checkpoint.golden import default_examples, deviation_from, golden_numbers
    from torchmdnet.ensemble import Ensemble

    if isinstance(old, Ensemble) or isinstance(new, Ensemble):
        assert isinstance(old, Ensemble) and isinstance(new, Ensemble)  # noqa: PT018
        return max(_deviation(*pair) for pair in zip(old, new, strict=True))  # type: ignore[arg-type]
    options = old.hyper_parameters
    examples = default_examples(
        old,
        elements=old.provenance.get("elements"),
        is_periodic=not _needs_open_space(old),
        has_charges=bool(options.get("charge")),
        has_spins=bool(options.get("spin")),
    )
    return deviation_from(golden_numbers(old, examples), new.double())


def _needs_open_space(model: TorchMD_Net) -> bool:
    """Whether a head takes every pair of a system, so that boxes are refused."""
    return getattr(model.output_model, "coulomb_cutoff", 0.0) is None


def _units(stated: str | None) -> dict[str, str] | None:
    if stated is None:
        return None
    from torchmdnet.calculators.units import Units

    energy, length = Units.parse(stated)
    return {"energy": energy, "length": length}


def _elements(stated: str | None) -> list[int] | None:
    if stated is None:
        return None
    from torchmdnet.elements import ATOMIC_NUMBERS

    symbols = stated.replace(",", " ").split()
    unknown = [symbol for symbol in symbols if symbol not in ATOMIC_NUMBERS]
    if unknown:
        raise ConfigError(f"--elements: {', '.join(unknown)} is not known. Write symbols, H,C,N,O.")
    return sorted({ATOMIC_NUMBERS[symbol] for symbol in symbols})

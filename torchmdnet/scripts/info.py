"""``torchmd-net info``: the card of a model file."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torchmdnet.scripts.argument_types import CommandParser

__all__ = ["get_parser", "main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the card of a model file as a table, or with ``--json`` as it is.

    Raises:
        CheckpointError: If the file is damaged, was changed, or does not repeat its golden numbers.
    """
    args = get_parser().parse_args(argv)

    from torchmdnet.checkpoint import describe
    from torchmdnet.checkpoint.read import as_model_file

    card = describe(args.file)
    with as_model_file(args.file):
        if args.check:
            card["check"] = _check(args.file, card)
        if args.json:
            print(json.dumps(card, indent=2, ensure_ascii=False))
            return
        _print(card)


def get_parser() -> argparse.ArgumentParser:
    """The arguments of ``torchmd-net info``."""
    parser = CommandParser(prog="torchmd-net info", description="Say what is in a model file.")
    parser.add_argument("file", help="a native file (.safetensors), a checkpoint (.ckpt), or a .zip of either")
    parser.add_argument("--json", action="store_true", help="print the card as JSON")
    parser.add_argument("--check", action="store_true", help="load the model and let it repeat its golden numbers")
    return parser


def _check(path: str, card: Mapping[str, Any]) -> str:
    """Load the model, which compares it with its golden numbers, and say how well it did."""
    from torchmdnet.checkpoint.golden import deviation_from
    from torchmdnet.checkpoint.load import load_model
    from torchmdnet.potential import TorchMD_Net

    load_model(path)
    cards = card.get("members", [card])
    if not all(member.get("golden") for member in cards):
        return "the model loads; the file holds no golden numbers to compare with"
    exact = load_model(path, precision=64)
    models = [member for member in exact.modules() if isinstance(member, TorchMD_Net)]
    worst = max(deviation_from(each["golden"], model) for each, model in zip(cards, models, strict=True))
    return f"golden numbers repeated; largest relative deviation {worst:.0e} in double precision{_grids(models)}"


def _grids(models: Sequence[Any]) -> str:
    """How the radial filters of models that have just been asked were evaluated."""
    from torchmdnet.timing.measure import radial_engines

    engines = [engine for model in models for engine in radial_engines(model)]
    grids = {(engine.spline.num_cells, engine.error or 0.0) for engine in engines if engine.spline is not None}
    told = [f"{cells} cells, relative error {error:.0e}" for cells, error in sorted(grids)]
    return f"; radial filters read from a grid of {'; '.join(told)}" if told else "; radial filters exact, pair by pair"


def _print(card: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for number, member in enumerate(card.get("members", [card])):
        title = card["file"] if member is card else f"{card['file']}, member {number + 1} of {len(card['members'])}"
        console.print(Text(title, "bold"), soft_wrap=True)
        rows = rows_of(member)
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            console.print(Text.assemble((f"  {name.ljust(width)}", "cyan"), "  ", text), soft_wrap=True)
    if "members" in card and card.get("check"):
        console.print(Text(card["check"]), soft_wrap=True)


def rows_of(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A card as names and texts; what the file does not state is marked as such."""
    units = card["units"]
    length = units["length"] or "Å"
    quantities = _units_of_training(units)
    rows: list[tuple[str, Any]] = [
        ("kind", _KINDS[card["kind"]] + (f", format {card['format']}" if "format" in card else "")),
        ("written by", card.get("written_by")),
        ("trained by", card.get("trained_by")),
        ("architecture", card["architecture"]),
        ("head", _head(card)),
        ("properties", ", ".join(card["hyper_parameters"].get("properties") or {})),
        ("priors", ", ".join(card["priors"]) or "none"),
        ("parameters", f"{card['num_parameters']:,}" if card["num_parameters"] else None),
        ("precision", f"{card['precision']} bit"),
        ("cutoff", f"{card['cutoff']:g} {length}" if card["cutoff"] else None),
        ("box", _box(card["hyper_parameters"].get("box_vecs"))),
        ("inputs", _inputs(card["hyper_parameters"])),
        ("elements", " ".join(card["elements"]) if card["elements"] else "not stated"),
        ("units", _units(units)),
        ("energies", _zero_of(card)),
        ("reference energies", _table((card.get("references") or {}).get("energies"), quantities["energy"])),
        ("level of theory", card["level_of_theory"] or "not stated"),
        ("citation", card["citation"]),
        ("layout", card.get("layout")),
    ]
    for name, value in card["training"].items():
        rows.append((f"training: {name.replace('_', ' ')}", _with_units(name, value, quantities)))
    if card["kind"] == "native":
        golden = card.get("golden")
        rows += [
            ("golden numbers", _golden(golden) if golden else "none"),
            ("sha256 of the tensors", card["sha256"]["tensors"]),
        ]
    rows.append(("check", card.get("check")))
    return [(name, str(value)) for name, value in rows if value]


_KINDS = {"native": "native file, unchanged since it was written", "checkpoint": "checkpoint"}


def _head(card: Mapping[str, Any]) -> str:
    """The name of the head, with its arguments where it has any of its own."""
    from torchmdnet.heads import named_head

    _, arguments = named_head(card["hyper_parameters"].get("output_model", card["head"]))
    told = ", ".join(f"{name}: {value}" for name, value in arguments.items())
    return f"{card['head']} ({told})" if told else card["head"]


def _units(units: Mapping[str, str | None]) -> str:
    if not units["energy"]:
        return "not stated; calculators take eV and Å and say so. State them with: torchmd-net convert --units"
    return f"energy {units['energy']}, length {units['length'] or 'not stated'}"


def _zero_of(card: Mapping[str, Any]) -> str | None:
    """What energies are relative to, and where that comes from."""
    source = (card.get("references") or {}).get("source")
    words = f"the reference energies of the elements{f', {source}' if source else ' that the file holds'}"
    if card["hyper_parameters"].get("remove_ref_energy"):
        return f"relative to {words}; remove_ref_energy=False adds them"
    return f"totals: the network adds to {words}" if source else None


def _table(energies: Mapping[str, float] | None, unit: str) -> str | None:
    return ", ".join(f"{name} {energy:.6g} {unit}" for name, energy in energies.items()) if energies else None


def _units_of_training(units: Mapping[str, str | None]) -> dict[str, str]:
    """The unit of each quantity that a card has numbers of."""
    energy = units["energy"] or "energy unit"
    length = units["length"] or ("Å" if units["energy"] else "length unit")
    return {
        "energy": energy,
        "energy_per_atom": f"{energy}/atom",
        "force": f"{energy}/{length}",
        "stress": f"{energy}/{length}³",
    }


#: Facts about training that have a unit, and of which quantity.
_QUANTITIES = {
    "energy_per_atom": "energy_per_atom",
    "largest_force": "force",
    "y_mae": "energy",
    "y_rmse": "energy",
    "y_mae_per_atom": "energy_per_atom",
    "y_rmse_per_atom": "energy_per_atom",
    "neg_dy_mae": "force",
    "neg_dy_rmse": "force",
    "stress_mae": "stress",
    "stress_rmse": "stress",
}

_ERRORS = frozenset(name for name in _QUANTITIES if "_mae" in name or "_rmse" in name)


#: Names of errors in words.
_WORDS = {"y": "energy", "neg_dy": "force component", "num_molecules": "systems", "num_atoms": "atoms"}


def _in_words(name: str) -> str:
    """A name of the tables in words: ``energy per atom MAE`` of ``y_mae_per_atom``."""
    found = re.fullmatch(r"(.+)_(mae|rmse)(_per_atom)?", name)
    if found is None:
        return _WORDS.get(name, name)
    what, kind, per_atom = found.groups()
    return f"{_WORDS.get(what, what)}{' per atom' if per_atom else ''} {kind.upper()}"


def _with_units(name: str, value: Any, quantities: Mapping[str, str]) -> str:
    """A fact about training in words, with its unit where it has one; errors in eV are told in meV."""
    if isinstance(value, Mapping):
        words = _in_words if name == "errors" else str
        return ", ".join(f"{words(key)} {_with_units(key, item, quantities)}" for key, item in value.items())
    if name == "spin":
        return f"{_text(value)} (unpaired electrons, multiplicity - 1, for data read through ASE)"
    unit = "e" if name == "total_charge" else quantities.get(_QUANTITIES.get(name, ""), "")
    if name in _ERRORS and unit.partition("/")[0] == "eV" and isinstance(value, (int, float)):
        value, unit = 1000 * value, f"m{unit}"
    return f"{_text(value)} {unit}".rstrip()


def _inputs(options: Mapping[str, Any]) -> str | None:
    names = ["total charge"] if options.get("charge") else []
    if options.get("spin"):
        has_effect = "spin" in str(options.get("system_embedding", "spin"))
        names.append("spin" if has_effect else "spin (without effect: the release that trained it made no use of it)")
    return ", ".join(names) or None


def _box(box: Any) -> str | None:
    return None if not box else f"its own, {box}"


def _golden(golden: Mapping[str, Any]) -> str:
    systems = ", ".join(f"{system['name']} of {len(system['z'])} atoms" for system in golden["systems"])
    return f"{systems}; single precision deviates by {golden['single_precision']:.0e}"


def _text(value: Any) -> str:
    """A fact about training in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return _text(value[0])
    if isinstance(value, list) and len(value) == 2 and all(isinstance(item, (int, float)) for item in value):
        return f"{_text(value[0])} to {_text(value[1])}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return "" if value is None else str(value)

"""The arguments with which commands take a potential and structures, and the checks before their work."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torchmdnet.errors import ConfigError, DataError
from torchmdnet.files import expanded
from torchmdnet.scripts.argument_types import finite

if TYPE_CHECKING:
    from ase import Atoms

    from torchmdnet.calculators import TMDNETCalculator

__all__ = [
    "add_potential_options",
    "add_state_options",
    "add_unseen_option",
    "calculator_of",
    "check_fits",
    "closest_of",
    "digest_of",
    "hold",
    "structures_of",
]

MODEL = "a native file (.safetensors), a checkpoint (.ckpt), or a .zip of either"


def add_potential_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Where and how precisely a potential is evaluated, and in which units."""
    group = parser.add_argument_group("potential")
    group.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default=dtype,
        help="precision of the calculation (default: %(default)s)",
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda (default: %(default)s)")
    group.add_argument("--units", help="of the model, such as kcal/mol, if its file does not state them")
    group.add_argument(
        "--total-energies",
        action="store_true",
        help="add the reference energies of the elements that a delta-learned model leaves out",
    )


def add_state_options(parser: argparse.ArgumentParser) -> None:
    """Charge and spin of structures, and whether elements that were not trained are accepted."""
    group = parser.add_argument_group("structures")
    group.add_argument(
        "--index", default="-1", help="which frames of each file, as in Python: -1, 0, :, ::10 (default: the last)"
    )
    group.add_argument("--charge", type=finite, help="total charge in e, if not the one in the file")
    group.add_argument("--spin", type=finite, help="spin, in the convention of the training data")
    add_unseen_option(group)


def add_unseen_option(group: argparse._ArgumentGroup) -> None:
    """``--allow-unseen``."""
    group.add_argument(
        "--allow-unseen",
        action="store_true",
        help="go on with elements, charges and spins the model was not trained on",
    )


def calculator_of(model: str, args: argparse.Namespace) -> TMDNETCalculator:
    """The calculator that the arguments ask for.

    Raises:
        ConfigError: If the device is not there.
        FileNotFoundError: If there is no such model.
    """
    import torch

    from torchmdnet.calculators import TMDNETCalculator

    kind = args.device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        here = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise ConfigError(f"--device: {args.device!r} is not available. Choose from {here}.")
    options: dict[str, Any] = {"units": args.units, "device": args.device, "dtype": args.dtype}
    if args.total_energies:
        options["remove_ref_energy"] = False
    return TMDNETCalculator(model, **options)


def structures_of(paths: Sequence[str], args: argparse.Namespace) -> list[tuple[str, Atoms]]:
    """Structures with their names, ``water.xyz`` or ``water.xyz:3`` where a file has several.

    Raises:
        ConfigError: If ``--index`` is not understood.
        FileNotFoundError: If there is no such file.
        DataError: If nothing can be read.
    """
    from torchmdnet.datasets.files import find_files
    from torchmdnet.datasets.structure_files import read_structures

    index = _index(args.index)
    found: list[tuple[str, Atoms]] = []
    for path in find_files([str(path) for path in paths], "structure"):
        frames = list(read_structures(path, index))
        if not frames:
            raise DataError(f"{path}: there are no frames in it (--index {args.index}).")
        for number, atoms in frames:
            if not len(atoms):
                raise DataError(f"{path}, frame {number}: there are no atoms.")
            atoms.info |= {name: getattr(args, name) for name in ("charge", "spin") if getattr(args, name) is not None}
            found.append((f"{path}:{number}" if len(frames) > 1 else str(path), atoms))
    return found


def _index(text: str) -> Any:
    words = text.split(":")
    try:
        numbers = [int(word) if word.strip() else None for word in words]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or (len(numbers) == 1 and numbers[0] is None) or numbers[2:] == [0]:
        raise ConfigError(f"--index: {text[:40]!r} is not understood. Write -1, 0, :, 10: or ::10.")
    if len(numbers) == 1:
        return numbers[0]
    return tuple([*numbers, None][:3])


def check_fits(calculator: TMDNETCalculator, atoms: Atoms, name: str, *, allow_unseen: bool) -> None:
    """Refuse a structure that a potential cannot speak of.

    Raises:
        ConfigError: For elements, charges and spins that the model was not trained on, as far as its file says.
        DataError: For positions and cells that are none, atoms at one place, and an atom too near to its own image.
    """
    import torch

    from torchmdnet.calculators.ase import stated
    from torchmdnet.calculators.loading import check_elements, unseen_elements, unseen_states
    from torchmdnet.labelling.sound import check_structure
    from torchmdnet.simulation.sanity import clash_of

    closest = closest_of(calculator)
    try:
        check_structure(atoms, closest)
        z = torch.from_numpy(atoms.get_atomic_numbers().astype("int64"))
        check_elements(calculator.model, z)
    except ValueError as error:
        raise DataError(f"{name}: {str(error).rstrip('.')}.") from None
    clash = clash_of(atoms, closest)
    if clash is not None and not clash.can_be_relaxed:
        raise DataError(f"{name}: {clash.told}")
    told = [unseen_elements(calculator.model, z)]
    for option in ("charge", "spin"):
        value = stated(option, atoms)
        if value is not None:
            told.append(unseen_states(calculator.model, option, torch.tensor([value], dtype=torch.float64)))
    for sentence in filter(None, told):
        if not allow_unseen:
            raise ConfigError(f"{name}: {sentence} Pass --allow-unseen to go on all the same.")


def closest_of(calculator: Any) -> float:
    """Distance in Å below which a potential refuses two atoms as one; see :func:`.neighbors.sound.check_apart`."""
    from torchmdnet.calculators.loading import members_of
    from torchmdnet.neighbors.sound import CLOSEST
    from torchmdnet.simulation.sanity import COINCIDENT

    parts = [getattr(member, "representation_model", None) for member in members_of(calculator.model)]
    cutoffs = [float(getattr(part, "cutoff_upper", 0.0)) * calculator.units.in_angstrom for part in parts]
    return max(CLOSEST * max(cutoffs, default=0.0), COINCIDENT)


def hold(atoms: Atoms, words: Sequence[str], name: str) -> None:
    """Fix the atoms that ``--fix`` names, beside the constraints of the file."""
    from ase.constraints import FixAtoms

    held_back: set[int] = set()
    for word in ",".join(words).replace(" ", ",").split(","):
        if match := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word):
            first, last = int(match[1]), int(match[2] or match[1])
            if not first <= last < len(atoms):
                raise ConfigError(f"--fix: {word} is not among the atoms of {name}, 0 to {len(atoms) - 1}.")
            held_back |= set(range(first, last + 1))
        elif word:
            chosen = [index for index, symbol in enumerate(atoms.symbols) if symbol == word]
            if not chosen:
                known = ", ".join(dict.fromkeys(atoms.symbols))
                raise ConfigError(f"--fix: {word!r} is neither numbers of atoms nor an element of {name} ({known}).")
            held_back |= set(chosen)
    if len(held_back) == len(atoms):
        raise ConfigError(f"--fix: all atoms of {name} are held in place. Leave some free.")
    if held_back:
        atoms.set_constraint([*atoms.constraints, FixAtoms(sorted(held_back))])


def digest_of(model: str) -> str:
    """SHA-256 of a model file."""
    found = hashlib.sha256()
    with open(expanded(model), "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()

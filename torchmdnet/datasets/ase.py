"""Your own data: any file that ASE reads."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.cache import cached_frames, digest
from torchmdnet.datasets.files import find_files
from torchmdnet.datasets.frames import Frames
from torchmdnet.datasets.labels import Labels
from torchmdnet.datasets.structure_files import Index
from torchmdnet.datasets.structure_labels import Key, StructureReader
from torchmdnet.elements import ATOMIC_NUMBERS, SYMBOLS
from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.units import energy_factor, length_factor

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["ASE"]

logger = logging.getLogger(__name__)

#: Raised when the same files would give other frames than before.
READER = 2

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class ASE(FramesDataset):
    """Structures with reference labels from any file ASE reads: extended XYZ, ASE databases, trajectories, ...

    .. code-block:: yaml

        dataset: ASE
        dataset_root: ~/data/water_*.extxyz
        dataset_arg: {energy_key: REF_energy, forces_key: REF_forces}

    Energies and forces are taken as ASE gives them, in eV and Å, unless ``energy_unit`` or ``length_unit`` say what the
    files hold instead. Labels are looked for in ``atoms.info``, ``atoms.arrays``, the results of an attached
    calculator, and, in a database, key-value pairs and data. Gradients are never taken for forces;
    ``forces_key: "-gradient"`` asks for the negative of ``gradient``.

    A sample has ``z``, ``pos``, and of the following whatever the files hold: ``y`` (1, 1) eV, ``neg_dy`` (N, 3) eV/Å,
    ``stress`` (1, 3, 3) eV/Å³ with tension positive, ``box`` (1, 3, 3) Å, ``q`` (1,) e, ``s`` (1,). A zero row of
    ``box`` is a direction that is not periodic. ``s`` is the number of unpaired electrons, 0 for a closed shell,
    whichever way the file counts spin. Every frame needs an energy and forces if the first one has them; a stress, or
    one of ``labels``, may be missing (or NaN) in some frames, and is NaN in their samples.

    Single atoms in open space, or marked ``config_type=IsolatedAtom``, are no samples (unless there is nothing else),
    but can state the reference energies of their elements. By default these are fitted by least squares, which leaves
    the network a few eV to learn where isolated atoms leave it the whole energy of binding.

    Frames are numbered from 0 in messages, as ASE numbers them.

    Args:
        root: A path, a pattern, or a list of them.
        energy_key: Name of the energy. None: the usual names are tried. False: ignore energies.
        forces_key: Name of the forces, likewise.
        stress_key: Name of the stress, likewise; (3, 3), or ASE's Voigt order xx yy zz yz xz xy.
        charge_key: Name of the total charge, likewise.
        spin_key: Name of the spin, likewise.
        energy_unit: Unit of energies in the files; they are converted to eV.
        length_unit: Unit of lengths in the files; they are converted to Å.
        index: Which frames of each file: ``":"``, ``"::10"``, ``-1``.
        cache: Keep what was read in ``$TORCHMDNET_CACHE`` (or ``~/.cache/torchmdnet``), mapped instead of read the next
            time. An entry depends on the content of the files and on these arguments, so it is never out of date.
        val: Files to validate on; :attr:`splits` then says which systems they hold.
        test: Files to test on, likewise.
        spin_convention: What the spin key counts: "multiplicity", "unpaired" electrons, or "total_spin" S. None: known
            from the usual names, inferred from the number of electrons for others.
        extra_keys: More quantities to carry along, ``{name: key}`` or a list of keys.
        labels: Further labels to learn, by name; training fills this in from ``properties``. They are looked for under
            their usual names where no frame has the name itself, and stay in the unit of the file.
        atomref: Reference energies of elements: "fit" (None is the same), "isolated" for single atoms in the files, or
            a mapping of symbols to energies in eV; elements it leaves out are fitted.
        transform: Called with each sample.

    Raises:
        ConfigError: If an argument cannot be understood.
        DataError: If a file cannot be used; the message has the file and the frame. Nothing is written then.
    """

    energy_unit = "eV"
    length_unit = "Å"
    fits_reference_energies: ClassVar[bool] = True

    def __init__(
        self,
        root: Files,
        energy_key: Key = None,
        forces_key: Key = None,
        stress_key: Key = None,
        charge_key: Key = None,
        spin_key: Key = None,
        energy_unit: str | None = None,
        length_unit: str | None = None,
        index: str | int | slice = ":",
        cache: bool = True,
        *,
        val: Files | None = None,
        test: Files | None = None,
        spin_convention: Literal["multiplicity", "unpaired", "total_spin"] | None = None,
        extra_keys: Mapping[str, str] | Sequence[str] | None = None,
        labels: Labels | None = None,
        atomref: str | Mapping[str, float] | None = None,
        transform: Callable[[Data], Data] | None = None,
    ) -> None:
        groups = {
            part: find_files(where, option)
            for part, where, option in (("train", root, "dataset_root"), ("val", val, "val"), ("test", test, "test"))
            if where is not None
        }
        _check_disjoint(groups)
        stated = _stated_energies(atomref)
        keys: dict[str, Key] = {
            "energy": energy_key,
            "forces": forces_key,
            "stress": stress_key,
            "charge": charge_key,
            "spin": spin_key,
        }
        options: dict[str, Any] = {
            "keys": _checked_keys(keys),
            "units": (energy_unit, length_unit),
            "index": _checked_index(index),
            "spin_convention": spin_convention,
            "extra_keys": (extras := _checked_extras(extra_keys)),
            "labels": {name: shape for name, shape in (labels or {}).items() if name not in {*_TAKEN, *extras}},
        }
        if spin_convention not in (None, "multiplicity", "unpaired", "total_spin"):
            raise ConfigError(
                f"spin_convention: {spin_convention!r} is not known. Choose multiplicity, unpaired or total_spin."
            )
        if energy_unit is not None:
            energy_factor(energy_unit)
        if length_unit is not None:
            length_factor(length_unit)

        def build(folder: Path | None) -> tuple[Frames, dict[str, Any]]:
            return StructureReader(**options).read(groups, folder)

        if cache:
            import ase

            paths = [path for part in groups.values() for path in part]
            sizes = {part: len(files) for part, files in groups.items()}
            signature = {"reader": READER, "ase": ase.__version__, "options": _plain(options), "groups": sizes}
            frames, notes = cached_frames("ase", digest(paths, signature), build)
        else:
            frames, notes = build(None)
        for line in notes["log"]:
            logger.info(line)
        isolated = {int(z): energy for z, energy in notes["isolated"].items()}
        if atomref == "isolated":
            absent = [SYMBOLS[z] for z in frames.elements().tolist() if z not in isolated]
            if absent:
                raise DataError(
                    f"atomref: 'isolated' is asked for, but no single atom of {', '.join(absent)} is given."
                )
        known = stated if stated is not None else (isolated if atomref == "isolated" else {})
        super().__init__(frames, transform, reference_energies=known)
        #: The name each kind of label was found under.
        self.keys: dict[str, str] = notes["keys"]
        self.files = groups
        self._parts: list[tuple[str, int]] = [(part, count) for part, count in notes["parts"]]

    @property
    def splits(self) -> dict[str, np.ndarray] | None:
        """Systems of ``root``, ``val`` and ``test``, or, with one source, as ``split`` in each frame's header says."""
        names = np.repeat([part for part, _ in self._parts], [count for _, count in self._parts])
        if not {"val", "test"} & set(names.tolist()) or "" in names:
            return None
        parts = {part: np.flatnonzero(names == part) for part in ("train", "val", "test")}
        return {f"idx_{part}": rows for part, rows in parts.items() if len(rows) or part == "train"}


# -------------------------------------------------------------------------------------------------- arguments


#: Names in a sample that are already spoken for.
_TAKEN = frozenset({"z", "pos", "y", "neg_dy", "box", "q", "s", "stress", "batch", "ptr"})


def _checked_keys(keys: Mapping[str, Key]) -> dict[str, Key]:
    for kind, key in keys.items():
        if key is not None and key is not False and not (isinstance(key, str) and key.strip("- ")):
            raise ConfigError(f"{kind}_key: {key!r} should be a name, or false to ignore the {kind}.")
    forces = keys["forces"]
    if isinstance(forces, str) and "grad" in forces.lower() and not forces.startswith("-"):
        raise ConfigError(
            f"forces_key: {forces!r} looks like a gradient, which has the opposite sign. Write '-{forces}' for its "
            "negative; if it does hold forces, rename it."
        )
    return dict(keys)


def _checked_extras(extra: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    if extra is None:
        return {}
    if isinstance(extra, str):
        extra = [extra]
    named = dict(extra) if isinstance(extra, Mapping) else {key: key for key in extra}
    for name in named:
        if name in _TAKEN or not str(name).isidentifier() or str(name).startswith("_"):
            raise ConfigError(f"extra_keys: {name!r} cannot be the name of an extra quantity. Give it another name.")
    return named


def _checked_index(index: str | int | slice) -> Index:
    if isinstance(index, slice):
        return (index.start, index.stop, index.step)
    if isinstance(index, int) and not isinstance(index, bool):
        return index
    text = str(index).strip()
    match = re.fullmatch(r"(-?\d+)?(:(-?\d+)?)?(:(-?\d+)?)?", text)
    if not match or not text:
        raise ConfigError(f"index: {index!r} is not an index. Write a number or a slice such as ':', '10:' or '::5'.")
    if ":" not in text:
        return int(text)
    fields = [int(part) if part else None for part in text.split(":")] + [None]
    if fields[2] == 0:
        raise ConfigError(f"index: {index!r} has a step of zero.")
    return (fields[0], fields[1], fields[2])


def _stated_energies(atomref: str | Mapping[str, float] | None) -> dict[int, float] | None:
    if atomref is None or atomref in ("isolated", "fit"):
        return None
    if not isinstance(atomref, Mapping):
        raise ConfigError(f"atomref: {atomref!r} is not available. Choose isolated, fit, or give {{symbol: energy}}.")
    table: dict[int, float] = {}
    for name, energy in atomref.items():
        number = ATOMIC_NUMBERS.get(str(name), int(name) if str(name).isdigit() else 0)
        if not 0 < number < len(SYMBOLS):
            raise ConfigError(f"atomref: {name!r} is not an element.{did_you_mean(name, ATOMIC_NUMBERS)}")
        table[number] = float(energy)
    return table


def _check_disjoint(groups: Mapping[str, list[Path]]) -> None:
    seen: dict[str, str] = {}
    for part, files in groups.items():
        for path in files:
            other = seen.setdefault(os.path.realpath(path), part)
            if other != part:
                raise DataError(f"{path} is in both the {other} and the {part} files.")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value

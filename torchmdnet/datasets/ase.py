"""Your own data: any file that ASE reads."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import logging
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TextIO, cast

import numpy as np

from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.cache import cached_frames, digest
from torchmdnet.datasets.files import find_files, progress
from torchmdnet.datasets.frames import Field, FrameBuilder, Frames
from torchmdnet.datasets.reference_energies import isolated_atom_energies
from torchmdnet.elements import ATOMIC_NUMBERS, SYMBOLS
from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.units import energy_factor, length_factor

if TYPE_CHECKING:
    from ase import Atoms
    from torch_geometric.data import Data

__all__ = ["ASE"]

logger = logging.getLogger(__name__)

#: Raised when the same files would give other frames than before.
READER = 1

#: Where labels are looked for when no key is given; a name that says "reference" goes before a plain one.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "energy": (
        *("REF_energy", "ref_energy", "reference_energy", "DFT_energy", "dft_energy", "qm_energy"),
        *("energy", "Energy", "total_energy", "potential_energy"),
    ),
    "forces": (
        *("REF_forces", "ref_forces", "reference_forces", "DFT_forces", "dft_forces", "qm_forces"),
        *("forces", "Forces", "force"),
    ),
    "stress": ("REF_stress", "ref_stress", "reference_stress", "DFT_stress", "dft_stress", "stress"),
    "charge": ("total_charge", "charge", "q", "net_charge"),
    "spin": ("spin_multiplicity", "multiplicity", "n_unpaired", "unpaired_electrons", "nupdown", "spin"),
}
#: What the number under a usual name counts; under any other name it is inferred from the number of electrons.
SPIN_MEANING = {
    "spin_multiplicity": "multiplicity",
    "multiplicity": "multiplicity",
    "n_unpaired": "unpaired",
    "unpaired_electrons": "unpaired",
    "nupdown": "unpaired",
}
OVERLAP = 0.1  # Å; two nuclei this close are a mistake in the file

Key = str | Literal[False] | None
Index = tuple[int | None, int | None, int | None] | int
ALL: Index = (None, None, None)
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
    whichever way the file counts spin.

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
            "extra_keys": _checked_extras(extra_keys),
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
            return _Reader(**options).read(groups, folder)

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
    taken = {"z", "pos", "y", "neg_dy", "box", "q", "s", "stress", "batch", "ptr"}
    for name in named:
        if name in taken or not str(name).isidentifier() or str(name).startswith("_"):
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


# -------------------------------------------------------------------------------------------------- reading


class _Reader:
    """Turns frames of ASE into samples, checking each."""

    def __init__(
        self,
        keys: dict[str, Key],
        units: tuple[str | None, str | None],
        index: Index,
        spin_convention: str | None,
        extra_keys: dict[str, str],
    ) -> None:
        self.asked = keys
        self.index = index
        self.spin_convention = spin_convention
        self.extra_keys = extra_keys
        self.energy_scale = 1.0 if units[0] is None else energy_factor(units[0])
        self.length_scale = 1.0 if units[1] is None else length_factor(units[1])
        self.keys: dict[str, str] = {}
        self.first = ""
        self.fields: dict[str, Field] = {}
        self.spins: _SpinReadings | None = None
        self.periodic = False
        self.overlaps = 0
        self.log: list[str] = []

    def read(self, groups: Mapping[str, list[Path]], folder: Path | None) -> tuple[Frames, dict[str, Any]]:
        """Everything in the files, as frames and notes about them."""
        builder: FrameBuilder | None = None
        singles: list[tuple[Atoms, dict[str, Any], str]] = []
        parts: list[str] = []
        isolated: dict[int, float] = {}
        total = _total(groups) if self.index == ALL else None
        try:
            for part, where, atoms in progress(self._frames(groups), "Reading structures", total=total):
                found = _quantities(atoms)
                if _is_isolated(atoms, found):
                    singles.append((atoms, found, where))
                    continue
                if builder is None:
                    self._choose_keys(atoms, found, where)
                    builder = FrameBuilder(folder, fields=self.fields)
                builder.append(self._sample(atoms, found, where))
                parts.append(_part(part, found, len(groups)))
            if builder is None:  # nothing but single atoms: then they are the samples
                self._choose_keys(*singles[0])
                builder = FrameBuilder(folder, fields=self.fields)
                for single in singles:
                    builder.append(self._sample(*single))
                parts = ["train"] * len(singles)
            else:
                isolated = self._isolated(singles)
            if self.spins is not None:
                builder.add_column("s", self.spins.unpaired(self.log))
            if not self.periodic:
                builder.drop_column("box")
            frames = builder.finish()
        finally:
            if builder is not None:
                builder.close()
        if isolated:
            self.log.append(
                f"{len(singles)} isolated atoms ({', '.join(SYMBOLS[z] for z in isolated)}) are not among the samples. "
                "Pass atomref: isolated to take reference energies from them."
            )
        if self.overlaps > 5:
            logger.warning("%d frames in all have atoms closer than %g Å.", self.overlaps, OVERLAP)
        runs = [(part, sum(1 for _ in run)) for part, run in itertools.groupby(parts)]
        return frames, {"keys": self.keys, "isolated": isolated, "parts": runs, "log": self.log}

    def _frames(self, groups: Mapping[str, list[Path]]) -> Iterator[tuple[str, str, Atoms]]:
        for part, paths in groups.items():
            for path in paths:
                empty = True
                for number, atoms in _read(path, self.index):
                    empty = False
                    yield part, f"{path}, frame {number}", atoms
                if empty:
                    raise DataError(f"{path}: there are no frames in it (index: {_index_text(self.index)}).")

    def _choose_keys(self, atoms: Atoms, found: Mapping[str, Any], where: str) -> None:
        """Decide under which names the labels are, by the first frame."""
        self.first = where
        for kind, asked in self.asked.items():
            if asked is False:
                continue
            if asked is not None:
                self.keys[kind] = asked
                if asked.lstrip("-") not in found:
                    raise DataError(_missing(where, kind, asked.lstrip("-"), found))
                continue
            present = [n for n in USUAL_NAMES[kind] if n in found and (np.size(found[n]) == 1 or kind in _ARRAYS)]
            if present:
                self.keys[kind] = present[0]
                if len(present) > 1 and kind in ("energy", "forces", "stress"):
                    others = ", ".join(present[1:])
                    self.log.append(f"{kind}_key: {present[0]!r} is used; the frames also have {others}.")
        if "energy" not in self.keys and "forces" not in self.keys:
            hint = ""
            gradients = [name for name in found if "grad" in name.lower()]
            if gradients and self.asked["forces"] is None:
                hint = f" To train on the negative of {gradients[0]!r}, pass forces_key: '-{gradients[0]}'."
            raise DataError(
                f"{where}: no energy and no forces were found. Its quantities are {_listed(found)}. "
                f"Say which to use with energy_key and forces_key.{hint}"
            )
        for name, key in self.extra_keys.items():
            if key not in found:
                raise DataError(_missing(where, "extra", key, found))
            self.fields[name] = _extra_field(atoms, found, key, where)
        if "spin" in self.keys:
            self.spins = _SpinReadings(self.keys["spin"], self.spin_convention)

    def _sample(self, atoms: Atoms, found: Mapping[str, Any], where: str) -> dict[str, Any]:
        """One frame as z, pos and labels, in eV and Å."""
        z = np.asarray(atoms.numbers)
        num = len(z)
        if num == 0:
            raise DataError(f"{where}: the frame has no atoms.")
        if z.min() < 1 or z.max() >= len(SYMBOLS):
            wrong = int(np.flatnonzero((z < 1) | (z >= len(SYMBOLS)))[0])
            raise DataError(
                f"{where}: atom {wrong} has atomic number {int(z[wrong])}, which is not an element "
                f"(1 to {len(SYMBOLS) - 1})."
            )
        pos = _finite(atoms.positions, (num, 3), "positions", where) * self.length_scale
        box = _box(atoms, where) * self.length_scale
        self.periodic |= bool(box.any())
        self._look_for_overlaps(pos, box, where)
        sample: dict[str, Any] = {"z": z, "pos": pos, "box": box}
        scale = self.energy_scale
        if "energy" in self.keys:
            sample["y"] = self._label(found, "energy", (), where) * scale
        if "forces" in self.keys:
            if num == 1 and not box.any() and self.keys["forces"].lstrip("-") not in found:
                sample["neg_dy"] = np.zeros((1, 3))  # an atom alone in space feels none
            else:
                forces = self._label(found, "forces", (num, 3), where)
                sample["neg_dy"] = forces * (scale / self.length_scale)
        if "stress" in self.keys:
            if not (np.abs(box).sum(axis=1) > 0).all():
                raise DataError(
                    f"{where}: a stress needs a cell in three directions, but pbc is {atoms.pbc.tolist()}. "
                    "Pass stress_key: false to ignore the stress."
                )
            stress = _full_stress(self._label(found, "stress", None, where), self.keys["stress"], where)
            sample["stress"] = stress * (scale / self.length_scale**3)
        if "charge" in self.keys:
            sample["q"] = self._label(found, "charge", (), where)
        if self.spins is not None:
            electrons = int(z.sum()) - round(float(sample.get("q", 0.0)))
            self.spins.add(float(self._label(found, "spin", (), where)), electrons, where)
        for name, key in self.extra_keys.items():
            field = self.fields[name]
            shape = (num, *field.shape) if field.level == "atom" else field.shape
            if key not in found:
                raise DataError(_missing(where, "extra", key, found, self.first))
            sample[name] = _finite(found[key], shape, key, where)
        return sample

    def _label(self, found: Mapping[str, Any], kind: str, shape: tuple[int, ...] | None, where: str) -> np.ndarray:
        key = self.keys[kind]
        name = key.lstrip("-")
        if name not in found:
            raise DataError(_missing(where, kind, name, found, self.first))
        value = _finite(found[name], shape, name, where)
        return -value if key.startswith("-") else value

    def _look_for_overlaps(self, pos: np.ndarray, box: np.ndarray, where: str) -> None:
        pair = _overlap(pos, box)
        if pair is not None:
            self.overlaps += 1
            if self.overlaps <= 5:
                logger.warning("%s: atoms %d and %d are %.3f Å apart.", where, *pair)

    def _isolated(self, singles: Sequence[tuple[Atoms, dict[str, Any], str]]) -> dict[int, float]:
        if not singles or "energy" not in self.keys:
            return {}
        z = np.array([int(atoms.numbers[0]) for atoms, _, _ in singles])
        energy = [float(self._label(found, "energy", (), where)) for _, found, where in singles]
        charge = [float(found.get(self.keys.get("charge", ""), 0.0)) for _, found, _ in singles]
        return isolated_atom_energies(z, np.array(energy) * self.energy_scale, np.array(charge))


class _SpinReadings:
    """Spin as a file counts it, and which ways of counting fit the numbers of electrons.

    Args:
        key: The name the spin is found under.
        convention: How it is counted, if the user says so.
    """

    def __init__(self, key: str, convention: str | None) -> None:
        self.key = key
        self.convention = convention or SPIN_MEANING.get(key)
        self.values: list[float] = []
        self.fits: dict[str, bool] = dict.fromkeys(("unpaired", "multiplicity", "total_spin"), True)
        self.fractional = False
        self.misfits = 0
        self.first = ""

    @staticmethod
    def count(value: float, convention: str) -> float:
        """Unpaired electrons."""
        counts: dict[str, float] = {"unpaired": value, "multiplicity": value - 1, "total_spin": 2 * value}
        return counts[convention]

    def add(self, value: float, electrons: int, where: str) -> None:
        """Take the spin of one frame."""
        self.first = self.first or where
        self.values.append(value)
        self.fractional |= value != round(value)
        for name in self.fits:
            unpaired = self.count(value, name)
            possible = unpaired >= 0 and unpaired == round(unpaired)
            if name == self.convention and not possible:
                raise DataError(f"{where}: {self.key} = {value:g} is not possible as {name}.")
            agrees = possible and (unpaired - electrons) % 2 == 0
            self.fits[name] &= agrees
            if name == self.convention and not agrees:
                self.misfits += 1
                if self.misfits == 1:
                    logger.warning(
                        "%s: %g unpaired electrons do not go with %d electrons. "
                        "Is the total charge missing, or spin_convention another?",
                        *(where, unpaired, electrons),
                    )

    def unpaired(self, log: list[str]) -> np.ndarray:
        """Unpaired electrons of every frame, (S,)."""
        convention = self.convention
        if convention is None:
            # whole numbers are taken for S only when asked: no common format writes them
            names = ["total_spin"] if self.fractional else ["unpaired", "multiplicity"]
            convention = next((name for name in names if self.fits[name]), None)
            if convention is None:
                raise DataError(
                    f"{self.first} and later: what {self.key!r} counts cannot be told from the numbers of electrons. "
                    "Pass spin_convention: multiplicity, unpaired or total_spin."
                )
            log.append(f"spin_key: {self.key!r} is read as {convention}, which fits the numbers of electrons.")
        return np.array([self.count(value, convention) for value in self.values])


_ARRAYS = ("forces", "stress")


def _quantities(atoms: Atoms) -> dict[str, Any]:
    """Everything a frame says beside z, pos and cell, by name; results of a calculator go before equal names."""
    found: dict[str, Any] = {}
    for source in (atoms.info.get("data"), atoms.info.get("key_value_pairs"), atoms.info):
        if isinstance(source, Mapping):
            found.update(source)
    found.update({name: array for name, array in atoms.arrays.items() if name not in ("numbers", "positions")})
    if atoms.calc is not None:
        found.update(getattr(atoms.calc, "results", {}))
    return {name: value for name, value in found.items() if value is not None}


def _is_isolated(atoms: Atoms, found: Mapping[str, Any]) -> bool:
    if len(atoms) != 1:
        return False
    named = re.fullmatch(r"isolated[_ -]?atoms?", str(found.get("config_type", "")), flags=re.IGNORECASE)
    return bool(named) or not atoms.pbc.any()


def _part(part: str, found: Mapping[str, Any], num_groups: int) -> str:
    if num_groups > 1:
        return part
    name = str(found.get("split", "")).lower()
    return next((known for known in ("train", "val", "test") if name.startswith(known)), "")


def _finite(value: Any, shape: tuple[int, ...] | None, name: str, where: str) -> np.ndarray:
    """A label as float64 of the expected shape."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {name} is {value!r} instead of a number.") from error
    if shape == () and array.size == 1:
        array = array.reshape(())
    if shape is not None and array.shape != shape:
        raise DataError(f"{where}: {name} has shape {array.shape} instead of {shape}.")
    if not np.isfinite(array).all():
        place = "" if array.ndim == 0 else f" at {tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])}"
        raise DataError(f"{where}: {name} is {array[~np.isfinite(array)].flat[0]}{place}. Remove or repair the frame.")
    return array


def _box(atoms: Atoms, where: str) -> np.ndarray:
    """Lattice vectors as rows, with a zero row for each direction that is not periodic."""
    cell = np.asarray(atoms.cell.array, dtype=np.float64)
    if not np.isfinite(cell).all():
        raise DataError(f"{where}: the cell holds {cell[~np.isfinite(cell)].flat[0]}.")
    periodic = np.asarray(atoms.pbc, dtype=bool)
    rows = cell[periodic]
    if len(rows) and np.linalg.svd(rows, compute_uv=False).min() < 1e-3:
        raise DataError(
            f"{where}: pbc is {periodic.tolist()}, but the cell {cell.tolist()} does not span these directions."
        )
    return np.where(periodic[:, None], cell, 0.0)


def _full_stress(value: np.ndarray, name: str, where: str) -> np.ndarray:
    if value.shape == (6,):
        xx, yy, zz, yz, xz, xy = value
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    if value.size != 9:
        raise DataError(f"{where}: {name} has shape {value.shape}; a stress is (3, 3), (9,) or, in Voigt order, (6,).")
    full = value.reshape(3, 3)
    if not np.allclose(full, full.T, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(full).max())):
        raise DataError(f"{where}: {name} is not symmetric: {full.tolist()}.")
    return (full + full.T) / 2


def _extra_field(atoms: Atoms, found: Mapping[str, Any], key: str, where: str) -> Field:
    value = np.asarray(found[key])
    if value.dtype.kind not in "biuf":
        raise DataError(f"{where}: {key} holds {value.dtype} instead of numbers; it cannot be an extra quantity.")
    if key in atoms.arrays or key in ("forces", "charges", "magmoms", "energies", "stresses"):
        return Field("atom", value.shape[1:], "float64")
    return Field("system", value.shape, "float64")


def _overlap(pos: np.ndarray, box: np.ndarray) -> tuple[int, int, float] | None:
    """A pair of atoms closer than :data:`OVERLAP`, nearest images included."""
    if len(pos) < 2:
        return None
    from scipy.spatial import KDTree

    periodic = box.any(axis=1)
    cell = box.copy()
    if not periodic.all():  # any vectors that complete the cell will do for the open directions
        cell[~periodic] = np.linalg.svd(box)[2][periodic.sum() :]
    inverse = np.linalg.inv(cell)
    fractional = pos @ inverse
    fractional[:, periodic] %= 1.0
    fractional[:, periodic] %= 1.0  # a tiny negative number wraps to one, and one to zero
    reach = OVERLAP * np.linalg.norm(inverse, 2)
    tree = KDTree(fractional, boxsize=np.where(periodic, 1.0, 0.0) if periodic.any() else None)
    for i, j in tree.query_pairs(reach, output_type="ndarray"):
        apart = fractional[i] - fractional[j]
        apart[periodic] -= np.round(apart[periodic])
        distance = float(np.linalg.norm(apart @ cell))
        if distance < OVERLAP:
            return int(i), int(j), distance
    return None


def _missing(where: str, kind: str, name: str, found: Mapping[str, Any], first: str = "") -> str:
    text = f"{where}: {name!r} is missing"
    text += f", although {first} has it. " if first and first != where else ". "
    text += f"The frame's quantities are {_listed(found)}.{did_you_mean(name, found)}"
    if kind == "extra":
        return text + " Name one of them in extra_keys."
    return text + f" Set {kind}_key, or {kind}_key: false to do without {kind} labels."


def _listed(found: Mapping[str, Any]) -> str:
    return ", ".join(sorted(str(name) for name in found if not str(name).startswith("_"))) or "none"


# ----------------------------------------------------------------------------------------------- files to frames


def _index_text(index: Index) -> str:
    return str(index) if isinstance(index, int) else ":".join("" if i is None else str(i) for i in index)


def _read(path: Path, index: Index) -> Iterator[tuple[int, Atoms]]:
    """Frames of one file with their numbers; whatever goes wrong names the file and the frame."""
    kind = _format(path)
    if kind == "extxyz":
        wanted = _wanted(index, lambda: _count_extxyz(path))
        yield from _read_extxyz(path, wanted)
    elif kind in ("db", "json", "aselmdb"):
        yield from _read_database(path, index)
    else:
        yield from _read_other(path, kind, index)


def _format(path: Path) -> str:
    from ase.io.formats import UnknownFileTypeError, filetype, ioformats

    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty.")
    if path.suffix == ".aselmdb":
        return "aselmdb"
    try:
        kind = cast(str, filetype(str(path)))
        if kind not in ioformats:
            raise UnknownFileTypeError(kind)
        return kind
    except UnknownFileTypeError as error:
        raise DataError(f"{path}: ASE does not know this kind of file ({error}).") from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: the file cannot be read ({error}). Is it complete?") from error


def _wanted(index: Index, count: Callable[[], int]) -> Sequence[int] | None:
    """Numbers of the frames asked for; None for all of them."""
    if index == ALL:
        return None
    total = count()
    if isinstance(index, int):
        return [range(total)[index]] if -total <= index < total else []
    return sorted(range(total)[slice(*index)])


def _total(groups: Mapping[str, list[Path]]) -> int | None:
    """Number of frames where it is quick to find out, for the progress bar."""
    paths = [path for part in groups.values() for path in part]
    try:
        if all(_format(path) == "extxyz" for path in paths):
            return sum(_count_extxyz(path) for path in paths)
    except (DataError, OSError, ValueError):
        pass  # the reader will say what is wrong
    return None


def _open_text(path: Path) -> TextIO:
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "rt")


def _extxyz_texts(path: Path) -> Iterator[tuple[int, str]]:
    """The text of each frame, with the line it starts on."""
    line_number, frame = 0, 0
    try:
        with _open_text(path) as file:
            while header := file.readline():
                line_number += 1
                if not header.strip():
                    continue
                try:
                    num = int(header)
                except ValueError as error:
                    raise DataError(
                        f"{path}, frame {frame}: line {line_number} should be a number of atoms, "
                        f"but it is {header.strip()[:60]!r}."
                    ) from error
                body = list(itertools.islice(file, num + 1))
                if len(body) < num + 1:
                    raise DataError(
                        f"{path}, frame {frame}: the file ends after {max(len(body) - 1, 0)} of {num} atoms. "
                        "It is incomplete."
                    )
                yield line_number, header + "".join(body)
                line_number += num + 1
                frame += 1
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path}, frame {frame}: the file cannot be read on ({error}). Is it complete?") from error
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error}).") from error


def _count_extxyz(path: Path) -> int:
    return sum(1 for _ in _extxyz_texts(path))


def _read_extxyz(path: Path, wanted: Sequence[int] | None, chunk: int = 200) -> Iterator[tuple[int, Atoms]]:
    """Extended XYZ in one pass. ASE parses the text; the frames are cut apart here, because it would stop at a blank
    line without a word and seek through a compressed file from its start for every frame."""
    chosen = None if wanted is None else set(wanted)
    texts = (
        (number, text) for number, (_, text) in enumerate(_extxyz_texts(path)) if chosen is None or number in chosen
    )
    while block := list(itertools.islice(texts, chunk)):
        frames = _parse_extxyz("".join(text for _, text in block))
        if isinstance(frames, Exception) or len(frames) != len(block):
            frames = []
            for number, text in block:  # once more, one by one, to find out which
                one = _parse_extxyz(text)
                if isinstance(one, Exception):
                    raise DataError(f"{path}, frame {number}: {_reason(one)}") from one
                frames += one
        for (number, _), atoms in zip(block, frames, strict=True):
            yield number, atoms


def _parse_extxyz(text: str) -> list[Atoms] | Exception:
    from ase.io import read

    try:
        return cast("list[Atoms]", read(io.StringIO(text), index=":", format="extxyz"))
    except Exception as error:  # ASE's parsers raise whatever their code runs into
        return error


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is not an element{did_you_mean(error.args[0], ATOMIC_NUMBERS)}."
    return f"it cannot be parsed ({type(error).__name__}: {error})."


def _read_database(path: Path, index: Index) -> Iterator[tuple[int, Atoms]]:
    """Rows of an ASE database, with their key-value pairs and data, which ``ase.io.read`` leaves behind."""
    from ase.db import connect

    number = -1
    try:
        database = connect(str(path))
        wanted = _wanted(index, lambda: database.count())
        chosen = None if wanted is None else set(wanted)
        for number, row in enumerate(database.select()):
            if chosen is None or number in chosen:
                yield number, row.toatoms(add_additional_information=True)
    except Exception as error:  # database backends raise their own kinds
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}, frame {number + 1}: {_reason(error)}") from error


def _read_other(path: Path, kind: str, index: Index) -> Iterator[tuple[int, Atoms]]:
    from ase.io import iread

    number = -1
    try:
        text = _index_text(index)
        start, step = (0, 1) if isinstance(index, int) else (index[0] or 0, index[2] or 1)
        for number, atoms in enumerate(iread(str(path), index=text, format=kind, do_not_split_by_at_sign=True)):
            yield (index if isinstance(index, int) else start + step * number), atoms
    except Exception as error:  # as above: any kind of error for any kind of file
        raise DataError(f"{path}, frame {number + 1}: {_reason(error)}") from error

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
from torchmdnet.datasets.labels import ARTICLES, Absence, LabelKind, Labels, suggested_names, suggested_option
from torchmdnet.datasets.structure_files import Index
from torchmdnet.datasets.structure_labels import USUAL_WEIGHTS, Key, Source, StructureReader
from torchmdnet.datasets.structure_tables import checked_columns
from torchmdnet.elements import ATOMIC_NUMBERS, SYMBOLS, unknown_element
from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.units import energy_factor, force_factor, length_factor

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["ASE"]

logger = logging.getLogger(__name__)

#: Raised when the same files would give other frames or notes than before.
READER = 6

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class ASE(FramesDataset):
    """Structures with reference labels from any file ASE reads, and from LMDB, Parquet and ``.npz`` files.

    .. code-block:: yaml

        dataset: ASE
        dataset_root: ~/data/water_*.extxyz
        dataset_arg: {energy_key: REF_energy, forces_key: REF_forces}

    Energies and forces are taken as ASE gives them, in eV and Å, unless ``energy_unit`` or ``length_unit`` say what the
    files hold instead, as arguments or in the header of the frames, where ``level_of_theory`` is read too. Labels are
    looked for in ``atoms.info``, ``atoms.arrays``, the results of an attached calculator, and, in a database,
    key-value pairs and data. Gradients are never taken for forces; ``forces_key: "-gradient"`` asks for the negative
    of ``gradient``.

    A sample has ``z``, ``pos``, and of the following whatever the files hold: ``y`` (1, 1) eV, ``neg_dy`` (N, 3) eV/Å,
    ``stress`` (1, 3, 3) eV/Å³ with tension positive, ``box`` (1, 3, 3) Å, ``q`` (1,) e, ``s`` (1,). A zero row of
    ``box`` is a direction that is not periodic. ``s`` is the number of unpaired electrons, 0 for a closed shell,
    whichever way the file counts spin. Every frame needs an energy and forces if the first one has them; a stress, or
    one of ``labels``, may be missing (or NaN) in some frames, and is NaN in their samples. ``config_weight``,
    ``y_weight``, ``neg_dy_weight`` and ``stress_weight`` (1,) multiply the losses of a sample, where there are any.

    Single atoms in open space, or marked ``config_type=IsolatedAtom``, are no samples (unless there is nothing else),
    but can state the reference energies of their elements. By default these are fitted by least squares, which leaves
    the network a few eV to learn where isolated atoms leave it the whole energy of binding.

    Frames are numbered from 0 in messages, as ASE numbers them.

    Args:
        root: A path, a pattern, or a list of them. None where ``files`` are given.
        energy_key: Name of the energy. None: the usual names are tried. False: ignore energies.
        forces_key: Name of the forces, likewise.
        stress_key: Name of the stress, likewise; (3, 3), or ASE's Voigt order xx yy zz yz xz xy. The name of a virial
            (``virial``, ``REF_virials``, ...) is understood as ``virial_key``.
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
        files: In place of ``root``: a list of paths, patterns, and mappings with a ``path`` and whatever is particular
            to it: ``weight`` of its configurations in the loss, ``split`` (train, val or test), and ``index``,
            ``energy_key``, ``forces_key``, ``stress_key``, ``energy_unit``, ``length_unit``, ``forces_unit`` as below.
        columns: Names of ``numbers``, ``positions``, ``cell`` and ``pbc`` in LMDB, Parquet and ``.npz`` files.
        weight_keys: Names of the weights of a ``configuration``, and of its ``energy``, ``forces`` and ``stress``.
            None: the usual names are tried. False: weights in the files are ignored.
        virial_key: Name of a virial W in the unit of energies, instead of a stress: the stress is -W / V, with the
            volume V of the cell. ``"-name"`` is the negative of ``name``.
        forces_unit: Unit of forces in the files, ``"eV/Å"`` or ``"Hartree/Bohr"``, where it is not that of energies
            per that of lengths; they are converted to eV/Å.
        group_key: Name of what says which samples belong together; training fills this in from ``split_by``.

    Raises:
        ConfigError: If an argument cannot be understood.
        DataError: If a file cannot be used; the message has the file and the frame. Nothing is written then.
    """

    energy_unit = "eV"
    length_unit = "Å"
    fits_reference_energies: ClassVar[bool] = True
    #: What turns frames into samples, and refuses those it cannot use.
    reader: Callable[..., StructureReader] = StructureReader

    def __init__(
        self,
        root: Files | None = None,
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
        files: Sequence[str | Mapping[str, Any]] | None = None,
        columns: Mapping[str, str] | None = None,
        weight_keys: Mapping[str, str] | Literal[False] | None = None,
        group_key: str | None = None,
        virial_key: str | None = None,
        forces_unit: str | None = None,
    ) -> None:
        given: dict[str, Key] = {
            "energy": energy_key,
            "forces": forces_key,
            "stress": stress_key,
            "charge": charge_key,
            "spin": spin_key,
            "virial": virial_key,
        }
        stated = _stated_energies(atomref)
        common = Source([], keys=_checked_keys(given), units=_checked_units(energy_unit, length_unit))
        common = common._replace(frames=_checked_index(index), forces_unit=_checked_force_unit(forces_unit))
        if files is None:
            parts = (("train", root, "dataset_root"), ("val", val, "val"), ("test", test, "test"))
            sources = [
                common._replace(paths=find_files(where, option), part=part)
                for part, where, option in parts
                if where is not None
            ]
            if root is None:
                raise ConfigError("ASE: no files are given. Set dataset_root, or files in dataset_arg.")
            if len(sources) == 1:
                sources = [sources[0]._replace(part="")]
        else:
            if root is not None or val is not None or test is not None:
                raise ConfigError("files: they stand in place of root, val and test. Give one or the other.")
            sources = _listed_sources(files, common)
        _check_disjoint(sources)
        options: dict[str, Any] = {
            "spin_convention": spin_convention,
            "extra_keys": (extras := _checked_extras(extra_keys)),
            "labels": {name: shape for name, shape in (labels or {}).items() if name not in {*_TAKEN, *extras}},
            "columns": checked_columns(columns),
            "weight_keys": _checked_weights(weight_keys),
            "group_key": group_key,
        }
        if spin_convention not in (None, "multiplicity", "unpaired", "total_spin"):
            raise ConfigError(
                f"spin_convention: {spin_convention!r} is not known. Choose multiplicity, unpaired or total_spin."
            )

        def build(folder: Path | None) -> tuple[Frames, dict[str, Any]]:
            return self.reader(**options).read(sources, folder)

        if cache:
            import ase

            paths = [path for source in sources for path in source.paths]
            described = [source._replace(paths=[])._asdict() | {"files": len(source.paths)} for source in sources]
            signature = {"reader": READER, "ase": ase.__version__, "options": _plain(options), "sources": described}
            frames, notes = cached_frames("ase", digest(paths, _plain(signature)), build)
        else:
            frames, notes = build(None)
        for line in notes["log"]:
            logger.info(line)
        for line in notes["warnings"]:
            logger.warning(line)
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
        #: Every quantity of the files, with its form: ``"number"``, ``"atoms × 3"``, ``"text"``.
        self.quantities: dict[str, str] = notes["quantities"]
        #: What to look at in the files, in words.
        self.warnings: list[str] = notes["warnings"]
        stated_in_files = "energy_unit" in self.quantities
        self._states_energy_unit = stated_in_files or all(source.units[0] is not None for source in sources)
        self._ignored = {kind for kind, key in given.items() if key is False}
        self.level_of_theory = notes["level_of_theory"]
        self.files = {
            part or "train": [path for source in sources if source.part == part for path in source.paths]
            for part in dict.fromkeys(source.part for source in sources)
        }
        self.group_key = group_key
        #: Number of samples from each file, in a row.
        self.runs = np.array([count for _, count in notes["files"]])
        #: Units of energies, lengths and forces that settings or files state, for this many samples in a row.
        self.stated_units: list[tuple[tuple[str | None, str | None, str | None], int]] = [
            ((energy, length, forces), count) for (energy, length, forces), count in notes["stated"]
        ]
        self._parts: list[tuple[str, int]] = [(part, count) for part, count in notes["parts"]]
        self._groups: list[tuple[str, int]] = [(name, count) for name, count in notes["groups"]]
        #: Whether files or frames state the part they belong to, so that no other division is meant.
        self.is_divided = self.splits is not None

    @property
    def splits(self) -> dict[str, np.ndarray] | None:
        """Systems of each part, as the files are listed, or, where they are not, as each frame's header says.

        What neither says is for training, once others are named for validation or testing.
        """
        names = _unrolled(self._parts)
        if not {"val", "test"} & set(names.tolist()):
            return None
        names = np.where(names == "", "train", names)
        parts = {part: np.flatnonzero(names == part) for part in ("train", "val", "test")}
        return {f"idx_{part}": rows for part, rows in parts.items() if len(rows) or part == "train"}

    def absent_label(self, kind: LabelKind) -> Absence | None:
        if kind in self._ignored:
            return None
        listed = ", ".join(f"{name} ({form})" for name, form in sorted(self.quantities.items())) or "none"
        named = suggested_names(kind, self.quantities)
        option = suggested_option(kind, named[0]) if named else f"{kind}_key: NAME"
        advice = f"Did you mean dataset_arg: {{{option}}}?" if named else f"Name it: dataset_arg: {{{option}}}."
        reason = f"no frame has {ARTICLES[kind]} under a known name. The frames hold {listed}."
        return Absence(f"{reason} {advice}", True)

    def unit_advice(self, unit: str) -> str | None:
        if self._states_energy_unit:
            return None
        return (
            f"Set dataset_arg: {{energy_unit: {unit}}}, which converts energies and forces alike to eV and eV/Å: "
            "forces that are in eV/Å already would become wrong, so add forces_unit: eV/Å for such files. Set "
            "energy_unit: eV if the energies are in eV."
        )

    @property
    def groups(self) -> np.ndarray | None:
        """What ``group_key`` says of each sample, (S,)."""
        return _unrolled(self._groups) if self._groups else None


def _unrolled(runs: Sequence[tuple[str, int]]) -> np.ndarray:
    return np.repeat([name for name, _ in runs], [count for _, count in runs])


# -------------------------------------------------------------------------------------------------- arguments


#: Names in a sample that are already spoken for.
_TAKEN = frozenset(
    {"z", "pos", "y", "neg_dy", "box", "q", "s", "stress", "batch", "ptr"}
    | {"config_weight", "y_weight", "neg_dy_weight", "stress_weight"}
)
#: Two ways to name one label.
_STRESSES = frozenset({"stress", "virial"})
#: What a listed file may have of its own.
_OWN_KEYS = {"energy_key": "energy", "forces_key": "forces", "stress_key": "stress", "virial_key": "virial"}
_OWN = ("path", "weight", "split", "index", *_OWN_KEYS, "energy_unit", "length_unit", "forces_unit")


def _listed_sources(files: Any, common: Source) -> list[Source]:
    """The entries of ``files``."""
    if isinstance(files, str | Mapping) or not isinstance(files, Sequence) or not files:
        raise ConfigError(f"files: {files!r} should be a list of paths, patterns, or mappings with a path.")
    sources = []
    for number, entry in enumerate(files, start=1):
        own: dict[str, Any] = {"path": entry} if isinstance(entry, str | os.PathLike) else entry
        what = f"files, entry {number}"
        if not isinstance(own, Mapping) or not own.get("path"):
            raise ConfigError(f"{what}: {entry!r} has no path. Write a path, or {{path: a.extxyz, weight: 2.0}}.")
        for word in own:
            if word not in _OWN:
                raise ConfigError(
                    f"{what}: {word!r} is not understood.{did_you_mean(word, _OWN)} It takes {', '.join(_OWN)}."
                )
        weight, part = own.get("weight", 1.0), own.get("split") or ""
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise ConfigError(f"{what}: weight: {weight!r} is not a number of 0 or more.")
        if part not in ("", "train", "val", "test"):
            raise ConfigError(f"{what}: split: {part!r} is not known. Choose train, val or test.")
        keys = {kind: own[word] for word, kind in _OWN_KEYS.items() if word in own}
        replaced = _STRESSES if _STRESSES & {*keys} else {*keys}
        inherited: dict[str, Key] = {k: None if k in replaced else key for k, key in common.keys.items()}
        units = (own.get("energy_unit", common.units[0]), own.get("length_unit", common.units[1]))
        sources.append(
            Source(
                find_files(own["path"], what),
                part,
                float(weight),
                _checked_keys({**inherited, **keys}),
                _checked_units(*units),
                _checked_index(own["index"]) if "index" in own else common.frames,
                _checked_force_unit(own.get("forces_unit", common.forces_unit)),
            )
        )
    if any(source.part for source in sources):
        sources = [source._replace(part=source.part or "train") for source in sources]
    return sources


def _checked_units(energy: str | None, length: str | None) -> tuple[str | None, str | None]:
    if energy is not None:
        energy_factor(energy)
    if length is not None:
        length_factor(length)
    return energy, length


def _checked_force_unit(unit: str | None) -> str | None:
    if unit is not None:
        force_factor(unit)
    return unit


def _checked_weights(keys: Any) -> dict[str, str] | None:
    if keys is None or keys is False:
        return None if keys is None else {}
    if not isinstance(keys, Mapping):
        raise ConfigError(
            f"weight_keys: {keys!r} should be a mapping such as {{configuration: weight}}, or false to ignore weights."
        )
    for kind in keys:
        if kind not in USUAL_WEIGHTS:
            raise ConfigError(
                f"weight_keys: {kind!r} has no weight.{did_you_mean(kind, USUAL_WEIGHTS)} Choose from "
                f"{', '.join(USUAL_WEIGHTS)}."
            )
    return dict(keys)


def _checked_keys(keys: Mapping[str, Key]) -> dict[str, Key]:
    for kind, key in keys.items():
        if key is not None and key is not False and not (isinstance(key, str) and key.strip("- ")):
            raise ConfigError(f"{kind}_key: {key!r} should be a name, or false to ignore the {kind}.")
    if keys["virial"] is False or (keys["virial"] and keys["stress"] is not None):
        raise ConfigError(
            f"virial_key: {keys['virial']!r} beside stress_key: {keys['stress']!r}. Name the one that the files hold; "
            "stress_key: false ignores both."
        )
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
            raise ConfigError(f"atomref: {unknown_element(name)}")
        table[number] = float(energy)
    return table


def _check_disjoint(sources: Sequence[Source]) -> None:
    seen: dict[str, str] = {}
    for number, source in enumerate(sources, start=1):
        for path in source.paths:
            name = source.part or f"number {number}"
            other = seen.setdefault(os.path.realpath(path), name)
            if other != name:
                raise DataError(f"{path} is in both the {other} and the {name} files.")
    paths = [os.path.realpath(path) for source in sources for path in source.paths]
    twice = next((path for path in paths if paths.count(path) > 1), None) if len(set(paths)) < len(paths) else None
    if twice is not None:
        raise DataError(f"{twice} is listed twice. Its frames would end up in training and test alike.")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value

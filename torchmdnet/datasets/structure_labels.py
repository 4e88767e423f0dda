"""From ASE's frames to samples: labels under whatever names they have, in eV and Å, each checked."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from torchmdnet.datasets.files import progress
from torchmdnet.datasets.frames import Field, FrameBuilder, Frames
from torchmdnet.datasets.labels import FARTHEST, LARGEST_LABEL, USUAL_NAMES, Labels, find_label, too_large
from torchmdnet.datasets.reference_energies import isolated_atom_energies
from torchmdnet.datasets.structure_files import ALL, Index, count_structures, index_text, read_structures
from torchmdnet.elements import SYMBOLS
from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.units import energy_factor, force_factor, length_factor, normalise_unit

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["SPIN_MEANING", "USUAL_WEIGHTS", "VIRIALS", "Key", "Source", "StructureReader"]

#: Name of a label; None: the usual ones are tried; False: the label is ignored.
Key = str | Literal[False] | None

#: Names of virials, in lower case: minus the stress times the volume, an energy.
VIRIALS = frozenset(
    f"{source}{word}"
    for source in ("", "ref_", "reference_", "dft_", "qm_", "total_")
    for word in ("virial", "virials", "virial_tensor")
)
#: A stress times the volume whose sign is not stated by its source.
UNSIGNED_VIRIAL = "cauchy_stress_times_volume"
#: What the number under a usual name counts; under any other name it is inferred from the number of electrons.
SPIN_MEANING = {
    "spin_multiplicity": "multiplicity",
    "multiplicity": "multiplicity",
    "n_unpaired": "unpaired",
    "unpaired_electrons": "unpaired",
    "nupdown": "unpaired",
}
#: What a weight in a frame belongs to -> the names that are tried.
USUAL_WEIGHTS: dict[str, tuple[str, ...]] = {
    "configuration": ("config_weight",),
    "energy": ("config_energy_weight", "energy_weight"),
    "forces": ("config_forces_weight", "forces_weight"),
    "stress": ("config_stress_weight", "stress_weight"),
}
#: The fields of a sample that hold them.
_WEIGHT_FIELDS = {
    "configuration": "config_weight",
    "energy": "y_weight",
    "forces": "neg_dy_weight",
    "stress": "stress_weight",
}
OVERLAP = 0.1  # Å; two nuclei this close are a mistake in the file
CLOSEST = 1e-4  # Å; closer ones that are not at the same place have no direction between them
FLATTEST = 1e-2  # of the file's unit of length; a periodic cell thinner than this is a mistake


class Source(NamedTuple):
    """Files that are read alike."""

    paths: list[Path]
    part: str = ""  # train, val or test; empty: as `split` in a frame's header says
    weight: float = 1.0  # of each configuration in the loss
    keys: Mapping[str, Key] = {}  # name of the energy, forces, stress, virial, charge and spin, by these words
    units: tuple[str | None, str | None] = (None, None)  # energy, length; None: as the frames state, or else eV and Å
    frames: Index = ALL
    forces_unit: str | None = None  # None: as those of energies and lengths give it


class StructureReader:
    """Turns frames of ASE into samples, checking each.

    The first frame decides under which names the labels are; every later one must have the same, and no later one may
    have an energy or forces that the first does not have. Sources with keys of their own are decided by their own first
    frame. What one atom leaves open, whether a number is that of the atom or of the system, is decided by the first
    frame with more of them.

    Args:
        spin_convention: What the spin counts; None to find out.
        extra_keys: Further quantities, name in a sample to name in the file; every frame has them.
        labels: Further labels; a frame may do without.
        columns: Names of the structure's parts in a table.
        weight_keys: Names of weights, by the keys of :data:`USUAL_WEIGHTS`; None tries the usual ones.
        group_key: Name of what ``split_by`` keeps together.
    """

    def __init__(
        self,
        spin_convention: str | None,
        extra_keys: dict[str, str],
        labels: Labels,
        columns: Mapping[str, str] | None = None,
        weight_keys: Mapping[str, str] | None = None,
        group_key: str | None = None,
    ) -> None:
        self.source = Source([])
        self.asked: Mapping[str, Key] = {}
        self.columns = dict(columns or {})
        self.spin_convention = spin_convention
        self.extra_keys = extra_keys
        self.labels = dict(labels)
        self.label_keys: dict[str, str] = {}
        #: Every quantity that occurs, with its form in the first frame that has it.
        self.quantities: dict[str, str] = {}
        #: For energies and forces that some frames lack, the first refusal and the number of frames.
        self.lacking: dict[str, tuple[str, int]] = {}
        #: Labels that the first frame does not have: under which name, where, and in how many frames they occur.
        self.late: dict[str, tuple[str, str, int]] = {}
        #: Numbers of the system so far, which may turn out to be numbers of the atoms.
        self.open_kinds: set[str] = set()
        #: How many frames have a free energy that is not their energy, and the largest difference.
        self.free_energies, self.free_difference = 0, 0.0
        #: How many frames lack a label that others may have.
        self.missing: dict[str, int] = {"stress": 0, **dict.fromkeys(labels, 0)}
        self.weight_keys = weight_keys
        self.weights: dict[str, list[float]] = {kind: [] for kind in USUAL_WEIGHTS}
        self.weights_found: dict[str, str] = {}
        self.group_key = group_key
        self.groups: list[str] = []
        #: Units as the first frame of a source states them, and where it is; the others have to agree.
        self.stated: dict[str, Any] = {}
        self.stated_by = ""
        self.energy_scale = self.length_scale = self.force_scale = 1.0
        #: Units of energies, lengths and forces as settings or files state them for the frames being read.
        self.statement: tuple[str | None, str | None, str | None] = (None, None, None)
        self.level_of_theory: str | None = None
        #: For each choice of keys the name of each kind of label, and the frame that decided it.
        self.decided: list[tuple[Mapping[str, Key], dict[str, str], str]] = []
        self.keys: dict[str, str] = {}
        self.first = ""
        self.fields: dict[str, Field] = {}
        #: Shapes of further quantities in the first frame.
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.spins: _SpinReadings | None = None
        self.periodic = False
        self.overlaps = 0
        self.log: list[str] = []
        self.warnings: list[str] = []

    def read(self, sources: Sequence[Source], folder: Path | None) -> tuple[Frames, dict[str, Any]]:
        """Everything in the files, as frames and notes about them.

        Args:
            sources: The files, in the order of the samples.
            folder: Where to store the frames; None for memory.

        Returns:
            The frames, and notes that JSON can hold: ``keys`` that labels were found under, all ``quantities`` with
            their form, energies of ``isolated`` atoms in eV, the ``parts``, ``files`` and ``groups`` frames belong to
            as (name, run length), the units of energies, lengths and forces that are ``stated`` for them, likewise, the
            ``level_of_theory``, and a ``log`` and ``warnings`` for the user.
        """
        builder: FrameBuilder | None = None
        singles: list[tuple[Source, Atoms, dict[str, Any], str]] = []
        parts: list[str] = []
        files: list[str] = []
        stated: list[tuple[str | None, str | None, str | None]] = []
        isolated: dict[int, float] = {}
        paths = [path for source in sources for path in source.paths]
        total = count_structures(paths) if all(source.frames == ALL for source in sources) else None
        try:
            for source, where, atoms in progress(self._frames(sources), "Reading structures", total=total):
                found = _quantities(atoms)
                if _is_isolated(atoms, found):
                    singles.append((source, atoms, found, where))
                    continue
                self._turn_to(source, atoms, found, where)
                if builder is None:
                    self._open_fields(atoms, found, where)
                    builder = FrameBuilder(folder, fields=self.fields)
                self._settle_levels(atoms, found, builder)
                sample = self._sample(atoms, found, where)
                if sample is not None:
                    builder.append(sample)
                    parts.append(source.part or _header_part(found))
                    files.append(where.rpartition(", frame ")[0])
                    stated.append(self.statement)
            if builder is None:  # nothing but single atoms: then they are the samples
                for source, atoms, found, where in singles:
                    self._turn_to(source, atoms, found, where)
                    if builder is None:
                        self._open_fields(atoms, found, where)
                        builder = FrameBuilder(folder, fields=self.fields)
                    sample = self._sample(atoms, found, where)
                    if sample is not None:
                        builder.append(sample)
                        parts.append("train")
                        files.append(where.rpartition(", frame ")[0])
                        stated.append(self.statement)
            else:
                isolated = self._isolated(singles)
            if builder is None or not builder.num_systems:
                raise DataError(self._no_frame(paths))
            if self.spins is not None:
                builder.add_column("s", self.spins.unpaired(self.log))
                self._tell_spins(self.spins)
            if not self.periodic:
                builder.drop_column("box")
            self._refuse_gaps()
            self._settle_missing(builder)
            self._add_weights(builder)
            self._tell_free_energies()
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
            self.warnings.append(f"{self.overlaps} frames in all have atoms closer than {OVERLAP:g} Å.")
        notes: dict[str, Any] = {"parts": _runs(parts), "files": _runs(files), "groups": _runs(self.groups)}
        notes["stated"] = _runs(stated)
        notes |= {"keys": self.decided[0][1] | self.label_keys, "isolated": isolated, "quantities": self.quantities}
        return frames, {**notes, "level_of_theory": self.level_of_theory, "log": self.log, "warnings": self.warnings}

    def _frames(self, sources: Sequence[Source]) -> Iterator[tuple[Source, str, Atoms]]:
        for source in sources:
            for path in source.paths:
                empty = True
                for number, atoms in read_structures(path, source.frames, self.columns):
                    empty = False
                    yield source, f"{path}, frame {number}", atoms
                if empty:
                    raise DataError(f"{path}: there are no frames in it (index: {index_text(source.frames)}).")

    def _turn_to(self, source: Source, atoms: Atoms, found: Mapping[str, Any], where: str) -> None:
        """Read with the units and keys of a source from here on; its first frame settles what it leaves open."""
        if source is self.source:
            return
        self.source, self.stated_by = source, where
        given = dict(zip(("energy_unit", "length_unit"), source.units, strict=True))
        self.stated = {name: found.get(name) for name, unit in given.items()}
        for name, unit in given.items():
            if unit is not None and self.stated[name] is not None and _differ(unit, self.stated[name], name[:6]):
                raise DataError(
                    f"{where}: {name} is {self.stated[name]!r} in the file, but {unit!r} in the settings. Leave the "
                    "setting out, or correct the file."
                )
        try:
            self.energy_scale = energy_factor(str(given["energy_unit"] or self.stated["energy_unit"] or "eV"))
            self.length_scale = length_factor(str(given["length_unit"] or self.stated["length_unit"] or "Å"))
        except ConfigError as error:  # settings are looked at before, so the file states it
            raise DataError(f"{where}: {error}") from None
        self.force_scale = self.energy_scale / self.length_scale
        energy, length = (given[name] or self.stated[name] for name in ("energy_unit", "length_unit"))
        self.statement = (
            None if energy is None else normalise_unit(str(energy), "energy"),
            None if length is None else normalise_unit(str(length), "length"),
            source.forces_unit,
        )
        if source.forces_unit is not None:
            self.force_scale = force_factor(source.forces_unit)
        self.asked = source.keys
        for asked, keys, first in self.decided:
            if asked == source.keys:
                self.keys, self.first = keys, first
                return
        self.keys = {}
        self._choose_keys(atoms, found, where)
        self.decided.append((source.keys, self.keys, where))
        there, here = ({*keys} - {"stress"} for keys in (self.decided[0][1], self.keys))
        if there != here:
            raise DataError(
                f"{where}: {', '.join(sorted(there ^ here))} would be read from one of this file and "
                f"{self.decided[0][2]}, but not from the other. All files need the same labels: name them with "
                "energy_key, forces_key and so on, or leave one out of all with false."
            )

    def _choose_keys(self, atoms: Atoms, found: Mapping[str, Any], where: str) -> None:
        """Decide under which names the labels are, by the first frame."""
        self.first = where
        for kind, asked in self.asked.items():
            if asked is False or kind in ("stress", "virial"):
                continue
            if asked is not None:
                self.keys[kind] = asked
                if asked.lstrip("-") not in found:
                    raise DataError(_missing(where, kind, asked.lstrip("-"), found))
                continue
            present = self._names_of(kind, atoms, found)
            wrong = [name for name in present if _is_boolean(found[name])]
            present = [name for name in present if name not in wrong]
            if wrong and not present:
                raise DataError(f"{where}: {_boolean(wrong[0], found[wrong[0]])} Or set {kind}_key: false.")
            if not present:
                continue
            alike = [name for name in present[1:] if name.lower() == present[0].lower()]
            if present[0] not in USUAL_NAMES[kind] and alike:
                raise DataError(
                    f"{where}: {', '.join(map(repr, [present[0], *alike]))} could all be the {kind}. Say which with "
                    f"{kind}_key."
                )
            self.keys[kind] = present[0]
            if present[0] not in USUAL_NAMES[kind]:
                self.log.append(f"{kind}_key: {present[0]!r} is taken for the {kind}.")
            if len(present) > 1 and kind in ("energy", "forces"):
                others = ", ".join(present[1:])
                self.log.append(f"{kind}_key: {present[0]!r} is used; the frames also have {others}.")
            if len(atoms) == 1 and np.shape(found[present[0]]) == (1,) and kind not in _ARRAYS:
                self.open_kinds.add(kind)
        if "energy" not in self.keys and "forces" not in self.keys and not self.labels:
            self.warnings.append(
                f"{where}: no energy and no forces were found among its quantities, {_listed(found)}. The structures "
                "can be read, but not trained on."
            )

    @staticmethod
    def _names_of(kind: str, atoms: Atoms, found: Mapping[str, Any]) -> list[str]:
        """The usual names of a label that a frame has; those that differ in capitals alone come last."""
        usual = USUAL_NAMES[kind]
        names = [name for name in usual if name in found]
        lower = {name.lower() for name in usual if len(name) > 1}
        names += [name for name in found if name not in usual and name.lower() in lower]
        if kind in _ARRAYS:
            return names
        return [name for name in names if np.size(found[name]) == 1 and not _is_per_atom(atoms, name)]

    def _settle_levels(self, atoms: Atoms, found: Mapping[str, Any], builder: FrameBuilder) -> None:
        """Decide whether quantities belong to atoms or to systems, by a frame with more than one atom."""
        for kind in tuple(self.open_kinds) if len(atoms) > 1 else ():
            self.open_kinds.discard(kind)
            if not _is_per_atom(atoms, self.keys[kind]):
                continue
            key = self.keys.pop(kind)
            self.log.append(f"{kind}_key: {key!r} has a number for each atom, so it is not the {kind} of the system.")
            if kind == "spin":
                self.spins = None
            elif builder.num_systems:
                builder.drop_column({"energy": "y", "charge": "q"}[kind])
        for name, key in self.extra_keys.items():
            field, shape = self.fields[name], np.shape(found.get(key, ()))
            if field.level == "system" and _is_per_atom(atoms, key) and field.shape == (1, *shape[1:]) != shape:
                field = Field("atom", shape[1:], field.dtype)  # the frames before had one atom each
            elif field.level == "atom" and shape == self.shapes[name] and shape[0] != len(atoms):
                field = Field("system", shape, field.dtype)  # the frames before had as many atoms as there are numbers
            if field != self.fields[name]:
                self.fields[name] = field
                builder.change_level(name, field)

    def _open_fields(self, atoms: Atoms, found: Mapping[str, Any], where: str) -> None:
        """How quantities beside energies and forces are stored, by the first frame."""
        self.level_of_theory = str(found["level_of_theory"]) if "level_of_theory" in found else None
        for name, key in self.extra_keys.items():
            if key not in found:
                raise DataError(_missing(where, "extra", key, found))
            self.fields[name] = _extra_field(atoms, found, key, where)
            self.shapes[name] = np.shape(found[key])
        for name, label in self.labels.items():
            self.fields[name] = Field(label.level, label.row, "float32")
        if "spin" in self.keys:
            self.spins = _SpinReadings(self.keys["spin"], self.spin_convention)
        if self.weight_keys is None and "weight" in found:
            self.log.append(
                "The frames have 'weight', which is not used. To multiply losses by it, pass weight_keys: "
                "{configuration: weight}."
            )

    def _sample(self, atoms: Atoms, found: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        """One frame as z, pos and labels, in eV and Å; None leaves it out."""
        for name, first in self.stated.items():
            if found.get(name) != first:
                raise DataError(
                    f"{where}: {name} is {found.get(name)!r}, although it is {first!r} in {self.stated_by}. Files of "
                    "different units stand under files, each with its own."
                )
        if self.level_of_theory is not None and str(found.get("level_of_theory")) != self.level_of_theory:
            self.log.append(f"level_of_theory: {where} has another than {self.first}, so none is noted.")
            self.level_of_theory = None
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
        pos = _finite(atoms.positions, (num, 3), "positions", where)
        if (far := np.abs(pos).max()) > FARTHEST:
            atom, axis = (int(i) for i in np.argwhere(np.abs(pos) == far)[0])
            raise DataError(
                f"{where}: coordinate {'xyz'[axis]} of atom {atom} is {pos[atom, axis]:.3g}; up to {FARTHEST:g} is "
                "accepted. Remove or repair the frame."
            )
        pos = pos * self.length_scale
        box = _box(atoms, where) * self.length_scale
        self.periodic |= bool(box.any())
        self._look_for_overlaps(pos, box, where)
        sample: dict[str, Any] = {"z": z, "pos": pos, "box": box}
        scale = self.energy_scale
        self._look_at_names(atoms, found, where)
        if "energy" in self.keys:
            sample["y"] = self._label(found, "energy", (), where) * scale
        if "forces" in self.keys:
            if num == 1 and not box.any() and self.keys["forces"].lstrip("-") not in found:
                sample["neg_dy"] = np.zeros((1, 3))  # an atom alone in space feels none
            else:
                forces = self._label(found, "forces", (num, 3), where)
                sample["neg_dy"] = forces * self.force_scale
        if self.asked["stress"] is not False:
            sample["stress"] = self._stress(atoms, found, box, where)
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
            value = np.asarray(found[key])
            sample[name] = _finite(value.astype(np.float64) if _is_boolean(value) else value, shape, key, where)
        for name, label in self.labels.items():
            shape = (num, *label.row) if label.level == "atom" else label.row
            sample[name] = self._further_label(found, name, shape, where)
        weights = {kind: self._weight(found, kind, where) for kind in USUAL_WEIGHTS}
        if self.group_key is not None:
            if self.group_key not in found:
                raise DataError(_missing(where, "group", self.group_key, found, self.first))
            self.groups.append(str(found[self.group_key]))
        for kind, weight in weights.items():
            self.weights[kind].append(weight)
        return sample

    def _weight(self, found: Mapping[str, Any], kind: str, where: str) -> float:
        """A weight of the frame, 1 where it has none; that of the configuration times that of its source."""
        own = self.source.weight if kind == "configuration" else 1.0
        names = USUAL_WEIGHTS[kind] if self.weight_keys is None else (self.weight_keys.get(kind),)
        name = next((name for name in names if name in found), None)
        if name is None:
            return own
        self.weights_found[kind] = name
        value = float(_finite(found[name], (), name, where))
        if value < 0:
            raise DataError(f"{where}: {name} is {value:g}, but a weight cannot be negative.")
        return own * value

    def _add_weights(self, builder: FrameBuilder) -> None:
        """Store the weights that say something.

        Raises:
            DataError: If no frame has a weight that was asked for.
        """
        for kind, name in (self.weight_keys or {}).items():
            if kind not in self.weights_found:
                raise DataError(
                    f"weight_keys: no frame has {name!r}. Their quantities are {_listed(self.quantities)}."
                    f"{did_you_mean(name, self.quantities)}"
                )
        for kind, values in self.weights.items():
            if any(value != 1.0 for value in values):
                builder.add_column(_WEIGHT_FIELDS[kind], np.array(values))
                source = f" ({self.weights_found[kind]!r})" if kind in self.weights_found else ""
                whose = "losses" if kind == "configuration" else f"the loss of the {kind}"
                self.log.append(f"Weights{source} of {min(values):g} to {max(values):g} multiply {whose}.")

    def _look_at_names(self, atoms: Atoms, found: Mapping[str, Any], where: str) -> None:
        """Keep account of quantities, of labels that the first frame lacks, and of free energies."""
        for name, value in found.items():
            if name not in self.quantities:
                self.quantities[name] = _form(value, len(atoms), _is_per_atom(atoms, name))
        for kind in ("energy", "forces", "charge", "spin"):
            if kind in self.keys or self.asked[kind] is not None:
                continue
            names = [name for name in self._names_of(kind, atoms, found) if not _is_boolean(found[name])]
            if names and not (len(atoms) == 1 and np.shape(found[names[0]]) == (1,)):
                name, first, count = self.late.get(kind, (names[0], where, 0))
                self.late[kind] = (name, first, count + 1)
        if self.keys.get("energy") == "energy" and self.asked["energy"] is None and "free_energy" in found:
            difference = abs(_finite(found["free_energy"], (), "free_energy", where) - np.ravel(found["energy"])[0])
            if difference * self.energy_scale > 1e-6:
                self.free_energies += 1
                self.free_difference = max(self.free_difference, float(difference) * self.energy_scale)

    def _refuse_gaps(self) -> None:
        """Refuse energies and forces that some frames have and others lack; tell of charges and spins.

        Raises:
            DataError: With the frame, and how many frames there are.
        """
        total = len(self.weights["configuration"])
        for kind, (text, count) in self.lacking.items():
            raise DataError(f"{text} {count} of {total} frames lack the {kind}.")
        for kind, (name, where, count) in self.late.items():
            text = f"{where}: {name!r} is the {kind}, but {self.first} has none; {count} of {total} frames have one."
            if kind in ("energy", "forces"):
                raise DataError(
                    f"{text} Leave out the frames without, or set {kind}_key: false to do without {kind} labels."
                )
            self.warnings.append(f"{text} It is not read.")

    def _tell_free_energies(self) -> None:
        if self.free_energies:
            self.warnings.append(
                f"{self.free_energies} of {len(self.weights['configuration'])} frames have a free_energy that is not "
                f"their energy, by up to {self.free_difference:.3g} eV. 'energy' is used. With electronic smearing "
                "forces are the slope of the free energy: set energy_key: free_energy to train on the two that go "
                "together, or energy_key: energy if you mean it."
            )

    def _stress(self, atoms: Atoms, found: Mapping[str, Any], box: np.ndarray, where: str) -> np.ndarray:
        """The stress of a frame, (3, 3) in eV/Å³, NaN where it has none.

        A virial W is an energy, and the stress is -W / V with the volume V of the cell.
        """
        asked = self.asked["stress"] or self.asked.get("virial")
        names = (asked,) if asked else USUAL_NAMES["stress"]
        key = self.keys.get("stress") or next((name for name in names if name and name.lstrip("-") in found), None)
        if key is None or key.lstrip("-") not in found or _is_nan(found[key.lstrip("-")]):
            self.missing["stress"] += 1
            return np.full((3, 3), np.nan)
        name = key.lstrip("-")
        is_virial = bool(self.asked.get("virial")) or name.lower() in VIRIALS
        if name == UNSIGNED_VIRIAL and not is_virial:
            raise DataError(
                f"{where}: {name} is not divided by the volume, and the source does not state its sign. Set "
                f"virial_key: {name} if it is a virial, -V times the stress, or virial_key: -{name} if it is V times "
                "the stress."
            )
        if not (np.abs(box).sum(axis=1) > 0).all():
            raise DataError(
                f"{where}: a stress needs a cell in three directions, but pbc is {atoms.pbc.tolist()}. "
                "Pass stress_key: false to ignore the stress."
            )
        if "stress" not in self.keys:
            self.keys["stress"] = key
            if is_virial:
                self.log.append(f"{key!r} is read as a virial: the stress is minus the virial over the volume.")
        value = _full_stress(self._label(found, "stress", None, where), key, where)
        if is_virial:
            return -value * self.energy_scale / abs(np.linalg.det(box))
        return value * (self.energy_scale / self.length_scale**3)

    def _further_label(
        self, found: Mapping[str, Any], name: str, shape: tuple[int, ...], where: str
    ) -> np.ndarray | float:
        """One of ``labels`` in the shape asked for, NaN where the frame has none."""
        key = self.label_keys.get(name) or find_label(name, found)
        if key is None or key not in found or _is_nan(found[key]):
            self.missing[name] += 1
            return np.full(shape, np.nan)
        self.label_keys[name] = key
        value = np.asarray(found[key])
        is_flat = value.ndim < 2 or not shape or value.shape[0] == shape[0]
        if is_flat and value.size == np.prod(shape, dtype=int):
            value = value.reshape(shape)  # nine numbers are as good as (3, 3), and (N, 1) as (N,)
        return _believable(_finite(value, shape, key, where), key, where)

    def _settle_missing(self, builder: FrameBuilder) -> None:
        """Drop a stress that no frame has; say how many frames lack a label.

        Raises:
            DataError: If no frame has a label that was asked for.
        """
        for name, count in self.missing.items():
            asked = (self.asked["stress"] or self.asked.get("virial")) if name == "stress" else name
            if not count or (name == "stress" and self.asked["stress"] is False):
                continue
            if count < builder.num_systems:
                self.log.append(f"{name}: {count} of {builder.num_systems} frames have none.")
            elif name == "stress" and not asked:
                builder.drop_column("stress")
            else:
                raise DataError(
                    f"{self.first} and later: no frame has {asked!r}. Their quantities are "
                    f"{_listed(self.quantities)}.{did_you_mean(asked, self.quantities)} "
                    + (
                        "Set stress_key, or stress_key: false to do without stress labels."
                        if name == "stress"
                        else f"Name the right one: properties: {{{name}: {{label: ...}}}}."
                    )
                )

    def _label(self, found: Mapping[str, Any], kind: str, shape: tuple[int, ...] | None, where: str) -> np.ndarray:
        key = self.keys[kind]
        name = key.lstrip("-")
        if name not in found:
            return self._lack(kind, _missing(where, kind, name, found, self.first), shape)
        value = _believable(_finite(found[name], shape, name, where), name, where)
        return -value if key.startswith("-") else value

    def _lack(self, kind: str, text: str, shape: tuple[int, ...] | None) -> np.ndarray:
        """Note that a frame has no energy or no forces, to be refused when they are counted.

        Raises:
            DataError: At once for any other label.
        """
        if kind not in ("energy", "forces"):
            raise DataError(text)
        first, count = self.lacking.get(kind, (text, 0))
        self.lacking[kind] = (first, count + 1)
        return np.full(shape or (), np.nan)

    def _no_frame(self, paths: Sequence[Path]) -> str:
        """Say that no frame can be used."""
        return f"{', '.join(map(str, paths))}: there is no frame that can be used."

    def _look_for_overlaps(self, pos: np.ndarray, box: np.ndarray, where: str) -> None:
        pair = _overlap(pos, box)
        if pair is not None:
            i, j, distance = pair
            if 0 < distance < CLOSEST:
                raise DataError(
                    f"{where}: atoms {i} and {j} are {distance:.2g} Å apart, so there is no meaningful direction "
                    "between them. Remove one of them, or the frame."
                )
            self.overlaps += 1
            if self.overlaps <= 5:
                self.warnings.append(f"{where}: atoms {i} and {j} are {distance:.3f} Å apart.")

    def _tell_spins(self, spins: _SpinReadings) -> None:
        if spins.misfits:
            more = f", likewise in {spins.misfits - 1} other frames" if spins.misfits > 1 else ""
            self.warnings.append(f"{spins.misfit}{more}. Is the total charge missing, or spin_convention another?")

    def _isolated(self, singles: Sequence[tuple[Source, Atoms, dict[str, Any], str]]) -> dict[int, float]:
        if not singles or "energy" not in self.keys:
            return {}
        z, energy, charge = [], [], []
        for source, atoms, found, where in singles:
            self._turn_to(source, atoms, found, where)
            z.append(int(atoms.numbers[0]))
            energy.append(float(self._label(found, "energy", (), where)) * self.energy_scale)
            charge.append(float(found.get(self.keys.get("charge", ""), 0.0)))
        return isolated_atom_energies(np.array(z), np.array(energy), np.array(charge))


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
        self.misfits, self.misfit = 0, ""
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
                    self.misfit = f"{where}: {unpaired:g} unpaired electrons do not go with {electrons} electrons"

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


def _header_part(found: Mapping[str, Any]) -> str:
    """The part of the data that a frame itself says it belongs to, or nothing."""
    name = str(found.get("split", "")).lower()
    return next((known for known in ("train", "val", "test") if name.startswith(known)), "")


def _runs(names: Sequence[Any]) -> list[tuple[Any, int]]:
    """Equal names in a row as name and number."""
    return [(name, sum(1 for _ in run)) for name, run in itertools.groupby(names)]


def _differ(unit: str, stated: Any, kind: str) -> bool:
    """Whether two names are those of different units; a name of the author's own is not known to be."""
    try:
        return normalise_unit(unit, kind) != normalise_unit(str(stated), kind)
    except ConfigError:
        return False


def _is_nan(value: Any) -> bool:
    """Whether a label says itself that it is missing."""
    array = np.asarray(value)
    return array.dtype.kind == "f" and array.size > 0 and bool(np.isnan(array).all())


def _finite(value: Any, shape: tuple[int, ...] | None, name: str, where: str) -> np.ndarray:
    """A label as float64 of the expected shape."""
    if _is_boolean(value):
        raise DataError(f"{where}: {_boolean(name, value)}")
    if np.asarray(value).dtype.kind == "c":
        raise DataError(f"{where}: {name} holds complex numbers.")
    if np.ma.isMaskedArray(value):
        value = np.ma.filled(value.astype(np.float64), np.nan)
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


def _believable(values: np.ndarray, name: str, where: str) -> np.ndarray:
    """A label, unless it is larger than any can be."""
    if values.size and (largest := float(np.abs(values).max())) > LARGEST_LABEL:
        raise DataError(f"{where}: {name}: {too_large(largest)}")
    return values


def _is_boolean(value: Any) -> bool:
    return np.asarray(value).dtype.kind == "b"


def _boolean(name: str, value: Any) -> str:
    """Why a label that is true or false is refused."""
    text = f"{name} is {value}, which is no number."
    if np.ndim(value) == 0 and value:
        text += f" (A word without a value in the comment of an xyz file is read as true: write {name}=NUMBER.)"
    return text


#: Results of ASE's calculators with a row for each atom.
_ATOMIC_RESULTS = ("forces", "charges", "magmoms", "energies", "stresses")


def _is_per_atom(atoms: Atoms, name: str) -> bool:
    """Whether a frame has a quantity for each atom."""
    return name in atoms.arrays or (name in _ATOMIC_RESULTS and name in getattr(atoms.calc, "results", {}))


def _form(value: Any, num_atoms: int, is_per_atom: bool) -> str:
    """What a quantity looks like, in words: ``a number``, ``atoms × 3``, ``text``."""
    if isinstance(value, str) or np.asarray(value).dtype.kind in "US":
        return "text"
    array = np.asarray(value)
    if array.dtype.kind == "b":
        return "true or false"
    if array.dtype.kind not in "iufc":
        return "other"
    if is_per_atom or (array.ndim and len(array) == num_atoms and num_atoms > 1):
        return " × ".join(["atoms", *map(str, array.shape[1:])])
    return "number" if array.size == 1 else " × ".join(map(str, array.shape))


def _box(atoms: Atoms, where: str) -> np.ndarray:
    """Lattice vectors as rows, with a zero row for each direction that is not periodic."""
    cell = np.asarray(atoms.cell.array, dtype=np.float64)
    if not np.isfinite(cell).all():
        raise DataError(f"{where}: the cell holds {cell[~np.isfinite(cell)].flat[0]}.")
    if np.abs(cell).max() > FARTHEST:
        raise DataError(
            f"{where}: the cell holds {np.abs(cell).max():.3g}; lattice vectors up to {FARTHEST:g} are accepted."
        )
    periodic = np.asarray(atoms.pbc, dtype=bool)
    rows = cell[periodic]
    if len(rows) and np.linalg.svd(rows, compute_uv=False).min() < FLATTEST:
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
    if value.dtype.kind == "b" and not value.ndim:
        raise DataError(f"{where}: {_boolean(key, found[key])}")
    if value.dtype.kind not in "biuf":
        raise DataError(f"{where}: {key} holds {value.dtype} instead of numbers; it cannot be an extra quantity.")
    if _is_per_atom(atoms, key):
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
    if kind == "group":
        return text + " split_by needs it in every frame."
    return text + f" Set {kind}_key, or {kind}_key: false to do without {kind} labels."


def _listed(found: Iterable[str]) -> str:
    return ", ".join(sorted(str(name) for name in found if not str(name).startswith("_"))) or "none"

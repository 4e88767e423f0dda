"""Reading structure files to the end, whatever is wrong in them.

Training refuses a file at its first fault. Here the same reader goes on: a label that cannot be used becomes NaN, a
frame without usable positions is left out, and all of it is noted down.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.datasets.ase import ASE
from torchmdnet.datasets.frames import Frames
from torchmdnet.datasets.labels import Labels, LabelShape
from torchmdnet.datasets.structure_labels import Source, StructureReader, _form, _quantities
from torchmdnet.errors import DataError

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["Fault", "Survey", "SurveyedASE"]

#: Labels that are looked at where a file has them, although nothing is trained on them by default.
FURTHER: Labels = {"dipole": LabelShape("system", (3,)), "charges": LabelShape("atom", ())}

#: Frames that decide under which names the labels are.
FIRST = 50


@dataclass(frozen=True)
class Fault:
    """Something that training would stop at.

    Args:
        kind: The quantity: "energy", "forces", ..., "frame" for one that had to be left out, "file" for an unreadable
            rest of a file.
        text: What training says, with the file and the frame.
        sample: The sample; None where the frame is none.
    """

    kind: str
    text: str
    sample: int | None


@dataclass
class Survey:
    """What was met on the way through structure files."""

    files: list[Path] = field(default_factory=list)
    file_of: array[int] = field(default_factory=lambda: array("i"))
    frame_of: array[int] = field(default_factory=lambda: array("q"))
    faults: list[Fault] = field(default_factory=list)
    #: Number of frames with each quantity, by its name in the file, and its shape in the first of them.
    names: Counter[str] = field(default_factory=Counter)
    shapes: dict[str, str] = field(default_factory=dict)
    #: Energies of isolated atoms, which are no samples, in eV, by atomic number.
    isolated: dict[int, float] = field(default_factory=dict)
    num_frames: int = 0
    num_dropped: int = 0

    def place(self, sample: int) -> str:
        """The file and the frame of a sample."""
        return f"{self.files[self.file_of[sample]]}, frame {self.frame_of[sample]}"


class SurveyedASE(ASE):
    """The same data set as training reads, with faults noted instead of refused, in :attr:`survey`."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self.survey = Survey()
        self.reader = partial(_Surveyor, survey=self.survey)
        keywords["labels"] = {**FURTHER, **(keywords.get("labels") or {})}
        super().__init__(*args, **{**keywords, "cache": False})


class _Surveyor(StructureReader):
    """A reader that notes faults and goes on."""

    def __init__(self, survey: Survey, **options: Any) -> None:
        super().__init__(**options)
        self.survey = survey

    def read(self, sources: Sequence[Any], folder: Path | None) -> tuple[Frames, dict[str, Any]]:
        """Everything in the files that can be used; see :meth:`StructureReader.read`."""
        self._sources = sources
        return super().read(sources, folder)

    def _frames(self, sources: Sequence[Any]) -> Iterator[Any]:
        for source in sources:
            for path in source.paths:
                self.survey.files.append(path)
                try:
                    for frame in super()._frames([source._replace(paths=[path])]):
                        self.survey.num_frames += 1
                        yield (source, *frame[1:])
                except DataError as error:
                    self._note("file", str(error), None)

    def _choose_keys(self, atoms: Atoms, found: Mapping[str, Any], where: str) -> None:
        """By what the first frames have between them: the very first may be one that lacks a label."""
        names = dict(found)
        try:
            for *_, other in itertools.islice(super()._frames([self.source]), FIRST):
                names = {**_quantities(other), **names}
        except DataError:
            pass  # it will be met again on the way
        super()._choose_keys(atoms, names, where)

    def _sample(self, atoms: Atoms, found: Mapping[str, Any], where: str) -> dict[str, Any] | None:
        survey = self.survey
        known = len(survey.faults)
        for name, value in found.items():
            survey.names[name] += 1
            survey.shapes.setdefault(name, _form(value, len(atoms), False))
        try:
            sample = super()._sample(atoms, found, where)
        except DataError as error:
            self._without_samples(known)
            self._note("frame", str(error), None)
            survey.num_dropped += 1
            if self.spins is not None:
                del self.spins.values[len(survey.file_of) :]
            return None
        path, _, number = where.rpartition(", frame ")
        assert str(survey.files[-1]) == path
        survey.file_of.append(len(survey.files) - 1)
        survey.frame_of.append(int(number))
        return sample

    def _label(self, found: Mapping[str, Any], kind: str, shape: tuple[int, ...] | None, where: str) -> np.ndarray:
        try:
            return super()._label(found, kind, shape, where)
        except DataError as error:
            if kind not in ("energy", "forces"):
                raise  # that of a stress is noted with it
            self._note(kind, str(error), len(self.survey.file_of))
            return np.full((3, 3) if shape is None else shape, np.nan)

    def _stress(self, atoms: Atoms, found: Mapping[str, Any], box: np.ndarray, where: str) -> np.ndarray:
        try:
            return super()._stress(atoms, found, box, where)
        except DataError as error:
            self._note("stress", str(error), len(self.survey.file_of))
            return np.full((3, 3), np.nan)

    def _further_label(
        self, found: Mapping[str, Any], name: str, shape: tuple[int, ...], where: str
    ) -> np.ndarray | float:
        try:
            return super()._further_label(found, name, shape, where)
        except DataError as error:
            self._note(name, str(error), len(self.survey.file_of))
            return np.full(shape, np.nan)

    def _settle_missing(self, builder: Any) -> None:
        for name, count in self.missing.items():
            if count == builder.num_systems and not (name == "stress" and self.asked["stress"] is False):
                builder.drop_column(name)

    def _lack(self, kind: str, text: str, shape: tuple[int, ...] | None) -> np.ndarray:
        raise DataError(text)  # noted with the frame

    def _refuse_gaps(self) -> None:
        try:
            super()._refuse_gaps()
        except DataError as error:
            self._note("file", str(error), None)

    def _no_frame(self, paths: Sequence[Path]) -> str:
        if not self.survey.faults:
            return super()._no_frame(paths)
        first, total = self.survey.faults[0].text, self.survey.num_frames
        return f"{first} None of the {total:,} frames can be used." if total > 1 else first

    def _look_for_overlaps(self, pos: np.ndarray, box: np.ndarray, where: str) -> None:
        """Close contacts have a check of their own."""

    def _tell_spins(self, spins: Any) -> None:
        """Charge and spin have one too."""

    def _isolated(self, singles: Sequence[tuple[Source, Atoms, dict[str, Any], str]]) -> dict[int, float]:
        known = len(self.survey.faults)
        self.survey.isolated = super()._isolated(singles)
        self._without_samples(known)
        return self.survey.isolated

    def _without_samples(self, first: int) -> None:
        """What was noted from here on is about a frame that is no sample."""
        faults = self.survey.faults
        faults[first:] = [replace(fault, sample=None) for fault in faults[first:]]

    def _note(self, kind: str, text: str, sample: int | None) -> None:
        self.survey.faults.append(Fault(kind, text, sample))

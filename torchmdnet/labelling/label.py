"""Energies and forces for structures, in parallel and resumable."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torchmdnet.errors import ConfigError, DataError
from torchmdnet.files import check_target, is_one_of
from torchmdnet.labelling.journal import Journal
from torchmdnet.labelling.methods import PROPERTIES, Method, charge_and_unpaired
from torchmdnet.labelling.output import writer_for
from torchmdnet.labelling.workers import progress_bar, run

if TYPE_CHECKING:
    from ase import Atoms

__all__ = [
    "Summary",
    "collect",
    "failures",
    "journal_of",
    "key_of",
    "label",
    "open_journal",
    "read_all",
    "told",
    "without_labels",
]


class Summary(NamedTuple):
    """What has become of the structures.

    Args:
        written: Structures in the output.
        computed: Those of this run that got a result.
        failed: Message of each error and how many different structures have it.
        where: The first place at which each error occurred, ``file, frame n``.
        dropped: Sampled structures that were out of bounds, by the reason.
    """

    written: int
    computed: int
    failed: Counter[str]
    where: dict[str, str]
    dropped: Counter[str] = Counter()


@dataclass(frozen=True)
class _Labelling:
    """The work of a process: labels of one structure after another."""

    method: Method
    properties: tuple[str, ...]

    def prepare(self) -> Callable[[Atoms], dict[str, Any]]:
        calculators = self.method.prepare()
        return lambda atoms: calculators.evaluate(atoms, self.properties)


def label(
    sources: Sequence[str | Path],
    output: str | Path,
    method: Method,
    *,
    properties: Sequence[str] = (),
    processes: int = 1,
    retry: bool = False,
    timeout: float | None = None,
    memory: float | None = None,
) -> Summary:
    """Compute labels of structures and write them, in the order of the structures.

    Results are collected in ``<output>.journal`` as they come. Called again with the same method, it computes what is
    missing: after an interruption at any moment, and for structures that have been added. Structures that failed are
    left out of the output.

    Args:
        sources: Files that ASE reads, or patterns. Total charge and spin are taken from each structure's header.
        output: File to write, ``.extxyz`` or ``.h5``.
        method: The calculator.
        properties: What to compute; see :meth:`~torchmdnet.labelling.methods.Calculators.evaluate` for the default.
        processes: How many processes.
        retry: Try again what failed before.
        timeout: Seconds after which a structure counts as failed. None: never.
        memory: Bytes that all processes may use together; beyond, the structure of the largest process counts as
            failed. None: nine tenths of the memory that is available at the start.

    Raises:
        ConfigError: If an argument or the calculator cannot work.
        DataError: If a file cannot be read or written.
    """
    from torchmdnet.datasets.files import find_files

    files = find_files([str(source) for source in sources], "structures")
    output = check_target(output, "output")
    write = writer_for(output)
    for name in properties:
        if name not in PROPERTIES:
            raise ConfigError(f"properties: {name!r} is not available. Choose from {', '.join(PROPERTIES)}.")
    header = {**method.describe(), "properties": list(properties)}
    with open_journal(output, header, files) as journal:
        places = _places(files)
        todo = {
            key: place
            for key, place in places.items()
            if key not in journal or (retry and not journal.succeeded(key))
        }  # fmt: skip
        work, missing = _Labelling(method, tuple(properties)), _read_some(files, todo)
        outcomes = run(work, missing, processes=processes, timeout=timeout, memory=memory)
        computed = collect(outcomes, journal, todo, len(places), "Labelling", "structure")
        failed, where = failures(journal, places)
        if failed.total() == len(places):
            raise DataError(f"no structure could be labelled; {told(failed, where)}")
        written = write(_labelled(files, journal, method))
    return Summary(written, computed, failed, where)


def failures(journal: Journal, places: Mapping[str, str]) -> tuple[Counter[str], dict[str, str]]:
    """How often each error occurred, and where first; see :class:`Summary`."""
    failed: Counter[str] = Counter()
    where: dict[str, str] = {}
    for key, place in places.items():
        if not journal.succeeded(key):
            error = journal[key]["error"]
            failed[error] += 1
            where.setdefault(error, place)
    return failed, where


def told(failed: Counter[str], where: Mapping[str, str], most: int = 3) -> str:
    """The most frequent errors in a line."""
    lines = [f"{count} times: {message} ({where[message]})" for message, count in failed.most_common(most)]
    return "; ".join(lines) + ("; ..." if len(failed) > most else "")


def open_journal(output: Path, header: dict[str, Any], files: Sequence[Path]) -> Journal:
    """The journal beside an output file; refused where that file would be lost.

    Raises:
        ConfigError: If the output is one of the files read, or somebody else's.
        DataError: If the journal belongs to other settings.
    """
    if is_one_of(output, files):
        raise ConfigError(f"output: {output} is one of the files to read. Choose another name.")
    path = journal_of(output)
    if output.exists() and not path.exists():
        raise ConfigError(
            f"output: {output} exists, without the journal ({path.name}) that this command would have left. Choose "
            "another name, or delete it."
        )
    return Journal(path, header)


def journal_of(output: Path) -> Path:
    """Where the results for an output file are collected."""
    return output.with_name(output.name + ".journal")


def read_all(files: Sequence[Path]) -> Iterator[tuple[str, Atoms]]:
    """All structures with their place, ``file, frame n``."""
    from torchmdnet.datasets.structure_files import ALL, read_structures

    for path in files:
        for number, atoms in read_structures(path, ALL):
            yield f"{path}, frame {number}", atoms


def key_of(atoms: Atoms) -> str:
    """Digest of everything that a calculation depends on: elements, positions, cell, charge and spin."""
    import numpy as np

    try:
        state: tuple[Any, ...] = charge_and_unpaired(atoms)
    except (DataError, TypeError, ValueError) as error:  # it will fail, by the same words
        state = (str(error),)
    whole = hashlib.sha256(repr((len(atoms), state, atoms.pbc.tolist())).encode())
    for array, kind in ((atoms.numbers, "<i8"), (atoms.positions, "<f8"), (atoms.cell.array, "<f8")):
        whole.update(np.ascontiguousarray(array, dtype=kind).tobytes())
    return whole.hexdigest()[:32]


def _places(files: Sequence[Path]) -> dict[str, str]:
    """The first place of every different structure, by its key."""
    places: dict[str, str] = {}
    for place, atoms in read_all(files):
        places.setdefault(key_of(atoms), place)
    if not places:
        raise DataError(f"{', '.join(map(str, files))}: there are no structures.")
    return places


def _read_some(files: Sequence[Path], places: dict[str, str]) -> Iterator[tuple[str, Atoms]]:
    """Structures at these places, with their key, read as they are asked for."""
    left = len(places)
    for place, atoms in read_all(files) if left else ():
        key = key_of(atoms)
        if places.get(key) == place:
            atoms.calc = None
            yield key, atoms
            left -= 1
            if not left:
                return


def collect(
    outcomes: Iterable[tuple[str, dict[str, Any]]],
    journal: Journal,
    places: Mapping[str, str],
    total: int,
    description: str,
    unit: str,
) -> int:
    """Write outcomes down as they come; how many were results.

    Args:
        outcomes: Keys and outcomes; see :func:`torchmdnet.labelling.workers.run`.
        journal: Where to.
        places: Where each piece that is to be done comes from, to be noted beside an error.
        total: How many pieces there are, those included that were done before.
        description: What is being done.
        unit: What a piece is.
    """
    computed = 0
    with progress_bar(description, total, total - len(places), unit) as tell:
        for key, outcome in outcomes:
            journal.append(key, outcome if "result" in outcome else {**outcome, "source": places[key]})
            computed += "result" in outcome
            tell("result" not in outcome)
    return computed


def _labelled(files: Sequence[Path], journal: Journal, method: Method) -> Iterator[Atoms]:
    """The structures that have a result, with it."""
    for _, atoms in read_all(files):
        key = key_of(atoms)
        if journal.succeeded(key):
            yield labelled(atoms, journal[key]["result"], method.level_of_theory)


def labelled(atoms: Atoms, results: dict[str, Any], level_of_theory: str) -> Atoms:
    """A structure with new labels, without old ones, and with all that a reader would have to guess."""
    from ase.calculators.singlepoint import SinglePointCalculator

    frame = without_labels(atoms)
    charge, unpaired = charge_and_unpaired(atoms)
    frame.info.update(
        total_charge=charge,
        spin_multiplicity=unpaired + 1,
        level_of_theory=level_of_theory,
        energy_unit="eV",
        length_unit="Angstrom",
    )
    frame.calc = SinglePointCalculator(frame, **results)
    return frame


def without_labels(atoms: Atoms) -> Atoms:
    """A copy without energies, forces and the like of an earlier calculation, but with total charge and spin."""
    from torchmdnet.datasets.labels import USUAL_LABELS, USUAL_NAMES

    labels = {kind: names for kind, names in USUAL_NAMES.items() if kind not in ("charge", "spin")}
    old = {name for names in (*labels.values(), *USUAL_LABELS.values()) for name in names}
    old |= {"free_energy", "energies", "stresses", "virial", "magmom", "magmoms"}
    old |= {"level_of_theory", "energy_unit", "length_unit"}
    frame = atoms.copy()
    frame.calc = None
    for name in old & frame.info.keys():
        del frame.info[name]
    for name in old & frame.arrays.keys():
        del frame.arrays[name]
    return frame

"""The state of a simulation in a file: all that its next step depends on, to the last bit."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.errors import DataError
from torchmdnet.files import draft_of
from torchmdnet.parse import parse_json

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["State", "put_numbers", "read_atoms", "take_numbers", "write_atoms"]

#: Of an integrator, what is not its own.
_NOT_STATE = frozenset({"atoms", "optimizable", "comm", "rng", "observers", "masses", "trajectory", "logfile"})


@dataclass
class State:
    """Where a simulation is.

    Args:
        step: How many steps have been done.
        positions: (N, 3) Å.
        momenta: (N, 3) in ASE's unit.
        cell: (3, 3) Å.
        integrator: Variables of the integrator, thermostats and barostats included, by name.
        search: What the calculator keeps from step to step, by name.
        random: State of the random generator.
        sizes: Bytes of each file that grows, by its name, when the state was taken.
        seconds: Wall-clock time so far.
        done: Whether the simulation has come to its end.
    """

    step: int
    positions: np.ndarray
    momenta: np.ndarray
    cell: np.ndarray
    integrator: dict[str, np.ndarray] = field(default_factory=dict)
    search: dict[str, np.ndarray] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    done: bool = False

    def write(self, path: Path) -> None:
        """Write it; a crash on the way leaves the file that was there."""
        notes = {
            "step": self.step,
            "random": self.random,
            "sizes": self.sizes,
            "seconds": self.seconds,
            "done": self.done,
        }
        arrays = {"positions": self.positions, "momenta": self.momenta, "cell": self.cell}
        arrays |= {f"integrator/{name}": value for name, value in self.integrator.items()}
        arrays |= {f"search/{name}": value for name, value in self.search.items()}
        arrays["notes"] = np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)
        with draft_of(path) as draft, open(draft, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]

    @classmethod
    def read(cls, path: Path) -> State:
        """Read what :meth:`write` wrote.

        Raises:
            DataError: If the file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            notes = parse_json(arrays.pop("notes").tobytes(), str(path), DataError)
            parts: dict[str, dict[str, np.ndarray]] = {"integrator": {}, "search": {}}
            for name in [name for name in arrays if "/" in name]:
                kind, _, key = name.partition("/")
                parts[kind][key] = arrays.pop(name)
            return cls(**arrays, **parts, **notes)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise DataError(f"{path} cannot be read ({error}). Start the simulation again with --overwrite.") from error


def take_numbers(integrator: Any) -> dict[str, np.ndarray]:
    """Every number and array that an integrator of ASE keeps, those of its thermostats and barostats included."""
    found: dict[str, np.ndarray] = {}

    def walk(part: Any, prefix: str) -> None:
        for name, value in vars(part).items():
            if name in _NOT_STATE:
                continue
            if isinstance(value, (bool, int, float, np.number, np.ndarray)):
                array = np.asarray(value)
                if array.dtype.kind in "biuf":
                    found[prefix + name] = array.copy()
            elif type(value).__module__.startswith("ase.md."):
                walk(value, f"{prefix}{name}.")

    walk(integrator, "")
    return found


def put_numbers(integrator: Any, numbers: Mapping[str, np.ndarray]) -> None:
    """Give an integrator the numbers that :func:`take_numbers` found in another like it.

    Raises:
        DataError: If it is not like it, as integrators of two releases of ASE may not be.
    """
    missing = set(take_numbers(integrator)) - set(numbers)  # others may have been made by a step
    if missing:
        names = ", ".join(sorted(missing))
        raise DataError(
            f"the integrator of this release of ASE has variables that are not in the state ({names}). "
            "Go on with the release that began, or start again with --overwrite."
        )
    for name, value in numbers.items():
        *parts, last = name.split(".")
        holder = integrator
        for part in parts:
            holder = getattr(holder, part)
        setattr(holder, last, value.copy() if value.ndim else value.item())


def write_atoms(path: Path, atoms: Atoms) -> None:
    """A structure with its constraints, masses and ``info``, to the last bit, as JSON."""
    from ase.io.jsonio import encode

    copy = atoms.copy()
    copy.calc = None
    plain = (str, int, float, bool, np.ndarray, np.number)
    copy.info = {name: value for name, value in copy.info.items() if isinstance(value, plain)}
    with draft_of(path) as draft:
        draft.write_text(encode(copy.todict()), encoding="utf-8")


def read_atoms(path: Path) -> Atoms:
    """Read what :func:`write_atoms` wrote.

    Raises:
        DataError: If the file is damaged.
    """
    from ase import Atoms
    from ase.io.jsonio import decode

    try:
        return Atoms.fromdict(decode(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Start the simulation again with --overwrite.") from error

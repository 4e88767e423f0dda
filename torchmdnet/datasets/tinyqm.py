"""Small quantum-chemical reference sets that come with the package."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.files import expand
from torchmdnet.datasets.frames import Frames
from torchmdnet.elements import ATOMIC_NUMBERS
from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.parse import parse_json

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["TinyQM"]

#: Integer columns are decimal numbers with six places: they compress well and give back exactly what was written.
PLACES = 1e6
SPLITS = ("train", "val", "test")

#: Columns of a packed file: level, shape of a row, and the name in a sample (None: not part of samples).
COLUMNS: dict[str, tuple[str, tuple[int, ...], str | None]] = {
    "pos": ("atom", (3,), "pos"),
    "forces": ("atom", (3,), "neg_dy"),
    "partial_charges": ("atom", (), "partial_charges"),
    "baseline_forces": ("atom", (3,), None),
    "energy": ("system", (1,), "y"),
    "box": ("system", (3, 3), "box"),
    "stress": ("system", (3, 3), "stress"),
    "dipole": ("system", (3,), "dp"),
    "baseline_energy": ("system", (1,), None),
}
SINGLE = ("neg_dy", "partial_charges", "stress", "dp")  # float32 is plenty for these


class TinyQM(FramesDataset):
    """Energies, forces and more of small molecules and cells, computed for this package; nothing is downloaded.

    ================== ======= ========= ============ ==========================================================
    level              systems elements  atoms        labels
    ================== ======= ========= ============ ==========================================================
    GFN2-xTB           2,940   H C N O   2 to 18      energy, forces, total and partial charges, spin, dipole
    wB97X/6-31G(d)     640     H C N O   2 to 10      energy, forces, total charge, spin, dipole; GFN2-xTB baseline
    GFN1-xTB           397     six       8 to 24      energy, forces, stress of periodic cells
    ================== ======= ========= ============ ==========================================================

    GFN2-xTB: 49 species (molecules, five ions, ten clusters) from Langevin dynamics at 150 to 1000 K. The density
    functional labels part of the same geometries: with ``baseline=True`` the labels are the difference of the two
    methods. GFN1-xTB: strained NaCl, diamond, silicon and boxes of eight water molecules, with one k-point, so a
    well-defined surface to learn but no material property. :attr:`splits` divides each into train, val and test.

    A sample has ``z``, ``pos`` (N, 3) Å, ``y`` (1, 1) eV, ``neg_dy`` (N, 3) eV/Å, ``q`` (1,) e, ``s`` (1,) unpaired
    electrons, and, depending on the level, ``partial_charges`` (N,) e, ``dp`` (1, 3) e·Å, ``box`` (1, 3, 3) Å,
    ``stress`` (1, 3, 3) eV/Å³. The data are dedicated to the public domain (CC0 1.0).

    Args:
        root: A folder that ``tools/make_tinyqm.py`` wrote. Anything else: the sets of the package.
        level: Level of theory, see the table; ``gfn2``, ``wb97x`` and ``gfn1`` will do.
        split: Only the "train", "val" or "test" part.
        baseline: Learn the difference to the cheaper method that is stored beside the labels.
        atomref: Reference energies of elements: "fit" for least squares (None is the same), or "isolated" for free
            atoms at the same level. A network learns energies relative to fitted ones faster.
        transform: Called with each sample.

    Attributes:
        names: Name of the species of each system, (S,).
        smiles: Its SMILES, (S,), empty for crystals.
        temperature: Temperature of the dynamics a system was taken from in K, (S,), 0 where there was none.

    Raises:
        ConfigError: If there is no such level or part, or the level has no baseline or isolated atoms.
        DataError: If a file does not match its checksum.
    """

    energy_unit = "eV"
    length_unit = "Å"
    fits_reference_energies = True
    citation = "Computed for this package with tblite and PySCF; CC0 1.0."

    def __init__(
        self,
        root: str | Path | None = None,
        level: str = "GFN2-xTB",
        split: str | None = None,
        *,
        baseline: bool = False,
        atomref: str | None = None,
        transform: Callable[[Data], Data] | None = None,
    ) -> None:
        folder = _folder(root)
        levels = _levels(folder)
        name = _find_level(level, levels)
        entry = levels[name]
        stored = _read(folder, entry)
        if baseline and "baseline_energy" not in stored:
            raise ConfigError(f"baseline: {name} has none beside its labels. Leave baseline out.")
        if split is not None and split not in SPLITS:
            raise ConfigError(
                f"split: {split!r} is not a part.{did_you_mean(split, SPLITS)} Choose train, val or test."
            )
        energies = entry.get("reference_energies")
        if atomref not in (None, "isolated", "fit"):
            raise ConfigError(f"atomref: {atomref!r} is not available. Choose isolated or fit.")
        if energies is None and atomref == "isolated":
            raise ConfigError(f"atomref: {name} has no isolated atoms. Choose fit.")
        known = _reference_energies(energies, baseline) if energies and atomref == "isolated" else None

        frames, part = _frames(stored, baseline), stored["split"]
        kind, temperature = stored["kind"], stored["temperature"]
        if split is not None:
            rows = np.flatnonzero(part == SPLITS.index(split))
            frames, part, kind, temperature = frames.select(rows), part[rows], kind[rows], temperature[rows]
        super().__init__(frames, transform, reference_energies=known)
        self.level_of_theory = f"{name} minus {entry['baseline']}" if baseline else name
        self.names: np.ndarray = stored["names"][kind]
        self.smiles: np.ndarray = stored["smiles"][kind]
        self.temperature: np.ndarray = temperature
        self._part = part

    @property
    def splits(self) -> dict[str, np.ndarray] | None:
        """``idx_train``, ``idx_val`` and ``idx_test``; None where there is only one part."""
        rows = {f"idx_{name}": np.flatnonzero(self._part == number) for number, name in enumerate(SPLITS)}
        rows = {name: part for name, part in rows.items() if len(part)}
        return rows if len(rows) > 1 and "idx_train" in rows else None


def levels(root: str | Path | None = None) -> list[str]:
    """The levels of theory there are."""
    return list(_levels(_folder(root)))


def _levels(folder: Any) -> dict[str, dict[str, Any]]:
    """What the manifest says of each level."""
    manifest = parse_json((folder / "manifest.json").read_bytes(), f"{folder}: manifest.json", DataError)
    levels = manifest.get("levels") if isinstance(manifest, dict) else None
    if not isinstance(levels, dict) or not all(isinstance(entry, dict) for entry in levels.values()):
        raise DataError(f"{folder}: manifest.json has no table of levels; the file is damaged.")
    return levels


def _folder(root: str | Path | None) -> Any:
    if root is not None and (own := Path(expand(root)) / "manifest.json").is_file():
        return own.parent
    return resources.files("torchmdnet.datasets") / "embedded"


def _find_level(level: str, levels: Mapping[str, Mapping[str, Any]]) -> str:
    def simple(text: str) -> str:
        return str(text).lower().replace("ω", "w").replace(" ", "")

    for name, entry in levels.items():
        if simple(level) in {simple(alias) for alias in (name, *entry.get("aliases", ()))}:
            return name
    raise ConfigError(
        f"level: {level!r} is not available.{did_you_mean(level, levels)} Choose from {', '.join(levels)}."
    )


def _read(folder: Any, entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
    content = (folder / entry["file"]).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != entry["sha256"]:
        raise DataError(
            f"{entry['file']} is damaged: its SHA-256 is {found}, not {entry['sha256']}. Install the package again."
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {name: file[name] for name in file}


def _reference_energies(energies: Mapping[str, Mapping[str, float]], baseline: bool) -> dict[int, float]:
    table = {ATOMIC_NUMBERS[symbol]: energy for symbol, energy in energies["labels"].items()}
    if baseline:
        cheaper = {ATOMIC_NUMBERS[symbol]: energy for symbol, energy in energies["baseline"].items()}
        table = {z: energy - cheaper[z] for z, energy in table.items()}
    return table


def _frames(stored: Mapping[str, np.ndarray], baseline: bool) -> Frames:
    values = {name: _decode(stored[name], *COLUMNS[name][:2]) for name in COLUMNS if name in stored}
    if baseline:
        values["energy"] = values["energy"] - values["baseline_energy"]
        values["forces"] = values["forces"] - values["baseline_forces"]
        for name in ("dipole", "partial_charges", "stress"):
            values.pop(name, None)
    groups: dict[str, dict[str, np.ndarray]] = {"atom": {"z": stored["z"]}, "system": {}}
    for name, array in values.items():
        level, _, target = COLUMNS[name]
        if target is not None:
            groups[level][target] = array.astype(np.float32) if target in SINGLE else array
    groups["system"]["q"] = stored["charge"].astype(np.float32)
    groups["system"]["s"] = stored["unpaired"].astype(np.float32)
    ptr = np.concatenate([[0], np.cumsum(stored["counts"], dtype=np.int64)])
    return Frames(ptr, groups["atom"], groups["system"])


def _decode(array: np.ndarray, level: str, shape: tuple[int, ...]) -> np.ndarray:
    decoded = array / PLACES if array.dtype.kind == "i" else array.astype(np.float64)
    return decoded.reshape(-1, *shape)


def encode(values: np.ndarray) -> np.ndarray:
    """An array as it is packed: integers where six decimal places say everything, else as it is."""
    scaled = np.asarray(values, dtype=np.float64) * PLACES
    whole = np.round(scaled)
    if not np.array_equal(whole / PLACES, values):
        return np.asarray(values, dtype=np.float64)
    return whole.astype(np.int32 if np.abs(whole).max(initial=0) < 2**31 else np.int64)

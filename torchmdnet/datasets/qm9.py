"""QM9: equilibrium structures and properties of small organic molecules."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from torchmdnet.datasets.base import atomref_table
from torchmdnet.datasets.download import Remote, fetch, unpack, verify
from torchmdnet.datasets.files import progress
from torchmdnet.datasets.frames import Field, Frames
from torchmdnet.datasets.memdataset import Block, MemmappedDataset
from torchmdnet.datasets.sdf import read_sdf
from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.units import HARTREE_TO_EV

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["QM9"]

logger = logging.getLogger(__name__)

#: Column of the file, factor to our unit, unit; in the order of the target matrix.
_TARGETS: tuple[tuple[str, float, str], ...] = (
    ("mu", 1.0, "D"),
    ("alpha", 1.0, "Bohr^3"),
    ("homo", HARTREE_TO_EV, "eV"),
    ("lumo", HARTREE_TO_EV, "eV"),
    ("gap", HARTREE_TO_EV, "eV"),
    ("r2", 1.0, "Bohr^2"),
    ("zpve", HARTREE_TO_EV, "eV"),
    ("u0", HARTREE_TO_EV, "eV"),
    ("u298", HARTREE_TO_EV, "eV"),
    ("h298", HARTREE_TO_EV, "eV"),
    ("g298", HARTREE_TO_EV, "eV"),
    ("cv", 1.0, "cal/(mol K)"),
    ("u0_atom", 0.04336414, "eV"),
    ("u298_atom", 0.04336414, "eV"),
    ("h298_atom", 0.04336414, "eV"),
    ("g298_atom", 0.04336414, "eV"),
    ("A", 1.0, "GHz"),
    ("B", 1.0, "GHz"),
    ("C", 1.0, "GHz"),
)


class QM9(MemmappedDataset):
    """QM9: 130,831 molecules of up to 9 heavy atoms (H C N O F), relaxed, with 12 properties; one is the label.

    Samples: ``z``, ``pos`` in Å, ``y`` (1, 1) in the unit of the label. The 3,054 molecules that failed the
    consistency check of the authors are left out.

    Ruddigkeit et al., J. Chem. Inf. Model. 52, 2864 (2012), https://doi.org/10.1021/ci300415d; Ramakrishnan et al.,
    Sci. Data 1, 140022 (2014), https://doi.org/10.1038/sdata.2014.22.

    Args:
        root: Folder for the files.
        transform: Called with each sample when it is asked for; it sees all 19 targets, ``y`` (1, 19).
        label: The property to learn; one of :attr:`LABELS`.
        mirror: Folder or address with ``qm9.zip`` and ``uncharacterized.txt``, instead of their publishers.

    Raises:
        ConfigError: If the label is missing or unknown.
    """

    #: Column of the target matrix for each label.
    LABELS: ClassVar[Mapping[str, int]] = {
        "dipole_moment": 0,
        "isotropic_polarizability": 1,
        "homo": 2,
        "lumo": 3,
        "gap": 4,
        "electronic_spatial_extent": 5,
        "zpve": 6,
        "energy_U0": 7,
        "energy_U": 8,
        "enthalpy_H": 9,
        "free_energy": 10,
        "heat_capacity": 11,
    }
    #: Energies of the elements in eV, by column of the target matrix.
    ELEMENT_ENERGIES: ClassVar[Mapping[int, Mapping[int, float]]] = {
        6: dict.fromkeys((1, 6, 7, 8, 9), 0.0),
        7: {1: -13.61312172, 6: -1029.86312267, 7: -1485.30251237, 8: -2042.61123593, 9: -2713.48485589},
        8: {1: -13.5745904, 6: -1029.82456413, 7: -1485.26398105, 8: -2042.5727046, 9: -2713.44632457},
        9: {1: -13.54887564, 6: -1029.79887659, 7: -1485.2382935, 8: -2042.54701705, 9: -2713.42063702},
        10: {1: -13.90303183, 6: -1030.25891228, 7: -1485.71166277, 8: -2043.01812778, 9: -2713.88796536},
        11: dict.fromkeys((1, 6, 7, 8, 9), 0.0),
    }

    fields: ClassVar[dict[str, Field]] = {"targets": Field("system", (len(_TARGETS),), "float64")}
    length_unit = "Å"
    level_of_theory = "B3LYP/6-31G(2df,p)"
    citation = "Ramakrishnan et al., Sci. Data 1, 140022 (2014), doi:10.1038/sdata.2014.22"
    licence = "CC0"

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Data], Data] | None = None,
        label: str | None = None,
        *,
        mirror: str | None = None,
    ) -> None:
        if label is None or label not in self.LABELS:
            problem = "no property is chosen" if label is None else f"{label!r} is not available"
            hint = "" if label is None else did_you_mean(label, self.LABELS)
            raise ConfigError(f"label: {problem}.{hint} Choose from {', '.join(self.LABELS)}.")
        self.label = label
        self.label_idx = self.LABELS[label]
        #: Unit of ``y``.
        self.label_unit = _TARGETS[self.label_idx][2]
        self.energy_unit = "eV" if self.label_unit == "eV" else None
        energies = self.ELEMENT_ENERGIES.get(self.label_idx)
        self.reference_energies = None if energies is None else dict(energies)
        chosen = None if transform is None else _Choose(self.label_idx, transform)
        super().__init__(root, chosen, properties=("targets",), mirror=mirror)

    @property
    def remotes(self) -> Sequence[Remote]:
        bucket = "https://deepchemdata.s3-us-west-1.amazonaws.com/datasets/molnet_publish"
        return [
            Remote("qm9.zip", (f"{bucket}/qm9.zip",)),
            Remote("uncharacterized.txt", ("https://ndownloader.figshare.com/files/3195404",)),
        ]

    @property
    def raw_file_names(self) -> list[str]:
        if self._only_tensors:
            return ["qm9_v3.pt"]
        return ["gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt"]

    @property
    def _only_tensors(self) -> bool:
        """Whether an earlier release has left the molecules as tensors, and nothing else is there."""
        folder = Path(self.raw_dir)
        return (folder / "qm9_v3.pt").exists() and not (folder / "gdb9.sdf").exists()

    def download(self) -> None:
        if self._only_tensors:
            return
        folder, (molecules, excluded) = Path(self.raw_dir), self.remotes
        wanted = [folder / name for name in ("gdb9.sdf", "gdb9.sdf.csv")]
        if not all(path.exists() for path in wanted):
            archive = fetch(molecules, folder, what="QM9", mirror=self.mirror)
            unpack(archive, folder, [path.name for path in wanted], what="QM9")
            archive.unlink()
        for path in wanted:
            verify(path, what="QM9")
        fetch(excluded, folder, what="QM9", mirror=self.mirror)

    def blocks(self) -> Iterator[Block]:
        if self._only_tensors:
            yield from _from_tensors(Path(self.raw_dir, "qm9_v3.pt"))
            return
        molecules, table, excluded = (Path(self.raw_dir, name) for name in self.raw_file_names)
        targets, left_out = _read_targets(table), _read_numbers(excluded)
        if len(targets) == 133885 and len(left_out) != 3054:
            raise DataError(f"QM9: {excluded} lists {len(left_out)} molecules instead of 3054: it is not complete.")
        first = 0
        for block in progress(read_sdf(molecules, "QM9"), "QM9", unit="block"):
            last = first + len(block.counts)
            if last > len(targets):
                break
            keep = np.array([number not in left_out for number in range(first + 1, last + 1)])
            atoms = {name: values[np.repeat(keep, block.counts)] for name, values in block.atoms.items()}
            yield Block(block.counts[keep], atoms, {"targets": targets[first:last][keep]}, {})
            first = last
        if first != len(targets):
            raise DataError(f"QM9: {molecules} and {table.name} do not hold the same number of molecules.")

    def _open(self) -> Frames:
        frames = super()._open()
        assert isinstance(frames, Frames)
        targets = np.asarray(frames.systems["targets"])
        y = targets if self.transform is not None else np.ascontiguousarray(targets[:, self.label_idx, None])
        return Frames(frames.ptr, frames.atoms, {"y": y})

    def get_atomref(self, max_z: int = 100) -> Tensor | None:
        """Contribution of each element to the label, (max_z, 1) float32, or None for labels that are not sums."""
        return None if self.reference_energies is None else atomref_table(self.reference_energies, max_z)


class _Choose:
    """The user's transform, and then one of the targets."""

    def __init__(self, column: int, transform: Callable[[Data], Data]) -> None:
        self.column, self.transform = column, transform

    def __call__(self, sample: Data) -> Data:
        sample = self.transform(sample)
        sample["y"] = sample["y"][:, self.column, None]
        return sample


def _read_targets(path: Path) -> np.ndarray:
    """The 19 targets of each molecule in our units, (n, 19) float64."""
    try:
        with open(path) as file:
            header = [name.strip() for name in file.readline().split(",")]
            columns = [header.index(name) for name, _, _ in _TARGETS]
            values = np.loadtxt(file, delimiter=",", usecols=columns, ndmin=2)
    except ValueError as error:
        raise DataError(f"QM9: {path} does not have the expected columns ({error}).") from error
    return values * np.array([factor for _, factor, _ in _TARGETS])


def _read_numbers(path: Path) -> set[int]:
    """The numbers, from 1, of the molecules to leave out: first word of each line below nine lines of heading."""
    lines = path.read_text().splitlines()[9:]
    return {int(words[0]) for words in map(str.split, lines) if words and words[0].isdigit()}


def _from_tensors(path: Path) -> Iterator[Block]:
    """Molecules as they were distributed for use without RDKit: a list of dictionaries of tensors."""
    import torch

    logger.warning("QM9: %s holds targets in single precision. Delete it to fetch them in full.", path)
    try:
        molecules: list[dict[str, Any]] = torch.load(path, weights_only=True)
        counts = np.array([len(molecule["z"]) for molecule in molecules])
        atoms = {name: torch.cat([molecule[name] for molecule in molecules]).numpy() for name in ("z", "pos")}
        targets = torch.cat([molecule["y"] for molecule in molecules]).double().numpy()
    except Exception as error:
        raise DataError(f"QM9: {path} is not a list of dictionaries of tensors ({error}).") from error
    yield Block(counts, atoms, {"targets": targets}, {})

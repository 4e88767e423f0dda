"""Liquid water: the training set of a neural network potential for water and ice."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torchmdnet.datasets.download import Remote, fetch, unpack, verify
from torchmdnet.datasets.memdataset import Block, MemmappedDataset, conformers
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.units import BOHR_TO_ANGSTROM, HARTREE_TO_EV

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["WaterBox", "create_numpy_arrays"]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_ENERGY = re.compile(rf"TotEnergy=({_NUMBER})")
_PERIODIC = re.compile(r'pbc="([TF]) ([TF]) ([TF])"')
_LATTICE = re.compile(r'Lattice="([^"]*)"')


class WaterBox(MemmappedDataset):
    """1,593 frames of 64 water molecules in a periodic box.

    Samples: ``z``, ``pos``, ``y`` (1, 1), ``neg_dy``, ``box`` (1, 3, 3).

    The file does not say its units. The box, 23.465 wide for 64 molecules, and the energies are those of atomic
    units: Hartree, Bohr, Hartree/Bohr. By default nothing is converted, as in earlier releases; with
    ``units="eV"`` samples are in eV, Å and eV/Å.

    Cheng et al., Proc. Natl. Acad. Sci. 116, 1110 (2019), https://doi.org/10.1073/pnas.1815117116.

    Args:
        root: Folder for the files.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        units: ``"atomic"``, as in the file, or ``"eV"``.
        mirror: Where to get the file instead of from its publisher.
    """

    level_of_theory = "revPBE0-D3"
    citation = "Cheng et al., Proc. Natl. Acad. Sci. 116, 1110 (2019), doi:10.1073/pnas.1815117116"

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        *,
        units: str = "atomic",
        mirror: str | None = None,
    ) -> None:
        if units not in ("atomic", "eV"):
            raise ConfigError(f"units: {units!r} is not available. Choose from atomic, eV.")
        self.units = units
        self.energy_unit, self.length_unit = ("Hartree", "Bohr") if units == "atomic" else ("eV", "Å")
        super().__init__(root, transform, pre_transform, None, ("y", "neg_dy", "box"), mirror=mirror)

    @property
    def name(self) -> str:
        return "WaterBox" if self.units == "atomic" else f"WaterBox-{self.units}"

    @property
    def remotes(self) -> Sequence[Remote]:
        address = "https://archive.materialscloud.org/record/file?record_id=71&filename=training-set.zip"
        return [Remote("training-set.zip", (address,))]

    @property
    def raw_file_names(self) -> list[str]:
        place = "dataset_1593.xyz"
        return [place if os.path.exists(os.path.join(self.raw_dir, place)) else f"training-set/{place}"]

    def download(self) -> None:
        path = Path(self.raw_paths[0])
        if not path.exists():
            archive = fetch(self.remotes[0], self.raw_dir, what="WaterBox", mirror=self.mirror)
            unpack(archive, Path(self.raw_dir), self.raw_file_names, what="WaterBox")
        verify(path, what="WaterBox")

    def blocks(self) -> Iterator[Block]:
        energies, forces, positions, numbers, lattices = create_numpy_arrays(self.raw_paths[0])
        energy, length = (1.0, 1.0) if self.units == "atomic" else (HARTREE_TO_EV, BOHR_TO_ANGSTROM)
        yield conformers(
            numbers[:, :, 0],
            positions * length,
            y=energies * energy,
            neg_dy=forces * (energy / length),
            box=lattices.reshape(-1, 3, 3) * length,
        )


def create_numpy_arrays(
    file_path: str | os.PathLike[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read an extended XYZ file whose frames have the same number of atoms.

    Args:
        file_path: The file. Comment lines have ``TotEnergy=``, ``pbc="T T T"`` or ``"F F F"``, and ``Lattice="..."``;
            atom lines have a symbol, position, force and atomic number.

    Returns:
        Energies (n, 1), forces (n, N, 3), positions (n, N, 3), atomic numbers (n, N, 1) and lattice vectors (n, 9),
        zero without periodicity; in the units of the file.

    Raises:
        DataError: If a frame has another layout; the message has its number.
    """
    lines = Path(file_path).read_text().split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    try:
        size = int(lines[0])
    except (IndexError, ValueError) as error:
        raise DataError(f"{file_path}: the first line is not a number of atoms.") from error
    count, rest = divmod(len(lines), size + 2)
    wrong = next((i for i in range(count) if lines[i * (size + 2)].strip() != str(size)), None)
    if wrong is not None or rest:
        raise DataError(f"{file_path}: frame {count if wrong is None else wrong} is not complete with {size} atoms.")
    energies, lattices = np.zeros((count, 1)), np.zeros((count, 9))
    for i in range(count):
        energies[i], lattices[i] = _comment(lines[i * (size + 2) + 1], f"{file_path}, frame {i}")
    words = " ".join(line for i in range(count) for line in lines[i * (size + 2) + 2 : (i + 1) * (size + 2)]).split()
    try:
        table = np.array(words).reshape(count, size, 8)[:, :, 1:].astype(np.float64)
    except ValueError as error:
        raise DataError(
            f"{file_path}: every atom needs a symbol, a position, a force and an atomic number ({error})."
        ) from error
    return energies, table[:, :, 3:6], table[:, :, :3], table[:, :, 6:].astype(np.int64), lattices


def _comment(line: str, where: str) -> tuple[float, np.ndarray]:
    energy, periodic, lattice = _ENERGY.search(line), _PERIODIC.search(line), _LATTICE.search(line)
    if energy is None:
        raise DataError(f"{where}: the comment line has no TotEnergy=<number>.")
    if periodic is None or len(set(periodic.groups())) != 1:
        raise DataError(f'{where}: the comment line has neither pbc="T T T" nor pbc="F F F".')
    if periodic[1] == "F":
        return float(energy[1]), np.zeros(9)
    try:
        return float(energy[1]), np.array((lattice[1] if lattice else "").split(), dtype=np.float64).reshape(9)
    except ValueError as error:
        raise DataError(f"{where}: the comment line has no Lattice= with nine numbers.") from error

"""MACE-OFF: the training set of the MACE-OFF23 potentials for organic molecules."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar

import numpy as np

from torchmdnet.datasets.download import Remote, damaged
from torchmdnet.datasets.files import progress
from torchmdnet.datasets.memdataset import Block, MemmappedDataset
from torchmdnet.elements import ATOMIC_NUMBERS
from torchmdnet.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["MACEOFF", "parse_maceoff_tar"]

_ENERGY = re.compile(r"\benergy=([-+]?\d+\.?\d*(?:[eE][-+]?\d+)?)")
_COLUMNS = 10
_NUMBERS = {symbol.encode(): number for symbol, number in ATOMIC_NUMBERS.items()}


class MACEOFF(MemmappedDataset):
    """MACE-OFF23: about 951,000 conformers of neutral molecules of H C N O F P S Cl Br I, most of them from SPICE.

    Samples: ``z``, ``pos`` in Å, ``y`` in eV (total energies), ``neg_dy`` in eV/Å.

    Kovács et al., J. Am. Chem. Soc. 147, 17598 (2025), https://doi.org/10.1021/jacs.4c07099.

    Args:
        root: Folder for the files.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        pre_filter: Says of each sample whether to store it.
        version: One of the published versions, ``"1.0"``.
        max_gradient: Leave out conformers with the force on any atom above this, in eV/Å. None or 0: keep all.
        mirror: Where to get the file instead of from its publisher.

    Raises:
        ConfigError: If the version is unknown.
    """

    #: Address and file of each version.
    VERSIONS: ClassVar[dict[str, tuple[str, str]]] = {
        "1.0": (
            "https://api.repository.cam.ac.uk/server/api/core/bitstreams/b185b5ab-91cf-489a-9302-63bfac42824a/content",
            "train_large_neut_no_bad_clean.tar.gz",
        )
    }

    energy_unit = "eV"
    length_unit = "Å"
    level_of_theory = "ωB97M-D3(BJ)/def2-TZVPPD"
    citation = "Kovács et al., J. Am. Chem. Soc. 147, 17598 (2025), doi:10.1021/jacs.4c07099"
    fits_reference_energies = True

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        pre_filter: Callable[[Data], bool] | None = None,
        version: str = "1.0",
        max_gradient: float | None = None,
        *,
        mirror: str | None = None,
    ) -> None:
        self.version = str(version)
        if self.version not in self.VERSIONS:
            raise ConfigError(f"version: {version!r} is not published. Choose from {', '.join(self.VERSIONS)}.")
        self.max_gradient = max_gradient
        super().__init__(root, transform, pre_transform, pre_filter, ("y", "neg_dy"), mirror=mirror)

    @property
    def name(self) -> str:
        text = f"{self.version}{self.max_gradient}"
        return f"MACEOFF-{hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()}"

    @property
    def remotes(self) -> Sequence[Remote]:
        url, file = self.VERSIONS[self.version]
        return [Remote(f"maceoff/{self.version}/{file}", (url,))]

    @property
    def nothing_left(self) -> str:
        return f"no conformer is left with max_gradient={self.max_gradient!r}."

    def blocks(self) -> Iterator[Block]:
        for block in progress(_read_tar(self.raw_paths[0]), "MACEOFF", unit="block"):
            if not self.max_gradient:
                yield block
                continue
            first = np.cumsum(block.counts) - block.counts
            norms = np.linalg.norm(block.atoms["neg_dy"], axis=1)
            keep = np.maximum.reduceat(norms, first) <= self.max_gradient
            atoms = {name: values[np.repeat(keep, block.counts)] for name, values in block.atoms.items()}
            yield Block(block.counts[keep], atoms, {"y": block.systems["y"][keep]}, {})


def parse_maceoff_tar(tar_file: str | Path) -> Iterator[tuple[float, np.ndarray, np.ndarray, np.ndarray]]:
    """Read a tar archive of extended XYZ files frame by frame, without unpacking it.

    Args:
        tar_file: The archive. The first ``energy=`` of a comment line counts, and atom lines have ten columns: symbol,
            position, force and three more.

    Yields:
        Energy in eV, atomic numbers (N,), positions (N, 3) in Å, forces (N, 3) in eV/Å.

    Raises:
        DataError: If the archive is damaged or a frame has another layout.
    """
    for block in _read_tar(tar_file):
        last = np.cumsum(block.counts)
        for i, (start, stop) in enumerate(zip(last - block.counts, last, strict=True)):
            z, pos, neg_dy = (block.atoms[name][start:stop] for name in ("z", "pos", "neg_dy"))
            yield float(block.systems["y"][i]), z, pos, neg_dy


def _read_tar(path: str | Path) -> Iterator[Block]:
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isreg() else None
                if stream is not None:
                    yield from _read_frames(stream, f"{path}, {member.name}")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise damaged(path, error, "MACEOFF") from error


def _read_frames(stream: IO[bytes], where: str, at_once: int = 200_000) -> Iterator[Block]:
    """Frames of one file in blocks of about ``at_once`` atoms."""
    lines: list[bytes] = []
    counts: list[int] = []
    energies: list[float] = []
    number = 0
    for line in stream:
        if not line.strip():
            continue
        number += 1
        try:
            count = int(line)
        except ValueError as error:
            raise DataError(f"MACEOFF: {where}, frame {number}: {line!r} is not a number of atoms.") from error
        found = _ENERGY.search(next(stream, b"").decode())
        if found is None:
            raise DataError(f"MACEOFF: {where}, frame {number}: the comment line has no energy=.")
        atoms = list(islice(stream, count))
        if len(atoms) != count:
            raise DataError(f"MACEOFF: {where}, frame {number}: the file ends within the frame.")
        lines += atoms
        counts.append(count)
        energies.append(float(found[1]))
        if len(lines) >= at_once:
            yield _block(lines, counts, energies, where, number)
            lines, counts, energies = [], [], []
    if counts:
        yield _block(lines, counts, energies, where, number)


def _block(lines: list[bytes], counts: list[int], energies: list[float], where: str, number: int) -> Block:
    words = b"".join(lines).split()
    try:
        table = np.array(words).reshape(len(lines), _COLUMNS)
        z = np.array([_NUMBERS[symbol] for symbol in words[::_COLUMNS]])
        values = table[:, 1:7].astype(np.float64)
    except (KeyError, ValueError) as error:
        wrong = next((line for line in lines if len(line.split()) != _COLUMNS), None)
        reason = f"{wrong!r} does not have {_COLUMNS} columns" if wrong is not None else str(error)
        frames = f"frames {number - len(counts) + 1} to {number}"
        raise DataError(f"MACEOFF: {where}, {frames}: {reason}.") from error
    atoms = {"z": z, "pos": values[:, :3], "neg_dy": values[:, 3:]}
    return Block(np.array(counts), atoms, {"y": np.array(energies)}, {})

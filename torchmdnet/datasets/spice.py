"""SPICE: drug-like molecules, peptides and their interactions."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from torchmdnet.datasets.download import Remote
from torchmdnet.datasets.files import progress
from torchmdnet.datasets.labels import Labels, find_label
from torchmdnet.datasets.memdataset import Block, MemmappedDataset, conformers, open_hdf5
from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.units import BOHR_TO_ANGSTROM, HARTREE_TO_EV

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["SPICE", "keeps_gradient"]

logger = logging.getLogger(__name__)


class SPICE(MemmappedDataset):
    """SPICE: conformers of small molecules, dimers, dipeptides and solvated molecules; 1.1 million, in 2.0.1 2 million.

    Samples: ``z``, ``pos`` in Å, ``y`` in eV, ``neg_dy`` in eV/Å. Energies are formation energies: those of the
    isolated atoms and ions are already subtracted. With ``labels``, also ``dp`` (1, 3) in e Å, the dipole moment, and
    ``pq`` (N,) in e, MBIS charges, NaN for molecules that have none; and then ``q``, the total charge, in e.

    Eastman et al., Sci. Data 10, 11 (2023), https://doi.org/10.1038/s41597-022-01882-6; version 2: Eastman et al.,
    J. Chem. Theory Comput. 20, 8583 (2024), https://doi.org/10.1021/acs.jctc.4c00794.

    Args:
        root: Folder for the files.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        pre_filter: Says of each sample whether to store it.
        version: One of the published versions; see :attr:`VERSIONS`.
        subsets: Names of the subsets to take, such as ``"SPICE PubChem Set 1 Single Points Dataset v1.2"``.
            Default: all.
        max_gradient: Leave out conformers with the force on any atom above this, in eV/Å. None or 0: keep all.
        subsample_molecules: Take every n-th molecule of the file.
        mirror: Where to get the file instead of from its publisher.
        labels: "dipole" or "charges", or both, to store them too; training fills this in from ``properties``.

    Raises:
        ConfigError: If the version or an argument is not valid.
        DataError: If a subset does not occur, or nothing is left.
    """

    #: Folder, file and MD5 of each version.
    VERSIONS: ClassVar[dict[str, tuple[str, str, str | None]]] = {
        "1.0": ("https://github.com/openmm/spice-dataset/releases/download/1.0", "SPICE.hdf5", None),
        "1.1": ("https://github.com/openmm/spice-dataset/releases/download/1.1", "SPICE.hdf5", None),
        "1.1.1": ("https://zenodo.org/record/7258940/files", "SPICE-1.1.1.hdf5", "5411e7014c6d18ff07d108c9ad820b53"),
        "1.1.2": ("https://zenodo.org/record/7338495/files", "SPICE-1.1.2.hdf5", "a2b5ae2d1f72581040e1cceb20a79a33"),
        "1.1.3": ("https://zenodo.org/record/7606550/files", "SPICE-1.1.3.hdf5", "be93706b3bb2b2e327b690b185905856"),
        "1.1.4": ("https://zenodo.org/records/8222043/files", "SPICE-1.1.4.hdf5", "f27d4c81da0e37d6547276bf6b4ae6a1"),
        "2.0.1": ("https://zenodo.org/records/10975225/files", "SPICE-2.0.1.hdf5", "bfba2224b6540e1390a579569b475510"),
    }

    energy_unit = "eV"
    length_unit = "Å"
    level_of_theory = "ωB97M-D3(BJ)/def2-TZVPPD"
    citation = "Eastman et al., Sci. Data 10, 11 (2023), doi:10.1038/s41597-022-01882-6"
    licence = "CC0"

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        pre_filter: Callable[[Data], bool] | None = None,
        version: str = "1.1.3",
        subsets: Sequence[str] | str | None = None,
        max_gradient: float | None = None,
        subsample_molecules: int = 1,
        *,
        mirror: str | None = None,
        labels: Labels | Sequence[str] = (),
    ) -> None:
        self.version = str(version)
        if self.version not in self.VERSIONS:
            hint = did_you_mean(self.version, self.VERSIONS)
            raise ConfigError(f"version: {version!r} is not published.{hint} Choose from {', '.join(self.VERSIONS)}.")
        if subsample_molecules < 1:
            raise ConfigError(f"subsample_molecules: {subsample_molecules!r} must be 1 or more.")
        self.subsets = [subsets] if isinstance(subsets, str) else None if subsets is None else list(subsets)
        self.max_gradient = max_gradient
        self.subsample_molecules = int(subsample_molecules)
        self.further = tuple(sorted({_field_of(label) for label in labels}))
        properties = ("y", "neg_dy", *self.further, *(("q",) if self.further else ()))
        super().__init__(root, transform, pre_transform, pre_filter, properties, mirror=mirror)

    @property
    def name(self) -> str:
        text = f"{self.version}{self.subsets}{self.max_gradient}{self.subsample_molecules}"
        text += "".join(self.further)
        return f"SPICE-{hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()}"

    @property
    def remotes(self) -> Sequence[Remote]:
        folder, file, md5 = self.VERSIONS[self.version]
        return [Remote(f"spice/{self.version}/{file}", (f"{folder}/{file}",), md5 and f"md5:{md5}")]

    @property
    def nothing_left(self) -> str:
        chosen = {
            "subsets": self.subsets,
            "max_gradient": self.max_gradient,
            "subsample_molecules": self.subsample_molecules if self.subsample_molecules > 1 else None,
        }
        filters = ", ".join(f"{name}={value!r}" for name, value in chosen.items() if value)
        return f"no conformer is left{f' with {filters}' if filters else ''}."

    def _further(self, molecule: Any) -> dict[str, np.ndarray]:
        """Dipoles (n, 3), charges (n, N) and total charges (n,), as far as they were asked for."""
        if not self.further:
            return {}
        num, size = molecule["conformations"].shape[:2]
        charges, dipole = np.full((num, size), np.nan), np.full((num, 3), np.nan)
        if "mbis_charges" in molecule:
            charges = molecule["mbis_charges"][()].reshape(num, size)
        if "scf_dipole" in molecule:
            dipole = molecule["scf_dipole"][()] * BOHR_TO_ANGSTROM
        total = np.full(num, _total_charge(molecule["smiles"][()]))
        return {**{name: {"dp": dipole, "pq": charges}[name] for name in self.further}, "q": total}

    def blocks(self) -> Iterator[Block]:
        seen: set[str] = set()
        with open_hdf5(self.raw_paths[0], "SPICE") as file:
            molecules = progress(file.items(), f"SPICE {self.version}", len(file), "molecule")
            for number, (name, molecule) in enumerate(molecules):
                if self.subsets is not None:
                    subset = np.ravel(molecule["subset"][()])[0].decode()
                    seen.add(subset)
                    if subset not in self.subsets:
                        continue
                if number % self.subsample_molecules:
                    continue
                pos = molecule["conformations"][()] * BOHR_TO_ANGSTROM
                if pos.ndim != 3:
                    logger.warning("SPICE: %s is left out: its positions have shape %s.", name, pos.shape)
                    continue
                y = molecule["formation_energy"][()] * HARTREE_TO_EV
                neg_dy = -molecule["dft_total_gradient"][()] * HARTREE_TO_EV / BOHR_TO_ANGSTROM
                keep = keeps_gradient(neg_dy, self.max_gradient)
                yield conformers(
                    molecule["atomic_numbers"][()],
                    pos[keep],
                    y=y[keep],
                    neg_dy=neg_dy[keep],
                    **{name: values[keep] for name, values in self._further(molecule).items()},
                    notes={"mol_id": [name] * int(keep.sum())},
                )
        for wanted in self.subsets or ():
            if wanted not in seen:
                raise DataError(
                    f"subsets: SPICE {self.version} has no {wanted!r}.{did_you_mean(wanted, seen)} "
                    f"Choose from {', '.join(repr(subset) for subset in sorted(seen))}."
                )


def _total_charge(smiles: Any) -> int:
    """The sum of the formal charges that a SMILES text writes: ``[O-]``, ``[NH3+]``, ``[Ca+2]``, ``[Fe+++]``."""
    text = np.ravel(smiles)[0]
    text = text.decode() if isinstance(text, bytes) else str(text)
    total = 0
    for sign, repeats, number in re.findall(r"\[[^\]]*?([+-])(\1*)(\d*)(?::\d+)?\]", text):
        total += (1 if sign == "+" else -1) * (int(number) if number else 1 + len(repeats))
    return total


def _field_of(label: str) -> str:
    field = find_label(label, ("dp", "pq"))
    if field is None:
        raise ConfigError(
            f"labels: SPICE has no {label!r} to learn.{did_you_mean(label, ('dipole', 'charges'))} It has dipole and "
            "charges."
        )
    return field


def keeps_gradient(neg_dy: np.ndarray, limit: float | None) -> np.ndarray:
    """Which conformers, (n,), have no force on an atom above a limit: forces (n, N, 3) in the unit of the limit."""
    if not limit:
        return np.ones(len(neg_dy), dtype=bool)
    return (np.linalg.norm(neg_dy, axis=2) <= limit).all(axis=1)

"""Torsion scans of fragments of drugs, from Genentech."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from torchmdnet.datasets.download import Remote, fetch, unpack, verify
from torchmdnet.datasets.memdataset import Block, MemmappedDataset
from torchmdnet.datasets.sdf import read_sdf
from torchmdnet.errors import DataError, did_you_mean
from torchmdnet.units import KCAL_MOL_TO_EV

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["GenentechTorsions"]

logger = logging.getLogger(__name__)


class GenentechTorsions(MemmappedDataset):
    """Scans of 62 torsions, relaxed in the gas phase, with several methods; one of them gives the label.

    Samples: ``z``, ``pos`` in Å, ``y`` in eV, relative to the minimum of the scan.

    Sellers, James and Gobbi, J. Chem. Inf. Model. 57, 1265 (2017), https://doi.org/10.1021/acs.jcim.6b00614.

    Args:
        root: Folder for the files.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        pre_filter: Says of each sample whether to store it.
        paths: Not used.
        theory: Which records to take: the value of their item ``MinMethod``.
        energy_field: The item with the energy, in kcal/mol.
        mirror: Where to get the file instead of from its publisher.

    Raises:
        DataError: If there is no record of this theory, or one lacks the energy.
    """

    KCALMOL_TO_EV: ClassVar[float] = KCAL_MOL_TO_EV

    energy_unit = "eV"
    length_unit = "Å"
    citation = "Sellers, James, Gobbi, J. Chem. Inf. Model. 57, 1265 (2017), doi:10.1021/acs.jcim.6b00614"

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        pre_filter: Callable[[Data], bool] | None = None,
        paths: str | Sequence[str] | None = None,
        theory: str = "CCSD_T_CBS_MP2",
        energy_field: str = "deltaE",
        *,
        mirror: str | None = None,
    ) -> None:
        if paths is not None:
            logger.warning("GenentechTorsions: paths=%r is not used; mirror= takes a local file.", paths)
        self.theory, self.energy_field = theory, energy_field
        self.level_of_theory = "CCSD(T)/CBS" if theory == "CCSD_T_CBS_MP2" else theory
        super().__init__(root, transform, pre_transform, pre_filter, ("y",), mirror=mirror)

    @property
    def name(self) -> str:
        text = f"{self.theory} {self.energy_field}"
        return f"GenentechTorsions-{hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()}"

    @property
    def remotes(self) -> Sequence[Remote]:
        place = "https://github.com/Acellera/sellers/raw/main"
        return [Remote("ci6b00614_si_002.zip", (f"{place}/ci6b00614_si_002.zip",))]

    @property
    def raw_file_names(self) -> list[str]:
        return ["QM_MM_Gas_Phase_Torsion_Scan_Individual_Results_with_CCSD_T_CBS_baseline.sdf"]

    def download(self) -> None:
        path = Path(self.raw_paths[0])
        if not path.exists():
            archive = fetch(self.remotes[0], self.raw_dir, what="GenentechTorsions", mirror=self.mirror)
            unpack(archive, Path(self.raw_dir), self.raw_file_names, what="GenentechTorsions")
        verify(path, what="GenentechTorsions")

    def blocks(self) -> Iterator[Block]:
        path, seen, first = self.raw_paths[0], set(), 0
        for block in read_sdf(path, "GenentechTorsions"):
            items = block.notes["items"]
            methods = [item.get("MinMethod", "") for item in items]
            seen.update(methods)
            keep = np.array([method == self.theory for method in methods])
            chosen = np.flatnonzero(keep).tolist()
            atoms = {name: values[np.repeat(keep, block.counts)] for name, values in block.atoms.items()}
            y = [self._energy(items[i], f"{path}, record {first + i + 1}") for i in chosen]
            notes = {
                "mol_id": [int(items[i]["Number"]) if items[i].get("Number", "").isdigit() else None for i in chosen],
                "scan_atoms": [[int(word) for word in items[i].get("ScanAtoms_1", "").split()] for i in chosen],
            }
            yield Block(block.counts[keep], atoms, {"y": np.array(y, dtype=np.float64)}, notes)
            first += len(items)
        if self.theory not in seen:
            raise DataError(
                f"theory: GenentechTorsions has no {self.theory!r}.{did_you_mean(self.theory, seen)} "
                f"Choose from {', '.join(sorted(seen))}."
            )

    def _energy(self, items: dict[str, str], where: str) -> float:
        try:
            return float(items[self.energy_field]) * KCAL_MOL_TO_EV
        except KeyError as error:
            hint = did_you_mean(self.energy_field, items)
            raise DataError(
                f"energy_field: {where} has no item {self.energy_field!r}.{hint} It has {', '.join(items)}."
            ) from error
        except ValueError as error:
            raise DataError(f"energy_field: {where}: {items[self.energy_field]!r} is not a number.") from error

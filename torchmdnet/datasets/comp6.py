"""COMP6: benchmarks for potentials of organic molecules, meant for testing, not for training.

Energies are total energies in eV and forces are in eV/Å. The element energies of the first version are those of
isolated atoms, as for :class:`~torchmdnet.datasets.ani.ANI1`; those of the second version come from the regression
over ANI-2x. ANI-1x has the level of theory of COMP6v1 but another table, by up to 6.9 eV per atom: a model trained
with ANI-1x is to be tested with the table of ANI-1x.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torchmdnet.datasets.ani import ANI1, ANIBase, BySizeBase, element_numbers
from torchmdnet.datasets.download import Remote
from torchmdnet.datasets.files import progress
from torchmdnet.datasets.frames import Frames, JoinedFrames
from torchmdnet.datasets.labels import Labels
from torchmdnet.datasets.memdataset import Block, NothingLeft, conformers, open_hdf5
from torchmdnet.units import HARTREE_TO_EV

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = [
    "ANIMD",
    "S66X8",
    "COMP6Base",
    "COMP6v1",
    "COMP6v2",
    "DrugBank",
    "GDB07to09",
    "GDB10to13",
    "Tripeptides",
]


class COMP6Base(ANIBase):
    """What the parts of COMP6v1 share: one molecule a group, with several conformers.

    The files call gradients ``forces``; samples have forces.

    Samples: ``z``, ``pos``, ``y``, ``neg_dy``. With ``labels``, also ``pq`` (N,) in e, CM5 charges.

    Smith et al., J. Chem. Phys. 148, 241733 (2018), https://doi.org/10.1063/1.5023802.

    Args:
        root: Folder for the files.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        pre_filter: Says of each sample whether to store it.
        mirror: Where to get the files instead of from their publisher.
        labels: "charges", to store them too; training fills this in from ``properties``.
    """

    citation = "Smith et al., J. Chem. Phys. 148, 241733 (2018), doi:10.1063/1.5023802"
    licence = "MIT"

    #: Folder at the publisher, and the files in it.
    folder: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    _ELEMENT_ENERGIES: ClassVar[dict[int, float]] = ANI1._ELEMENT_ENERGIES
    FURTHER: ClassVar[dict[str, str]] = {"pq": "cm5"}  # the last column is their sum

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        pre_filter: Callable[[Data], bool] | None = None,
        *,
        mirror: str | None = None,
        labels: Labels | Sequence[str] = (),
    ) -> None:
        self.labels = tuple(labels)
        super().__init__(root, transform, pre_transform, pre_filter, ("y", "neg_dy"), mirror=mirror, labels=labels)

    @property
    def remotes(self) -> Sequence[Remote]:
        place = f"https://raw.githubusercontent.com/isayev/COMP6/master/COMP6v1/{self.folder}"
        return [Remote(file, (f"{place}/{file}",)) for file in self.files]

    def blocks(self) -> Iterator[Block]:
        for path in self.raw_paths:
            with open_hdf5(path, type(self).__name__) as file:
                for group in file.values():
                    for name, molecule in progress(group.items(), os.path.basename(path), len(group), "molecule"):
                        y = molecule["energies"][()] * HARTREE_TO_EV
                        yield conformers(
                            element_numbers(molecule["species"][()], path),
                            molecule["coordinates"][()],
                            y=y,
                            neg_dy=-molecule["forces"][()] * HARTREE_TO_EV,
                            **self._further(molecule),
                            notes={"mol_id": [f"{os.path.basename(path)}_{name}"] * len(y)},
                        )


class ANIMD(COMP6Base):
    """ANI-MD: 1,791 frames of molecular dynamics of 14 drugs and 2 small proteins."""

    folder = "ANI-MD"
    files = ("ani_md_bench.h5",)


class DrugBank(COMP6Base):
    """DrugBank: 13,379 conformers of 837 drugs."""

    folder = "DrugBank"
    files = ("drugbank_testset.h5",)


class GDB07to09(COMP6Base):
    """GDB 7 to 9: 36,000 conformers of 1,500 molecules with 7 to 9 heavy atoms."""

    folder = "GDB07to09"
    files = ("gdb11_07_test500.h5", "gdb11_08_test500.h5", "gdb11_09_test500.h5")


class GDB10to13(COMP6Base):
    """GDB 10 to 13: 47,670 conformers of 3,000 molecules with 10 to 13 heavy atoms."""

    folder = "GDB10to13"
    files = ("gdb11_10_test500.h5", "gdb11_11_test500.h5", "gdb13_12_test1000.h5", "gdb13_13_test1000.h5")


class Tripeptides(COMP6Base):
    """Tripeptides: 1,984 conformers of 248 tripeptides."""

    folder = "Tripeptides"
    files = ("tripeptide_full.h5",)


class S66X8(COMP6Base):
    """S66x8: 66 dimers at 8 distances each, 528 structures."""

    folder = "s66x8"
    files = ("s66x8_wb97x6-31gd.h5",)


class COMP6v1(COMP6Base):
    """The six parts of COMP6v1 in a row: 101,352 conformers, in the order of :attr:`PARTS`.

    Smith et al., J. Chem. Phys. 148, 241733 (2018), https://doi.org/10.1063/1.5023802.

    Args:
        root: Folder for the files.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        pre_filter: Says of each sample whether to store it.
        mirror: Where to get the files instead of from their publisher.
        labels: "charges", to store them too; training fills this in from ``properties``.
    """

    PARTS: ClassVar[tuple[type[COMP6Base], ...]] = (ANIMD, DrugBank, GDB07to09, GDB10to13, Tripeptides, S66X8)
    files = ()
    folder = ""

    def _problem(self) -> str | None:
        return None  # each part looks after its own arrays

    def _open(self) -> Frames | JoinedFrames:
        self.subsets: list[COMP6Base] = []
        for part in self.PARTS:
            try:
                subset = part(
                    self.root, None, self.pre_transform, self.pre_filter, mirror=self.mirror, labels=self.labels
                )
            except NothingLeft:
                continue
            self.subsets.append(subset)
        if not self.subsets:
            raise NothingLeft(f"COMP6v1: {self.nothing_left}")
        return JoinedFrames([subset.frames for subset in self.subsets if isinstance(subset.frames, Frames)])

    def sample_iter(self, mol_ids: bool = False) -> Iterator[Data]:
        """The samples of all parts; see :meth:`MemmappedDataset.sample_iter`."""
        for subset in self.subsets:
            yield from subset.sample_iter(mol_ids)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "subsets"}


class COMP6v2(BySizeBase):
    """COMP6v2: conformers of molecules of H C N O F S Cl, the successor of COMP6v1.

    Samples: ``z``, ``pos``, ``y``, ``neg_dy``. With ``labels``, also ``pq`` (N,) in e, CM5 charges.

    Devereux et al., J. Chem. Theory Comput. 16, 4192 (2020), https://doi.org/10.1021/acs.jctc.0c00121.

    Args:
        root: Folder for the files.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        pre_filter: Says of each sample whether to store it.
        properties: Labels to store.
        mirror: Where to get the file instead of from its publisher.
        labels: "charges", to store them too; training fills this in from its ``properties``.
    """

    FURTHER: ClassVar[dict[str, str]] = {"pq": "cm5_atomic_charges"}
    citation = "Devereux et al., J. Chem. Theory Comput. 16, 4192 (2020), doi:10.1021/acs.jctc.0c00121"

    @property
    def remotes(self) -> Sequence[Remote]:
        return [
            Remote(
                "COMP6v2_wB97X-631Gd.tar.gz",
                ("https://zenodo.org/records/10126157/files/COMP6v2_wB97X-631Gd.tar.gz",),
                "md5:0a417148966022e72f54c135d8f3d4e7",
            )
        ]

    @property
    def raw_file_names(self) -> list[str]:
        return ["comp6v2_final_h5/COMP6v2_wB97X-631Gd.h5"]

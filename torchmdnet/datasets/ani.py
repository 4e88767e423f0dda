"""The ANI data sets: small organic molecules far from and near equilibrium.

All energies are total energies in eV and forces are in eV/Å. ``get_atomref`` gives the energies of the elements: of
isolated atoms for ANI-1, from a linear regression over the set for the others. The two kinds differ by several eV per
atom, so a model must be used with the table it was trained with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from torchmdnet.datasets.base import atomref_table
from torchmdnet.datasets.download import Remote, fetch, unpack, verify
from torchmdnet.datasets.files import progress
from torchmdnet.datasets.labels import Labels, find_label
from torchmdnet.datasets.memdataset import Block, MemmappedDataset, conformers, open_hdf5, rows
from torchmdnet.elements import atomic_number
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.units import HARTREE_TO_EV

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["ANI1", "ANI1CCX", "ANI1X", "ANI2X", "ANI1XBase", "ANIBase"]


class ANIBase(MemmappedDataset):
    """What the ANI sets share: Hartree in the file, eV in the samples, and a table of element energies.

    Args:
        root: Folder for the files.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        pre_filter: Says of each sample whether to store it.
        properties: Labels to store.
        mirror: Where to get the files instead of from their publisher.
        labels: "dipole" or "charges", or both, to store them too, where the files have them; training fills this in
            from its ``properties``.
    """

    HARTREE_TO_EV: ClassVar[float] = HARTREE_TO_EV
    #: Names in the files of what can be stored beside energies and forces, by the name in a sample; in Å and e.
    FURTHER: ClassVar[dict[str, str]] = {}
    #: Energy of each element in Hartree.
    _ELEMENT_ENERGIES: ClassVar[dict[int, float]] = {}

    energy_unit = "eV"
    length_unit = "Å"
    level_of_theory = "ωB97X/6-31G(d)"

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        pre_filter: Callable[[Data], bool] | None = None,
        properties: Sequence[str] = ("y", "neg_dy"),
        *,
        mirror: str | None = None,
        labels: Labels | Sequence[str] = (),
    ) -> None:
        self.reference_energies = {z: energy * HARTREE_TO_EV for z, energy in self._ELEMENT_ENERGIES.items()}
        further = [self._field_of(label) for label in labels]
        chosen = tuple(dict.fromkeys([*properties, *sorted(further)]))
        super().__init__(root, transform, pre_transform, pre_filter, chosen, mirror=mirror)

    @classmethod
    def _field_of(cls, label: str) -> str:
        field = find_label(label, cls.FURTHER)
        if field is None:
            names = {"dp": "dipole", "pq": "charges"}
            offered = " and ".join(names[name] for name in cls.FURTHER) or "nothing beside energies and forces"
            raise ConfigError(f"labels: {cls.__name__} has no {label!r} to learn. It has {offered}.")
        return field

    def _further(self, molecule: Any, rows: slice | np.ndarray = slice(None)) -> dict[str, np.ndarray]:
        """Dipoles (n, 3) and charges (n, N) of some conformers, as far as they are wanted; NaN where there are none."""
        num, size = molecule["coordinates"].shape[:2]
        found: dict[str, np.ndarray] = {}
        for field, key in self.FURTHER.items():
            if field not in self.properties:
                continue
            width = 3 if field == "dp" else size
            values = molecule[key][()] if key in molecule else np.full((num, width), np.nan)
            values = values.reshape(num, -1)[rows, :width]
            if field == "pq" and size > 1:  # charges that were not computed are zeros in the files
                values = np.where((values == 0).all(axis=1, keepdims=True), np.nan, values)
            found[field] = values
        return found

    def get_atomref(self, max_z: int = 100) -> Tensor:
        """Energy of each element in eV, (max_z, 1) float32, zero for elements that the set does not have."""
        return atomref_table(self.reference_energies or {}, max_z)

    def _archive(self, remote: Remote, keep: bool = True) -> None:
        """Fetch an archive and unpack the raw files; those that are there are compared with their checksums."""
        name = type(self).__name__
        if not all(os.path.exists(path) for path in self.raw_paths):
            archive = fetch(remote, self.raw_dir, what=name, mirror=self.mirror)
            unpack(archive, Path(self.raw_dir), self.raw_file_names, what=name)
            if not keep:
                archive.unlink()
        for path in self.raw_paths:
            verify(Path(path), what=name)


class ANI1(ANIBase):
    """ANI-1: 22 million conformers of 57,462 molecules of H C N O with up to 8 heavy atoms, along normal modes.

    Samples: ``z``, ``pos``, ``y``.

    Smith, Isayev and Roitberg, Sci. Data 4, 170193 (2017), https://doi.org/10.1038/sdata.2017.193.
    """

    citation = "Smith, Isayev, Roitberg, Sci. Data 4, 170193 (2017), doi:10.1038/sdata.2017.193"

    _ELEMENT_ENERGIES: ClassVar[dict[int, float]] = {
        1: -0.500607632585,
        6: -37.8302333826,
        7: -54.5680045287,
        8: -75.0362229210,
    }

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        pre_filter: Callable[[Data], bool] | None = None,
        *,
        mirror: str | None = None,
    ) -> None:
        super().__init__(root, transform, pre_transform, pre_filter, ("y",), mirror=mirror)

    @property
    def remotes(self) -> Sequence[Remote]:
        return [Remote("ANI1_release.tar.gz", ("https://ndownloader.figshare.com/files/9057631",))]

    @property
    def raw_file_names(self) -> list[str]:
        return [f"ANI-1_release/ani_gdb_s{number:02d}.h5" for number in range(1, 9)]

    def download(self) -> None:
        self._archive(self.remotes[0], keep=False)

    def blocks(self) -> Iterator[Block]:
        for path in self.raw_paths:
            with open_hdf5(path, "ANI1") as file:
                for group in file.values():
                    for name, molecule in progress(group.items(), os.path.basename(path), len(group), "molecule"):
                        z = element_numbers(molecule["species"][()], path)
                        for part in rows(len(molecule["energies"])):
                            y = molecule["energies"][part]
                            notes = {"mol_id": [name] * len(y)}
                            yield conformers(z, molecule["coordinates"][part], y=y * HARTREE_TO_EV, notes=notes)


class ANI1XBase(ANIBase):
    """What ANI-1x and ANI-1ccx share: one file with the labels of several methods, NaN where one was not applied.

    Smith et al., Sci. Data 7, 134 (2020), https://doi.org/10.1038/s41597-020-0473-z.
    """

    citation = "Smith et al., Sci. Data 7, 134 (2020), doi:10.1038/s41597-020-0473-z"
    licence = "CC0"

    #: Names of the labels in the file.
    energy_key: ClassVar[str]
    forces_key: ClassVar[str | None] = None

    @property
    def remotes(self) -> Sequence[Remote]:
        checksum = "sha256:fe0ba06198ee72cf1003deebab2652097f6ab518337784dc811fa7da0c3bf5ac"
        return [Remote("ani1x-release.h5", ("https://figshare.com/ndownloader/files/18112775",), checksum)]

    def blocks(self) -> Iterator[Block]:
        with open_hdf5(self.raw_paths[0], type(self).__name__) as file:
            for name, molecule in progress(file.items(), type(self).__name__, len(file), "molecule"):
                y = molecule[self.energy_key][()] * HARTREE_TO_EV
                forces = molecule[self.forces_key][()] * HARTREE_TO_EV if self.forces_key else None
                valid = np.isfinite(y)
                if forces is not None:
                    valid &= np.isfinite(forces).all(axis=(1, 2))
                yield conformers(
                    molecule["atomic_numbers"][()],
                    molecule["coordinates"][()][valid],
                    y=y[valid],
                    neg_dy=None if forces is None else forces[valid],
                    **self._further(molecule, valid),
                    notes={"mol_id": [name] * int(valid.sum())},
                )


class ANI1X(ANI1XBase):
    """ANI-1x: 4,956,005 conformers of organic molecules (H C N O), chosen by active learning.

    Samples: ``z``, ``pos``, ``y``, ``neg_dy``. With ``labels``, also ``dp`` (1, 3) in e Å, the dipole moment, and
    ``pq`` (N,) in e, CM5 charges; many conformers have only one of the two, or none, and NaN in its place.

    Smith et al., J. Chem. Phys. 148, 241733 (2018), https://doi.org/10.1063/1.5023802; the data are described in
    Sci. Data 7, 134 (2020), https://doi.org/10.1038/s41597-020-0473-z.
    """

    energy_key = "wb97x_dz.energy"
    forces_key = "wb97x_dz.forces"
    FURTHER: ClassVar[dict[str, str]] = {"dp": "wb97x_dz.dipole", "pq": "wb97x_dz.cm5_charges"}

    _ELEMENT_ENERGIES: ClassVar[dict[int, float]] = {
        1: -0.60095298000,
        6: -38.08316124000,
        7: -54.70775770000,
        8: -75.19446356000,
    }


class ANI1CCX(ANI1XBase):
    """ANI-1ccx: 489,571 conformers of ANI-1x with coupled-cluster energies at the complete basis set limit.

    Samples: ``z``, ``pos``, ``y``.

    Smith et al., Nat. Commun. 10, 2903 (2019), https://doi.org/10.1038/s41467-019-10827-4.
    """

    level_of_theory = "CCSD(T)*/CBS"
    citation = "Smith et al., Nat. Commun. 10, 2903 (2019), doi:10.1038/s41467-019-10827-4"
    energy_key = "ccsd(t)_cbs.energy"

    _ELEMENT_ENERGIES: ClassVar[dict[int, float]] = {
        1: -0.5991501324919538,
        6: -38.03750806057356,
        7: -54.67448347695333,
        8: -75.16043537275567,
    }

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        pre_filter: Callable[[Data], bool] | None = None,
        *,
        mirror: str | None = None,
    ) -> None:
        super().__init__(root, transform, pre_transform, pre_filter, ("y",), mirror=mirror)


class BySizeBase(ANIBase):
    """The layout of ANI-2x and COMP6v2: one group for each number of atoms, with molecules of all kinds."""

    _ELEMENT_ENERGIES: ClassVar[dict[int, float]] = {
        1: -0.5978583943827134,
        6: -38.08933878049795,
        7: -54.711968298621066,
        8: -75.19106774742086,
        9: -99.80348506781634,
        16: -398.1577125334925,
        17: -460.1681939421027,
    }

    def download(self) -> None:
        self._archive(self.remotes[0])

    def blocks(self) -> Iterator[Block]:
        with open_hdf5(self.raw_paths[0], type(self).__name__) as file:
            parts = [(name, part) for name, group in file.items() for part in rows(len(group["energies"]))]
            for name, part in progress(parts, type(self).__name__, len(parts), "part"):
                group = file[name]
                yield conformers(
                    group["species"][part],
                    group["coordinates"][part],
                    y=group["energies"][part] * HARTREE_TO_EV,
                    neg_dy=group["forces"][part] * HARTREE_TO_EV,
                    **self._further(group, part),
                    notes={"mol_id": [f"{name}_{i}" for i in range(part.start, part.stop)]},
                )


class ANI2X(BySizeBase):
    """ANI-2x: about 9 million conformers of molecules of H C N O F S Cl.

    Samples: ``z``, ``pos``, ``y``, ``neg_dy``.

    Devereux et al., J. Chem. Theory Comput. 16, 4192 (2020), https://doi.org/10.1021/acs.jctc.0c00121.
    """

    citation = "Devereux et al., J. Chem. Theory Comput. 16, 4192 (2020), doi:10.1021/acs.jctc.0c00121"

    @property
    def remotes(self) -> Sequence[Remote]:
        return [
            Remote(
                "ANI-2x-wB97X-631Gd.tar.gz",
                ("https://zenodo.org/records/10108942/files/ANI-2x-wB97X-631Gd.tar.gz",),
                "md5:cb1d9effb3d07fc1cc6ced7cd0b1e1f2",
            )
        ]

    @property
    def raw_file_names(self) -> list[str]:
        return ["final_h5/ANI-2x-wB97X-631Gd.h5"]


def element_numbers(species: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
    """Atomic numbers of element symbols given as bytes, (N,)."""
    symbols = [symbol.decode() if isinstance(symbol, bytes) else str(symbol) for symbol in species.tolist()]
    try:
        return np.array([atomic_number(symbol) for symbol in symbols])
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]!r} is not an element.") from error

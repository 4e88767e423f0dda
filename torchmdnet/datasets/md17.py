"""MD17: molecular dynamics of single molecules, also in the revised and the coupled-cluster version."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from torchmdnet.datasets.download import Remote, damaged, fetch, unpack, verify
from torchmdnet.datasets.memdataset import Block, MemmappedDataset, conformers, rows
from torchmdnet.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["MD17", "Trajectory", "gdml", "read_npz"]


class Trajectory(MemmappedDataset):
    """Frames of one molecule from an ``.npz`` file; what MD17 and MD22 share.

    Samples: ``z``, ``pos`` in Å, ``y`` (1, 1) in kcal/mol, ``neg_dy`` in kcal/mol/Å.

    Args:
        root: Folder for the files.
        molecules: The molecule.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        pre_filter: Says of each sample whether to store it.
        mirror: Where to get the file instead of from its publisher.
    """

    #: File of each molecule.
    file_names: ClassVar[Mapping[str, str]]

    energy_unit = "kcal/mol"
    length_unit = "Å"

    def __init__(
        self,
        root: str | os.PathLike[str],
        molecules: str,
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        pre_filter: Callable[[Data], bool] | None = None,
        *,
        mirror: str | None = None,
    ) -> None:
        if molecules not in self.file_names:
            raise ConfigError(
                f"molecules: {type(self).__name__} has no {molecules!r}.{did_you_mean(molecules, self.file_names)} "
                f"Choose from {', '.join(self.file_names)}."
            )
        self.molecules = molecules
        super().__init__(root, transform, pre_transform, pre_filter, ("y", "neg_dy"), mirror=mirror)

    @property
    def name(self) -> str:
        return "data"

    @property
    def raw_dir(self) -> str:
        return os.path.join(self.root, self.molecules, "raw")

    @property
    def processed_dir(self) -> str:
        return os.path.join(self.root, "processed", self.molecules)

    @property
    def remotes(self) -> Sequence[Remote]:
        return [gdml(self.file_names[self.molecules])]

    def blocks(self) -> Iterator[Block]:
        z, pos, y, neg_dy = read_npz(self.raw_paths[0], type(self).__name__)
        for part in rows(len(pos)):
            yield conformers(z, pos[part], y=y[part], neg_dy=neg_dy[part])

    def mean(self) -> float:
        """Mean energy in :attr:`energy_unit`."""
        return float(np.mean(self.frames["y"]))

    def std(self) -> float:
        """Standard deviation of the energy in :attr:`energy_unit` (unbiased)."""
        return float(np.std(self.frames["y"], ddof=1))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)}, molecules={self.molecules!r})"


class MD17(Trajectory):
    """MD17: up to a million frames of one small molecule, with energies and forces.

    Three versions lie side by side under one list of names:

    - ``benzene`` ... ``azobenzene``: DFT at the level of PBE with van der Waals correction (TS); Chmiela et al.,
      Sci. Adv. 3, e1603015 (2017), https://doi.org/10.1126/sciadv.1603015;
    - ``revised_benzene`` ...: the same frames, thinned to 100,000 and computed again with PBE/def2-SVP on tight
      grids; Christensen and von Lilienfeld, https://doi.org/10.1088/2632-2153/abba6f. :attr:`splits` gives the
      first of the published splits;
    - ``aspirin_CCSD``, ``ethanol_CCSD_T`` ...: coupled cluster, with separate frames for training and testing;
      Chmiela et al., Nat. Commun. 9, 3887 (2018), https://doi.org/10.1038/s41467-018-06169-2.

    Samples: ``z``, ``pos`` in Å, ``y`` (1, 1) in kcal/mol, ``neg_dy`` in kcal/mol/Å. Energies keep double precision:
    near -400,000 kcal/mol single precision has steps of 0.03.

    Args:
        root: Folder for the files.
        molecules: One of :attr:`file_names`.
        train: For the coupled-cluster sets, the training or the test frames.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        pre_filter: Says of each sample whether to store it.
        mirror: Where to get the file instead of from its publisher.

    Raises:
        ConfigError: If the molecule is unknown, or ``train`` does not suit it.
    """

    file_names: ClassVar[Mapping[str, str]] = {
        "benzene": "md17_benzene2017.npz",
        "uracil": "md17_uracil.npz",
        "naphtalene": "md17_naphthalene.npz",
        "aspirin": "md17_aspirin.npz",
        "salicylic_acid": "md17_salicylic.npz",
        "malonaldehyde": "md17_malonaldehyde.npz",
        "ethanol": "md17_ethanol.npz",
        "toluene": "md17_toluene.npz",
        "paracetamol": "paracetamol_dft.npz",
        "azobenzene": "azobenzene_dft.npz",
        "revised_benzene": "rmd17_benzene.npz",
        "revised_uracil": "rmd17_uracil.npz",
        "revised_naphthalene": "rmd17_naphthalene.npz",
        "revised_aspirin": "rmd17_aspirin.npz",
        "revised_salicylic_acid": "rmd17_salicylic.npz",
        "revised_malonaldehyde": "rmd17_malonaldehyde.npz",
        "revised_ethanol": "rmd17_ethanol.npz",
        "revised_toluene": "rmd17_toluene.npz",
        "revised_paracetamol": "rmd17_paracetamol.npz",
        "revised_azobenzene": "rmd17_azobenzene.npz",
        "benzene_CCSD_T": "benzene_ccsd_t.zip",
        "aspirin_CCSD": "aspirin_ccsd.zip",
        "malonaldehyde_CCSD_T": "malonaldehyde_ccsd_t.zip",
        "ethanol_CCSD_T": "ethanol_ccsd_t.zip",
        "toluene_CCSD_T": "toluene_ccsd_t.zip",
        "benzene_FHI-aims": "benzene2018_dft.npz",
    }

    def __init__(
        self,
        root: str | os.PathLike[str],
        molecules: str,
        train: bool | None = None,
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        pre_filter: Callable[[Data], bool] | None = None,
        *,
        mirror: str | None = None,
    ) -> None:
        self.is_revised = molecules.startswith("revised_")
        self.is_coupled_cluster = "_CCSD" in molecules
        if molecules in self.file_names and self.is_coupled_cluster != (train is not None):
            raise ConfigError(
                f"train: {molecules!r} has separate frames for training and testing. Choose True or False."
                if self.is_coupled_cluster
                else f"train: {molecules!r} is not divided. Leave it out, and set train_size and test_size instead."
            )
        self.train = train
        if self.is_revised:
            self.level_of_theory = "PBE/def2-SVP"
            self.citation = "Christensen, von Lilienfeld, Mach. Learn.: Sci. Technol. 1, 045018 (2020), "
            self.citation += "doi:10.1088/2632-2153/abba6f"
            self.licence = "CC0"
        elif self.is_coupled_cluster:
            method = "CCSD(T)" if molecules.endswith("_T") else "CCSD"
            self.level_of_theory = f"{method}/{'cc-pVTZ' if molecules.startswith('ethanol') else 'cc-pVDZ'}"
            self.citation = "Chmiela et al., Nat. Commun. 9, 3887 (2018), doi:10.1038/s41467-018-06169-2"
        else:
            self.level_of_theory = "PBE+TS"
            self.citation = "Chmiela et al., Sci. Adv. 3, e1603015 (2017), doi:10.1126/sciadv.1603015"
        super().__init__(root, molecules, transform, pre_transform, pre_filter, mirror=mirror)

    @property
    def name(self) -> str:
        return "data" if self.train is None else "train" if self.train else "test"

    @property
    def raw_dir(self) -> str:
        return os.path.join(self.root, "raw") if self.is_revised else super().raw_dir

    @property
    def remotes(self) -> Sequence[Remote]:
        if self.is_revised:
            address = "https://archive.materialscloud.org/record/file?filename=rmd17.tar.bz2&record_id=466"
            return [Remote("rmd17.tar.bz2", (address,))]
        return super().remotes

    @property
    def raw_file_names(self) -> list[str]:
        file = self.file_names[self.molecules]
        if self.is_revised:
            return [f"rmd17/npz_data/{file}"]
        if self.is_coupled_cluster:
            return [f"{file.removesuffix('.zip')}-{self.name}.npz"]
        return [file]

    def download(self) -> None:
        if not (self.is_revised or self.is_coupled_cluster):
            super().download()
            return
        folder = Path(self.raw_dir)
        if not os.path.exists(self.raw_paths[0]):
            archive = fetch(self.remotes[0], folder, what="MD17", mirror=self.mirror)
            if self.is_revised:
                files = [f"rmd17/npz_data/{file}" for file in self.file_names.values() if file.startswith("rmd17_")]
                unpack(archive, folder, files, what="MD17", optional=[f"rmd17/splits/{name}" for name in _SPLITS])
            else:
                stem = self.file_names[self.molecules].removesuffix(".zip")
                unpack(archive, folder, [f"{stem}-train.npz", f"{stem}-test.npz"], what="MD17")
        verify(Path(self.raw_paths[0]), what="MD17")

    @property
    def splits(self) -> dict[str, np.ndarray] | None:
        """The first published split of the revised sets: 1000 frames to learn from, of which the last 50 validate.

        None for the other sets, or when the files of the split are not in ``root/raw/rmd17/splits``.
        """
        files = [Path(self.raw_dir, "rmd17", "splits", name) for name in _SPLITS]
        if not self.is_revised or self._indices is not None or not all(file.exists() for file in files):
            return None
        learn, test = (np.loadtxt(file, dtype=np.int64, ndmin=1) for file in files)
        return {"idx_train": learn[:-50], "idx_val": learn[-50:], "idx_test": test}


_SPLITS = ("index_train_01.csv", "index_test_01.csv")


def gdml(file: str) -> Remote:
    """A file of the collection that MD17 and MD22 belong to."""
    place = "quantum-machine.org/gdml/data/npz"
    return Remote(file, (f"https://{place}/{file}", f"http://{place}/{file}"))


def read_npz(path: str, what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Atomic numbers (N,), positions (n, N, 3), energies (n,) and forces (n, N, 3), under either set of names."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = ("z", "R", "E", "F") if "R" in file else ("nuclear_charges", "coords", "energies", "forces")
            z, pos, y, neg_dy = (file[name] for name in names)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(path, error, what) from error
    z, y = z.reshape(-1), y.reshape(-1)
    if pos.shape != (len(y), len(z), 3) or neg_dy.shape != pos.shape:
        raise DataError(
            f"{what}: {path} holds {len(z)} atoms, {len(y)} energies, positions {pos.shape} and forces {neg_dy.shape}, "
            "which do not fit together."
        )
    return z, pos, y, neg_dy

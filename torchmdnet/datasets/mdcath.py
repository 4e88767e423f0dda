"""mdCATH: molecular dynamics of protein domains with a classical force field."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Dataset as GeometricDataset

from torchmdnet.datasets.download import Remote, fetch
from torchmdnet.datasets.files import expand, progress
from torchmdnet.datasets.frames import Indices, as_tensor, make_batch
from torchmdnet.datasets.memdataset import open_hdf5
from torchmdnet.errors import ConfigError, DataError, did_you_mean
from torchmdnet.files import not_a_file

if TYPE_CHECKING:
    from torch_geometric.data import Batch, Data

__all__ = ["MDCATH", "load_pdb_list"]

logger = logging.getLogger(__name__)

_PLACE = "https://huggingface.co/datasets/compsciencelab/mdCATH/resolve/main"


class _Trajectory(NamedTuple):
    domain: str
    temperature: str
    replica: str
    num_frames: int  # after skip_frames


class MDCATH(GeometricDataset):
    """mdCATH: 5,398 protein domains, five temperatures, five replicas each; forces without energies.

    Samples: ``z`` (N,), ``pos`` (N, 3) in Å, ``neg_dy`` (N, 3) in kcal/mol/Å, and ``info``,
    ``"<domain>_<temperature>_<replica>_<frame>"``. There is no ``y``: train on forces only.

    The whole set has several TB. An index file says what there is; only the domains that pass the filters are
    downloaded, one file each, and frames are read from the files when they are asked for. A file is compared with
    what the server announces when it comes, not each time it is opened.

    Mirarchi, Giorgino and De Fabritiis, Sci. Data 11, 1299 (2024), https://doi.org/10.1038/s41597-024-04140-z.

    Args:
        root: Folder for the index and the domains.
        transform: Called with each sample when it is asked for.
        pre_transform: Not used; nothing is stored.
        pre_filter: Not used; nothing is stored.
        source_file: The index. Only the default can be downloaded.
        file_basename: Start of the names of the domain files. Only the default can be downloaded.
        numAtoms: Largest number of atoms of a domain; None: no limit.
        numNoHAtoms: Largest number of atoms other than hydrogen; None: no limit.
        numResidues: Largest number of residues; None: no limit.
        temperatures: Temperatures in K: of 320, 348, 379, 413 and 450.
        skip_frames: Take every n-th frame.
        pdb_list: The domains, or a text file with one in each line; None: all.
        min_gyration_radius: Smallest radius of gyration in nm that a replica may reach; None: no limit.
        max_gyration_radius: Largest radius of gyration in nm that a replica may reach; None: no limit.
        alpha_beta_coil: Smallest shares of residues in helices, in sheets and in neither, in percent each; a None
            among them, or in place of all three: no limit.
        solid_ss: Smallest share of residues in helices and sheets together, in percent; None: no limit.
        numFrames: Smallest number of frames of a replica; None: no limit.
        mirror: Where to get the files instead of from their publisher.

    Raises:
        ConfigError: If an argument cannot be met.
        DataError: If a file cannot be had, a domain or temperature is unknown, or nothing passes the filters.
    """

    energy_unit: str | None = "kcal/mol"
    length_unit: str | None = "Å"
    level_of_theory: str | None = "CHARMM22*"
    citation: str | None = "Mirarchi, Giorgino, De Fabritiis, Sci. Data 11, 1299 (2024), doi:10.1038/s41597-024-04140-z"
    licence: str | None = "CC BY 4.0"
    #: Frames are read from files of many GB, which loader workers can do side by side.
    gathers_in_process: bool = False

    SOURCE_FILE: ClassVar[str] = "mdcath_source.h5"
    FILE_BASENAME: ClassVar[str] = "mdcath_dataset"

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        pre_filter: Callable[[Data], bool] | None = None,
        source_file: str = SOURCE_FILE,
        file_basename: str = FILE_BASENAME,
        numAtoms: int | None = 5000,
        numNoHAtoms: int | None = None,
        numResidues: int | None = 1000,
        temperatures: Sequence[str | int] | str | int = ("348",),
        skip_frames: int = 1,
        pdb_list: Sequence[str] | str | os.PathLike[str] | None = None,
        min_gyration_radius: float | None = None,
        max_gyration_radius: float | None = None,
        alpha_beta_coil: Sequence[float | None] | None = None,
        solid_ss: float | None = None,
        numFrames: int | None = None,
        *,
        mirror: str | None = None,
    ) -> None:
        if root is None or not os.fspath(root):
            raise ConfigError("MDCATH: root is missing. Give a folder for the data.")
        if skip_frames < 1:
            raise ConfigError(f"skip_frames: {skip_frames!r} must be 1 or more.")
        for name, value in (("pre_transform", pre_transform), ("pre_filter", pre_filter)):
            if value is not None:
                logger.warning("MDCATH: %s is not used: frames are read from their files, nothing is stored.", name)
        self.source_file, self.file_basename, self.mirror = source_file, file_basename, mirror
        self.numAtoms, self.numNoHAtoms, self.numResidues = numAtoms, numNoHAtoms, numResidues
        self.temperatures = [str(t) for t in ([temperatures] if isinstance(temperatures, (str, int)) else temperatures)]
        self.skip_frames = int(skip_frames)
        self.pdb_list = None if pdb_list is None else load_pdb_list(pdb_list)
        self.min_gyration_radius, self.max_gyration_radius = min_gyration_radius, max_gyration_radius
        self.alpha_beta_coil, self.solid_ss = _checked_shares(alpha_beta_coil), solid_ss
        self.numFrames = numFrames
        #: (temperature, replica, frames) of each domain that passes the filters.
        self.processed: dict[str, list[tuple[str, str, int]]] = {}
        self._numbers: dict[str, np.ndarray] = {}
        super().__init__(expand(root), transform)
        self._trajectories = [_Trajectory(domain, *rest) for domain, all_ in self.processed.items() for rest in all_]
        self._stops = np.cumsum([trajectory.num_frames for trajectory in self._trajectories])
        #: Frames in all.
        self.num_conformers = int(self._stops[-1])
        #: Size of the domain files, in MiB.
        self.total_size_mb = round(sum(os.path.getsize(self._path(domain)) for domain in self.processed) / 2**20, 4)

    # ------------------------------------------------------------------------------------------------------ files

    @property
    def raw_dir(self) -> str:
        return self.root

    @property
    def raw_file_names(self) -> list[str]:
        return [self.source_file, *(os.path.basename(self._path(domain)) for domain in self.processed)]

    def _path(self, domain: str) -> str:
        return os.path.join(self.root, f"{self.file_basename}_{domain}.h5")

    def download(self) -> None:
        """Fetch the index, choose, and fetch the domains that are not there yet."""
        self._fetch(self.source_file, self.source_file, self.SOURCE_FILE)
        self.processed = self._choose(os.path.join(self.root, self.source_file))
        missing = [domain for domain in self.processed if not os.path.exists(self._path(domain))]
        for domain in progress(missing, "mdCATH", len(missing), "domain"):
            file = os.path.basename(self._path(domain))
            self._fetch(file, f"data/{file}", f"{self.FILE_BASENAME}_{domain}.h5")

    def _download(self) -> None:
        self.download()

    def _fetch(self, file: str, place: str, published: str) -> None:
        if os.path.exists(os.path.join(self.root, file)):
            return
        if file != published:
            raise DataError(
                f"MDCATH: {os.path.join(self.root, file)} is missing. Only {self.SOURCE_FILE} and "
                f"{self.FILE_BASENAME}_<domain>.h5 can be downloaded; put other files there yourself."
            )
        fetch(Remote(file, (f"{_PLACE}/{place}",)), self.root, what="MDCATH", mirror=self.mirror)

    # ----------------------------------------------------------------------------------------------------- choosing

    def _choose(self, path: str) -> dict[str, list[tuple[str, str, int]]]:
        chosen: dict[str, list[tuple[str, str, int]]] = {}
        with open_hdf5(path, "MDCATH") as file:
            names = list(file) if self.pdb_list is None else self.pdb_list
            for name in progress(names, "mdCATH index", len(names), "domain"):
                if name not in file:
                    hint = did_you_mean(name, file)
                    raise DataError(f"pdb_list: {name!r} is not among the {len(file)} domains of {path}.{hint}")
                replicas = list(self._replicas(name, file[name]))
                if replicas:
                    chosen[name] = replicas
        if not chosen:
            limits = ("numAtoms", "numNoHAtoms", "numResidues", "min_gyration_radius", "max_gyration_radius")
            limits += ("alpha_beta_coil", "solid_ss", "numFrames")
            given = ", ".join(f"{name}={getattr(self, name)}" for name in limits if getattr(self, name) is not None)
            raise DataError(f"MDCATH: no trajectory of {len(names)} domains passes {given or 'the filters'}.")
        return chosen

    def _replicas(self, name: str, domain: Any) -> Iterator[tuple[str, str, int]]:
        num_residues = int(domain.attrs["numResidues"])
        if _above(domain.attrs["numProteinAtoms"], self.numAtoms) or _above(num_residues, self.numResidues):
            return
        if self.numNoHAtoms is not None and _above(domain.attrs["numNoHAtoms"], self.numNoHAtoms):
            return
        for temperature in self.temperatures:
            if temperature not in domain:
                raise DataError(
                    f"temperatures: {name} has no {temperature!r}. Choose from {', '.join(_numbered(domain))}."
                )
            for replica, group in domain[temperature].items():
                if self._passes(group.attrs, num_residues):
                    yield temperature, replica, -(-int(group.attrs["numFrames"]) // self.skip_frames)

    def _passes(self, facts: Any, num_residues: int) -> bool:
        if self.numFrames is not None and facts["numFrames"] < self.numFrames:
            return False
        if self.min_gyration_radius is not None and facts["min_gyration_radius"] < self.min_gyration_radius:
            return False
        if _above(facts["max_gyration_radius"], self.max_gyration_radius):
            return False
        alpha, beta = (100.0 * float(facts[name]) / num_residues for name in ("alpha", "beta"))
        if self.solid_ss is not None and alpha + beta < self.solid_ss:
            return False
        shares = (alpha, beta, 100.0 - alpha - beta)
        limits = self.alpha_beta_coil or (None, None, None)
        return all(limit is None or share >= limit for share, limit in zip(shares, limits, strict=True))

    # ------------------------------------------------------------------------------------------------------ reading

    def __len__(self) -> int:
        return len(self.indices())

    def len(self) -> int:
        """The number of frames."""
        return self.num_conformers

    def _locate(self, index: int) -> tuple[_Trajectory, int]:
        """The trajectory a frame belongs to, and its number there."""
        which = int(np.searchsorted(self._stops, index, side="right"))
        trajectory = self._trajectories[which]
        return trajectory, index - int(self._stops[which]) + trajectory.num_frames

    def get(self, idx: int) -> Data:
        """One frame, before ``transform``."""
        from torch_geometric.data import Data

        trajectory, frame = self._locate(idx)
        with open_hdf5(self._path(trajectory.domain), "MDCATH") as file:
            group = file[trajectory.domain][trajectory.temperature][trajectory.replica]
            row = frame * self.skip_frames
            return Data(
                z=as_tensor(np.array(self._atoms(file, trajectory.domain))),
                pos=torch.from_numpy(np.asarray(group["coords"][row], dtype=np.float32)),
                neg_dy=torch.from_numpy(np.asarray(group["forces"][row], dtype=np.float32)),
                info=_info(trajectory, frame),
            )

    def batch(self, indices: Indices) -> Batch:
        """Frames as one batch, in the order asked for; each file is opened once."""
        view = self.indices()
        rows = [view[int(i)] for i in np.asarray(indices).reshape(-1)]
        if self.transform is not None:
            from torch_geometric.data import Batch

            return Batch.from_data_list([self.transform(self.get(row)) for row in rows])
        places = [self._locate(row) for row in rows]
        arrays: list[tuple[np.ndarray, ...]] = [()] * len(rows)
        for domain in dict.fromkeys(trajectory.domain for trajectory, _ in places):
            with open_hdf5(self._path(domain), "MDCATH") as file:
                z = self._atoms(file, domain)
                wanted = [i for i, (trajectory, _) in enumerate(places) if trajectory.domain == domain]
                for trajectory in dict.fromkeys(places[i][0] for i in wanted):
                    mine = np.array([i for i in wanted if places[i][0] == trajectory])
                    frames, which = np.unique([places[i][1] for i in mine], return_inverse=True)
                    group = file[domain][trajectory.temperature][trajectory.replica]
                    pos, forces = (group[name][frames * self.skip_frames] for name in ("coords", "forces"))
                    for i, j in zip(mine.tolist(), which.tolist(), strict=True):
                        arrays[i] = (z, pos[j], forces[j])
        counts = np.array([len(parts[0]) for parts in arrays])
        z, pos, forces = (np.concatenate(column) for column in zip(*arrays, strict=True))
        ptr = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        tensors: dict[str, Any] = {
            "z": as_tensor(z),
            "pos": torch.from_numpy(pos.astype(np.float32, copy=False)),
            "neg_dy": torch.from_numpy(forces.astype(np.float32, copy=False)),
            "info": [_info(trajectory, frame) for trajectory, frame in places],
            "batch": torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
            "ptr": ptr,
        }
        return make_batch(tensors, ("z", "pos", "neg_dy"))

    def _atoms(self, file: Any, domain: str) -> np.ndarray:
        if domain not in self._numbers:
            self._numbers[domain] = np.asarray(file[domain]["z"][()])
        return self._numbers[domain]

    @property
    def splits(self) -> dict[str, np.ndarray] | None:
        """None: the source publishes no split."""
        return None

    def get_atomref(self, max_z: int = 100) -> Tensor | None:
        """None: there are no energies."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)})"


def load_pdb_list(pdb_list: Sequence[str] | str | os.PathLike[str]) -> list[str]:
    """Names of domains: a list as it is, or the lines of a text file.

    Raises:
        DataError: If there is no such file.
    """
    if not isinstance(pdb_list, (str, os.PathLike)):
        return list(dict.fromkeys(pdb_list))
    path = Path(expand(pdb_list))
    if wrong := not_a_file(path):
        raise DataError(f"pdb_list: {wrong} Give a text file, or a list of domains.")
    lines = (line.strip() for line in path.read_text().splitlines())
    return list(dict.fromkeys(line for line in lines if line))


def _info(trajectory: _Trajectory, frame: int) -> str:
    return f"{trajectory.domain}_{trajectory.temperature}_{trajectory.replica}_{frame}"


def _above(value: Any, limit: float | None) -> bool:
    return limit is not None and value > limit


def _numbered(group: Any) -> list[str]:
    """The temperatures among the entries of a domain."""
    return [name for name in group if name.isdigit()]


def _checked_shares(shares: Sequence[float | None] | None) -> tuple[float | None, ...] | None:
    if shares is None:
        return None
    limits = tuple(shares)
    total = sum(limit for limit in limits if limit is not None)
    if len(limits) != 3 or total > 100 or any(limit is not None and limit < 0 for limit in limits):
        raise ConfigError(
            f"alpha_beta_coil: {limits} cannot be met. Give three smallest shares in percent, for helix, sheet and "
            "coil, which add up to at most 100."
        )
    return limits

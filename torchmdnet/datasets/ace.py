"""Acellera's HDF5 format, and the same data as Hugging Face tables."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import numpy as np

from torchmdnet.datasets.base import FramesDataset
from torchmdnet.datasets.cache import cache_folder, cached_frames, digest
from torchmdnet.datasets.download import locked
from torchmdnet.datasets.files import expand, find_files, natural_key, progress
from torchmdnet.datasets.frames import FrameBuilder, Frames
from torchmdnet.datasets.memdataset import Block, MemmappedDataset, conformers, open_hdf5
from torchmdnet.datasets.spice import keeps_gradient
from torchmdnet.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["Ace", "AceHF", "download_gitea_dataset"]

logger = logging.getLogger(__name__)


class Ace(MemmappedDataset):
    """Your own data in the Ace layout, version 1.0 or 2.0.

    Samples: ``z``, ``pos`` in Å, ``y`` in eV (formation energies), ``neg_dy`` in eV/Å, ``q`` in e, ``pq`` in e,
    ``dp`` (1, 3) in e Å.

    The root of a file has the attributes ``layout = "Ace"`` and ``layout_version``. Molecules are groups of the root
    (1.0) or of the one group in it (2.0), with ``atomic_numbers`` (N,) and ``formal_charges`` (N,). Every other array
    has an attribute ``units``:

    ================  =======================================  ========================================
    unit              1.0: in ``conformations/<name>``         2.0: in the molecule, n conformers
    ================  =======================================  ========================================
    ``Å``             ``positions`` (N, 3)                     ``positions`` (n, N, 3)
    ``eV``            ``formation_energy`` ()                  ``formation_energies`` (n,)
    ``eV/Å``          ``forces`` (N, 3)                        ``forces`` (n, N, 3)
    ``e``             ``partial_charges`` (N,)                 ``partial_charges`` (n, N)
    ``e*Å``           ``dipole_moment`` (3,)                   ``dipole_moments`` (n, 3)
    ================  =======================================  ========================================

    A conformer without energy (1.0), or with NaN (2.0), has failed and is left out.

    Args:
        root: Folder for the arrays made from the files.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        pre_filter: Says of each sample whether to store it.
        paths: A file, a folder with ``.h5`` files, a pattern, or a list of those.
        max_gradient: Leave out conformers with the force on any atom above this, in eV/Å. None or 0: keep all.
        subsample_molecules: Take every n-th molecule of each file.

    Raises:
        ConfigError: If root or paths are missing.
        DataError: If a file does not have the layout; the message has the file and the molecule.
    """

    energy_unit = "eV"
    length_unit = "Å"

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        pre_filter: Callable[[Data], bool] | None = None,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        max_gradient: float | None = None,
        subsample_molecules: int = 1,
    ) -> None:
        if not paths:
            raise ConfigError("paths: no file is given. Give a file, a folder with .h5 files, or a list of them.")
        if subsample_molecules < 1:
            raise ConfigError(f"subsample_molecules: {subsample_molecules!r} must be 1 or more.")
        self.paths = paths
        self.files = [str(path) for path in hdf5_files(paths, "paths")]
        self.max_gradient = max_gradient
        self.subsample_molecules = int(subsample_molecules)
        super().__init__(root, transform, pre_transform, pre_filter, ("y", "neg_dy", "q", "pq", "dp"))

    @property
    def name(self) -> str:
        paths = self.paths if isinstance(self.paths, str) else _text(self.paths)
        text = f"{paths}{self.max_gradient}{self.subsample_molecules}"
        return f"Ace-{hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()}"

    @property
    def source_files(self) -> list[str]:
        return self.files

    @property
    def nothing_left(self) -> str:
        filters = f" with max_gradient={self.max_gradient!r}" if self.max_gradient else ""
        return f"no conformer is left of {len(self.files)} files{filters}."

    def blocks(self) -> Iterator[Block]:
        for number, path in enumerate(self.files):
            with open_hdf5(path, "Ace") as file:
                for index, (name, molecule, read) in enumerate(_molecules(file, path)):
                    if index % self.subsample_molecules:
                        continue
                    arrays = read(molecule, f"{path}, molecule {name}")
                    if not len(arrays["positions"]):
                        continue
                    keep = keeps_gradient(arrays["forces"], self.max_gradient)
                    num = int(keep.sum())
                    charge = int(np.sum(molecule["formal_charges"][()], dtype=np.int64))
                    yield conformers(
                        molecule["atomic_numbers"][()],
                        arrays["positions"][keep],
                        y=arrays["energies"][keep],
                        neg_dy=arrays["forces"][keep],
                        q=np.full(num, charge),
                        pq=arrays["charges"][keep],
                        dp=arrays["dipoles"][keep],
                        notes={
                            "i_path": [number] * num,
                            "mol_id": [name] * num,
                            "i_conf": np.flatnonzero(keep).tolist(),
                        },
                    )


def hdf5_files(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], what: str) -> list[Path]:
    """The files that paths stand for, where a folder stands for the ``.h5`` files in it, in natural order."""
    files: list[str] = []
    for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        text = expand(path)
        if not os.path.isdir(text):
            files.append(text)
            continue
        inside = sorted(glob.glob(os.path.join(glob.escape(text), "*.h5")), key=natural_key)
        if not inside:
            raise DataError(f"{what}: the folder {path} holds no .h5 file.")
        files += inside
    return find_files(files, what)


def _text(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> str | list[str]:
    return os.fspath(paths) if isinstance(paths, (str, os.PathLike)) else [os.fspath(path) for path in paths]


# ------------------------------------------------------------------------------------------------------ the two layouts

_Reader = Callable[[Any, str], dict[str, np.ndarray]]


def _molecules(file: Any, path: str) -> Iterator[tuple[str, Any, _Reader]]:
    """Name and group of each molecule, and how to read it."""
    layout, version = str(file.attrs.get("layout", "")), str(file.attrs.get("layout_version", ""))
    if layout != "Ace" or version not in ("1.0", "2.0"):
        raise DataError(
            f"Ace: {path} has layout {layout or None!r}, version {version or None!r}. Layout 'Ace', version 1.0 or "
            "2.0, is wanted as attributes of the file."
        )
    group, read = file, _read_1
    if version == "2.0":
        if len(file) != 1:
            raise DataError(f"Ace: {path} has {len(file)} top groups; a file of version 2.0 has one.")
        group, read = next(iter(file.values())), _read_2
    for name, molecule in progress(group.items(), os.path.basename(path), len(group), "molecule"):
        yield name, molecule, read


def _read_1(molecule: Any, where: str) -> dict[str, np.ndarray]:
    done = [conformer for conformer in molecule["conformations"].values() if "formation_energy" in conformer]
    names = {
        "positions": ("positions", "Å"),
        "energies": ("formation_energy", "eV"),
        "forces": ("forces", "eV/Å"),
        "charges": ("partial_charges", "e"),
        "dipoles": ("dipole_moment", "e*Å"),
    }
    return {
        ours: np.array([_checked(conformer, name, unit, f"{where}, {conformer.name}") for conformer in done])
        for ours, (name, unit) in names.items()
    }


def _read_2(molecule: Any, where: str) -> dict[str, np.ndarray]:
    arrays = {
        "positions": _checked(molecule, "positions", "Å", where),
        "energies": _checked(molecule, "formation_energies", "eV", where),
        "forces": _checked(molecule, "forces", "eV/Å", where),
        "charges": _checked(molecule, "partial_charges", "e", where),
        "dipoles": _checked(molecule, "dipole_moments", "e*Å", where),
    }
    done = ~np.isnan(arrays["energies"])
    if not all(len(array) == len(done) for array in arrays.values()):
        raise DataError(f"Ace: {where}: the arrays hold different numbers of conformers.")
    return {name: array[done] for name, array in arrays.items()}


def _checked(group: Any, name: str, unit: str, where: str) -> np.ndarray:
    if name not in group:
        raise DataError(f"Ace: {where}: {name!r} is missing.")
    found = group[name].attrs.get("units")
    found = found.decode() if isinstance(found, bytes) else found
    if found != unit:
        raise DataError(f"Ace: {where}: {name!r} has the attribute units={found!r} instead of {unit!r}.")
    return group[name][()]


# --------------------------------------------------------------------------------------------------------- Hugging Face


class AceHF(FramesDataset):
    """Data in the columns of the Ace layout, from files that the Hugging Face ``datasets`` package reads.

    Samples: ``z``, ``pos`` in Å, ``y`` (1, 1) in eV, ``neg_dy`` in eV/Å, ``q`` in e, ``pq`` in e, ``dp`` (1, 3) in e Å.
    The columns are ``atomic_numbers``, ``positions``, ``formation_energy``, ``forces``, ``formal_charges``,
    ``partial_charges`` and ``dipole_moment``.

    Args:
        root: What ``datasets`` is to read: a builder such as ``"parquet"``, or a data set of the hub.
        paths: The files. One such as ``ssh://gitea.host/user/repo/branch/main/file`` is taken from a repository.
        split: The split to read.
        max_gradient: Leave out rows with the force on any atom at or above this, in eV/Å, or with NaN in force or
            energy. None or 0: keep all.

    Raises:
        ConfigError: If ``datasets`` is not installed.
        DataError: If a column is missing or nothing is left.
    """

    energy_unit = "eV"
    length_unit = "Å"

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "atomic_numbers",
        "positions",
        "formation_energy",
        "forces",
        "formal_charges",
        "partial_charges",
        "dipole_moment",
    )

    def __init__(
        self,
        root: str = "parquet",
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        split: str = "train",
        max_gradient: float | None = None,
    ) -> None:
        try:
            from datasets import load_dataset  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                "dataset: AceHF needs the package 'datasets'. Install it with: pip install torchmd-net[huggingface]"
            ) from error
        if paths is not None:
            paths = [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
            folder = cache_folder() / "gitea"
            paths = [download_gitea_dataset(path, folder) if "gitea" in path else expand(path) for path in paths]
        table = load_dataset(root, data_files=paths, split=split)
        missing = [name for name in self.COLUMNS if name not in table.column_names]
        if missing:
            raise DataError(f"AceHF: {', '.join(missing)} missing; the columns are {', '.join(table.column_names)}.")
        self.max_gradient = max_gradient
        key = digest([], {"set": "AceHF", "fingerprint": table._fingerprint, "max_gradient": max_gradient})
        frames, _ = cached_frames("acehf", key, lambda folder: (self._read(table, folder), {}))
        super().__init__(frames)

    def _read(self, table: Any, folder: Path | None) -> Frames:
        builder = FrameBuilder(folder)
        try:
            # plain lists: the package's NumPy format would round energies to single precision
            batches = table.select_columns(list(self.COLUMNS)).with_format(None).iter(batch_size=1024)
            for batch in progress(batches, "AceHF", -(-len(table) // 1024), "batch"):
                for sample in _rows(batch, self.max_gradient):
                    builder.append(sample)
            if not builder.num_systems:
                raise DataError(f"AceHF: no row is left of {len(table)} with max_gradient={self.max_gradient!r}.")
            return builder.finish()
        finally:
            builder.close()


def _rows(batch: Mapping[str, Any], max_gradient: float | None) -> Iterator[dict[str, Any]]:
    for i in range(len(batch["formation_energy"])):
        forces = np.array(batch["forces"][i])
        energy = float(batch["formation_energy"][i])
        if max_gradient and not (np.linalg.norm(forces, axis=1).max() < max_gradient and np.isfinite(energy)):
            continue
        yield {
            "z": np.array(batch["atomic_numbers"][i]),
            "pos": np.array(batch["positions"][i]),
            "y": energy,
            "neg_dy": forces,
            "q": np.sum(batch["formal_charges"][i]),
            "pq": np.array(batch["partial_charges"][i]),
            "dp": np.array(batch["dipole_moment"][i]),
        }


def download_gitea_dataset(path: str, tmpdir: str | os.PathLike[str]) -> str:
    """Fetch a file from a Git repository over SSH.

    Args:
        path: ``ssh://host/user/repo/.../file``; ``branch/<name>`` or ``commit/<hash>`` on the way choose the revision
            (default: branch ``main``).
        tmpdir: Folder for the clones.

    Returns:
        Where the file is now.

    Raises:
        ConfigError: If the address is not of this form.
        DataError: If ``git`` cannot fetch it.
    """
    address = urlsplit(path)
    parts = [part for part in address.path.split("/") if part]
    if (
        address.scheme != "ssh"
        or not address.hostname
        or len(parts) < 3
        or any(p.startswith(("-", "..")) for p in parts)
    ):
        raise ConfigError(f"paths: {path!r} must look like ssh://host/user/repo/branch/main/file.")
    user, repo, *rest = parts
    repo = repo.removesuffix(".git")
    revision, file = "origin/main", rest[-1]
    for i, part in enumerate(rest[:-2]):
        if part in ("branch", "commit"):
            revision = f"origin/{rest[i + 1]}" if part == "branch" else rest[i + 1]
            file = "/".join(rest[i + 2 :])
            break
    folder = Path(tmpdir) / f"{user}_{repo}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not (folder / ".git").exists():
            _git("clone", "--no-checkout", "--", f"ssh://{address.netloc}/{user}/{repo}.git", str(folder))
        else:
            _git("-C", str(folder), "fetch", "origin")
        _git("-C", str(folder), "checkout", "--force", "--detach", revision)
    if not (folder / file).is_file():
        raise DataError(f"paths: {user}/{repo} has no file {file!r} at {revision}.")
    return str(folder / file)


def _git(*arguments: str) -> None:
    try:
        subprocess.run(["git", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConfigError("paths: a file in a repository needs the program 'git', which is not installed.") from error
    except subprocess.CalledProcessError as error:
        raise DataError(f"paths: 'git {' '.join(arguments)}' failed: {error.stderr.strip()}") from error

"""QM9q: molecules of QM9 in several charge states, from your own files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from torchmdnet.datasets.ace import hdf5_files
from torchmdnet.datasets.files import progress
from torchmdnet.datasets.memdataset import Block, MemmappedDataset, conformers, open_hdf5
from torchmdnet.datasets.spice import keeps_gradient
from torchmdnet.errors import ConfigError, DataError
from torchmdnet.units import BOHR_TO_ANGSTROM, DEBYE_TO_E_ANGSTROM, HARTREE_TO_EV

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["QM9q"]


class QM9q(MemmappedDataset):
    r"""Charged and neutral molecules of H C N O F.

    Samples: ``z``, ``pos`` in Å, ``y`` in eV, ``neg_dy`` in eV/Å, ``q`` in e, ``pq`` in e, ``dp`` (1, 3) in e Å.
    Energies are relative to the atoms and ions of the same total charge; see :meth:`compute_reference_energy`.
    Conformers with a force above 100 eV/Å on any atom are left out.

    A file holds one group; in it, one group for each molecule with ``atomic_numbers`` (N,) and the groups
    ``positions``, ``energy``, ``gradient_vector``, ``electronic_charge`` and ``dipole_moment``, in which each
    conformer has an array under its name. These groups have an attribute ``units``, see :attr:`UNITS`.

    Args:
        root: Folder for the arrays made from the files.
        transform: Called with each sample when it is asked for.
        pre_transform: Called with each sample before it is stored.
        pre_filter: Says of each sample whether to store it.
        paths: A file, a folder with ``.h5`` files, a pattern, or a list of those.

    Raises:
        ConfigError: If root or paths are missing.
        DataError: If a file does not have the layout; the message has the file and the molecule.
    """

    HARTREE_TO_EV: ClassVar[float] = HARTREE_TO_EV
    BORH_TO_ANGSTROM: ClassVar[float] = BOHR_TO_ANGSTROM  # the established spelling
    DEBYE_TO_EANG: ClassVar[float] = DEBYE_TO_E_ANGSTROM
    #: Energy of each element in each charge state, in Hartree.
    ELEMENT_ENERGIES: ClassVar[Mapping[int, Mapping[int, float]]] = {
        1: {0: -0.5013312007, 1: 0.0},
        6: {-1: -37.8236383010, 0: -37.8038423252, 1: -37.3826165878},
        7: {-1: -54.4626446440, 0: -54.5269367415, 1: -53.9895574739},
        8: {-1: -74.9699154500, 0: -74.9812632126, 1: -74.4776884006},
        9: {-1: -99.6695561536, 0: -99.6185158728},
    }
    #: The charge state of lowest energy.
    INITIAL_CHARGES: ClassVar[Mapping[int, int]] = {1: 0, 6: -1, 7: 0, 8: 0, 9: -1}
    #: What the attribute ``units`` says.
    UNITS: ClassVar[Mapping[str, str]] = {
        "positions": "Å : ångströms",
        "energy": "E_h : hartree",
        "gradient_vector": "vector : Hartree/Bohr ",
        "electronic_charge": "n : fractional electrons",
        "dipole_moment": "\\mu : Debye ",
    }
    #: Largest force that is kept, in eV/Å.
    MAX_FORCE: ClassVar[float] = 100.0

    energy_unit = "eV"
    length_unit = "Å"

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        transform: Callable[[Data], Data] | None = None,
        pre_transform: Callable[[Data], Data] | None = None,
        pre_filter: Callable[[Data], bool] | None = None,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    ) -> None:
        if not paths:
            raise ConfigError("paths: no file is given. Give a file, a folder with .h5 files, or a list of them.")
        self.files = [str(path) for path in hdf5_files(paths, "paths")]
        super().__init__(root, transform, pre_transform, pre_filter, ("y", "neg_dy", "q", "pq", "dp"))

    @property
    def source_files(self) -> list[str]:
        return self.files

    @staticmethod
    def compute_reference_energy(atomic_numbers: Sequence[int] | np.ndarray, charge: int) -> float:
        """Energy in eV of the separate atoms and ions with this total charge.

        Every atom starts in its charge state of lowest energy; then one atom after another takes or gives an
        electron, each time where the total is lowest, until the charges add up.

        Args:
            atomic_numbers: The atoms, (N,).
            charge: Their total charge in e.

        Raises:
            DataError: If an element or the charge is not possible; it is also an ``IndexError``.
        """
        states = QM9q.ELEMENT_ENERGIES
        numbers = [int(z) for z in atomic_numbers]
        unknown = sorted(set(numbers) - set(states))
        if unknown:
            raise _Impossible(f"QM9q has no energies for the elements {unknown}, only for {sorted(states)}.")
        charges = [QM9q.INITIAL_CHARGES[z] for z in numbers]
        while (missing := int(charge) - sum(charges)) != 0:
            step = 1 if missing > 0 else -1
            costs = [
                (states[z][q + step] - states[z][q], i)
                for i, (z, q) in enumerate(zip(numbers, charges, strict=True))
                if q + step in states[z]
            ]
            if not costs:
                raise _Impossible(f"Atoms {numbers} cannot have the total charge {charge}.")
            charges[min(costs)[1]] += step
        return sum(states[z][q] for z, q in zip(numbers, charges, strict=True)) * HARTREE_TO_EV

    def blocks(self) -> Iterator[Block]:
        for path in self.files:
            with open_hdf5(path, "QM9q") as file:
                if len(file) != 1:
                    raise DataError(f"QM9q: {path} has {len(file)} top groups instead of one.")
                top = next(iter(file.values()))
                for name, molecule in progress(top.items(), os.path.basename(path), len(top), "molecule"):
                    if not len(molecule["energy"]):
                        continue
                    z = molecule["atomic_numbers"][()]
                    arrays = self._arrays(molecule, f"{path}, molecule {name}")
                    neg_dy = -arrays["gradient_vector"] * HARTREE_TO_EV / BOHR_TO_ANGSTROM
                    keep = keeps_gradient(neg_dy, self.MAX_FORCE)
                    q = np.round(arrays["electronic_charge"].sum(axis=1)).astype(np.int64)[keep]
                    kinds, which = np.unique(q, return_inverse=True)
                    reference = np.array([self.compute_reference_energy(z, int(kind)) for kind in kinds])
                    yield conformers(
                        z,
                        arrays["positions"][keep],
                        y=arrays["energy"][keep] * HARTREE_TO_EV - reference[which],
                        neg_dy=neg_dy[keep],
                        q=q,
                        pq=arrays["electronic_charge"][keep],
                        dp=arrays["dipole_moment"][keep] * DEBYE_TO_E_ANGSTROM,
                        notes={"mol_id": [name] * len(q)},
                    )

    def _arrays(self, molecule: Any, where: str) -> dict[str, np.ndarray]:
        """Each quantity of all conformers, (n, ...), in the order of the energies."""
        arrays = {}
        for name, unit in self.UNITS.items():
            group = molecule[name]
            found = group.attrs.get("units")
            found = found.decode() if isinstance(found, bytes) else found
            if found != unit:
                raise DataError(f"QM9q: {where}: {name!r} has the attribute units={found!r} instead of {unit!r}.")
            arrays[name] = np.array([group[conformer][()] for conformer in molecule["energy"]])
        arrays["energy"] = arrays["energy"].reshape(-1)
        return arrays


class _Impossible(DataError, IndexError):
    """Atoms or charges that the table does not cover."""

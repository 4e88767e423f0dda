"""What every data set of ours offers: samples, batches without per-sample work, and the facts about its labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from torchmdnet.datasets.frames import Frames, Indices, JoinedFrames
from torchmdnet.datasets.labels import Absence, LabelKind
from torchmdnet.datasets.reference_energies import fit_energies
from torchmdnet.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch_geometric.data import Batch, Data
    from typing_extensions import Self

__all__ = ["FramesDataset", "atomref_table", "check_keywords"]


def check_keywords(name: str, function: Callable[..., Any], keywords: Iterable[str]) -> None:
    """Refuse an argument that a data set does not take.

    Args:
        name: What takes the arguments.
        function: Its class or constructor.
        keywords: Names of arguments.

    Raises:
        ConfigError: With the nearest name and all there are.
    """
    known = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return
    names = [word for word in known if word != "self"]
    for word in keywords:
        if word not in names:
            raise ConfigError(
                f"{name} has no argument {word!r}.{did_you_mean(word, names)} It takes {', '.join(names) or 'none'}."
            )


class FramesDataset(Dataset):
    """A data set on top of :class:`~torchmdnet.datasets.frames.Frames`.

    ``ds[i]`` is a ``torch_geometric.data.Data`` with ``z`` (N,), ``pos`` (N, 3), ``y`` (1, 1), ``neg_dy`` (N, 3) and
    whatever else the set holds; ``ds.batch(indices)`` is a ``Batch`` collected with one gather per quantity.

    A subclass states its source in the class attributes and hands its frames to this constructor.

    Args:
        frames: The stored systems.
        transform: Called with each sample. Batches are then collated sample by sample, which is slower.
        reference_energies: Energy of each element (atomic number to energy), if the source states them. Elements that
            are missing here are fitted when they are needed, if :attr:`fits_reference_energies`.
    """

    #: Unit of ``y``; forces are in this unit per :attr:`length_unit`.
    energy_unit: str | None = None
    #: Unit of ``pos`` and ``box``.
    length_unit: str | None = None
    #: The method that produced the labels.
    level_of_theory: str | None = None
    #: What to cite when these data are used.
    citation: str | None = None
    #: The terms under which the data may be used, as far as the source states them.
    licence: str | None = None
    #: Whether batches are collected in the calling process at memory speed, so that loader workers would only cost.
    gathers_in_process: bool = True
    #: Whether :meth:`get_atomref` falls back on a least-squares fit over the whole set.
    fits_reference_energies: ClassVar[bool] = False

    def __new__(cls, *args: Any, **keywords: Any) -> Self:
        check_keywords(cls.__name__, cls.__init__, keywords)
        return super().__new__(cls)

    def __init__(
        self,
        frames: Frames | JoinedFrames,
        transform: Callable[[Data], Data] | None = None,
        *,
        reference_energies: Mapping[int, float] | None = None,
    ) -> None:
        self.frames = frames
        self.transform = transform
        #: Number of samples from each file or trajectory, in a row; None where the source does not say.
        self.runs: np.ndarray | None = None
        self.reference_energies = dict(reference_energies) if reference_energies else None

    def __len__(self) -> int:
        return len(self.frames)

    def len(self) -> int:
        """The number of systems, as ``torch_geometric`` data sets say it."""
        return len(self)

    def get(self, index: int) -> Data:
        """System number ``index``, from 0, before :attr:`transform`."""
        return self.frames.data(index)

    def __getitem__(self, index: Any) -> Any:
        """One system as ``Data``; for a slice, a list of numbers or a mask, a ``torch.utils.data.Subset``."""
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        if np.ndim(index) == 0:
            sample = self.get(int(index))
            return sample if self.transform is None else self.transform(sample)
        chosen = np.asarray(index)
        return Subset(self, (np.flatnonzero(chosen) if chosen.dtype == bool else chosen).tolist())

    def batch(self, indices: Indices) -> Batch:
        """The systems with these ``indices`` as one batch, in this order."""
        if self.transform is None:
            return self.frames.batch(indices)
        from torch_geometric.data import Batch

        return Batch.from_data_list([self[int(i)] for i in indices])

    def absent_label(self, kind: LabelKind) -> Absence | None:
        """What is there in place of a label that training asks for; None where the user did without it."""
        return Absence(f"the data hold no {kind}, only {', '.join(self.frames.fields)}.", False)

    def unit_advice(self, unit: str) -> str | None:
        """How to state that energies are in ``unit``, in words; None where their unit is known."""
        return None

    @property
    def splits(self) -> dict[str, np.ndarray] | None:
        """``idx_train``, ``idx_val`` and ``idx_test`` where the source publishes a split."""
        return None

    def get_atomref(self, max_z: int = 100) -> Tensor | None:
        """Energy of each element, (max_z, 1) float32 in :attr:`energy_unit`, zero for elements that do not occur.

        None where the source states none and the set does not fit them.
        """
        if self.states_reference_energies:
            return atomref_table(self.reference_energies or {}, max_z)
        if self.fits_reference_energies and "y" in self.frames:
            return atomref_table(self.fit_reference_energies(), max_z)
        return None

    @property
    def states_reference_energies(self) -> bool:
        """Whether the source gives the energy of every element that occurs."""
        known = self.reference_energies
        return known is not None and all(z in known for z in self.frames.elements().tolist())

    def fit_reference_energies(self, indices: Indices | None = None) -> dict[int, float]:
        """Energies of the elements by least squares, keeping those that the source states.

        Args:
            indices: Systems to fit to; all of them by default.

        Returns:
            Energy by atomic number, in :attr:`energy_unit`.
        """
        counts, elements = self.frames.composition(indices)
        y = np.asarray(self.frames["y"]).reshape(-1)
        return fit_energies(counts, elements, y if indices is None else y[np.asarray(indices)], self.reference_energies)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)})"


def atomref_table(energies: Mapping[int, float], max_z: int = 100) -> Tensor:
    """A table of element energies, (max_z, 1) float32, zero for elements that are not given."""
    table = np.zeros((max_z, 1), dtype=np.float64)
    for z, energy in energies.items():
        if z < max_z:
            table[z, 0] = energy
    return torch.from_numpy(table).float()

"""Loaders whose order depends on the seed and the epoch alone, for one process or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from torchmdnet.memory import total_memory
from torchmdnet.processes import end_with_parent

if TYPE_CHECKING:
    from torch_geometric.data import Batch

#: Blocks whose samples are shuffled together.
BLOCKS_AT_ONCE = 32

__all__ = ["EpochBatchSampler", "IndexedSubset", "Loader", "collect"]


class EpochBatchSampler(Sampler[np.ndarray]):
    """Batches of sample numbers, shuffled by (seed, epoch) and nothing else.

    A resumed run therefore sees the batches that an uninterrupted one would have seen, and no other random number can
    disturb them. With several processes each sample belongs to one of them, all have the same number of batches, and
    no sample is repeated (unless a process would otherwise run out of them).

    Args:
        num_samples: Size of the data set (n).
        batch_size: Largest number of samples in a batch, per process.
        shuffle: Whether the order changes with the epoch; without, it is ascending.
        seed: Seed of the order.
        rank: Number of this process. None: taken from ``torch.distributed`` when iterating.
        world_size: Number of processes, likewise.
        block: Shuffle blocks of this many neighbours, and the samples of every :data:`BLOCKS_AT_ONCE` blocks in a row,
            instead of all samples at once: each file is then read in a few places at a time.
        neighbours: Samples in the order in which they are stored, (n,); None is ascending.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        block: int | None = None,
        neighbours: np.ndarray | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.block = block
        self.neighbours = neighbours
        self._skip = 0
        self._place = None if rank is None or world_size is None else (rank, world_size)

    @property
    def sampler(self) -> EpochBatchSampler:
        """This object: Lightning looks for ``set_epoch`` under this name."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def skip(self, batches: int) -> None:
        """Let the next iteration begin after this many batches: a run continues inside an epoch."""
        self._skip = batches

    def _process(self) -> tuple[int, int]:
        if self._place is not None:
            return self._place
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def __len__(self) -> int:
        share = -(-self.num_samples // self._process()[1])  # of the process that has most
        return -(-share // self.batch_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        if not self.num_samples:
            return
        rank, world_size = self._process()
        order = self._order()
        mine = order[rank::world_size]
        number = len(self)
        if len(mine) < number:  # fewer samples than processes: everyone needs something to do
            mine = np.resize(order if not len(mine) else mine, number)
        if -(-len(mine) // self.batch_size) == number:
            batches = np.split(mine, np.arange(self.batch_size, len(mine), self.batch_size))
        else:
            batches = np.array_split(mine, number)
        first, self._skip = self._skip, 0
        yield from batches[first:]

    def _order(self) -> np.ndarray:
        """The samples of this epoch in the order in which they are served, (n,)."""
        total, block = self.num_samples, self.block
        if not self.shuffle:
            return np.arange(total)
        random = np.random.default_rng([self.seed, self.epoch])
        if block is None:
            return random.permutation(total)
        starts = random.permutation(-(-total // block)) * block
        order = (starts[:, None] + np.arange(block)).reshape(-1)
        order = order[order < total]
        for first in range(0, total, BLOCKS_AT_ONCE * block):
            random.shuffle(order[first : first + BLOCKS_AT_ONCE * block])
        return order if self.neighbours is None else self.neighbours[order]


class IndexedSubset(Subset):
    """A part of a data set that passes whole batches of numbers on.

    As far as other loaders are concerned, it is an ordinary ``Subset`` of samples.
    """

    def __init__(self, dataset: Any, indices: torch.Tensor) -> None:
        super().__init__(dataset, indices)  # type: ignore[arg-type]
        self._rows = np.asarray(indices, dtype=np.int64)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self._rows[index])]

    def __getitems__(self, indices: Any) -> list[Any]:
        return [self[int(i)] for i in indices]

    def batch(self, indices: Any) -> Batch:
        """Samples of this part as one batch."""
        return collect(self.dataset, self._rows[np.asarray(indices, dtype=np.int64)])

    @property
    def rows(self) -> np.ndarray:
        """The numbers of these samples in the whole data set, (n,)."""
        return self._rows

    def __len__(self) -> int:
        return len(self._rows)


class Loader(DataLoader):
    """A ``DataLoader`` over batches of sample numbers.

    A data set that collects batches at memory speed (``gathers_in_process``) is read in this process: handing batches
    from worker to worker would cost more than making them. Others, and data larger than memory, for which the disk has
    to be waited for, get ``num_workers`` workers, which end with this process. The batches are the same either way.

    Args:
        dataset: Gives samples, or batches through ``batch(indices)``.
        batch_sampler: Which samples make up each batch.
        num_workers: Worker processes for a data set that needs them.
    """

    def __init__(self, dataset: Any, batch_sampler: EpochBatchSampler, num_workers: int = 0) -> None:
        source = dataset.dataset if isinstance(dataset, Subset) else dataset
        has_transform = getattr(source, "transform", None) is not None
        at_memory_speed = getattr(source, "gathers_in_process", False) and not has_transform
        size = getattr(getattr(source, "frames", None), "nbytes", 0)
        workers = 0 if at_memory_speed and size < total_memory() else num_workers
        super().__init__(
            _WholeBatches(dataset),
            batch_sampler=batch_sampler,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=end_with_parent if workers else None,
            generator=torch.Generator().manual_seed(batch_sampler.seed),  # not a draw from the global one
        )


def collect(dataset: Any, indices: np.ndarray) -> Batch:
    """Samples as a ``torch_geometric`` batch: gathered by the data set itself if it can, else collated one by one."""
    gather: Callable[[np.ndarray], Batch] | None = getattr(dataset, "batch", None)
    if gather is not None:
        return gather(indices)
    from torch_geometric.data import Batch

    return Batch.from_data_list([dataset[int(i)] for i in indices])


class _WholeBatches(Dataset):
    """Hands a loader's request over as one piece."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: np.ndarray) -> Batch:
        return collect(self.dataset, indices)


def _as_it_is(batch: Any) -> Any:
    return batch

"""Loaders over whole batches, and their place in a checkpoint.

Lightning replaces the sampler of a `DataLoader` under DDP by one that pads with
repeated examples, unless the Trainer has `use_distributed_sampler=False`. It leaves
other iterables alone, so `Loader` holds a `DataLoader` and isn't one: our shards stay
as they are with either setting.
"""

from collections.abc import Iterator, Sized
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_resnorm.data.sampling import BatchKey, SkipBatchSampler


class BatchDataset(Protocol):
    """A dataset that is asked for whole batches."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: BatchKey) -> tuple[Tensor, ...]: ...


class BatchSource(Sized, Protocol):
    """An iterable over the keys of one rank's batches, of known length."""

    batch_size: int

    def __iter__(self) -> Iterator[BatchKey]: ...


class Loader:
    """Iterates over the batches of a `BatchDataset` that a batch sampler names.

    Args:
        dataset: Makes a batch from a `BatchKey`.
        batch_sampler: The keys, in order.
        num_workers: Processes that make batches; 0 makes them in this one.
        pin_memory: Whether batches are put into pinned memory (for CUDA).
    """

    def __init__(
        self,
        dataset: BatchDataset,
        batch_sampler: BatchSource,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.batch_sampler = dataset, batch_sampler
        self.num_workers = num_workers
        # Its own generator: else each start draws from the global random state. Workers
        # aren't persistent: an idle one holds up the garbage collector for 5 s when it
        # comes upon the loader in a reference cycle, as a Trainer makes them.
        self._loader = DataLoader(
            dataset,  # pyright: ignore[reportArgumentType]
            sampler=batch_sampler,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        yield from self._loader


class ResumableLoader(Loader):
    """A training loader whose place in the epoch goes into Lightning's checkpoints.

    `state_dict` and `load_state_dict` are what Lightning looks for. Outside of a
    Trainer call `set_epoch` before each epoch, as with torch's `DistributedSampler`.
    """

    batch_sampler: SkipBatchSampler

    def __init__(
        self,
        dataset: BatchDataset,
        batch_sampler: SkipBatchSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            dataset, batch_sampler, num_workers=num_workers, pin_memory=pin_memory
        )
        self._epoch, self._done, self._total = -1, 0, len(self)
        self._loaded = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.batch_sampler.sampler.set_epoch(epoch)

    def batch_indices(self) -> np.ndarray:
        """Return which training examples the batch handed out last holds.

        Returns:
            Indices into the training set, int64, in the batch's order.

        Raises:
            ValueError: If no batch of this epoch was handed out yet.
        """
        if self._done == 0:
            raise ValueError("batch_indices: no batch of this epoch was handed out yet")
        return self.batch_sampler.batches(self._epoch)[self._done - 1]

    # A generator, because Lightning calls iter() before it sets a resumed run's epoch.
    def __iter__(self) -> Iterator[Any]:
        epoch = self.batch_sampler.sampler.epoch
        # A checkpoint of an epoch's end is followed by another epoch, from its start.
        if not self._loaded or epoch != self._epoch:
            self._epoch, self._done = epoch, 0
        elif self._total != len(self):
            raise ValueError(
                f"the checkpoint is amid an epoch of {self._total} batches, this run's "
                f"epochs have {len(self)}: resume with the batch_size, num_train and "
                "devices it was made with"
            )
        self._loaded, self._total = False, len(self)
        self.batch_sampler.start = self._done
        for batch in self._loader:
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the place in the epoch: `epoch`, batches `done`, batches `total`."""
        return {"epoch": self._epoch, "done": self._done, "total": self._total}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next iteration go on from a saved place, if it is of that epoch."""
        self._epoch, self._done = state_dict["epoch"], state_dict["done"]
        self._total = state_dict["total"]
        self._loaded = True

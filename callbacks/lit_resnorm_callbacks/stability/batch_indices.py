"""Which training examples a batch holds, read off the batch sampler."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from lit_resnorm_callbacks.stability.collation import WatchedCollation


class BatchIndices:
    """Tells which examples of the training set the batch in hand holds.

    A loader that has `batch_indices()`, as our data modules' have, is asked. Of torch's
    `DataLoader`, what its batch sampler gives is kept in order until the batch arrives:
    with worker processes the sampler runs ahead.

    Args:
        name: The probe's name, for messages.
        batch_dim: Dimension that counts examples in a batch.
    """

    def __init__(self, name: str, batch_dim: int = 0) -> None:
        self.name = name
        self._batch_dim = batch_dim
        # Several loaders: a search for a rate trains on others amid a run.
        self._recorded: dict[DataLoader[Any], _RecordedBatches] = {}
        self._collations: dict[DataLoader[Any], WatchedCollation] = {}
        self._replaced: list[DataLoader[Any]] = []
        self._put_back: Callable[[], None] | None = None

    def watch(self, trainer: Trainer) -> None:
        """Have the training loaders' samplers recorded from their first batch on.

        Workers are given batches before the first hook of a fit, so the loader is met
        where Lightning hands it to the strategy.
        """
        strategy = trainer.strategy
        process = strategy.process_dataloader

        def recorded(dataloader: object) -> object:
            dataloader = process(dataloader)
            if trainer.training and isinstance(dataloader, DataLoader):
                self._record(dataloader)
            return dataloader

        strategy.process_dataloader = recorded
        self._put_back = lambda: vars(strategy).pop("process_dataloader", None)

    def release(self) -> None:
        """Give the strategy its own method back."""
        if self._put_back is not None:
            self._put_back()
            self._put_back = None
        for loader in self._replaced:
            loader.collate_fn = self._collations[loader].collate
        self._replaced.clear()

    def num_examples(self, trainer: Trainer) -> int:
        """Return the size of the training set.

        Raises:
            ValueError: If examples of the loader have no indices.
        """
        loader = trainer.train_dataloader
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"{self.name}: {type(dataset).__name__} is iterable: its examples have"
                " no indices, so none can be left out"
            )
        readable = hasattr(loader, "batch_indices") or isinstance(loader, DataLoader)
        if dataset is None or not readable:
            raise ValueError(
                f"{self.name}: can't tell which examples the batches of a"
                f" {type(loader).__name__} hold; use one torch DataLoader, or give the"
                " loader batch_indices() and dataset"
            )
        if not getattr(loader, "in_order", True):
            raise ValueError(f"{self.name}: the training loader has in_order=False")
        return len(dataset)

    def current(self, trainer: Trainer) -> list[int]:
        """Return the indices of the batch in hand; call once a batch.

        Raises:
            ValueError: If they aren't known, or the batch's rows are in another order.
        """
        loader: Any = trainer.train_dataloader
        if hasattr(loader, "batch_indices"):
            return [int(index) for index in loader.batch_indices()]
        recorded = self._recorded.get(loader)
        if recorded is None or not recorded.given:
            raise ValueError(
                f"{self.name}: a batch came that no sampler of the loader had named"
            )
        collation = self._collations.get(loader)
        if collation is not None and collation.found:
            raise ValueError(
                f"{self.name}: the training loader's collate_fn"
                f" {_name(collation.collate)} reorders, mixes or changes rows:"
                " collated one by one, examples give others; which row to leave out"
                " can't be told"
            )
        return _indices(recorded.given.popleft())

    def _record(self, loader: DataLoader[Any]) -> None:
        if isinstance(loader.dataset, IterableDataset) or loader in self._recorded:
            return
        batched = loader.batch_sampler is not None
        name = "batch_sampler" if batched else "sampler"
        self._recorded[loader] = _RecordedBatches(getattr(loader, name))
        # DataLoader refuses to have it set, lest the loader's options contradict it.
        vars(loader)[name] = self._recorded[loader]
        if not batched:
            return
        collate: Any = loader.collate_fn
        if not isinstance(collate, WatchedCollation):  # as another probe may have done
            loader.collate_fn = collate = WatchedCollation(collate, self._batch_dim)
            self._replaced.append(loader)
        self._collations[loader] = collate


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


class _RecordedBatches:
    """A sampler of batches that keeps what it gives."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.given: deque[Any] = deque()

    def __getattr__(self, name: str) -> Any:
        if name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.given = given = deque()
        for key in self.batches:
            given.append(key)
            yield key


def _indices(key: Any) -> list[int]:
    """Return the indices in what a batch sampler gave: alone, or beside the epoch."""
    key = getattr(key, "indices", key)
    if not hasattr(key, "__iter__"):
        return [int(key)]
    return [int(each[-1] if hasattr(each, "__getitem__") else each) for each in key]

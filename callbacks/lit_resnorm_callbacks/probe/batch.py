"""The fixed batch on which a probe measures."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from lit_resnorm.measures.passes.batch_dim import as_given, examples_first
from lit_resnorm.measures.passes.batches import joined, num_rows, take_rows
from lit_resnorm.measures.passes.kept_state import data_kept
from lit_resnorm.measures.passes.untouched import Reduce, untouched
from lit_resnorm_callbacks.probe.ranks import measured_together


def fixed_batch(
    trainer: Trainer,
    module: LightningModule,
    num_examples: int,
    *,
    name: str,
    batch: Any = None,
    dataloader: Iterable[Any] | None = None,
    batch_dim: int = 0,
    or_training: bool = False,
) -> Any:
    """Return the whole probe batch, the same on every rank, on the module's device.

    Its examples are in the first dimension, whatever `batch_dim` is.

    The first of: `batch`; `dataloader`; the data module's `probe_dataloader()`; the
    loader of the evaluation under way, or in `fit` the validation loader. A loader that
    shuffles is read with fixed random states, and not through worker processes, so the
    run's own loaders and random numbers are left alone.

    Args:
        trainer: A running trainer.
        module: Its module, whose batch-transfer hooks apply.
        num_examples: How many examples to take from the front.
        name: The probe's name, for messages.
        batch: A batch to take as it is.
        dataloader: A loader to read from.
        batch_dim: Dimension that counts examples in what is read.
        or_training: Whether the training loader serves where there is no other.

    Raises:
        ValueError: If there is no loader to read from, it holds no example, or a batch
            doesn't tell how many; begins with `name`.
    """

    def read(_: Reduce) -> Any:
        if batch is not None:
            return _counted(batch, batch_dim, name)[0]
        source = dataloader
        if source is None:
            source = _loader(trainer, name, or_training)
        try:
            return first_examples(source, num_examples, name, batch_dim)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"{name}: the probe batch can't be read ({type(error).__name__}:"
                f" {error}): give batch= or dataloader="
            ) from error

    data = getattr(trainer, "datamodule", None)
    with untouched(module), data_kept(data), torch.no_grad():
        batch = measured_together(trainer, read)
        if trainer.world_size > 1:
            batch = trainer.strategy.broadcast(batch)
        batch = take_rows(batch, slice(num_examples))
        if not num_rows(batch):
            raise ValueError(f"{name}: the probe batch holds no example")
        # the module's hooks know its own batches
        batch = trainer.precision_plugin.convert_input(as_given(batch, batch_dim))
        batch = trainer.strategy.batch_to_device(batch, module.device)
        return examples_first(batch, batch_dim)


def batch_source(trainer: Trainer, *, batch: Any, dataloader: Any) -> Any:
    """Return what the probe batch is read from: two that are the same give the same.

    Args:
        trainer: A running trainer.
        batch: The batch, where it is given.
        dataloader: The loader, where it is given.
    """
    if batch is not None or dataloader is not None:
        return dataloader if batch is None else batch
    data = _probe_data(trainer)
    return _running_loop(trainer)._data_source.instance if data is None else data


def _probe_data(trainer: Trainer) -> Any:
    data = getattr(trainer, "datamodule", None)
    return data if hasattr(data, "probe_dataloader") else None


def _running_loop(trainer: Trainer) -> Any:
    return {
        TrainerFn.FITTING: trainer.fit_loop.epoch_loop.val_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
    }[trainer.state.fn]  # type: ignore[index]


def _loader(trainer: Trainer, name: str, or_training: bool) -> Iterable[Any]:
    data = _probe_data(trainer)
    if data is not None:
        return data.probe_dataloader()
    # The loader as it was given: Lightning's own copy may carry a distributed sampler,
    # which pads with duplicates.
    source = _running_loop(trainer)._data_source
    if source.is_defined():
        given = source.dataloader()
        given = given.iterables if isinstance(given, CombinedLoader) else given
        loaders = pytree.tree_leaves(given, is_leaf=lambda x: isinstance(x, DataLoader))
        if loaders and isinstance(loaders[0], Iterator):
            raise ValueError(
                f"{name}: the validation loader is a {type(loaders[0]).__name__}, which"
                " can be read once only; give the probe batch= or dataloader="
            )
        if loaders:
            return loaders[0]
    if or_training and isinstance(trainer.train_dataloader, DataLoader):
        return trainer.train_dataloader
    raise ValueError(
        f"{name}: there is no validation loader to take the probe batch from; give the"
        " probe batch= or dataloader=, or the data module probe_dataloader()"
    )


def _counted(batch: Any, batch_dim: int, name: str) -> tuple[Any, int]:
    """Return a batch with examples in the first dimension, and their number."""
    try:
        batch = examples_first(batch, batch_dim)
        return batch, num_rows(batch)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def first_examples(
    loader: Iterable[Any], num_examples: int, name: str, batch_dim: int = 0
) -> Any:
    """Return a loader's first batches, joined, that hold so many examples or all.

    The global random states are set, and those of generators that the loader, its
    samplers or its dataset hold, so that a shuffling loader gives the same; the latter
    are put back, as is what else they hold.

    Args:
        loader: Yields batches.
        num_examples: How many examples to take.
        name: Of who asks, for messages.
        batch_dim: Dimension that counts examples; in what is returned, the first does.

    Raises:
        ValueError: If the loader holds no example, or a batch doesn't tell how many;
            begins with `name`.
    """
    torch.default_generator.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    batches, num = [], 0
    with data_kept(loader):
        for batch in _in_process(loader):
            rows, size = _counted(batch, batch_dim, name)
            batches.append(rows)
            num += size
            if num >= num_examples:
                break
    if not num:
        raise ValueError(f"{name}: the loader of the probe batch holds no example")
    try:
        return joined(batches)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _in_process(loader: Iterable[Any]) -> Iterator[Any]:
    if not isinstance(loader, DataLoader) or not loader.num_workers:
        return iter(loader)
    if isinstance(loader.dataset, IterableDataset):
        how: dict[str, Any] = {"batch_size": loader.batch_size}
    elif loader.batch_sampler is None:
        how = {"batch_size": None, "sampler": loader.sampler}
    else:
        how = {"batch_sampler": loader.batch_sampler}
    return iter(DataLoader(loader.dataset, collate_fn=loader.collate_fn, **how))

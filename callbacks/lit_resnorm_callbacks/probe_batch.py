"""The fixed batch on which a probe measures."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from lit_resnorm.measures.observe import num_rows, take_rows, untouched

LABELS = ("labels", "label", "targets", "target", "y")
"""Names under which a dict of a batch holds the labels."""


def target_of(batch: Any) -> Any:
    """Return a batch's target: a tuple's second element, or a dict's by usual names."""
    if isinstance(batch, Mapping):
        return next((batch[name] for name in LABELS if name in batch), None)
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def targets_of(batch: Any) -> Tensor | None:
    """Return a batch's target where that is a tensor."""
    found = target_of(batch)
    return found if isinstance(found, Tensor) else None


def network_output(module: nn.Module, batch: Any) -> Any:
    """Return the module's output on a batch, however the batch is laid out.

    A module's own `probe_forward(batch)` comes first. Else a dict gives the arguments
    that `forward` names, a tuple or list its first element, a tensor itself.

    Raises:
        ValueError: If a dict lacks an argument that `forward` requires.
    """
    own = getattr(module, "probe_forward", None)
    if own is not None:
        return own(batch)
    if isinstance(batch, dict):
        return module(**_named_arguments(module, batch))
    return module(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _named_arguments(module: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return batch
    required = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
    ]
    if missing := [name for name in required if name not in batch]:
        raise ValueError(
            f"{type(module).__name__}.forward needs {', '.join(missing)}, and the probe"
            f" batch has only {', '.join(batch)}: give forward_fn or probe_forward"
        )
    return {p.name: batch[p.name] for p in parameters if p.name in batch}


def fixed_batch(
    trainer: Trainer,
    module: LightningModule,
    num_examples: int,
    *,
    name: str,
    batch: Any = None,
    dataloader: Iterable[Any] | None = None,
) -> Any:
    """Return the whole probe batch, the same on every rank, on the module's device.

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

    Raises:
        ValueError: If there is no loader to read from, or it holds no example.
    """
    with untouched(module), torch.no_grad():
        if batch is None:
            source = dataloader if dataloader is not None else _loader(trainer, name)
            batch = first_examples(source, num_examples, name)
        if trainer.world_size > 1:
            batch = trainer.strategy.broadcast(batch)
        batch = take_rows(batch, slice(num_examples))
        if not num_rows(batch):
            raise ValueError(f"{name}: the probe batch holds no example")
        batch = trainer.precision_plugin.convert_input(batch)
        return trainer.strategy.batch_to_device(batch, module.device)


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


def _loader(trainer: Trainer, name: str) -> Iterable[Any]:
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
    raise ValueError(
        f"{name}: there is no validation loader to take the probe batch from; give the"
        " probe batch= or dataloader=, or the data module probe_dataloader()"
    )


def first_examples(loader: Iterable[Any], num_examples: int, name: str) -> Any:
    """Return a loader's first batches, joined, that hold so many examples or all.

    The global random states are set, so that a shuffling loader gives the same.

    Raises:
        ValueError: If the loader holds no example; begins with `name`.
    """
    torch.default_generator.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    batches, num = [], 0
    for batch in _in_process(loader):
        batches.append(batch)
        num += num_rows(batch)
        if num >= num_examples:
            break
    if not num:
        raise ValueError(f"{name}: the loader of the probe batch holds no example")
    return joined(batches)


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


def joined(batches: Sequence[Any]) -> Any:
    """Return one batch of the rows of several.

    Tensors that don't count examples, and whatever is no tensor, are the first batch's;
    lists without a tensor, as of file names, are strung together.
    """
    if len(batches) == 1:
        return batches[0]
    nums = [num_rows(batch) for batch in batches]

    def join(parts: Sequence[Any]) -> Any:
        first = parts[0]
        if isinstance(first, Tensor):
            full = first.ndim and [len(part) for part in parts] == nums
            return torch.cat([*parts]) if full else first
        if isinstance(first, Mapping):
            return {key: join([part[key] for part in parts]) for key in first}
        if isinstance(first, (tuple, list)):
            if not any(isinstance(x, Tensor) for x in pytree.tree_leaves(first)):
                return [*chain.from_iterable(parts)]
            inner = [join(column) for column in zip(*parts, strict=True)]
            named = hasattr(first, "_fields")
            return type(first)(*inner) if named else type(first)(inner)
        return first

    return join(batches)

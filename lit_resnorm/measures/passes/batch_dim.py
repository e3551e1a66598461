"""Batches whose examples another dimension counts than the first: time-major ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.passes.batches import leaves, mapped, num_rows, take_rows
from lit_resnorm.measures.passes.untouched import untouched


def examples_first(batch: Any, batch_dim: int) -> Any:
    """Return the batch with the examples in the first dimension of every tensor.

    Args:
        batch: A batch.
        batch_dim: The dimension that counts examples, of the tensors that have it;
            those of fewer dimensions, as labels of whole sequences, count them in their
            first.

    Raises:
        ValueError: If no tensor has so many dimensions.
    """
    if not batch_dim:
        return batch
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]
    if tensors and not any(leaf.ndim > batch_dim for leaf in tensors):
        shapes = " and ".join(str(tuple(leaf.shape)) for leaf in tensors)
        raise ValueError(
            f"batch_dim is {batch_dim}, and the batch's tensors, of shape {shapes},"
            " lack that dimension"
        )
    return mapped(lambda leaf: _moved(leaf, batch_dim, 0), batch)


def as_given(batch: Any, batch_dim: int) -> Any:
    """Return a batch with the examples where its network has them."""
    return mapped(lambda leaf: _moved(leaf, 0, batch_dim), batch)


def _moved(leaf: Any, source: int, to: int) -> Any:
    moves = isinstance(leaf, Tensor) and leaf.ndim > max(source, to)
    return leaf.movedim(source, to) if moves else leaf


def targets_first(target_fn: Callable[..., Any], batch_dim: int) -> Callable[..., Any]:
    """Return `target_fn`, of batches and for labels with the examples first."""
    return partial(_targets, target_fn, batch_dim) if batch_dim else target_fn


def _targets(target_fn: Callable[..., Any], batch_dim: int, batch: Any) -> Any:
    found = target_fn(as_given(batch, batch_dim))
    return mapped(lambda leaf: _moved(leaf, batch_dim, 0), found)


class ExamplesFirst:
    """Runs a network whose batches are not as the measures have them.

    Args:
        forward_fn: Takes the module and a batch as the module has it.
        batch_dim: The dimension that counts its examples.
    """

    def __init__(self, forward_fn: Callable[..., Any], batch_dim: int) -> None:
        self.forward_fn = forward_fn
        self.batch_dim = batch_dim
        self._output_dims: list[int] | None = None

    def __call__(self, module: nn.Module, batch: Any) -> Any:
        """Return the output on a batch, both with examples in the first dimension."""
        output = self.forward_fn(module, as_given(batch, self.batch_dim))
        dims = iter(self._output_dims or self._by_size(output, num_rows(batch)))
        return mapped(
            lambda leaf: (
                _moved(leaf, next(dims), 0) if isinstance(leaf, Tensor) else leaf
            ),
            output,
        )

    def look(self, module: nn.Module, batch: Any) -> None:
        """Find where the outputs count examples: where two are more than one.

        Args:
            module: The network; it is left as it was.
            batch: A batch with the examples in the first dimension.

        Raises:
            ValueError: If an output counts them nowhere.
        """
        with untouched(module, norm_mode="eval") as run, torch.no_grad():
            one, two = (
                leaves(run(lambda rows=rows: self.forward_fn(module, rows)))
                for rows in (
                    as_given(take_rows(batch, torch.zeros(num).long()), self.batch_dim)
                    for num in (1, 2)
                )
            )
        dims = []
        for few, more in zip(one, two, strict=True):
            if not isinstance(few, Tensor):
                continue
            where = [d for d in range(few.ndim) if few.shape[d] != more.shape[d]]
            if len(where) > 1 or (not where and few.ndim):
                raise ValueError(
                    f"an output of shape {tuple(few.shape)} for one example and"
                    f" {tuple(more.shape)} for two counts examples in no dimension:"
                    " give forward_fn"
                )
            dims += where or [0]
        self._output_dims = dims

    def _by_size(self, output: Any, num: int) -> list[int]:
        tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
        first = [x.ndim <= self.batch_dim or x.shape[0] == num for x in tensors]
        return [0 if is_first else self.batch_dim for is_first in first]

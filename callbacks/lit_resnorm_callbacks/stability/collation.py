"""Sees whether the rows of a batch are its examples, in the order of the sampler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate, default_convert

from lit_resnorm.measures.passes.batch_dim import examples_first
from lit_resnorm.measures.passes.batches import leaves
from lit_resnorm.measures.passes.random_states import RandomStates, random_states_kept

Collate = Callable[[list[Any]], Any]

NUM_CHECKED = 16
"""Batches that each process of a loader checks: some may hold their order by chance."""
_NUM_REPLACED = 4


class WatchedCollation:
    """A collate function whose first batches are compared with single examples.

    A function that sorts its rows, or mixes them, makes it impossible to say which row
    lacks when an example is left out. Works in worker processes too: what they find is
    in shared memory.

    Args:
        collate: The loader's own function.
        batch_dim: Dimension that counts examples in what it returns.
    """

    def __init__(self, collate: Collate, batch_dim: int = 0) -> None:
        self.collate = collate
        self._batch_dim = batch_dim
        self._left = 0 if collate in (default_collate, default_convert) else NUM_CHECKED
        self._found = torch.zeros(1, dtype=torch.int8).share_memory_()

    @property
    def found(self) -> bool:
        """Whether a batch had rows that are not its examples."""
        return bool(self._found)

    def __call__(self, examples: Any) -> Any:
        """Return the batch of these examples."""
        if not self._left or not isinstance(examples, list):
            return self.collate(examples)
        self._left -= 1
        with random_states_kept():
            # Copies, as a collate function may write into the examples.
            if not _checked(self._rows_first, examples):
                self._found.fill_(1)
        return self.collate(examples)

    def _rows_first(self, examples: list[Any]) -> Any:
        return examples_first(self.collate(examples), self._batch_dim)


def _checked(collate: Collate, examples: list[Any]) -> bool:
    try:
        return rows_are_examples(collate, examples)
    except Exception:
        # It takes no single examples: what its rows are can't be told.
        return False


def rows_are_examples(collate: Collate, examples: list[Any]) -> bool:
    """Return whether a collate function's row r is the r-th example, whatever follows.

    Each row must be that of the example collated alone, up to padding. Where the
    function draws random numbers, replacing one example must change no other row.

    Args:
        collate: The function.
        examples: The examples of a batch.
    """
    before = RandomStates.now()
    whole = _tensors_by_row(collate(copy.deepcopy(examples)), len(examples))
    if before.moved():
        before.set()
        return other_rows_stay(collate, examples)
    alone = [_tensors_by_row(collate([copy.deepcopy(each)]), 1) for each in examples]
    return all(
        len(single) == len(whole)
        and all(
            _same_but_padding(x[r], y[0]) for x, y in zip(whole, single, strict=True)
        )
        for r, single in enumerate(alone)
    )


def other_rows_stay(collate: Collate, examples: list[Any]) -> bool:
    """Return whether replacing one of the first examples changes no other row.

    Args:
        collate: The function; each call draws the same random numbers.
        examples: The examples of a batch.
    """
    before = RandomStates.now()
    whole = _tensors_by_row(collate(copy.deepcopy(examples)), len(examples))
    for r in range(min(_NUM_REPLACED, len(examples) - 1)):
        others = [*copy.deepcopy(examples)]
        others[r] = copy.deepcopy(examples[r + 1])
        before.set()
        found = _tensors_by_row(collate(others), len(examples))
        for s in range(len(examples)):
            if s != r and not all(
                _same_but_padding(x[s], y[s]) for x, y in zip(whole, found, strict=True)
            ):
                return False
    return True


def _tensors_by_row(batch: Any, num: int) -> list[Tensor]:
    """Return the tensors of a batch that have a row for each example."""
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]
    return [x for x in tensors if x.ndim and x.shape[0] == num]


def _same_but_padding(x: Tensor, y: Tensor) -> bool:
    """Return whether two rows agree where neither is padded, at the front or back."""
    if x.ndim != y.ndim:
        return x.numel() == y.numel() and _equal(x.flatten(), y.flatten())
    sizes = [min(a, b) for a, b in zip(x.shape, y.shape, strict=True)]
    front = [slice(size) for size in sizes]
    if _equal(x[tuple(front)], y[tuple(front)]):
        return True
    ends = [
        [slice(n - size, n) for n, size in zip(t.shape, sizes, strict=True)]
        for t in (x, y)
    ]
    return _equal(x[tuple(ends[0])], y[tuple(ends[1])])


def _equal(x: Tensor, y: Tensor) -> bool:
    return bool(((x == y) | ((x != x) & (y != y))).all())

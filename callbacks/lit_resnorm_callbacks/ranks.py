"""Sums over ranks that a failure on one of them cannot leave hanging."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_resnorm.measures.passes.untouched import Reduce, identity

T = TypeVar("T")

_FINE, _FAILED, _OUT_OF_MEMORY = 0, 1, 2


class OtherRankError(RuntimeError):
    """A measurement failed on another rank, so that it ended on this one too."""


class OutOfMemoryError(RuntimeError):
    """A measurement ran out of memory on some rank."""


def measured_together(trainer: Trainer, measure: Callable[[Reduce], T]) -> T:
    """Return `measure(reduce)`, failing on all ranks if it fails on one.

    Before each sum the ranks tell each other whether one has failed since the last;
    a rank that fails tells once, at the others' next sum or at their end. So all make
    the same collectives whatever happens, and none waits for one that has left.

    Args:
        trainer: Knows the ranks.
        measure: Takes a `Reduce`; calls it equally often on every rank.

    Raises:
        OutOfMemoryError: If a rank ran out of memory.
        OtherRankError: If `measure` failed on another rank.
        Exception: What `measure` raised on this rank.
    """
    ranks = _Ranks(trainer)
    try:
        result = measure(ranks.sum if trainer.world_size > 1 else identity)
    except (OtherRankError, OutOfMemoryError):
        raise
    except Exception as error:
        code = _OUT_OF_MEMORY if _is_out_of_memory(error) else _FAILED
        worst = ranks.worst(code)
        if worst == _OUT_OF_MEMORY:
            raise OutOfMemoryError(str(error)) from error
        raise
    ranks.agree()
    return result


class _Ranks:
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def sum(self, tensor: Tensor) -> Tensor:
        self.agree()
        return self._reduce(tensor.detach().clone())

    def agree(self) -> None:
        worst = self.worst(_FINE)
        if worst == _OUT_OF_MEMORY:
            raise OutOfMemoryError("another rank ran out of memory")
        if worst == _FAILED:
            raise OtherRankError("the measurement failed on another rank")

    def worst(self, code: int) -> int:
        """Return the worst code of any rank, this one's included."""
        if self.trainer.world_size == 1:
            return code
        codes = torch.zeros(3, device=self.trainer.strategy.root_device)
        codes[code] = 1
        return int(self._reduce(codes).nonzero().max())

    def _reduce(self, tensor: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        if not isinstance(reduced, Tensor):
            raise TypeError(
                f"{type(self.trainer.strategy).__name__} gave no tensor back"
            )
        return reduced


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)

"""Work that a failure on one rank ends on all, so that none is left waiting."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_resnorm.measures.passes.untouched import Reduce, identity

T = TypeVar("T")

_FINE, _REFUSED, _FAILED, _OUT_OF_MEMORY = range(4)

# Identity of what a call inside another told; the object may be raised again later.
_told_rank: ContextVar[int | None] = ContextVar("told", default=None)


class OtherRankError(RuntimeError):
    """A measurement failed on another rank, so that it ended on this one too."""


class OtherRankRefusalError(OtherRankError, ValueError):
    """Another rank refused."""


class OutOfMemoryError(RuntimeError):
    """A measurement ran out of memory on some rank."""


class NothingSmallerError(RuntimeError):
    """A measurement ran out of memory, and needs no less in another way."""


def measured_together(trainer: Trainer, measure: Callable[[Reduce], T]) -> T:
    """Return `measure(reduce)`, failing on all ranks if it fails on one.

    Before each sum the ranks tell each other whether one has failed since the last;
    a rank that fails tells once, at the others' next sum or at their end. So all make
    the same collectives whatever happens, and none waits for one that has left. Of
    several failures the worst counts on all: running out of memory, then others, then
    refusals (ValueError). Calls may be nested.

    Args:
        trainer: Knows the ranks.
        measure: Takes a `Reduce`; calls it equally often on every rank.

    Raises:
        OutOfMemoryError: If a rank ran out of memory.
        OtherRankError: If `measure` failed on another rank; says why.
        Exception: What `measure` raised on this rank.
    """
    ranks = _Ranks(trainer)
    _told_rank.set(None)
    try:
        result = measure(ranks.sum if trainer.world_size > 1 else identity)
    except Exception as error:
        if id(error) == _told_rank.get():
            raise
        code = _code(error)
        worst, reason = ranks.exchange(code, f"{type(error).__name__}: {error}")
        if worst == _OUT_OF_MEMORY and code == worst:
            raise _telling(OutOfMemoryError(str(error))) from error
        if worst != code:
            raise _of_another(worst, reason) from error
        _telling(error)
        raise
    ranks.agree()
    return result


def _telling(error: Exception) -> Exception:
    """Return an exception, noted as one that the other ranks know of."""
    _told_rank.set(id(error))
    return error


class _Ranks:
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def sum(self, tensor: Tensor) -> Tensor:
        self.agree()
        return self._reduce(tensor.detach().clone())

    def agree(self) -> None:
        worst, reason = self.exchange(_FINE)
        if worst != _FINE:
            raise _of_another(worst, reason)

    def exchange(self, code: int, reason: str = "") -> tuple[int, str]:
        """Return the worst code of any rank, this one's included, and its reason."""
        trainer = self.trainer
        if trainer.world_size == 1:
            return code, reason
        codes = torch.zeros(trainer.world_size, device=trainer.strategy.root_device)
        codes[trainer.global_rank] = code
        worst, rank = self._reduce(codes).max(0)
        if worst == _FINE:
            return _FINE, ""
        # every rank knows of the failure here, so all take part
        said = trainer.strategy.broadcast(reason, src=int(rank))
        return int(worst), f"on rank {int(rank)}, {said}"

    def _reduce(self, tensor: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        if not isinstance(reduced, Tensor):
            raise TypeError(
                f"{type(self.trainer.strategy).__name__} gave no tensor back"
            )
        return reduced


def _of_another(code: int, reason: str) -> Exception:
    kinds = {_OUT_OF_MEMORY: OutOfMemoryError, _REFUSED: OtherRankRefusalError}
    return _telling(kinds.get(code, OtherRankError)(reason))


def _code(error: Exception) -> int:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, OutOfMemoryError)):
        return _OUT_OF_MEMORY
    if isinstance(error, NothingSmallerError):
        return _FAILED
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):
        return _OUT_OF_MEMORY
    return _REFUSED if isinstance(error, ValueError) else _FAILED

"""Strategies of a Trainer, and what a probe needs of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_resnorm.measures.passes.untouched import Reduce, untouched

# Strategies that leave only a part of the weights on a rank.
_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def check_strategy(trainer: Trainer, name: str) -> None:
    """Refuse strategies that share the weights out.

    Raises:
        ValueError: If the trainer has one; `name` is the probe's, for the message.
    """
    strategy = type(trainer.strategy).__name__
    if strategy in _SHARDING:
        raise ValueError(
            f"{name}: {strategy} leaves a part of the weights on each rank,"
            " and a probe needs them whole"
        )


@contextmanager
def buffers_of_rank_0(
    trainer: Trainer, module: LightningModule, reduce: Reduce
) -> Iterator[None]:
    """Give every rank the buffers of rank 0, and put its own back.

    Running statistics drift apart between ranks; rank 0's are what is saved.

    Args:
        trainer: Knows the ranks.
        module: Whose buffers they are.
        reduce: Sums over ranks.
    """
    if trainer.world_size == 1:
        yield
        return
    with untouched(module), torch.no_grad():
        for buffer in module.buffers():
            # a sum with zeros, because only sums tell of a rank that has failed
            own = buffer if trainer.global_rank == 0 else torch.zeros_like(buffer)
            own = own.byte() if own.dtype == torch.bool else own
            buffer.copy_(reduce(own))
        yield

"""Strategies of a Trainer, and what a probe needs of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lit_resnorm.measures.passes.untouched import Reduce, untouched
from lit_resnorm.quantities import SITE_KEY

# Strategies that leave only a part of the weights on a rank.
_BY_TENSOR = "ModelParallelStrategy"
_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", _BY_TENSOR)

# A pipe takes 64 KiB before it is read; the rest is for what else Lightning writes.
_SENT_BACK = 2**15


def check_strategy(trainer: Trainer, name: str, *, takes_shards: bool = False) -> None:
    """Refuse strategies that share the weights out.

    Args:
        trainer: Has a strategy.
        name: The probe's, for the message.
        takes_shards: Whether the probe measures sharded tensors (FSDP2, tensor
            parallelism).

    Raises:
        ValueError: If the trainer has one.
    """
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    found = [kind for kind in kinds if kind in _SHARDING]
    if found and not (takes_shards and found[0] == _BY_TENSOR):
        strategy = kinds[0]
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


def keep_sendable(trainer: Trainer, prefix: str) -> None:
    """Take values by site off `callback_metrics` where their number would block.

    Strategies that fork or spawn write the metrics into a pipe, and nobody reads it
    before the writing process has ended: where they are more than the pipe takes, a
    run never ends. Loggers have got all values.

    Args:
        trainer: At its end.
        prefix: First part of the values' names.
    """
    if not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        return
    metrics = trainer.callback_metrics
    sent = io.BytesIO()
    torch.save(dict(metrics), sent)  # as Lightning does, some 300 bytes a value
    if sent.tell() <= _SENT_BACK:
        return
    for key in [*metrics]:
        if key.startswith(f"{prefix}/") and SITE_KEY.fullmatch(key):
            del metrics[key]

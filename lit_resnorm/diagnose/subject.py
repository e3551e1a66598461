"""What a diagnosis is of, and what is told of its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_resnorm.measures.losses import Loss
from lit_resnorm.measures.passes.batches import Forward

Progress = Callable[[str, int, int], None]
"""Takes the stage, how much of it is done, and of how much."""


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""
    del stage, done, total


@dataclass(frozen=True)
class Subject:
    """A network on the batch that it is measured on.

    Attributes:
        module: The network.
        batch: The batch, examples first.
        loss: Its loss.
        forward: Runs the network on a batch.
        norm_mode: What batch norm does.
        told: Told how far a diagnosis has come.
    """

    module: nn.Module
    batch: Any
    loss: Loss
    forward: Forward
    norm_mode: str = "frozen"
    told: Progress = silent

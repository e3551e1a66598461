"""When a probe measures."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class Cadence:
    """When to measure, in optimizer steps.

    Attributes:
        every_n_steps: Steps between measurements.
        at_start: Measure before the first step.
        at_end: Measure after the last one.
    """

    every_n_steps: int = 100
    at_start: bool = True
    at_end: bool = True

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ValueError(
                f"cadence is {self.every_n_steps}; it must be at least 1 optimizer step"
            )

    def due(self, step: int) -> bool:
        """Return whether to measure after this many steps."""
        return step > 0 and step % self.every_n_steps == 0


def steps_taken(trainer: Trainer, *, in_batch: bool = False) -> int:
    """Return the optimizer steps that the weights have taken.

    With several optimizers, which each count in `trainer.global_step`, it is the number
    of batches that stepped.

    Args:
        trainer: A trainer in `fit`.
        in_batch: Whether the batch in hand has not been counted yet.
    """
    if len(trainer.optimizers) < 2:
        return trainer.global_step
    loop = trainer.fit_loop.epoch_loop
    stepped = in_batch and not loop._should_accumulate()
    return loop._batches_that_stepped + stepped


def is_dry_run(trainer: Trainer) -> bool:
    """Say whether this is Lightning's `fast_dev_run`."""
    return bool(getattr(trainer, "fast_dev_run", False))

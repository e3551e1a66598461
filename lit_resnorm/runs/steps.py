"""Which optimizer step a logged value belongs to, and how a run ended.

The step of a value is the number of optimizer steps that the weights it was
computed at have taken (see `lit_resnorm.runs.optimizer_steps`). Lightning numbers
validation rows and the rows at the end of a training epoch one lower; a logger that
asks `StepCount` puts them right.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import nn

from lit_resnorm.runs.optimizer_steps import (
    checkpoint_steps,
    steps_before_batch,
    steps_taken,
    track_steps,
)

_LOSS = re.compile(r"(^|[/_.])loss($|[/_.])")


class StepCount:
    """The steps of the values that a logger of a Trainer is given."""

    def __init__(self) -> None:
        self._trainer: weakref.ref[Trainer] | None = None
        self._evaluated: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the Trainer, which a spawned process can't be given."""
        return {**self.__dict__, "_trainer": None}

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer, once it has begun."""
        return self._trainer() if self._trainer is not None else None

    def begin(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Learn the Trainer of a module that is about to run.

        Returns:
            The checkpoint that was loaded, or None.

        Raises:
            TypeError: If the module is none of Lightning's.
        """
        if not isinstance(model, LightningModule):
            raise TypeError(f"log_graph: {type(model)} has no Trainer")
        trainer = model.trainer
        self._trainer = weakref.ref(trainer)
        # the loops get their state only after this call, so it is read here
        checkpoint = trainer._checkpoint_connector._loaded_checkpoint
        of_weights = checkpoint and trainer.state.fn != "fit"
        self._evaluated = checkpoint_steps(checkpoint) if of_weights else None
        if trainer.state.fn == "fit":
            track_steps(trainer, model, checkpoint)
        return checkpoint

    def of(self, step: int | None, *, of_lightning: bool = False) -> int | None:
        """Return the step of a value; None where there is neither step nor Trainer.

        Args:
            step: As the logger was given it; None: the present weights.
            of_lightning: Whether Lightning may have numbered it, not a callback.
        """
        trainer = self.trainer
        if trainer is None:
            return step
        counted = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self._evaluated is not None:
            # the loops don't know how far the weights of a checkpoint had come
            unknown = step in (None, counted, trainer.global_step)
            return self._evaluated if unknown else cast(int, step)
        if step is None:
            return steps_taken(trainer)
        in_hook = trainer.lightning_module._current_fx_name is not None
        if step != counted or in_hook or not of_lightning:
            return step
        # inside an epoch a training row comes after the step that its loss led to
        inside = trainer._logger_connector._first_loop_iter is not None
        if trainer.training and inside:
            return steps_before_batch(trainer)
        return steps_taken(trainer)


def run_status(status: str, trainer: Trainer) -> str:
    """Return how a run ended.

    Args:
        status: Lightning's word, "success" or "failed".
        trainer: The Trainer.

    Returns:
        `finished`, `diverged` (see `has_diverged`), `interrupted` (Ctrl-C, SIGTERM) or
        `failed`; `running` where it hasn't ended.
    """
    if is_under_way(trainer):
        return "running"
    if status == "failed":
        stopped = isinstance(sys.exc_info()[1], KeyboardInterrupt | SystemExit)
        return "interrupted" if stopped else "failed"
    return "diverged" if has_diverged(trainer) else "finished"


def is_under_way(trainer: Trainer) -> bool:
    """Say whether loggers are finalized amid a run, as SLURM's signal has it done."""
    if trainer.state.status != TrainerStatus.RUNNING:
        return False
    # at a run's end Lightning calls it running still, and has let go of its data
    if trainer.state.fn == TrainerFn.FITTING:
        return trainer.fit_loop._data_fetcher is not None
    loop = trainer._active_loop
    return loop is not None and loop._data_fetcher is not None


def has_diverged(trainer: Trainer) -> bool:
    """Say whether a training diverged.

    A module's own `diverged` tells, of a population that of all its members; without
    one, whether a loss that it logged isn't finite in the end.
    """
    own = getattr(trainer.lightning_module, "diverged", None)
    if own is not None:
        return bool(torch.as_tensor(own).all())
    return any(
        _LOSS.search(key) and not bool(torch.as_tensor(value).isfinite().all())
        for key, value in trainer.callback_metrics.items()
    )

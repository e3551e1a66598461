"""How many optimizer steps the weights of a run have taken.

With one optimizer that is `trainer.global_step`, as Lightning counts it (a step that
gradient scaling skips counts too). With several, which each count there, it is the
number of batches in which any of them stepped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StepTracker(Callback):
    """Counts the batches that stepped, of a module that steps its optimizers itself.

    Lightning counts the steps of all optimizers together, and every batch; which
    batches stepped can't be told from that afterwards. The count is in checkpoints.
    """

    def __init__(self) -> None:
        self._steps = 0
        # `trainer.global_step` as the batch in hand began
        self._began_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin where the run is: at a checkpoint, or where another fit ended."""
        del pl_module
        self._steps = self.taken(trainer)
        self._began_at = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch before."""
        del pl_module, batch, batch_idx
        self._steps = self.taken(trainer)
        self._began_at = trainer.global_step

    def on_save_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Put the count into a checkpoint."""
        del pl_module
        checkpoint[_CHECKPOINT_KEY] = self.taken(trainer)

    def on_load_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Go on from a checkpoint."""
        del trainer, pl_module
        self.go_on(checkpoint)

    def go_on(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over the count of a checkpoint."""
        self._steps = checkpoint_steps(checkpoint)
        self._began_at = checkpoint["global_step"]

    def end_batch_again(self, trainer: Trainer, before: int) -> None:
        """Be at the end of a batch again, at which a checkpoint was saved.

        Args:
            trainer: About to go on from the checkpoint.
            before: What `before` gave then.
        """
        if len(trainer.optimizers) > 1:
            self._began_at = trainer.global_step - (self._steps > before)
            self._steps = before
        else:
            self._began_at = before

    def taken(self, trainer: Trainer) -> int:
        """Return how many batches have stepped, the one in hand included."""
        return self._steps + (trainer.global_step > self._began_at)

    def before(self, trainer: Trainer) -> int:
        """Return how many steps had been taken when the batch in hand began."""
        return self._steps if len(trainer.optimizers) > 1 else self._began_at


_CHECKPOINT_KEY = "lit_resnorm_steps"


def track_steps(
    trainer: Trainer,
    module: LightningModule,
    checkpoint: Mapping[str, Any] | None = None,
) -> None:
    """See that steps are counted, where Lightning's own counts don't tell.

    Args:
        trainer: Gets a :class:`StepTracker`, once.
        module: About to be trained.
        checkpoint: The checkpoint that was loaded before this call, if any.
    """
    if module.automatic_optimization or step_tracker(trainer) is not None:
        return
    tracker = StepTracker()
    if checkpoint:
        tracker.go_on(checkpoint)
    # a new list, because Lightning may be going through the present one
    trainer.callbacks = [tracker, *trainer.callbacks]  # pyright: ignore[reportAttributeAccessIssue]


def step_tracker(trainer: Trainer) -> StepTracker | None:
    """Return the tracker that a Trainer has, if any."""
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    return next((c for c in callbacks if isinstance(c, StepTracker)), None)


def steps_taken(trainer: Trainer) -> int:
    """Return the optimizer steps that the weights have taken (see the module)."""
    if len(trainer.optimizers) < 2:
        return trainer.global_step
    tracker = step_tracker(trainer)
    if tracker is not None:
        return tracker.taken(trainer)
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.state_dict()["total"]["processed"]


def steps_before_batch(trainer: Trainer) -> int:
    """Return the steps that had been taken when the batch in hand began.

    For batches that Lightning logs: with automatic optimization those that stepped.
    """
    tracker = step_tracker(trainer)
    return steps_taken(trainer) - 1 if tracker is None else tracker.before(trainer)


def checkpoint_steps(checkpoint: Mapping[str, Any]) -> int:
    """Return how many steps a checkpoint's weights have taken."""
    if len(checkpoint.get("optimizer_states", ())) < 2:
        return checkpoint["global_step"]
    if _CHECKPOINT_KEY in checkpoint:
        return checkpoint[_CHECKPOINT_KEY]
    # written where nobody counted: every batch is taken for one that stepped
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return progress["total"]["processed"]

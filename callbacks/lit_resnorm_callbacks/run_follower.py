"""Takes what lacks single examples along with a run, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_resnorm.measures.copies import Bound, Losses
from lit_resnorm.measures.losses import check_mean
from lit_resnorm.measures.observe import Reduce
from lit_resnorm.measures.preserved import random_state
from lit_resnorm.measures.rehearsal import rehearse
from lit_resnorm_callbacks.batch_indices import BatchIndices
from lit_resnorm_callbacks.cadence import steps_taken
from lit_resnorm_callbacks.left_out import LeftOut
from lit_resnorm_callbacks.ranks import measured_together
from lit_resnorm_callbacks.twin_training import TwinTraining


class RunFollower:
    """Finds the examples left out in a run's batches, and has twins take its steps.

    Where that fails amid a run, it gives up and leaves the run alone.

    Args:
        name: The probe's name, for messages.
        strict: Raise where it fails, as in any case in the first batch.

    Attributes:
        indices: Which examples a batch holds.
        training: The training of the twins; None where none are trained.
        broken: Why it was given up; None: it wasn't.
    """

    def __init__(self, name: str, *, strict: bool) -> None:
        self.indices = BatchIndices(name)
        self.training: TwinTraining | None = None
        self.broken: str | None = None
        self._strict = strict
        self._name = name
        self._compared = False
        self._under_way = False
        self._batch_in_hand: Any = None

    def start(self) -> None:
        """Begin anew, without twins."""
        self.training = self.broken = None
        self._compared = self._under_way = False

    def begin_batch(
        self, trainer: Trainer, batch: Any, batch_idx: int, left_out: LeftOut
    ) -> None:
        """Find the examples in a batch; fork the twins of those never seen before."""
        self._batch_in_hand = batch
        step = steps_taken(trainer)

        def begin(reduce: Reduce) -> None:
            indices = self.indices.current(trainer)
            hits = left_out.find(trainer, batch, indices, step, reduce)
            if self.training is not None:
                self.training.begin(trainer, hits, batch_idx)

        self._guarded(trainer, begin)

    def compare(
        self, trainer: Trainer, module: nn.Module, losses: Losses, loss: Tensor
    ) -> None:
        """Before the first step, see that the examples' losses make the run's.

        Args:
            trainer: The trainer.
            module: The run's module.
            losses: The losses of examples.
            loss: What the run is about to differentiate.

        Raises:
            ValueError: If the losses of examples don't average to it.
        """
        if self._compared:
            return
        self._compared = True
        training, batch = self.training, self._batch_in_hand

        def compared(_: Reduce) -> None:
            if training is not None:
                training.compare(trainer, batch, loss)
                return
            with random_state():
                around = trainer.precision_plugin.train_step_context
                seen = rehearse(Bound(module, losses), batch, around)
            if not seen.draws:  # else other masks make other losses
                own = loss * trainer.accumulate_grad_batches
                check_mean(self._name, seen.losses, own)

        measured_together(trainer, compared)

    def before_step(self, optimizer: Optimizer) -> None:
        """Take over the settings of the run's step."""
        if self.training is not None:
            self.training.before_step(optimizer)

    def end_batch(self, trainer: Trainer, batch: Any) -> None:
        """Train the twins on the batch."""
        self._batch_in_hand = None
        if (training := self.training) is not None:
            self._guarded(trainer, lambda reduce: training.end(trainer, batch, reduce))
        self._under_way = True

    def release(self) -> None:
        """Take the hooks off."""
        self.indices.release()
        if self.training is not None:
            self.training.close()

    def _guarded(self, trainer: Trainer, work: Callable[[Reduce], None]) -> None:
        if self.broken is not None:
            return
        try:
            measured_together(trainer, work)
        except Exception as error:
            if self._strict or not self._under_way:
                raise
            self.broken = f"twins stopped: {type(error).__name__}: {error}"

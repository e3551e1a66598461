"""Takes what lacks single examples along with a run, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_resnorm.measures.copies.copies import Losses
from lit_resnorm.measures.copies.first_pass import run_first_pass
from lit_resnorm.measures.losses import Reduction
from lit_resnorm.measures.passes.random_states import random_states_kept
from lit_resnorm.measures.passes.untouched import Reduce
from lit_resnorm.runs.optimizer_steps import steps_taken
from lit_resnorm_callbacks.probe.guard import RefusedRunError
from lit_resnorm_callbacks.probe.ranks import OutOfMemoryError, measured_together
from lit_resnorm_callbacks.stability.batch_hooks import WatchedBatchHooks
from lit_resnorm_callbacks.stability.batch_indices import BatchIndices
from lit_resnorm_callbacks.stability.left_out import LeftOut
from lit_resnorm_callbacks.stability.training import TwinTraining


class RunFollower:
    """Finds the examples left out in a run's batches, and has twins take its steps.

    Where that fails amid a run, it gives up and leaves the run alone.

    Args:
        name: The probe's name, for messages.
        strict: Raise where it fails, as in any case before the first step is over.
        batch_dim: Dimension that counts examples in what the loader gives.

    Attributes:
        indices: Which examples a batch holds.
        training: The training of the twins; None where none are trained.
        broken: Why it was given up; None: it wasn't.
        num_rows: Rows of the run's batches on this rank, where no twins are trained.
    """

    def __init__(self, name: str, *, strict: bool, batch_dim: int = 0) -> None:
        self.indices = BatchIndices(name, batch_dim)
        self._batch_hooks = WatchedBatchHooks()
        self._batch_dim = batch_dim
        self.training: TwinTraining | None = None
        self.broken: str | None = None
        self.num_rows = 1
        self._strict = strict
        self._name = name
        self._under_way = False
        self._first_step = 0
        self._batch_in_hand: Any = None

    def watch(self, trainer: Trainer) -> None:
        """Have what a batch holds, and what becomes of it, told from now on."""
        self.indices.watch(trainer)
        if self._batch_dim == 0:
            self._batch_hooks.watch(trainer)

    def start(self, step: int) -> None:
        """Begin anew, without twins, after so many optimizer steps."""
        self.training = self.broken = None
        self._under_way = False
        self._first_step = step

    def begin_batch(
        self, trainer: Trainer, batch: Any, batch_idx: int, left_out: LeftOut
    ) -> None:
        """Find the examples in a batch; fork the twins of those never seen before."""
        self._batch_in_hand = batch
        step = steps_taken(trainer)

        def begin(reduce: Reduce) -> None:
            indices = self.indices.current(trainer)
            if (hook := self._batch_hooks.found) is not None:
                raise ValueError(
                    f"{self._name}: {hook} mixes or reorders rows: replacing one"
                    " example changes others; which row to leave out can't be told"
                )
            hits = left_out.find(trainer, batch, indices, step, reduce)
            if self.training is not None:
                self.training.begin(trainer, hits, batch_idx)

        self._guarded(trainer, begin)

    def before_backward(
        self,
        trainer: Trainer,
        module: nn.Module,
        losses: Losses,
        reduction: Callable[[Any], Reduction],
        loss: Tensor,
    ) -> None:
        """Before an epoch's first step, see that the examples' losses make the run's.

        Args:
            trainer: The trainer.
            module: The run's module.
            losses: The losses of examples.
            reduction: Takes a batch, says what makes its loss of these.
            loss: What the run is about to differentiate.

        Raises:
            ValueError: If the losses of examples don't make it.
        """
        training, batch = self.training, self._batch_in_hand

        def compare(_: Reduce) -> None:
            if training is not None:
                training.before_backward(trainer, batch, loss)
                return
            with random_states_kept():
                around = trainer.precision_plugin.train_step_context
                seen = run_first_pass(module, losses, batch, around)
            found = reduction(batch)
            self.num_rows = len(found.weights)
            if not seen.draws:  # else other masks make other losses
                own = loss * trainer.accumulate_grad_batches
                found.check(self._name, seen.losses, own)

        if training is not None or not self._under_way:
            self._guarded(trainer, compare)

    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Train what the run is about to train."""
        if (training := self.training) is not None:
            self._guarded(trainer, lambda _: training.before_step(optimizer))

    def end_batch(self, trainer: Trainer, batch: Any) -> None:
        """Train the twins on the batch."""
        self._batch_in_hand = None
        if (training := self.training) is not None:
            self._guarded(trainer, lambda reduce: training.end(trainer, batch, reduce))
        self._under_way |= steps_taken(trainer) > self._first_step

    def pending(self) -> list[dict[str, Any]]:
        """Return what the twins' next step adds to, a rank each; all ranks call it."""
        return [] if self.training is None else self.training.pending()

    def add_pending(self, saved: list[dict[str, Any]]) -> None:
        """Go on amid an accumulation, with what `pending` gave."""
        if self.training is not None and saved:
            self.training.add_pending(saved)

    def check(self) -> None:
        """See that the twins are what they should be.

        Raises:
            RuntimeError: If they could not be trained, or the run's weights aren't
                those that it trained.
        """
        if self.broken is not None:
            raise RuntimeError(self.broken)
        if self.training is not None:
            self.training.check_weights()

    def finish(self) -> None:
        """Let the weights be changed: the run has ended."""
        if self.training is not None:
            self.training.finish()

    def release(self) -> None:
        """Take the hooks off."""
        self.indices.release()
        self._batch_hooks.release()
        if self.training is not None:
            self.training.close()

    def _guarded(self, trainer: Trainer, work: Callable[[Reduce], None]) -> None:
        if self.broken is not None:
            return
        try:
            measured_together(trainer, work)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            if self._strict:
                raise
            if not self._under_way and not isinstance(error, OutOfMemoryError):
                if isinstance(error, ValueError):
                    raise RefusedRunError(str(error)) from error
                raise RefusedRunError(
                    f"{self._name}: the run can't be followed ({why}): give loss_fn or"
                    " forward_fn, or leave the probe out"
                ) from error
            self.broken = f"twins stopped: {why}"

"""ExactResume: what a run owes at a checkpoint is done by the run that goes on from it.

Lightning saves checkpoints amid the end of a step or an epoch, before the rows of that
moment reach the loggers, before the validation that is due, before the closing hooks;
a run that goes on from one begins after all that. Where a kill falls in between it is
lost. `ExactResume` puts into each checkpoint at which moment it was saved and what was
pending, and a run that goes on from it makes up for that before its next batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    Timer,
)
from lightning.pytorch.loops.fit_loop import RestartStage as FitStage
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import RestartStage as EpochStage
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lit_resnorm.runs.files import LOGGED, PENDING
from lit_resnorm.runs.history import RunHistory
from lit_resnorm.runs.optimizer_steps import step_tracker, steps_before_batch
from lit_resnorm.runs.requeue import DeferredRequeue, requeues

_BATCH_END, _VALIDATION, _VALIDATED = "batch end", "validation", "validation end"
_EPOCH_END, _BETWEEN_EPOCHS = "epoch end", "between epochs"


class ExactResume(Callback):
    """Has a run that goes on from a checkpoint do what was pending as it was saved.

    That is the row of the step or of the epoch, a validation that was due or under way
    (it runs again from its start), the end of the epoch, and the end of the training:
    `on_train_end` is called where Lightning would skip a training that is complete. A
    training that a callback or the module had stopped stays so, unless it goes on with
    other limits. Values in `trainer.callback_metrics` are there again, and so are
    gradients that were being accumulated (with one process, or DDP).

    Where SLURM's signal has a job requeued, the checkpoint is saved once the batch in
    hand has ended, or a batch of a validation, not amid it.

    Checkpoints that are saved in `on_train_batch_end`, in validation hooks, in
    `on_train_epoch_end` or after the last epoch hold what it takes; others are resumed
    as Lightning does it. What hooks that come after the saving one in the same moment
    log is not among it.
    """

    def __init__(self) -> None:
        self._validated = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put in the loops that begin with what is pending."""
        del pl_module
        if stage != "fit":
            return
        # The Trainer has made its loops, and filled them in, by now.
        if type(trainer.fit_loop) is _FitLoop:
            trainer.fit_loop.__class__ = _ResumingFitLoop
        if type(trainer.fit_loop.epoch_loop) is _TrainingEpochLoop:
            trainer.fit_loop.epoch_loop.__class__ = _ResumingEpochLoop
        loop = trainer.fit_loop
        if (
            isinstance(loop, _ResumingFitLoop)
            and isinstance(loop.epoch_loop, _ResumingEpochLoop)
            and requeues(trainer)
        ):
            loop.requeue = DeferredRequeue(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that a validation began."""
        del trainer, pl_module
        self._validated = False

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Don't let a requeue wait until a long validation has ended."""
        del pl_module, outputs, batch, batch_idx, dataloader_idx
        # ranks may have other numbers of these batches
        if trainer.state.fn == "fit" and trainer.world_size == 1:
            _requeue_if_due(trainer.fit_loop)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the rows of the validation are written."""
        del trainer, pl_module
        self._validated = True

    def on_save_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Put what is pending into the checkpoint."""
        histories = [one for one in trainer.loggers if isinstance(one, RunHistory)]
        if trainer.is_global_zero:
            checkpoint[LOGGED] = [history.logged() for history in histories]
        moment = self._moment(trainer)
        if moment is None:
            return
        row = (
            _pending_values(trainer, pl_module)
            if moment in (_BATCH_END, _EPOCH_END)
            else {}
        )
        checkpoint[PENDING] = {
            "moment": moment,
            "row": convert_tensors_to_scalars(row),
            "steps_before": steps_before_batch(trainer),
            "callback_metrics": {
                key: value.detach().cpu().clone()
                for key, value in trainer.callback_metrics.items()
            },
            "stopped": trainer.should_stop,
            "limits": _limits(trainer),
            "gradients": _accumulated(trainer, pl_module, moment),
        }

    def _moment(self, trainer: Trainer) -> str | None:
        loop = trainer.fit_loop
        epochs = loop.epoch_progress.state_dict()["current"]
        batches = loop.epoch_loop.batch_progress.state_dict()["current"]
        if trainer.state.fn != "fit" or trainer.sanity_checking or not epochs["ready"]:
            return None
        if getattr(loop.epoch_loop, "at_batch_end", False):
            return _VALIDATION
        if trainer.validating:
            return _VALIDATED if self._validated else _VALIDATION
        begun = epochs["ready"] == epochs["started"]
        if begun and epochs["processed"] == epochs["started"]:
            ended = epochs["completed"] == epochs["processed"]
            return _BETWEEN_EPOCHS if ended else _EPOCH_END
        done = batches["completed"] + 1
        ends = all(batches[key] == done for key in ("ready", "started", "processed"))
        return _BATCH_END if begun and ends else None

    def on_load_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Have the loop begin with what is pending in the checkpoint."""
        del pl_module
        loop = trainer.fit_loop
        if trainer.state.fn == "fit" and isinstance(loop, _ResumingFitLoop):
            loop.pending = checkpoint.get(PENDING)


def _pending_values(trainer: Trainer, module: LightningModule) -> Mapping[str, Any]:
    """Return what Lightning is about to log for this step, or for this epoch."""
    connector = trainer._logger_connector
    if connector._first_loop_iter is not None:
        accumulates = trainer.fit_loop._should_accumulate()
        if accumulates and module.automatic_optimization:
            return {}
        if not (connector.should_update_logs):
            return {}
    return connector.metrics["log"]


def _accumulated(
    trainer: Trainer, module: LightningModule, moment: str
) -> dict[str, Tensor]:
    """Return the gradients that the next step adds to, a row a rank."""
    amid = (
        moment not in (_EPOCH_END, _BETWEEN_EPOCHS)
        and trainer.fit_loop._should_accumulate()
    )
    whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    if not whole or not (amid or not module.automatic_optimization):
        return {}
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    gather = trainer.strategy.all_gather
    return {n: gather(g).reshape(-1, *g.shape).cpu() for n, g in grads.items()}


def _limits(trainer: Trainer) -> list[Any]:
    """Return what bounds a training, in plain values."""
    loop = trainer.fit_loop
    limits: list[Any] = [loop.min_epochs, loop.max_epochs, loop.min_steps]
    limits.append(loop.max_steps)
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        if isinstance(callback, EarlyStopping):
            limits += [callback.monitor, callback.patience, callback.min_delta]
        elif isinstance(callback, Timer):
            limits.append(callback._duration)
    return limits


class _ResumingEpochLoop(_TrainingEpochLoop):
    """Lightning's, which goes on amid an epoch where nothing is pending any more."""

    nothing_pending = False
    at_batch_end = False
    """Whether a batch has ended but for a validation that may be due."""

    def on_advance_end(self, data_fetcher: Any) -> None:
        self.at_batch_end = True
        try:
            _requeue_if_due(self.trainer.fit_loop)
        finally:
            self.at_batch_end = False
        super().on_advance_end(data_fetcher)

    def on_run_start(self, data_fetcher: Any) -> None:
        super().on_run_start(data_fetcher)
        if self.nothing_pending:
            # else it takes the batch before for one whose end is to come
            self.nothing_pending = self.restarting = False


class _ResumingFitLoop(_FitLoop):
    """Lightning's, which begins with what was pending in a checkpoint."""

    pending: Mapping[str, Any] | None = None
    requeue: DeferredRequeue | None = None
    epoch_loop: _ResumingEpochLoop

    @property
    def skip(self) -> bool:
        if self.pending is None:
            return super().skip
        return self.max_batches == 0 or self.trainer.limit_train_batches == 0

    def reset(self) -> None:
        if self.pending is None:
            super().reset()
        else:
            torch.set_grad_enabled(True)

    def on_run_start(self) -> None:
        super().on_run_start()
        pending, self.pending = self.pending, None
        if pending is not None:
            self._make_up_for(pending)

    def on_run_end(self) -> None:
        _requeue_if_due(self)
        super().on_run_end()
        _requeue_if_due(self)

    def _make_up_for(self, pending: Mapping[str, Any]) -> None:
        _Loop.restarting.fset(self, False)  # pyright: ignore[reportOptionalCall]
        self._take_over(pending)
        if pending["moment"] == _EPOCH_END:
            self._end_epoch(pending["row"])
        elif pending["moment"] != _BETWEEN_EPOCHS:
            self._end_batch(pending)
            if self.epoch_loop.done:
                self.on_advance_end()
            else:
                self._restart_stage = FitStage.RESTARTED_MID_EPOCH
                self.epoch_loop.restarting = self.epoch_loop.nothing_pending = True
                self.epoch_loop._restart_stage = EpochStage.RESTARTED_ON_LAST

    def _take_over(self, pending: Mapping[str, Any]) -> None:
        """Restore what Lightning's checkpoints leave out."""
        trainer = self.trainer
        metrics: Mapping[str, Tensor] = pending["callback_metrics"]
        trainer._logger_connector._callback_metrics.update(metrics)
        if pending["stopped"] and pending["limits"] == _limits(trainer):
            trainer.should_stop = True
        for callback in getattr(trainer, "callbacks", []):
            if isinstance(callback, GradientAccumulationScheduler):
                # it sets it as an epoch starts, which is not done amid one
                number = callback.get_accumulate_grad_batches(trainer.current_epoch)
                trainer.accumulate_grad_batches = number
        self._restore_gradients(pending.get("gradients", {}))
        path = Path(trainer.ckpt_path).resolve() if trainer.ckpt_path else None
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint):
                continue
            saved = [callback.best_model_path, callback.last_model_path]
            saved += callback.best_k_models
            if path in [Path(one).resolve() for one in saved if one]:
                callback._last_global_step_saved = trainer.global_step
                callback._last_checkpoint_saved = str(path)

    def _restore_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        trainer = self.trainer
        for name, parameter in trainer.lightning_module.named_parameters():
            if (rows := gradients.get(name)) is not None:
                own = rows[trainer.global_rank % len(rows)]
                parameter.grad = own.to(parameter, copy=True)

    def _end_batch(self, pending: Mapping[str, Any]) -> None:
        """Do what follows a batch: its row, the validation that is due."""
        loop, connector = self.epoch_loop, self.trainer._logger_connector
        connector._first_loop_iter = False
        if pending["moment"] == _BATCH_END:
            loop.batch_progress.increment_completed()
            if tracker := step_tracker(self.trainer):
                tracker.end_batch_again(self.trainer, pending["steps_before"])
            connector.log_metrics({**pending["row"]})
        loop._skip_next_val = pending["moment"] == _VALIDATED
        assert self._data_fetcher is not None
        loop.on_advance_end(self._data_fetcher)

    def _end_epoch(self, row: Mapping[str, Any]) -> None:
        """Do what follows the hooks at an epoch's end."""
        progress, loop = self.epoch_progress, self.epoch_loop
        progress.current.completed = progress.state_dict()["current"]["processed"] - 1
        if loop._num_ready_batches_reached():
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        # Lightning numbers the row so
        loop._batches_that_stepped -= 1
        self.trainer._logger_connector.log_metrics({**row})
        loop._batches_that_stepped += 1
        progress.increment_completed()


def _requeue_if_due(loop: _FitLoop) -> None:
    if isinstance(loop, _ResumingFitLoop) and loop.requeue is not None:
        loop.requeue.do_if_due()

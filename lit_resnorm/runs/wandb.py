"""WandbHistory: Weights & Biases with the steps and the ending of a run directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from numbers import Number
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_resnorm.quantities import SITE_KEY
from lit_resnorm.runs.files import RESUMED, STEP_KEY
from lit_resnorm.runs.history import RunHistory
from lit_resnorm.runs.optimizer_steps import checkpoint_steps
from lit_resnorm.runs.steps import StepCount, run_status


class WandbHistory(WandbLogger):
    """Lightning's `WandbLogger`, with what is needed to compare runs in W&B.

    - The step of every value is the one in `history.jsonl` (`lit_resnorm.runs.steps`),
      so that validation and probes share their axis.
    - The summary holds `min`, `max` and `last` of every value that isn't a single
      site's, for parallel coordinates, filters and sorting.
    - The summary also holds `status` (`finished`, `diverged`, `interrupted` or
      `failed`), `seconds`, and verdicts in words (`moments/pathology/word`).
    - A run goes on where W&B's own process has died: that is said once, and the rows
      that follow are in `history.jsonl` alone.

    Arguments are those of `WandbLogger`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # wandb warns of it whatever it is set to
        if self._wandb_init.get("anonymous") is None:
            self._wandb_init.pop("anonymous", None)

    @cached_property
    def _steps(self) -> StepCount:
        return StepCount()

    @cached_property
    def _defined(self) -> set[str]:
        return set()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Let W&B's process die without the run; say so once."""
        try:
            yield
        except ConnectionError as error:
            if not self.__dict__.get("_lost", False):
                self._lost = True
                rank_zero_warn(
                    "the process of W&B has died, and its run holds no more rows; the"
                    f" run goes on ({error!r})"
                )

    @rank_zero_only
    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        """Learn the Trainer and, where a checkpoint was loaded, the step it is at.

        Args:
            model: The LightningModule that is about to run.
            input_array: Not used.
        """
        del input_array
        checkpoint = self._steps.begin(model)
        trainer = self._steps.trainer
        if checkpoint and trainer is not None and trainer.state.fn == "fit":
            # a reader drops what an earlier process logged after the checkpoint
            resumed = {RESUMED: checkpoint_steps(checkpoint)}
            with self._reached():
                self.experiment.config.update(resumed, allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log one row.

        Args:
            metrics: Values by key. Lightning's own rows hold `epoch`.
            step: Optimizer steps taken by the weights; None for the present weights.
                The step of Lightning's own rows is put right.
        """
        step = self._steps.of(step, of_lightning="epoch" in metrics)
        with self._reached():
            for key, value in metrics.items():
                if key not in self._defined and isinstance(value, Number | Tensor):
                    self._defined.add(key)
                    self._define(key)
            super().log_metrics(metrics, step)

    def _define(self, key: str) -> None:
        if key == "epoch" or SITE_KEY.fullmatch(key):
            return
        options = {"step_metric": STEP_KEY, "summary": "min,max,last"}
        self.experiment.define_metric(key, **options)

    @rank_zero_only
    def log_verdict(self, key: str, word: str) -> None:
        """Put a verdict into the summary, in words."""
        with self._reached():
            self.experiment.summary[f"{key}/word"] = word

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Put into the summary how the run ended.

        Args:
            status: Lightning's word, "success" or "failed".
        """
        try:
            with self._reached():
                self._finalize(status)
        except Exception as error:
            # what ended the run is not to be lost
            rank_zero_warn(f"the W&B run is incomplete: {error!r}")

    def _finalize(self, status: str) -> None:
        super().finalize(status)
        trainer = self._steps.trainer
        if trainer is None or self._experiment is None:
            return
        ended: dict[str, Any] = {"status": run_status(status, trainer)}
        for logger in trainer.loggers:
            if isinstance(logger, RunHistory) and logger.ended:
                # it knows of the processes before, and of the fit before a test
                ended = logger.ended
        self.experiment.summary.update(ended)

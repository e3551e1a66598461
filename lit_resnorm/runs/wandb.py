"""WandbHistory: Weights & Biases with the steps and the ending of a run directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from numbers import Number
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_resnorm.quantities import SITE_KEY
from lit_resnorm.quantities.explanations import reference
from lit_resnorm.runs.files import HISTORY, RESUMED, STEP_KEY
from lit_resnorm.runs.history import RunHistory
from lit_resnorm.runs.json_lines import NOT_FINITE, read_rows
from lit_resnorm.runs.optimizer_steps import checkpoint_steps, steps_taken
from lit_resnorm.runs.steps import StepCount, run_status
from lit_resnorm.runs.wandb_offline import read_offline_run, run_ids


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
    - An offline run that goes on from a checkpoint sends again what `history.jsonl`
      holds and W&B's files don't, because W&B hadn't written it when the process was
      killed. What was logged after the checkpoint can't be taken out of W&B's files:
      `resumed_from_step` in the config says up to where readers keep it, and -1 in a
      run that was begun anew.

    Arguments are those of `WandbLogger`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # wandb warns of it whatever it is set to
        if self._wandb_init.get("anonymous") is None:
            self._wandb_init.pop("anonymous", None)
        self._is_first_fit = True
        self._owed_by: RunHistory | None = None

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
                    f" run goes on ({error!r}); see {reference('log_incomplete')}"
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
        if trainer is None or trainer.state.fn != "fit":
            return
        with self._reached():
            if checkpoint:
                self._go_on_from(checkpoint_steps(checkpoint))
                histories = [x for x in trainer.loggers if isinstance(x, RunHistory)]
                self._owed_by = histories[0] if self._is_first_fit else None
            elif steps_taken(trainer) == 0 and self._recorded_before():
                self._go_on_from(-1)
        self._is_first_fit = False

    def _go_on_from(self, step: int) -> None:
        # a reader drops what an earlier process logged after that step
        self.experiment.config.update({RESUMED: step}, allow_val_change=True)

    def _recorded_before(self) -> list[Path]:
        """Return where earlier processes recorded this run offline."""
        own = Path(self.experiment.sync_dir).resolve()
        found = run_ids(own.parent).get(self.experiment.id, [])
        return [path for path in found if path.resolve() != own]

    def _send_owed(self) -> None:
        """Send what the history had kept as this fit began, and W&B's files haven't.

        That is done with the first row, when every logger knows of its checkpoint.
        """
        history, self._owed_by = self._owed_by, None
        if history is None or self.experiment.offline is not True:
            return
        owed: dict[int, dict[str, Any]] = {}
        for row in read_rows(history.path / HISTORY)[: history.num_kept]:
            owed.setdefault(row["step"], {}).update(row)
        try:
            run = read_offline_run(self.experiment.id, self._recorded_before())
        except (ValueError, OSError) as error:
            rank_zero_warn(
                f"W&B may lack rows from before the checkpoint: {error}; see"
                f" {reference('log_incomplete')}"
            )
            return
        recorded = {row["step"]: row for row in run.rows}
        before = self._prefix + self.LOGGER_JOIN_CHAR if self._prefix else ""
        for step, row in owed.items():
            there = recorded.get(step, {})
            lacking = {
                key: NOT_FINITE.get(value, value) if isinstance(value, str) else value
                for key, value in row.items()
                if key not in ("step", "epoch") and there.get(before + key) != value
            }
            if lacking:
                self._log({**lacking, "epoch": row["epoch"]}, step)

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
            self._send_owed()
            self._log(metrics, step)

    def _log(self, metrics: Mapping[str, Any], step: int | None) -> None:
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
            rank_zero_warn(
                f"the W&B run is incomplete: {error!r}; see"
                f" {reference('log_incomplete')}"
            )

    def _finalize(self, status: str) -> None:
        super().finalize(status)
        trainer = self._steps.trainer
        if trainer is None or self._experiment is None:
            return
        self._send_owed()
        ended: dict[str, Any] = {"status": run_status(status, trainer)}
        for logger in trainer.loggers:
            if isinstance(logger, RunHistory) and logger.ended:
                # it knows of the processes before, and of the fit before a test
                ended = logger.ended
        self.experiment.summary.update(ended)

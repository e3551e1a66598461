"""RunHistory: the logger that writes a run directory as the run goes.

What the files hold is said in `lit_resnorm.runs.files`, what the step of a value is in
`lit_resnorm.runs.steps`; the appending to them is in `lit_resnorm.runs.writer`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_resnorm.quantities.explanations import reference
from lit_resnorm.runs.files import (
    CONFIG,
    HISTORY,
    LOGGED,
    PENDING,
    SUMMARY,
    installed_versions,
    read_config,
    summarise,
)
from lit_resnorm.runs.json_lines import read_rows, replace_file
from lit_resnorm.runs.optimizer_steps import checkpoint_steps, steps_taken
from lit_resnorm.runs.reading import parsed_json, read_text
from lit_resnorm.runs.steps import StepCount, is_under_way, run_status
from lit_resnorm.runs.writer import RunWriter

_MAPPINGS = ("values", "verdicts", "quantities", "versions")
"""Parts of a summary that are objects."""


class RunHistory(Logger):
    """Writes a run's values, tables and figures into its run directory.

    Every line is handed to the operating system when it is logged, so that a killed
    process loses none. A run that is resumed from a checkpoint at step g goes on in
    the same files: training rows from step g on and other rows after step g are
    dropped first, and what is logged again at a kept step is not doubled. Only rank
    0 writes. The logger learns of its Trainer through `log_graph`, which Lightning
    calls unless `enable_autolog_hparams` is off. Once `summary.json` is written,
    `ended` holds its `status` and `seconds`; `num_kept` is the number of rows that the
    history held as the latest fit began. Where a logger is finalized amid a run
    (SLURM's warning of a requeue does so) the status is `running` until the run ends.

    A step that a callback gives is taken as it is. Values that `validation_step`
    logs for each batch (`on_step=True`) keep Lightning's number of the batch.

    Args:
        save_dir: The run directory, made when needed. The command line fills it in.

    Another process that would write the same directory meanwhile is refused, and where
    the files can't be written, or were taken away, the run fails, at its end at last.
    A run that goes on where rows are missing says so.

    Raises:
        ValueError: If `save_dir` is None; at the start of `fit`, if the directory
            holds the steps of another run and no checkpoint is resumed, or another
            process writes it.
    """

    def __init__(self, save_dir: str | os.PathLike[str] | None = None) -> None:
        if save_dir is None:
            raise ValueError("RunHistory: save_dir is None, give it a directory")
        super().__init__()
        self.path = Path(save_dir)
        self._steps = StepCount()
        self._writer = RunWriter(self.path)
        self._verdicts: dict[str, str] = {}
        self._quantities: dict[str, Any] = {}
        self._began: float | None = None
        self._seconds_before = 0.0
        self.ended: dict[str, Any] = {}
        self.num_kept = 0
        self._when_final: list[Callable[[], None]] = []

    @property
    def name(self) -> str:
        """Empty: Lightning's own default for checkpoints is then a run directory's."""
        return ""

    @property
    def version(self) -> str:
        """Empty, as `name`."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self.path)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Add `params` to `config.yaml`; what YAML can't hold is written as text."""
        path = self.path / CONFIG
        known = read_config(path) if path.exists() else {}
        params = dict(params if isinstance(params, Mapping) else vars(params))
        params = json.loads(json.dumps(params, default=str))
        self.path.mkdir(parents=True, exist_ok=True)
        replace_file(path, yaml.safe_dump({**known, **params}, sort_keys=False))

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
        self.path.mkdir(parents=True, exist_ok=True)
        self._began, self.ended = time.monotonic(), {}
        if trainer is not None and trainer.state.fn == "fit":
            self._start_fit(trainer, checkpoint or {})
        self._seconds_before = self._summary().get("seconds", 0.0)

    def _start_fit(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        if checkpoint:
            steps, epoch = checkpoint_steps(checkpoint), _next_epoch(checkpoint)
        else:
            steps, epoch = steps_taken(trainer), trainer.current_epoch
        marks = checkpoint.get(LOGGED) or ()
        place = [one for one in trainer.loggers if isinstance(one, RunHistory)]
        # one that the Trainer doesn't have is not in its checkpoints
        logged = (
            dict(enumerate(marks)).get(place.index(self)) if self in place else None
        )
        begins = self._writer.go_on(
            steps, epoch, resumed=bool(checkpoint), logged=logged
        )
        self.num_kept = self._writer.logged()[0]
        if checkpoint and not begins:
            self._look_for_gap(trainer, checkpoint, logged, steps)
        summary = self._summary()
        if checkpoint and "values" not in summary:
            summary["values"] = summarise(read_rows(self.path / HISTORY))
        if summary:
            # a kill leaves no word of how the earlier training ended
            self._replace_summary({**summary, "status": "running"})

    def _look_for_gap(
        self,
        trainer: Trainer,
        checkpoint: Mapping[str, Any],
        logged: tuple[int, int] | None,
        steps: int,
    ) -> None:
        """Warn where rows from before a checkpoint of this run are missing."""
        path = Path(trainer.ckpt_path or "").resolve()
        is_own = path.is_relative_to(self.path.resolve())
        if logged is not None and (is_own or self._writer.logged()[0]):
            rank_zero_warn(
                f"{self.path / HISTORY} doesn't begin with the {logged[0]} rows that"
                f" were logged before the checkpoint at step {steps}: rows are missing;"
                f" see {reference('log_incomplete')}"
            )
            return
        # an end that is on record came after all rows
        killed = self._summary().get("status") in (None, "running")
        if (
            is_own
            and killed
            and PENDING not in checkpoint
            and _is_amid_rows(checkpoint)
        ):
            rank_zero_warn(
                f"{path} was saved without lit_resnorm.runs.ExactResume: rows of step"
                f" {steps} may be missing in {self.path / HISTORY}; see"
                f" {reference('log_incomplete')}"
            )

    def logged(self) -> tuple[int, int]:
        """Return the number of rows that are written, and a checksum of them."""
        return self._writer.logged()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one line of scalars.

        Args:
            metrics: Numbers or 0-d tensors by key. Lightning's own rows hold `epoch`.
            step: Optimizer steps taken by the weights; None for the present weights.
                The step of Lightning's own rows is put right (see the module).

        Raises:
            ValueError: If there is neither a step nor a Trainer to ask.
        """
        trainer = self._steps.trainer
        step = self._steps.of(step, of_lightning="epoch" in metrics)
        if step is None:
            raise ValueError("RunHistory.log_metrics: step is None, and no run began")
        epoch = metrics.get("epoch", trainer.current_epoch if trainer else None)
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        self._writer.add_row(step, epoch, values)

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Append a table to `tables/<key>.jsonl`.

        Args:
            key: Name of the table.
            columns: Names of its columns.
            data: Its rows.
            dataframe: A pandas frame instead of the two.
            step: Optimizer steps taken by the weights; None for the present weights.

        Raises:
            ValueError: If there is neither a step nor a Trainer to ask.
        """
        step = self._steps.of(step)
        if step is None:
            raise ValueError("RunHistory.log_table: step is None, and no run began")
        if dataframe is not None:
            columns, data = list(dataframe.columns), dataframe.to_numpy().tolist()
        self._writer.add_table(step, key, columns or (), data or ())

    @rank_zero_only
    def log_image(
        self, key: str, images: Sequence[Any], step: int | None = None, **_: Any
    ) -> None:
        """Write `figures/<key>.png` anew; a second image goes to `<key>.1.png`.

        Args:
            key: Name of the figure.
            images: Matplotlib figures or PIL images.
            step: Not used: there is one file a key, the newest.
        """
        del step
        self._writer.write_images(key, images)

    @rank_zero_only
    def log_verdict(self, key: str, word: str) -> None:
        """Write a verdict into `summary.json`, of a fit at once."""
        self._verdicts[key] = word
        self._note_at_once("verdicts", self._verdicts)

    @rank_zero_only
    def log_quantities(self, quantities: Mapping[str, Mapping[str, Any]]) -> None:
        """Write what the probes' values are, by key, into `summary.json`.

        Of a fit at once, so that a run that is killed is compared like any other.
        """
        self._quantities |= quantities
        self._note_at_once("quantities", self._quantities)

    def _note_at_once(self, part: str, values: Mapping[str, Any]) -> None:
        state = None if self._steps.trainer is None else self._steps.trainer.state
        if state is not None and (state.fn, state.status) == ("fit", "running"):
            earlier = self._summary()
            known = {**earlier.get(part, {}), **values}
            summary = {**earlier, "status": "running", part: known}
            if summary != earlier:
                self._replace_summary(summary)

    def when_final(self, action: Callable[[], None]) -> None:
        """Have `action` called on rank 0 whenever the run's files are complete.

        That is after Lightning's last hook of a `fit`, `validate` or `test`, however it
        ended, and where the logger is finalized amid one.
        """
        if action not in self._when_final:
            self._when_final.append(action)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the history, and write `summary.json` where a run began.

        The last end counts, but nothing that follows mends a run that was broken off.

        Args:
            status: Lightning's word, "success" or "failed". Written is `finished`,
                `diverged`, `interrupted` (Ctrl-C, SIGTERM) or `failed`, and `running`
                amid a run; validation and test leave a training's status as it is.
        """
        trainer = self._steps.trainer
        errors: list[OSError] = []
        if trainer is None or not is_under_way(trainer):
            with _collected(errors):
                self._writer.close()
        with _collected(errors):
            self._write_summary("failed" if errors else status)
        if not errors:
            for action in self._when_final:
                action()
        elif status == "failed":
            # of the error that ended the run
            rank_zero_warn(
                f"{self.path} is incomplete: {errors[0]}; see"
                f" {reference('log_incomplete')}"
            )
        else:
            raise errors[0]

    def _write_summary(self, status: str) -> None:
        trainer = self._steps.trainer
        if trainer is None or self._began is None:
            return
        word, ended = run_status(status, trainer), self.ended.get("status")
        if ended in ("failed", "interrupted") or ended == word != "running":
            return
        earlier = self._summary()
        if trainer.state.fn != "fit":
            word = earlier.get("status", word)
            # of a training that a kill ended
            word = "interrupted" if word == "running" else word
        history = self.path / HISTORY
        summary = {
            "status": word,
            "values": summarise(read_rows(history) if history.exists() else ()),
            "verdicts": {**earlier.get("verdicts", {}), **self._verdicts},
            "quantities": {**earlier.get("quantities", {}), **self._quantities},
            "seconds": self._seconds_before + time.monotonic() - self._began,
            "versions": installed_versions(
                "lit-resnorm", "lightning", "torch", "numpy"
            ),
        }
        self.ended = {key: summary[key] for key in ("status", "seconds")}
        self._replace_summary(summary)

    def _summary(self) -> dict[str, Any]:
        path = self.path / SUMMARY
        try:
            return _sound_summary(parsed_json(read_text(path))) if path.exists() else {}
        except ValueError as error:
            rank_zero_warn(
                f"{path} is damaged, it is written anew: {error}; see"
                f" {reference('log_incomplete')}"
            )
            return {}

    def _replace_summary(self, summary: Mapping[str, Any]) -> None:
        replace_file(self.path / SUMMARY, json.dumps(summary, indent=1) + "\n")


@contextmanager
def _collected(errors: list[OSError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        errors.append(error)


def _sound_summary(summary: Any) -> dict[str, Any]:
    """Return a summary; raise ValueError if it or a part of it is of another kind."""
    if not isinstance(summary, dict):
        raise ValueError(f"it holds {type(summary).__name__}, no object")
    kinds = {"seconds": int | float, **dict.fromkeys(_MAPPINGS, dict), "status": str}
    for key, kind in kinds.items():
        if key in summary and not isinstance(summary[key], kind):
            raise ValueError(f"its {key!r} is {type(summary[key]).__name__}")
    return summary


def _is_amid_rows(checkpoint: Mapping[str, Any]) -> bool:
    """Say whether a checkpoint was saved before the rows of its step."""
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    now = [each["current"] for each in progress]
    return any(each["completed"] < each["processed"] for each in now)


def _next_epoch(checkpoint: Mapping[str, Any]) -> int:
    """Return the epoch of the first batch that follows a checkpoint."""
    loop = checkpoint["loops"]["fit_loop"]
    is_last = loop["epoch_loop.batch_progress"]["is_last_batch"]
    return loop["epoch_progress"]["current"]["ready"] - 1 + is_last

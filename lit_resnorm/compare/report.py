"""RunReport: the page of `lit-resnorm compare` for one run, at the end of it."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lit_resnorm.quantities.explanations import reference
from lit_resnorm.runs.files import HISTORY
from lit_resnorm.runs.history import RunHistory

REPORT = "report.html"


class RunReport(Callback):
    """Writes `report.html` into the run directory when a run ends, however it ends.

    The page is that of `lit-resnorm compare` for this run alone, made from what
    `RunHistory` wrote, once it has written how the run ended: after `fit`, after a
    divergence, an error or Ctrl-C, and anew after `validate` and `test` of the same
    run. Without a `RunHistory` it is made from the log of a `CSVLogger`, into whose
    directory it goes then. Only rank 0 writes; nothing is sent between ranks, no
    random number is drawn, and a page that can't be made is one warning.

    It writes nothing under `fast_dev_run`, or where the Trainer has no logger at all.

    Args:
        path: The file; None: `report.html` in the run directory.

    Raises:
        ValueError: At set-up, if the Trainer has loggers, but neither of these.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._history: RunHistory | None = None
        self._csv: CSVLogger | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the log that the page is made from."""
        del pl_module
        self._history = self._csv = None
        if getattr(trainer, "fast_dev_run", False) or stage == "predict":
            return
        for logger in trainer.loggers:
            if isinstance(logger, RunHistory) and self._history is None:
                self._history = logger
            elif isinstance(logger, CSVLogger) and self._csv is None:
                self._csv = logger
        if self._history is not None:
            # what the run came to is written after the last hook of a callback
            self._history.when_final(self._write_history)
        elif not trainer.loggers:
            rank_zero_info("RunReport writes no page: nothing is logged")
        elif self._csv is None:
            raise ValueError(
                "RunReport: trainer.logger has neither a RunHistory nor a CSVLogger,"
                " whose files the page is made from: add one, or leave RunReport out"
            )

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Write the page from a CSVLogger's file."""
        del pl_module, stage
        self._write_csv(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write it where a run was broken off: `teardown` isn't called then."""
        del pl_module, exception
        self._write_csv(trainer)

    def _write_history(self) -> None:
        history = self._history
        # `predict` leaves the page as it is, and a run that never began has none
        if history is not None and (history.path / HISTORY).is_file():
            self._write(history.path)

    def _write_csv(self, trainer: Trainer) -> None:
        if self._csv is None or self._history is not None or not trainer.is_global_zero:
            return
        self._csv.save()
        self._write(Path(self._csv.log_dir))

    def _write(self, directory: Path) -> None:
        try:
            write_report(directory, self.path or directory / REPORT)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            rank_zero_warn(
                f"RunReport: no page was written: {reason}; see"
                f" {reference('log_incomplete')}"
            )


def write_report(directory: Path, path: Path) -> None:
    """Write the page of the run that a directory holds.

    Args:
        directory: A run directory, or that of a CSVLogger.
        path: The file.

    Raises:
        ValueError: If the directory holds no run that can be read.
        OSError: If the file can't be written.
    """
    # not needed before the end of a run
    from lit_resnorm.compare.document import comparison_document
    from lit_resnorm.compare.page import write_page
    from lit_resnorm.compare.sources import read_runs

    runs, skipped = read_runs([str(directory)])
    if len(runs) != 1:
        reasons = "; ".join(f"{one['name']}: {one['reason']}" for one in skipped)
        raise ValueError(reasons or f"{directory} holds {len(runs)} runs")
    write_page(comparison_document(runs), path)

"""The run that a command line starts or goes on with: its directory and its config."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from lit_resnorm.cli.defaults import keeps_checkpoints_in_run
from lit_resnorm.errors import printable
from lit_resnorm.runs.checkpoints import VARIANT
from lit_resnorm.runs.directories import (
    best_checkpoint,
    check_name,
    clear,
    has_not_begun,
    known_run,
    last_checkpoint,
    new_run,
)
from lit_resnorm.runs.files import CONFIG, RUN_DIR, logged_config
from lit_resnorm.runs.history import RunHistory
from lit_resnorm.runs.json_lines import replace_file
from lit_resnorm.runs.lock import LOCK, hold, release

_locked_runs: list[Path] = []


def rank() -> int:
    """Return the rank of this process, as far as it is known yet."""
    return getattr(rank_zero_only, "rank", None) or 0


def choose_run(options: Namespace, subcommand: str) -> Path | None:
    """Find or make the run directory; a checkpoint given by a word becomes a path.

    `last` and `best` go on with a run that is there; a path does where it lies in the
    run that `--run` names. Else the run is a new one, or none under `fast_dev_run`.
    With `last`, a run that `--run` names is begun by `fit` where it isn't there yet,
    and begins anew where it was broken off before its first checkpoint was whole: a
    script that starts a job again and again has the same words each time.

    Raises:
        ValueError: If a name can't be used, there is nothing to go on with, or another
            process writes the run.
    """
    root = Path(options.trainer.default_root_dir or ".")
    folder = root / check_name("--experiment", options.experiment)
    name = None if options.run is None else check_name("--run", options.run)
    word = options.ckpt_path
    traceless = bool(options.trainer.fast_dev_run)
    known = folder / name if name and (folder / name).is_dir() else None
    if known is None and word == "last" and _may_begin(options, subcommand):
        _tell(f"--ckpt_path last: there is no run {folder / str(name)} yet, it begins")
        options.ckpt_path = word = None
    if word in ("last", "best"):
        run = _agreed(options, folder, lambda: known_run(folder, name))
    elif known and (subcommand != "fit" or _is_in(known, word)):
        run = known
    elif traceless:
        return None
    else:
        run = _agreed(options, folder, lambda: new_run(folder, name))
    if not traceless:
        _hold(run)
    if word in ("last", "best"):
        options.ckpt_path = _chosen_checkpoint(options, subcommand, run)
    return None if traceless else run


def _chosen_checkpoint(options: Namespace, subcommand: str, run: Path) -> str | None:
    """Return the checkpoint that a word means; None where the run begins anew."""
    weights_only = options.get("weights_only") is not False
    if options.ckpt_path == "best":
        return str(best_checkpoint(run, weights_only=weights_only))
    if _may_begin(options, subcommand) and has_not_begun(run):
        _tell(f"--ckpt_path last: {run} has no checkpoint, it begins anew")
        if not rank():
            clear(run)
        return None
    return str(last_checkpoint(run, weights_only=weights_only))


def _may_begin(options: Namespace, subcommand: str) -> bool:
    """Say whether `--ckpt_path last` may begin a run."""
    named = subcommand == "fit" and options.run is not None
    return named and keeps_checkpoints_in_run(options)


def _tell(line: str) -> None:
    if not rank():
        sys.stderr.write(printable(line) + "\n")


def _hold(run: Path) -> None:
    """Keep other processes from writing a run, until `forget_run` or `let_go`."""
    if not rank() and run not in _locked_runs:
        hold(run)
        _locked_runs.append(run)


def let_go() -> None:
    """Let other processes write the runs that were chosen."""
    while _locked_runs:
        release(_locked_runs.pop())


def _is_in(run: Path, checkpoint: str | None) -> bool:
    """Say whether a checkpoint is one of the run's own."""
    if checkpoint is None:
        return False
    return Path(checkpoint).resolve().is_relative_to(run.resolve())


def _agreed(options: Namespace, folder: Path, choose: Callable[[], Path]) -> Path:
    """Return what rank 0 chose."""
    if RUN_DIR in os.environ and rank():
        return Path(os.environ[RUN_DIR])
    if options.run is None:
        if _ranks_started_elsewhere() > 1:
            raise ValueError(
                "--run: name the run where another program starts the ranks"
            )
    elif rank():
        return folder / options.run
    path = choose()
    os.environ[RUN_DIR] = str(path)
    return path


def _ranks_started_elsewhere() -> int:
    """Return how many ranks torchrun, SLURM or the like have started."""
    of_slurm = SLURMEnvironment.detect()
    return int(os.environ.get("SLURM_NTASKS" if of_slurm else "WORLD_SIZE", "1"))


def forget_run(run: Path | None) -> None:
    """Take away the directory of a run that never began."""
    if run is None or rank():
        return
    if {path.name for path in run.glob("*")} <= {CONFIG, LOCK}:
        for name in (CONFIG, LOCK):
            (run / name).unlink(missing_ok=True)
    for folder in (run, run.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def offline_wandb(trainer: Trainer) -> Iterator[str]:
    """Yield the runs that W&B loggers have recorded offline, for `wandb sync`."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and logger.version:
            folder = Path(logger.save_dir or ".") / "wandb"
            name = f"offline-run-*-{logger.version}"
            if any(folder.glob(name)):
                yield str(folder / name)


class RunConfig(SaveConfigCallback):
    """Writes the resolved config into the run directory and every logger.

    Args:
        parser: Parser of the subcommand.
        config: The resolved config.
        run_dir: The run directory; None: only the loggers get it.
        **kwargs: Options of Lightning's callback.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        *,
        run_dir: Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)
        self.run_dir = run_dir

    def save_config(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Write it; called on rank 0, before anything is trained."""
        del pl_module
        config = self.config.clone()
        # what belongs to this run alone, so that the file starts another one like it
        config["run"], config["ckpt_path"] = None, None
        text = self.parser.dump(config, skip_unset=False)
        if self.run_dir is not None:
            path = self.run_dir / CONFIG
            if stage == "fit" or not path.exists():
                replace_file(path, text)
        logged = logged_config(yaml.safe_load(text))
        for logger in trainer.loggers:
            own = isinstance(logger, RunHistory) and logger.path == self.run_dir
            if not own:
                logger.log_hyperparams(logged)

    def on_save_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Note whose weights a checkpoint holds."""
        del trainer
        checkpoint[VARIANT] = type(pl_module).__name__

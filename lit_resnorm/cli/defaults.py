"""What a run gets unless its options say otherwise, and what belongs to it alone."""

from __future__ import annotations

import os
import pydoc
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_info

from lit_resnorm.data import DataModule
from lit_resnorm.data.sampling import StepSeed
from lit_resnorm.runs.files import CHECKPOINTS, logged_config
from lit_resnorm.runs.history import RunHistory
from lit_resnorm.runs.resuming import ExactResume
from lit_resnorm.runs.wandb import WandbHistory

_WANDB = {
    # rows that wandb holds back longer are lost when the process is killed
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.1",
    # no table of all values at the end
    "WANDB_QUIET": "true",
}
_WANDB_OFFLINE = {
    # nor where it lies and what else there is: the command line says the first
    "WANDB_SILENT": "true",
}


def with_defaults(options: Namespace, *, has_wandb: bool) -> dict[str, Any]:
    """Return the options that change, nested.

    Loggers: RunHistory and W&B offline, where `trainer.logger` isn't set. Callbacks:
    a progress bar, a checkpoint at the end of each epoch, step seeds and `ExactResume`,
    beside those that are given.

    Args:
        options: Options of a subcommand.
        has_wandb: Whether wandb can be imported.

    Raises:
        ValueError: If a W&B logger is asked for and can't be made.
    """
    trainer = options.trainer
    loggers = _many(trainer.logger)
    if not has_wandb and any(_is(logger, WandbLogger) for logger in loggers):
        raise ValueError(
            "trainer.logger: WandbLogger needs wandb, which is not installed"
            " (pip install wandb)"
        )
    changes: dict[str, Any] = {"callbacks": _callbacks(options)}
    if trainer.logger in (None, True):
        changes["logger"] = _loggers(has_wandb)
    data = pydoc.locate(options.data.class_path)
    if isinstance(data, type) and issubclass(data, DataModule):
        changes["use_distributed_sampler"] = False
    return {"trainer": changes}


def _loggers(has_wandb: bool) -> list[dict[str, Any]]:
    history = {"class_path": _path_of_class(RunHistory)}
    if not has_wandb:
        rank_zero_info("wandb is not installed: the run is logged by RunHistory alone")
        return [history]
    # without `resume` here its null would override the logger's own default
    init = {"project": "lit_resnorm", "offline": True, "resume": "allow"}
    return [history, {"class_path": _path_of_class(WandbHistory), "init_args": init}]


def _callbacks(options: Namespace) -> list[Any]:
    trainer = options.trainer
    given = _many(trainer.callbacks)
    added: list[dict[str, Any]] = []
    if trainer.enable_progress_bar is not False and not _any(given, ProgressBar):
        bar = "lightning.pytorch.callbacks.RichProgressBar"
        added.append({"class_path": bar})
    if trainer.enable_checkpointing is not False and not _any(given, ModelCheckpoint):
        # `last` is a link: one file is written, and the one before stays until then
        init = {"save_last": "link", "enable_version_counter": False}
        added.append({"class_path": _path_of_class(ModelCheckpoint), "init_args": init})
    if not _any(given, StepSeed):
        seed = options.seed_everything
        init = {"seed": seed if type(seed) is int else 0}
        added.append({"class_path": _path_of_class(StepSeed), "init_args": init})
    if not _any(given, ExactResume):
        added.append({"class_path": _path_of_class(ExactResume)})
    return [*given, *added]


def filled_in(options: Namespace, run_dir: Path) -> None:
    """Put a run's directory, name and id into its loggers and checkpoints.

    What Lightning writes of its own accord goes there too: the checkpoint of a job that
    SLURM requeues, which another run must not find. What the user has set stays. W&B
    gets the experiment as group, the variant as type of job, and variant, data and
    experiment as tags; a run that is resumed keeps its id.
    """
    options.trainer.default_root_dir = str(run_dir)
    for callback in _many(options.trainer.callbacks):
        if _is(callback, ModelCheckpoint) and callback.init_args.dirpath is None:
            callback.init_args.dirpath = str(run_dir / CHECKPOINTS)
    for logger in _many(options.trainer.logger):
        if _is(logger, RunHistory) and logger.init_args.save_dir is None:
            logger.init_args.save_dir = str(run_dir)
        if _is(logger, WandbLogger):
            _fill_wandb(logger.init_args, options, run_dir)


def keeps_checkpoints_in_run(options: Namespace) -> bool:
    """Say whether checkpoints are written, and none outside of the run directory."""
    given = _many(options.trainer.callbacks)
    found = [callback for callback in given if _is(callback, ModelCheckpoint)]
    return bool(found) and all(one.init_args.dirpath is None for one in found)


def without_traces(options: Namespace) -> None:
    """Let a run write nothing: no loggers, no checkpoints."""
    given = _many(options.trainer.callbacks)
    kept = [callback for callback in given if not _is(callback, ModelCheckpoint)]
    options.trainer.callbacks = kept
    options.trainer.logger = options.trainer.enable_checkpointing = False


def _fill_wandb(init: Namespace, options: Namespace, run_dir: Path) -> None:
    offline = init.offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun")
    ours = _WANDB | (_WANDB_OFFLINE if offline else {})
    os.environ.update({**ours, **os.environ})
    flat = logged_config(options.as_dict())
    if init.save_dir == ".":
        init.save_dir = str(run_dir)
    values = {
        "name": run_dir.name,
        "project": "lit_resnorm",
        "id": None if init.version else _wandb_id(run_dir),
        "group": options.experiment,
        "job_type": flat["variant"],
        "tags": [flat["variant"], flat["data"], options.experiment],
        "resume": "allow",
    }
    for key, value in values.items():
        if init.get(key) is None:
            init[key] = value


def _wandb_id(run_dir: Path) -> str:
    """Return the id under which this run was recorded, or a new one."""
    for path in sorted((run_dir / "wandb").glob("*run-*")):
        match = re.fullmatch(r"(?:offline-)?run-\d{8}_\d{6}-(.+)", path.name)
        if match:
            return match[1]
    return secrets.token_hex(4)


def _many(value: Any) -> list[Any]:
    if isinstance(value, bool) or value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _any(components: Iterable[Any], kind: type) -> bool:
    return any(_is(component, kind) for component in components)


def _is(component: Any, kind: type) -> bool:
    """Say whether a class path is that of `kind` or of a class derived from it."""
    if isinstance(component, str):
        return False
    found = pydoc.locate(component.class_path)
    return isinstance(found, type) and issubclass(found, kind)


def _path_of_class(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

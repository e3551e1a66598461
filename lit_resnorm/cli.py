"""The command line: LightningCLI with run directories and errors of one line."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only

# imported, classes are known to the command line by their short names
import lit_resnorm.data
import lit_resnorm.modules  # noqa: F401
import lit_resnorm_callbacks  # noqa: F401
from lit_resnorm.cli_checks import (
    VARIANT,
    check_callback_names,
    check_checkpoint,
    check_devices,
    check_outputs,
)
from lit_resnorm.cli_defaults import filled_in, with_defaults
from lit_resnorm.cli_errors import UsageError, check_config_files, one_line
from lit_resnorm.run_files import CONFIG, logged_config
from lit_resnorm.run_places import (
    best_checkpoint,
    check_name,
    known_run,
    last_checkpoint,
    new_run,
)
from lit_resnorm.runs import RunHistory

PROGRAM = "lit-resnorm"
# Tells the processes that Lightning starts for DDP which directory rank 0 made.
_RUN_DIR = "LIT_RESNORM_RUN_DIR"
SUCCESS, FAILURE, WRONG_USE, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        argv: The words after the program's name; None: those of this process.

    Returns:
        0 success, 1 failure, 2 wrong use, 3 a diverged run, 130 interrupted.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in args
    args = [arg for arg in args if arg != "--traceback"]
    if args == ["--version"]:
        sys.stdout.write(f"{PROGRAM} {metadata.version('lit-resnorm')}\n")
        return SUCCESS
    status = FAILURE
    try:
        status = _run(args)
    except SystemExit as error:
        status = _status_of_exit(error)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        status = WRONG_USE if isinstance(error, UsageError) else FAILURE
        if show_traceback:
            traceback.print_exc()
        rank = f" [rank {_rank()}]" if _rank() else ""
        sys.stderr.write(f"{PROGRAM}: error{rank}: {one_line(error)}\n")
    finally:
        os.environ.pop(_RUN_DIR, None)
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=status)
    return status


def _rank() -> int:
    return getattr(rank_zero_only, "rank", 0)


def _run(args: list[str]) -> int:
    cli = ResNormCLI(args)
    diverged = cli.subcommand == "fit" and getattr(cli.model, "diverged", False)
    return DIVERGED if diverged else SUCCESS


def _status_of_exit(error: SystemExit) -> int:
    # Lightning leaves by SystemExit after Ctrl-C, and on SIGTERM by a kind of it
    if (
        isinstance(error.__context__, KeyboardInterrupt)
        or type(error) is not SystemExit
    ):
        return INTERRUPTED
    return error.code if isinstance(error.code, int) else SUCCESS


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
                path.write_text(text, encoding="utf-8")
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


class ResNormCLI(LightningCLI):
    """LightningCLI for any model and data, with a directory for every run.

    Args:
        args: Words of the command line.
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        self.run_dir: Path | None = None
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunConfig,
            trainer_defaults={"default_root_dir": "runs"},
            seed_everything_default=0,
            # our modules take optimizer and scheduler as options of their own
            auto_configure_optimizers=False,
            args=None if args is None else list(args),
        )

    @property
    def options(self) -> Namespace:
        """The resolved options of the subcommand."""
        return self.config[self.config.subcommand]

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser that raises instead of leaving the process."""
        return super().init_parser(**{"exit_on_error": False, **kwargs})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of run directories."""
        parser.add_argument(
            "--experiment",
            type=str | None,
            default=None,
            help="Folder of runs that belong together; default: the name of the first"
            " --config file, else of the model.",
        )
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="Name of the run; default: a time stamp. With --ckpt_path last or"
            " best: the run to go on with, default the experiment's newest.",
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="Whether fit ends with one pass over the test set.",
        )
        parser.set_defaults({"data": {"class_path": "lit_resnorm.data.Digits"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words of the command line."""
        check_config_files(sys.argv[1:] if args is None else args)
        try:
            self.config = parser.parse_args(args)
        except Exception as error:
            raise UsageError(one_line(error)) from error

    def _parse_ckpt_path(self) -> None:
        """Leave the options as they are: a checkpoint doesn't override them."""

    def before_instantiate_classes(self) -> None:
        """Fill in defaults, and find or make the run directory."""
        try:
            options = self.options
            check_devices(options.trainer.accelerator, options.trainer.devices)
            self._default_config()
            self._link_data()
            self._find_run()
        except Exception as error:
            raise UsageError(one_line(error)) from error

    def _default_config(self) -> None:
        options = self.options
        has_wandb = importlib.util.find_spec("wandb") is not None
        defaults = with_defaults(options, has_wandb=has_wandb)
        changes = {self.config.subcommand: defaults}
        self.config = self.parser.parse_object(changes, self.config)
        if self.options.experiment is None:
            files = self.options.config or []
            stem = Path(str(files[0])).stem if files else None
            model = self.options.model.class_path.rpartition(".")[2]
            self.options.experiment = stem or model

    def _link_data(self) -> None:
        """Fill in the model's input shape and classes from the data module."""
        init = self.options.model.get("init_args", {})
        wanted = {"in_shape": "input_shape", "num_classes": "num_classes"}
        missing = [name for name in wanted if name in init and init[name] is None]
        if not missing:
            return
        parser = LightningArgumentParser(exit_on_error=False)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
        config = Namespace(data=self.options.data.clone())
        data = parser.instantiate_classes(config)["data"]
        for name in missing:
            init[name] = getattr(data, wanted[name], None)

    def _find_run(self) -> None:
        """Choose the run directory; a checkpoint given by a word becomes a path."""
        options = self.options
        folder = Path(options.trainer.default_root_dir or ".") / check_name(
            "--experiment", options.experiment
        )
        name = None if options.run is None else check_name("--run", options.run)
        word = options.ckpt_path
        if word in ("last", "best"):
            run = self._agreed(lambda: known_run(folder, name))
            find = last_checkpoint if word == "last" else best_checkpoint
            options.ckpt_path = str(find(run))
        elif name and (folder / name).is_dir() and self._belongs(folder / name):
            run = folder / name
        elif options.trainer.fast_dev_run:
            return
        else:
            run = self._agreed(lambda: new_run(folder, name))
        if not options.trainer.fast_dev_run:
            self.run_dir = run

    def _belongs(self, run: Path) -> bool:
        """Say whether a subcommand may write into a run that is there."""
        path = self.options.ckpt_path
        if self.config.subcommand != "fit":
            return True
        return path is not None and Path(path).resolve().is_relative_to(run.resolve())

    def _agreed(self, choose: Any) -> Path:
        """Return what rank 0 chose."""
        if _RUN_DIR in os.environ and _rank():
            return Path(os.environ[_RUN_DIR])
        external = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if external and self.options.run is None:
            raise UsageError("--run: name the run where another program starts ranks")
        path = choose()
        os.environ[_RUN_DIR] = str(path)
        return path

    def instantiate_classes(self) -> None:
        """Make model, data and trainer, and look for mistakes before training."""
        try:
            config = self.config.clone()
            if self.run_dir is not None:
                self.save_config_kwargs = {"run_dir": self.run_dir}
                filled_in(config[config.subcommand], self.run_dir)
            self.config_init = self.parser.instantiate_classes(config)
            self.datamodule = self._get(self.config_init, "data")
            self.model = self._get(self.config_init, "model")
            # the whole config goes to the loggers once, by RunConfig
            self.model._log_hyperparams = self.datamodule._log_hyperparams = False
            check_outputs(self.model, self.datamodule)
            if self.options.ckpt_path:
                path, weights_only = self.options.ckpt_path, self.options.weights_only
                check_checkpoint(
                    Path(path), self.model, weights_only=weights_only is not False
                )
            callbacks = self._get(self.config_init, "trainer").get("callbacks")
            check_callback_names(callbacks or ())
            self.trainer = self.instantiate_trainer()
        except Exception as error:
            self._forget_run()
            raise UsageError(one_line(error)) from error

    def _forget_run(self) -> None:
        """Take away the directory of a run that never began."""
        if self.run_dir is None or _rank():
            return
        if [path.name for path in self.run_dir.glob("*")] == [CONFIG]:
            (self.run_dir / CONFIG).unlink()
        for folder in (self.run_dir, self.run_dir.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            self._forget_run()
            raise
        if self.run_dir is not None:
            rank_zero_info(f"Run directory: {self.run_dir}")

    def after_fit(self) -> None:
        """Test the trained weights where `test_after_fit` asks for it."""
        diverged = getattr(self.model, "diverged", False)
        if self.options.test_after_fit and not diverged:
            self.trainer.test(self.model, datamodule=self.datamodule)

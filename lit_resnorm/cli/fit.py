"""LightningCLI with run directories and errors of one line."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import (
    LightningDataModule,
    LightningModule,
    seed_everything,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning_utilities.core.rank_zero import rank_zero_info

# imported, classes are known to the command line by their short names
import lit_resnorm.compare.report
import lit_resnorm.data
import lit_resnorm.modules  # noqa: F401
import lit_resnorm_callbacks  # noqa: F401
from lit_resnorm.cli.checks import (
    check_callback_names,
    check_devices,
    check_groups,
    check_numbers,
    check_optimizer,
    check_outputs,
    check_seed,
    restores_checkpoint,
)
from lit_resnorm.cli.config_files import check_config_files
from lit_resnorm.cli.defaults import filled_in, with_defaults, without_traces
from lit_resnorm.cli.display import suit_output
from lit_resnorm.cli.fit_help import make_readable
from lit_resnorm.cli.noise import silence_advice_on_intervals, silence_lightning
from lit_resnorm.cli.options import OptionParser, explained, made_wrongly
from lit_resnorm.cli.run import (
    RunConfig,
    choose_run,
    forget_run,
    offline_wandb,
    rank,
)
from lit_resnorm.cli.traces import Before, Beginning, callbacks_of, look_before
from lit_resnorm.cli.trust import Trust
from lit_resnorm.compare.report import REPORT
from lit_resnorm.data import DataModule
from lit_resnorm.errors import UsageError, one_line, printable
from lit_resnorm.runs.checkpoints import check_checkpoint, load_checkpoint
from lit_resnorm.runs.files import SUMMARY, with_present_paths
from lit_resnorm.runs.steps import has_diverged

_YAML = "yaml with the classes of earlier versions"


_TRUST: ContextVar[Trust | None] = ContextVar("trust", default=None)


def _load_yaml(text: str) -> Any:
    # every text of YAML comes through here: files, files that they name, values
    config = with_present_paths(get_loader("yaml")(text))
    trust = _TRUST.get()
    if trust is not None:
        trust.check(config)
    return config


set_loader(_YAML, _load_yaml, (yaml.YAMLError,))


class ResNormCLI(LightningCLI):
    """LightningCLI for any model and data, with a directory for every run.

    Args:
        args: Words of the command line.
        more: Options, with dashes, that another command has beside those of `fit`.
        trust: What config files may name; None: anything.
    """

    def __init__(
        self,
        args: Sequence[str] | None = None,
        more: Iterable[str] = (),
        trust: Trust | None = None,
    ) -> None:
        self._trust = trust
        self.run_dir: Path | None = None
        self._before: Before | None = None
        self._beginning = Beginning()
        self._words = sys.argv[1:] if args is None else list(args)
        self._more = [*more]
        silence_lightning()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunConfig,
            parser_class=OptionParser,
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

    @property
    def diverged(self) -> bool:
        """Whether the training diverged."""
        forked = isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher)
        if forked and self.run_dir is not None:
            # the module that knows is in a process that has ended
            path = self.run_dir / SUMMARY
            return (
                path.exists() and json.loads(path.read_text())["status"] == "diverged"
            )
        return has_diverged(self.trainer)

    @property
    def _weights_only(self) -> bool:
        return self.options.get("weights_only") is not False

    def subcommands(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
    ) -> dict[str, set[str]]:
        """Return the command that is asked for, else all: parsers take time to make."""
        known = LightningCLI.subcommands()
        asked = self._words[:1]
        return {name: known[name] for name in asked} if {*asked} & {*known} else known

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser that raises instead of leaving the process."""
        return super().init_parser(**{"parser_mode": _YAML, **kwargs})

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        make_readable(cast(OptionParser, parser), subcommand)
        return parser

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
            " best: the run to go on with, default the experiment's newest. A run that"
            " isn't there, or has no checkpoint yet, begins with fit --run NAME"
            " --ckpt_path last: the words for jobs that are started again and again.",
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
        check_config_files(self._words)
        token = _TRUST.set(self._trust)
        try:
            self.config = parser.parse_args(args)
        except Exception as error:
            # the parser may have told it in its own words
            if self._trust is not None and self._trust.refusal is not None:
                raise self._trust.refusal from error
            raise UsageError(explained(error, self._words, self._more)) from error
        finally:
            _TRUST.reset(token)
        check_groups(self.options)
        check_seed(self.options.seed_everything)

    def _set_seed(self) -> None:
        """Seed without a word: what was drawn stands in `config.yaml`."""
        seed = self.options.seed_everything
        if seed is not False:
            given = None if seed is True else seed
            drawn = seed_everything(given, workers=True, verbose=False)
            self.options.seed_everything = drawn

    def _parse_ckpt_path(self) -> None:
        """Leave the options as they are: a checkpoint doesn't override them."""

    def before_instantiate_classes(self) -> None:
        """Fill in defaults, and find or make the run directory."""
        try:
            options = self.options
            check_devices(options.trainer.accelerator, options.trainer.devices)
            check_numbers(options.trainer)
            if options.trainer.log_every_n_steps is None:
                silence_advice_on_intervals()
            self._default_config()
            self._link_data()
            self._choose_run()
        except Exception as error:
            self._refuse(error)

    def _choose_run(self) -> None:
        root = self.options.trainer.default_root_dir or "."
        self._before = look_before(Path(root) / self.options.experiment)
        try:
            self.run_dir = choose_run(self.options, self.config.subcommand)
        except OSError as error:
            reason = f"no run can be written there ({error.strerror})"
            raise UsageError(f"--trainer.default_root_dir {root}: {reason}") from error

    def _refuse(self, error: Exception) -> NoReturn:
        """Raise UsageError, and leave nothing behind."""
        if self._before is not None and not rank():
            self._before.restore(self.run_dir)
        raise UsageError(made_wrongly(error)) from error

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
        data = parser.instantiate(config)["data"]
        for name in missing:
            init[name] = getattr(data, wanted[name], None)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer, and look for mistakes before training."""
        try:
            self.config_init = self.parser.instantiate(self._own_config())
            self.datamodule = self._get(self.config_init, "data")
            self.model = self._get(self.config_init, "model")
            # the whole config goes to the loggers once, by RunConfig
            self.model._log_hyperparams = self.datamodule._log_hyperparams = False
            check_outputs(self.model, self.datamodule)
            check_optimizer(self.model)
            if self.options.ckpt_path:
                path = Path(self.options.ckpt_path)
                check_checkpoint(path, self.model, weights_only=self._weights_only)
            callbacks = self._get(self.config_init, "trainer").get("callbacks")
            check_callback_names(callbacks or ())
            self._prepare_data()
            self.trainer = self.instantiate_trainer()
            suit_output(self.trainer)
            # the last, so that what the others refuse at the first batch is refused
            callbacks_of(self.trainer).append(self._beginning)
        except Exception as error:
            self._refuse(error)

    def _own_config(self) -> Namespace:
        """Return the config with what belongs to this run alone."""
        config = self.config.clone()
        options = config[config.subcommand]
        if options.trainer.fast_dev_run:
            without_traces(options)
        elif self.run_dir is not None:
            self.save_config_kwargs = {"run_dir": self.run_dir}
            filled_in(options, self.run_dir)
        return config

    def _prepare_data(self) -> None:
        """Make our data sets now, where an error costs nothing; it is done once."""
        if isinstance(self.datamodule, DataModule) and rank() == 0:
            self.datamodule.prepare_data()
            self.datamodule.setup(self.config.subcommand)

    def _run_subcommand(self, subcommand: str) -> None:
        path = self.options.ckpt_path
        try:
            if subcommand != "fit" and path and Path(path).is_file():
                self._take_step(Path(path))
            super()._run_subcommand(subcommand)
        except Exception as error:
            if restores_checkpoint(error):
                reason = f"it can't be gone on from ({one_line(error)})"
                self._refuse(UsageError(f"--ckpt_path {path}: {reason}"))
            refusal = isinstance(error, ValueError | MisconfigurationException)
            if refusal and not self._beginning.begun:
                self._refuse(error)
            forget_run(self.run_dir)
            raise
        except BaseException:
            forget_run(self.run_dir)
            raise
        if self.run_dir is not None:
            rank_zero_info(f"Run directory: {printable(self.run_dir)}")
            for recorded in offline_wandb(self.trainer) if subcommand == "fit" else ():
                rank_zero_info(f"W&B, offline: wandb sync {printable(recorded)}")
            report = self.run_dir / REPORT
            if report.is_file():
                rank_zero_info(f"Report, to open in a browser: {printable(report)}")

    def _take_step(self, path: Path) -> None:
        """Log values at the step that a checkpoint's weights have come to."""
        checkpoint = load_checkpoint(path, weights_only=self._weights_only)
        if "loops" in checkpoint:
            self._restore_loop(checkpoint["loops"])

    def _restore_loop(self, loops: Any) -> None:
        self.trainer.fit_loop.load_state_dict(loops["fit_loop"])

    def predict(self, **kwargs: Any) -> None:
        """Write what the module predicts to `predictions.pt`, one tensor a batch."""
        predictions = self.trainer.predict(**kwargs)
        if self.run_dir is not None:
            own = f".{rank()}" if self.trainer.world_size > 1 else ""
            torch.save(predictions, self.run_dir / f"predictions{own}.pt")

    def after_fit(self) -> None:
        """Test the trained weights where `test_after_fit` asks for it."""
        if self.options.test_after_fit and not self.diverged:
            self.trainer.test(self.model, datamodule=self.datamodule)

"""Model and data of a `fit` command line, without the fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from lit_resnorm.cli.checks import check_outputs
from lit_resnorm.cli.fit import ResNormCLI
from lit_resnorm.cli.options import made_wrongly
from lit_resnorm.cli.trust import Trust
from lit_resnorm.errors import UsageError


@dataclass(frozen=True)
class ModelAndData:
    """What a command line makes.

    Attributes:
        module: The model, on the device that the trainer would use.
        data: The data.
        variant: The model's class.
        dataset: The data's class.
    """

    module: LightningModule
    data: LightningDataModule
    variant: str
    dataset: str


def model_and_data(
    args: Sequence[str], more: Iterable[str] = (), trust: Trust | None = None
) -> ModelAndData:
    """Return the model and data that these options of `fit` make.

    All that `fit` takes is taken; nothing is trained, and nothing written.

    Args:
        args: Options and their values.
        more: Further options, with dashes, that misspelt ones may have been.
        trust: What config files may name; None: anything.

    Raises:
        UsageError: If `fit` would refuse the options.
    """
    cli = _Unstarted(["fit", *args], more, trust)
    options = cli.options
    return ModelAndData(
        cli.model,
        cli.datamodule,
        options.model.class_path.rpartition(".")[2],
        options.data.class_path.rpartition(".")[2],
    )


class _Unstarted(ResNormCLI):
    """Parses a command line of `fit` and makes model and data, no more."""

    def before_instantiate_classes(self) -> None:
        """Fill in the model's input shape and classes."""
        try:
            trainer = self.options.trainer
            trainer.logger, trainer.callbacks = False, None
            trainer.enable_checkpointing = False
            self._link_data()
        except Exception as error:
            raise UsageError(made_wrongly(error)) from error

    def instantiate_classes(self) -> None:
        """Make model and data."""
        try:
            config = self.config.clone()
            self.config_init = self.parser.instantiate(config)
            self.datamodule = self._get(self.config_init, "data")
            self.model = self._get(self.config_init, "model")
            self._prepare_data()
            check_outputs(self.model, self.datamodule)
        except Exception as error:
            raise UsageError(made_wrongly(error)) from error
        on_gpu = self.options.trainer.accelerator in ("auto", "gpu", "cuda")
        if on_gpu and torch.cuda.is_available():
            self.model.cuda()

    def _run_subcommand(self, subcommand: str) -> None:
        """Leave it at that."""

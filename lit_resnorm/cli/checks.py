"""What the command line looks at before training, so that mistakes cost no time."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_resnorm.errors import UsageError
from lit_resnorm.modules.classifier import LitClassifier

_LEAST_OF_TRAINER = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "reload_dataloaders_every_n_epochs": 0,
}
_LARGEST_SEED = 2**32 - 1


def check_devices(accelerator: str, devices: Any) -> None:
    """Raise ValueError if GPUs are asked for that aren't there."""
    if accelerator not in ("gpu", "cuda") or torch.backends.mps.is_available():
        return
    count = torch.cuda.device_count()
    asked = f"trainer.accelerator={accelerator}, trainer.devices={devices}"
    number = int(devices) if str(devices).isdecimal() else 1
    if number > count:
        raise ValueError(f"{asked}: this machine has {count or 'no'} GPU")


def check_numbers(options: Namespace) -> None:
    """Raise UsageError for numbers of the Trainer that it takes and that go wrong.

    Args:
        options: Options of the Trainer.
    """
    for name, least in _LEAST_OF_TRAINER.items():
        value = options.get(name)
        if isinstance(value, int | float) and not value >= least:
            raise UsageError(f"--trainer.{name} {value}: it must be {least} or more")


def check_groups(options: Namespace) -> None:
    """Raise UsageError for a group of options that is a value instead."""
    for name in ("trainer", "model", "data"):
        value = options.get(name)
        if not isinstance(value, Namespace):
            raise UsageError(f"--{name}: expected options, got {value!r}")


def check_seed(seed: bool | int) -> None:
    """Raise UsageError for a seed that numpy doesn't take."""
    if not 0 <= seed <= _LARGEST_SEED:
        raise UsageError(f"--seed_everything {seed}: it must be from 0 to 2**32 - 1")


def check_callback_names(callbacks: Iterable[Callback]) -> None:
    """Raise ValueError if two callbacks would keep their state under one key."""
    seen: dict[str, Callback] = {}
    for callback in callbacks:
        if not hasattr(callback, "name") and not _has_state(callback):
            continue
        key = callback.state_key
        if key in seen:
            name = getattr(callback, "name", None)
            kind = type(callback).__name__
            shared = f"the name {name!r}" if name else f"the key {key!r}"
            raise ValueError(
                f"trainer.callbacks: two {kind} have {shared}; give one another name"
            )
        seen[key] = callback


def _has_state(callback: Callback) -> bool:
    return is_overridden("state_dict", callback)


def check_outputs(module: LightningModule, data: LightningDataModule) -> None:
    """Raise ValueError if one of our modules can't learn from one of our data sets.

    One example of zeros goes through the network in eval mode; random states stay.
    """
    shape = getattr(data, "input_shape", None)
    classes = getattr(data, "num_classes", None)
    if not isinstance(module, LitClassifier) or shape is None or classes is None:
        return
    names = type(module).__name__, type(data).__name__
    training = module.training
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            outputs = module.eval()(torch.zeros(1, *shape))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{names[0]} can't take the inputs of {names[1]}, of shape {shape}: {error}"
        ) from error
    finally:
        module.train(training)
    if outputs.ndim != 2:
        raise ValueError(f"{names[0]} gives outputs of shape {tuple(outputs.shape)}")
    number = outputs.shape[1]
    declared = module.num_classes
    if declared is not None and declared > classes:
        raise ValueError(
            f"num_classes={declared} of {names[0]}, but {names[1]} has {classes}"
        )
    if number < classes or (module.loss == "mse" and number != classes):
        raise ValueError(
            f"loss={module.loss}: the head of {names[0]} has {number} outputs, but"
            f" {names[1]} has {classes} classes"
        )


def check_optimizer(module: LightningModule) -> None:
    """Raise ValueError if one of our modules can't make its optimizer."""
    if not isinstance(module, LitClassifier):
        return
    try:
        module.configure_optimizers()
    except (TypeError, ValueError) as error:
        raise ValueError(f"--model.optimizer, --model.lr_scheduler: {error}") from error


_RESTORING = {"checkpoint_connector.py": "restore", "fit.py": "_restore_loop"}
"""Functions that take over what a checkpoint holds: Lightning's, and ours."""


def restores_checkpoint(error: BaseException) -> bool:
    """Say whether an error arose as the state in a checkpoint was taken over."""
    return any(
        _RESTORING.get(Path(place.filename).name, "\0") in place.name
        for place in traceback.extract_tb(error.__traceback__)
    )

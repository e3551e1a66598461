"""The default optimizer, how any is scheduled or kept from a step; saved arguments."""

import inspect
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

__all__ = ["default_optimizer", "drop_step", "outermost_init", "scheduled"]


def default_optimizer(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return stochastic gradient descent with learning rate 0.05 and momentum 0.9."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def scheduled(
    optimizer: torch.optim.Optimizer, scheduler: Any, interval: str
) -> OptimizerLRScheduler:
    """Return an optimizer with its scheduler, as Lightning takes them.

    Args:
        optimizer: The optimizer.
        scheduler: Its scheduler; watches `val/loss`, or what its `monitor` names.
        interval: Whether it steps each `epoch` or optimizer `step`.

    Raises:
        ValueError: If `ReduceLROnPlateau` should step at each optimizer step.
    """
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    if plateau and interval == "step":
        raise ValueError(
            "lr_interval='step' doesn't go with ReduceLROnPlateau, which waits for a"
            " validation"
        )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {
            "scheduler": scheduler,
            "interval": interval,
            # LightningCLI's own ReduceLROnPlateau carries one.
            "monitor": getattr(scheduler, "monitor", "val/loss"),
        },
    }


def drop_step(optimizer: torch.optim.Optimizer, *, scaled: bool) -> None:
    """Make the step that the optimizer is about to take change nothing.

    Args:
        optimizer: Its gradients are dropped.
        scaled: Whether a gradient scaler takes the step.
    """
    # Fused optimizers look for infinite gradients inside the step, and the scaler
    # fails where there is no gradient at all; it skips the step where one is NaN.
    fused = scaled and getattr(optimizer, "_step_supports_amp_scaling", False)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if fused and parameter.grad is not None:
                parameter.grad.fill_(torch.nan)
            else:
                parameter.grad = None


def outermost_init(module: nn.Module) -> FrameType | None:
    """Return the frame of the outermost `__init__` that is building `module`.

    Its arguments alone make the module again; those that a class passes on to its base
    would come twice.
    """
    frame = inspect.currentframe()
    frame = frame and frame.f_back
    while frame and frame.f_back and frame.f_back.f_locals.get("self") is module:
        frame = frame.f_back
    return frame

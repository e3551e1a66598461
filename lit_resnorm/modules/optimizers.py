"""The default optimizer, and how any optimizer is kept from taking a step."""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["default_optimizer", "drop_step"]


def default_optimizer(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return stochastic gradient descent with learning rate 0.05 and momentum 0.9."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


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

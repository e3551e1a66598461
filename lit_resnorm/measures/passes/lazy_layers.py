"""Lazy layers, whose weights are drawn in a first pass: only the run may make it.

Their random numbers are the run's own, drawn where its first batch comes; a probe's
pass would draw others, and training would begin from other weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def lazy_tensors(model: nn.Module) -> list[str]:
    """Return the names of parameters and buffers that have no shape yet."""
    own = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in own if is_lazy(tensor)]


def check_initialised(model: nn.Module) -> None:
    """Refuse a model whose lazy layers have had no first pass.

    Raises:
        ValueError: If there is one; the message names its weights.
    """
    if names := lazy_tensors(model):
        raise ValueError(
            f"{', '.join(names)} of {type(model).__name__} have no shape before the"
            " first pass of their lazy layers: run a batch through the model first (in"
            " a run, in configure_model or by the sanity check of validation)"
        )


def initialise(model: nn.Module, forward: Callable[[], Any]) -> None:
    """Give lazy layers their shapes by a pass in eval mode, outside of a run.

    Global random states are drawn from, as by the model's own first pass.
    """
    if not lazy_tensors(model):
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            forward()
    finally:
        for module, mode in modes:
            module.training = mode

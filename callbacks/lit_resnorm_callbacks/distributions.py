"""Distributions of a network's output, as its loss tells them."""

from __future__ import annotations

from torch import nn

# Losses by the name that our modules give them, and torch's own.
_OUTPUTS = {"cross_entropy": "softmax", "mse": "gaussian"}
_LOSSES = {nn.CrossEntropyLoss: "softmax", nn.BCEWithLogitsLoss: "bernoulli"}


def distribution_of(module: nn.Module) -> str:
    """Return the distribution that belongs to a module's loss, `auto` without one.

    Raises:
        ValueError: If its loss tells none.
    """
    loss = getattr(module, "loss", None)
    if isinstance(loss, str) and loss in _OUTPUTS:
        return _OUTPUTS[loss]
    if not isinstance(loss, nn.modules.loss._Loss):
        return "auto"
    if type(loss) not in _LOSSES:
        raise ValueError(
            f"output is 'auto' and the module's loss is {type(loss).__name__}, which"
            " tells no distribution; give output 'softmax', 'bernoulli' or 'gaussian'"
            " (and loss_scale)"
        )
    return _LOSSES[type(loss)]

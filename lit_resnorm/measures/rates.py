"""Learning rates in use, and the bounds that curvature sets them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer


class Rate(NamedTuple):
    """The largest learning rate in use.

    Attributes:
        value: The rate.
        bound: Above it the optimizer diverges on a quadratic of this curvature.
        binding: Whether the bound is this optimizer's own; an adaptive one rescales its
            gradients, and the bound is that of plain gradient descent.
    """

    value: float
    bound: float
    binding: bool


def largest_rate(optimizers: Iterable[Optimizer], lambda_max: float) -> Rate | None:
    """Return the largest rate of all parameter groups, with its bound.

    Args:
        optimizers: The run's optimizers.
        lambda_max: Largest eigenvalue of the loss's curvature.

    Returns:
        None where there is no optimizer.
    """
    rates = [
        Rate(float(group["lr"]), rate_bound(optimizer, group, lambda_max), plain)
        for optimizer in optimizers
        for plain in (isinstance(optimizer, torch.optim.SGD),)
        for group in optimizer.param_groups
    ]
    return max(rates, key=lambda rate: (rate.value, -rate.bound), default=None)


def rate_bound(optimizer: Optimizer, group: dict[str, Any], lambda_max: float) -> float:
    r"""Return the rate above which an optimizer diverges on a quadratic.

    With momentum :math:`\mu`, dampening d and L2 decay w that joins the gradient:

    .. math:: \frac{2}{\lambda + w}, \quad
        \frac{2 (1 + \mu)}{(1 - d)(\lambda + w)}, \quad
        \frac{2 (1 + \mu)}{(1 + 2 \mu)(\lambda + w)}

    for plain gradient descent, heavy ball and Nesterov's momentum. Derived from the
    roots of the two-step recursion; Nesterov's bound is the lowest of the three.

    Args:
        optimizer: `torch.optim.SGD`; any other gets the bound :math:`2 / \lambda`.
        group: The parameter group.
        lambda_max: Largest eigenvalue.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return 2 / lambda_max if lambda_max else float("inf")
    curvature = lambda_max + float(group["weight_decay"])
    if group.get("maximize"):
        return 0.0
    if not curvature:
        return float("inf")
    momentum, dampening = float(group["momentum"]), float(group["dampening"])
    if not momentum:
        return 2 / curvature
    if group["nesterov"]:
        return 2 * (1 + momentum) / ((1 + 2 * momentum) * curvature)
    return 2 * (1 + momentum) / ((1 - dampening) * curvature)

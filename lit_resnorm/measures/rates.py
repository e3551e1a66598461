"""Learning rates in use, and the bounds that curvature sets them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer


class Rate(NamedTuple):
    """The largest learning rate in use.

    Attributes:
        value: The rate.
        bound: Above it the optimizer diverges on a quadratic of this curvature; None
            where the curvature bounds no rate of this optimizer.
        is_descent: Whether the optimizer steps along its gradients.
    """

    value: float
    bound: float | None
    is_descent: bool

    @property
    def ratio(self) -> float | None:
        """The rate over its bound; None where there is none."""
        if self.bound is None:
            return None
        return self.value / self.bound if self.bound else math.inf


def largest_rate(optimizers: Iterable[Optimizer], lambda_max: float) -> Rate | None:
    """Return the largest rate of all parameter groups, with its bound.

    Args:
        optimizers: The run's optimizers.
        lambda_max: Largest eigenvalue of the loss's curvature.

    Returns:
        None where there is no optimizer. Of equal rates the one with a bound, and of
        these the one with the lowest.
    """
    rates = [
        Rate(
            float(group["lr"]),
            rate_bound(optimizer, group, lambda_max),
            is_descent(optimizer),
        )
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]

    def weight(rate: Rate) -> tuple[float, float]:
        return rate.value, -math.inf if rate.bound is None else -rate.bound

    return max(rates, key=weight, default=None)


def is_descent(optimizer: Optimizer) -> bool:
    """Say whether an optimizer steps along its gradients, as `torch.optim.SGD` does.

    Any other rescales them, so that the curvature bounds no rate of its own.
    """
    return isinstance(optimizer, torch.optim.SGD)


def rate_bound(
    optimizer: Optimizer, group: dict[str, Any], lambda_max: float
) -> float | None:
    r"""Return the rate above which an optimizer diverges on a quadratic.

    With momentum :math:`\mu`, dampening d and L2 decay w that joins the gradient:

    .. math:: \frac{2}{\lambda + w}, \quad
        \frac{2 (1 + \mu)}{(1 - d)(\lambda + w)}, \quad
        \frac{2 (1 + \mu)}{(1 + 2 \mu)(\lambda + w)}

    for plain gradient descent, heavy ball and Nesterov's momentum. Derived from the
    roots of the two-step recursion; Nesterov's bound is the lowest of the three.

    Args:
        optimizer: `torch.optim.SGD`; any other rescales its gradients.
        group: The parameter group.
        lambda_max: Largest eigenvalue.

    Returns:
        None where none applies: of another optimizer, or without curvature.
    """
    if not is_descent(optimizer):
        return None
    curvature = lambda_max + float(group["weight_decay"])
    if group.get("maximize"):
        return 0.0
    if not curvature:
        return None
    momentum, dampening = float(group["momentum"]), float(group["dampening"])
    if not momentum:
        return 2 / curvature
    if group["nesterov"]:
        return 2 * (1 + momentum) / ((1 + 2 * momentum) * curvature)
    return 2 * (1 + momentum) / ((1 - dampening) * curvature)

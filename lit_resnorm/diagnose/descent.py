"""The learning rate that a module is configured to train at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lit_resnorm.measures.passes.untouched import untouched
from lit_resnorm.measures.rates import is_descent, rate_bound

_PEAKS = ("lr", "initial_lr", "max_lr")
"""A schedule that warms up begins below the rate that it was given."""


@dataclass(frozen=True)
class Descent:
    """An optimizer's way down, as far as the rate bound and a trial need it.

    Attributes:
        group: Momentum, dampening, Nesterov and decay of the group of the largest rate.
        rate: The largest rate; None: plain descent at no particular rate.
        words: What it is.
        binding: Whether the bound is its own; adaptive optimizers rescale gradients.
        settings: By parameter: its group's, with `scale`, its rate over the largest.
        optimizer: The optimizer; None where there is none.
    """

    group: dict[str, Any]
    rate: float | None
    words: str
    binding: bool
    settings: dict[Tensor, dict[str, Any]]
    optimizer: Optimizer | None

    def bound(self, lambda_max: float) -> float:
        """Return the rate bound at a curvature."""
        like, group = self.optimizer, self.group
        if like is None or not self.binding:
            like, group = torch.optim.SGD([torch.zeros(1)], lr=1.0), _PLAIN_DESCENT
        bound = rate_bound(like, group, lambda_max)
        return math.inf if bound is None else bound


_PLAIN_DESCENT = {
    "momentum": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
}


def descent_of(
    module: nn.Module, *, rate: float | None = None, optimizer: Optimizer | None = None
) -> tuple[Descent, str]:
    """Return how a module descends, and why no rate is known ("" where one is).

    Args:
        module: Its `configure_optimizers` is asked where it has one.
        rate: Stands in place of the configured rate; plain descent without optimizer.
        optimizer: Stands in place of the module's.

    Raises:
        ValueError: If `rate` isn't a positive number.
    """
    if rate is not None and not 0 < rate < float("inf"):
        raise ValueError(f"rate is {rate}; it must be a positive number")
    reason = ""
    if optimizer is None:
        optimizer, reason = _configured(module)
    if optimizer is None:
        words = "gradient descent"
        return Descent(
            _PLAIN_DESCENT, rate, words, True, {}, None
        ), reason if not rate else ""
    groups = [dict(group) for group in optimizer.param_groups]
    rates = [_peak(group) for group in groups]
    largest = max(rates)
    group = groups[rates.index(largest)]
    settings = {
        parameter: {**own, "scale": each / largest if largest else 1.0}
        for own, each in zip(groups, rates, strict=True)
        for parameter in own["params"]
    }
    binding = is_descent(optimizer)
    return (
        Descent(
            group=group,
            rate=largest if rate is None else rate,
            words=_optimizer_in_words(optimizer, group),
            binding=binding,
            settings=settings if binding else {},
            optimizer=optimizer,
        ),
        "",
    )


def _configured(module: nn.Module) -> tuple[Optimizer | None, str]:
    if not isinstance(module, LightningModule):
        return None, "the module configures no optimizer: give rate="
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return None, "the module has no trainable parameter"
    try:
        with untouched(module):
            found = list(_optimizers(module.configure_optimizers()))
    except Exception as error:
        # Whatever a module does that needs a trainer.
        words = " ".join(str(error).split())[:120]
        return None, f"configure_optimizers failed without a trainer ({words})"
    if not found:
        return None, "configure_optimizers gives no optimizer"
    return max(found, key=lambda o: max(_peak(g) for g in o.param_groups)), ""


def _optimizers(configured: Any) -> Iterable[Optimizer]:
    leaves = pytree.tree_leaves(configured, is_leaf=_is_optimizer)
    return [leaf for leaf in leaves if _is_optimizer(leaf)]


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Optimizer)


def _peak(group: dict[str, Any]) -> float:
    return max(float(group[name]) for name in _PEAKS if name in group)


def _optimizer_in_words(optimizer: Optimizer, group: dict[str, Any]) -> str:
    parts = []
    if group.get("momentum"):
        kind = "Nesterov momentum" if group.get("nesterov") else "momentum"
        parts.append(f"{kind} {group['momentum']:g}")
    if group.get("weight_decay"):
        parts.append(f"weight decay {group['weight_decay']:g}")
    return " with ".join(
        [type(optimizer).__name__, ", ".join(parts)][: 1 + bool(parts)]
    )

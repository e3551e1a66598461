"""The learning rate that a module is configured to train at."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
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
    """How a module steps down: its optimizer, and its largest learning rate.

    Attributes:
        optimizer: The optimizer; plain gradient descent where none is known.
        rate: The largest rate; None: no particular one.
        words: What takes the steps.
        num_others: Further optimizers, which aren't looked at.
    """

    optimizer: Optimizer
    rate: float | None
    words: str
    num_others: int = 0

    @property
    def binding(self) -> bool:
        """Whether curvature bounds its rate: other optimizers rescale gradients."""
        return is_descent(self.optimizer)

    def bound(self, lambda_max: float) -> float | None:
        """Return the rate bound at a curvature; None where none applies."""
        group = max(self.optimizer.param_groups, key=_peak)
        return rate_bound(self.optimizer, group, lambda_max)

    @property
    def untriable(self) -> str:
        """Why steps on copies can't be tried; empty where they can."""
        kind = type(self.optimizer)
        closure = inspect.signature(kind.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            return f"{kind.__name__} needs a closure for its steps"
        if isinstance(self.optimizer, torch.optim.SparseAdam):
            return f"{kind.__name__} takes sparse gradients alone"
        return ""

    def on_copies(self, copies: Mapping[Tensor, Tensor], rate: float) -> Optimizer:
        """Return an optimizer of the same class, settings and state over copies.

        Args:
            copies: By parameter its copy; of parameters that aren't there copies are
                made, which have no gradient and take no step.
            rate: The largest rate; the other groups' are as much smaller as now.
        """
        attributes = {
            name: value
            for name, value in vars(self.optimizer).items()
            # a scheduler counts calls of `step`; what others hang on isn't wanted
            if name != "step" and "hook" not in name
        }
        memo = {id(parameter): own for parameter, own in copies.items()}
        optimizer = type(self.optimizer).__new__(type(self.optimizer))
        optimizer.__setstate__(copy.deepcopy(attributes, memo))
        largest = max(map(_peak, self.optimizer.param_groups))
        for group, like in zip(
            optimizer.param_groups, self.optimizer.param_groups, strict=True
        ):
            scaled = rate * (_peak(like) / largest if largest else 1.0)
            known = like.get("lr")
            is_tensor = isinstance(known, Tensor)
            group["lr"] = torch.full_like(known, scaled) if is_tensor else scaled
            for parameter in group["params"]:
                parameter.grad = None
        return optimizer


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
    reason, num_others = "", 0
    if optimizer is None:
        optimizer, num_others, reason = _configured(module)
    if optimizer is None:
        trained = [p for p in module.parameters() if p.requires_grad]
        plain = torch.optim.SGD(trained or [torch.zeros(1)], lr=1.0)
        return Descent(plain, rate, "gradient descent"), "" if rate else reason
    group = max(optimizer.param_groups, key=_peak)
    known = _peak(group) if rate is None else rate
    words = _optimizer_in_words(optimizer, group)
    return Descent(optimizer, known, words, num_others), ""


def _configured(module: nn.Module) -> tuple[Optimizer | None, int, str]:
    """Return the optimizer of the largest rate, how many others, or why none."""
    if not isinstance(module, LightningModule):
        return None, 0, "the module configures no optimizer: give rate="
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return None, 0, "the module has no trainable parameter"
    try:
        with untouched(module):
            found = list(_optimizers(module.configure_optimizers()))
    except Exception as error:
        # Whatever a module does that needs a trainer.
        words = " ".join(str(error).split())[:120]
        return None, 0, f"configure_optimizers failed without a trainer ({words})"
    if not found:
        return None, 0, "configure_optimizers gives no optimizer"
    largest = max(found, key=lambda o: max(_peak(g) for g in o.param_groups))
    return largest, len(found) - 1, ""


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

"""The training loss of a few examples, taken without a trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_resnorm.measures.losses.comparison import Slope, Trained
from lit_resnorm.measures.passes.batch_dim import as_given
from lit_resnorm.measures.passes.batches import leaves
from lit_resnorm.measures.passes.functional_calls import with_weights
from lit_resnorm.measures.passes.untouched import untouched


class NotComparableError(Exception):
    """There is no training loss to compare with; the message says why."""


@contextmanager
def trained_loss(
    module: LightningModule,
    forward: Callable[[], Any],
    batch: Any,
    given: Any,
    norm_mode: str,
) -> Iterator[Trained]:
    """Give the loss that `training_step` returns for a batch, with its gradient.

    The step runs on copies of the weights, in eval mode, and what it logs is dropped.

    Args:
        module: The module in training.
        forward: Returns the network's output on the batch.
        batch: A few examples, in the first dimension.
        given: The same as the module takes them.
        norm_mode: What batch norm does, in both passes.

    Raises:
        NotComparableError: If the step can't be run, gives no loss, or another one each
            time.
    """
    arguments = _arguments(module, given)
    copies = {
        name: p.detach().requires_grad_(p.requires_grad)
        for name, p in module.named_parameters()
    }
    weights = [copy for copy in copies.values() if copy.requires_grad]
    with (
        untouched(module, norm_mode=norm_mode) as run,
        _unlogged(module),
        with_weights(module, copies),
    ):

        def loss(seed: int) -> Tensor:
            torch.manual_seed(seed)
            found = run(lambda: _run_training_step(module, arguments), recalibrate=True)
            return _loss_in(found)

        first, again = loss(0), loss(1)
        slope = _slope(first, weights)
        if not bool(first.isfinite()):
            raise NotComparableError(f"the training loss is {float(first.detach())}")
        if not torch.equal(first, again):
            raise NotComparableError("training_step draws random numbers")
        torch.manual_seed(0)
        output = run(forward, recalibrate=True)
        inputs = [x for x in leaves(batch) if isinstance(x, Tensor) and x.ndim]
        yield Trained(slope, weights, output, inputs)


def loss_of_training_step(module: LightningModule, batch: Any) -> Tensor:
    """Return the loss that `training_step` returns for a batch, and log nothing.

    For use within `untouched`. Random numbers are the same each time.

    Args:
        module: The module.
        batch: As the module takes it.

    Raises:
        NotComparableError: If the step can't be run, or returns no loss.
    """
    arguments = _arguments(module, batch)
    torch.manual_seed(0)
    with _unlogged(module):
        found = _run_training_step(module, arguments)
    loss = found.get("loss") if isinstance(found, dict) else found
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise NotComparableError("training_step returns no loss of the probe batch")
    return loss.reshape(())


@dataclass(frozen=True)
class ByTrainingStep:
    """Runs a module by its `training_step`: what it returns is the loss.

    In scripts that nobody edits, where `forward` doesn't take a batch as it is.

    Attributes:
        batch_dim: Dimension that counts examples in a batch as the module takes it.
    """

    batch_dim: int

    def __call__(self, module: LightningModule, batch: Any) -> Tensor:
        """Return the loss of a batch whose first dimension counts examples."""
        given = as_given(batch, self.batch_dim) if self.batch_dim else batch
        return loss_of_training_step(module, given)


def _run_training_step(module: LightningModule, arguments: list[Any]) -> Any:
    try:
        return module.training_step(*arguments)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise NotComparableError(
            f"training_step can't be run on the probe batch ({why})"
        ) from error


def _arguments(module: LightningModule, batch: Any) -> list[Any]:
    if not module.automatic_optimization:
        raise NotComparableError("optimization is manual")
    names = [*inspect.signature(module.training_step).parameters]
    if "dataloader_iter" in names:
        raise NotComparableError("training_step takes an iterator")
    return [batch, *[0] * (len(names) - 1)]


def _loss_in(found: Any) -> Tensor:
    loss = found.get("loss") if isinstance(found, dict) else found
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise NotComparableError("training_step returns no loss of the probe batch")
    return loss.reshape(())


def _slope(loss: Tensor, weights: list[Tensor]) -> Slope:
    try:
        return Slope.of_loss(loss, weights)
    except RuntimeError as error:
        raise NotComparableError(
            f"the training loss has no gradient ({error})"
        ) from error


@contextmanager
def _unlogged(module: LightningModule) -> Iterator[None]:
    """Have the module log nothing."""
    own = {name: vars(module).get(name) for name in ("log", "log_dict")}
    for name in own:
        vars(module)[name] = lambda *_, **__: None
    try:
        yield
    finally:
        for name, value in own.items():
            if value is None:
                del vars(module)[name]
            else:
                vars(module)[name] = value

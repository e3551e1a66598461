"""The loss that a probe measures, and whether it is the one that is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_info

from lit_resnorm.measures.losses import reduction_of
from lit_resnorm.measures.losses.comparison import Slope
from lit_resnorm.measures.losses.outcomes import OutputJudge
from lit_resnorm.measures.passes.batch_dim import as_given
from lit_resnorm.measures.passes.batches import num_rows, take_rows
from lit_resnorm_callbacks.probe.training_loss import NotComparableError, trained_loss

_EXAMPLES = 8
"""On which the loss is compared with the training loss."""


def compare_losses(
    name: str,
    module: LightningModule,
    batch: Any,
    judge: OutputJudge,
    forward_fn: Callable[..., Any],
    *,
    norm_mode: str,
    batch_dim: int,
) -> None:
    """Refuse losses of examples that aren't, up to a factor, what is trained.

    What is given, or a module's own `losses`, is taken at its word.

    Args:
        name: The probe's name, for messages.
        module: The module in training.
        batch: A batch with the examples in the first dimension.
        judge: Gives the losses.
        forward_fn: Takes module and batch, returns the network's output.
        norm_mode: What batch norm does.
        batch_dim: Dimension that counts examples in what the module takes.

    Raises:
        ValueError: If they aren't.
    """
    if judge.loss_fn is not None or callable(getattr(module, "losses", None)):
        return
    few = take_rows(batch, slice(_EXAMPLES))
    given = as_given(few, batch_dim) if batch_dim else few
    try:
        with trained_loss(
            module, lambda: forward_fn(module, few), few, given, norm_mode
        ) as trained:
            losses_B = judge.losses(module, trained.output, few)
            made = reduction_of(module, judge.target_fn(few), num_rows(few))
            own = Slope.of_loss(made.of_losses(losses_B), trained.weights)
    except NotComparableError as error:
        rank_zero_info(
            f"{name}: the losses that are measured were not compared with the training"
            f" loss: {error}"
        )
        return
    size = own.gradient.norm()
    if not size.isfinite() or not trained.slope.gradient.norm().isfinite():
        return
    factor = float(trained.slope.gradient.norm() / size) if size else 1.0
    if not (factor * own).descends_as(trained.slope):
        raise ValueError(
            f"{name}: the loss of the examples is read as"
            f" {own.value:.6g} and the training loss is {trained.slope.value:.6g}, with"
            " another gradient: give loss_fn, which takes output and target and returns"
            " the loss of each example, or forward_fn or target_fn"
        )

"""Losses by example, and their means over batches and ranks."""

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics import Metric

__all__ = [
    "LOSSES",
    "SUM_DTYPE",
    "EpochMeans",
    "example_losses",
    "sum_over_ranks",
]

LOSSES = ("cross_entropy", "mse")
# Apple's GPUs have no float64.
SUM_DTYPE = torch.float32 if torch.backends.mps.is_available() else torch.float64


def example_losses(loss: str, output: Tensor, target: Tensor) -> Tensor:
    """Return the loss of each example, in float32 or, for float64 outputs, that.

    Args:
        loss: `cross_entropy`, or `mse`: half the squared distance between output and
            target, summed over outputs.
        output: Shape `(B, C)`.
        target: Classes, integers of shape `(B,)`, or floats of shape `(B, C)`: the
            target itself (mse), class probabilities (cross entropy).

    Returns:
        Shape `(B,)`.

    Raises:
        ValueError: If the shapes don't match.
    """
    classes = not target.is_floating_point()
    expected = output.shape[:1] if classes else output.shape
    if output.ndim != 2 or target.shape != expected:
        raise ValueError(
            f"loss={loss!r} takes outputs (B, C) with classes (B,) or floats "
            f"(B, C); got output {tuple(output.shape)} and {target.dtype} target "
            f"{tuple(target.shape)}"
        )
    output = output if output.dtype == torch.float64 else output.float()
    if loss == "cross_entropy":
        target = target if classes else target.to(output)
        return F.cross_entropy(output, target, reduction="none")
    if classes:
        target = F.one_hot(target, output.shape[1])
    return (output - target.to(output)).square().sum(1) / 2


def sum_over_ranks(trainer: Trainer, value: Tensor) -> Tensor:
    """Return the sum of a tensor over ranks, leaving the tensor as it is."""
    if trainer.world_size == 1:
        return value
    return trainer.strategy.reduce(value.clone(), reduce_op="sum")


class EpochMeans(Metric):
    """Mean loss and accuracy: sums and counts, over batches and ranks.

    Its state is one vector: summed loss, number of right answers, of examples.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, dtype=SUM_DTYPE), dist_reduce_fx="sum")

    def update(self, sums: Tensor) -> None:
        """Add a batch's three sums, shape `(3,)`."""
        self.sums += sums

    def compute(self) -> dict[str, Tensor]:
        """Return `loss` and `accuracy`, means over the examples of all ranks."""
        loss, correct, examples = self.sums
        return {"loss": loss / examples, "accuracy": correct / examples}

    def restore(self, rows: Tensor, rank: int, world_size: int) -> None:
        """Go on with the sums that every rank had.

        Args:
            rows: One row of `sums` for each rank that there was.
            rank: This rank.
            world_size: Number of ranks now; where it is another, rank 0 takes all.
        """
        if len(rows) != world_size:
            zeros = rows.new_zeros(world_size - 1, 3)
            rows = torch.cat([rows.sum(0, keepdim=True), zeros])
        self.reset()
        self.update(rows[rank].to(self.sums))

"""What is logged of the members of a population.

Dimensions: M members, B examples of a batch, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_resnorm.modules.losses import SUM_DTYPE, sum_over_ranks


class MemberMeans:
    """Mean loss and accuracy of each member: sums and counts, over batches."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, losses_MB: Tensor, outputs_MBC: Tensor, target: Tensor) -> None:
        """Add a batch, with the target that its members share."""
        label = target.argmax(1) if target.is_floating_point() else target
        sums = [
            losses_MB.sum(1, dtype=SUM_DTYPE),
            (outputs_MBC.argmax(2) == label).sum(1, dtype=SUM_DTYPE),
            torch.full_like(losses_MB[:, 0], len(label), dtype=SUM_DTYPE),
        ]
        added = torch.stack(sums)
        self._sums = added if self._sums is None else self._sums + added

    def over_ranks(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return `loss` and `accuracy`, each `(M,)`; nothing where no batch came."""
        if self._sums is None:
            return {}
        loss, correct, count = sum_over_ranks(trainer, self._sums)
        return {"loss": loss / count, "accuracy": correct / count}


def logged_values(
    stage: str, values: Mapping[str, Tensor], diverged_M: Tensor
) -> dict[str, float]:
    """Return the members' values by name, and their means over those that are healthy.

    Args:
        stage: First part of the names.
        values: Each of shape `(M,)`, by name.
        diverged_M: Which members diverged.
    """
    width = max(2, len(str(len(diverged_M) - 1)))
    logged: dict[str, float] = {"population/diverged": float(diverged_M.sum())}
    for name, value_M in values.items():
        host = value_M.double().cpu()
        logged[f"{stage}/{name}"] = host[~diverged_M.cpu()].mean().item()
        for i, value in enumerate(host.tolist()):
            logged[f"{stage}/{name}/{i:0{width}d}"] = value
    return logged

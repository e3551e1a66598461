"""The members of a population: their weights, their labels and what is logged of them.

Dimensions: M members, N examples of the training set, B examples of a batch, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lit_resnorm.data.labelled import check_label_noise, flipped_labels
from lit_resnorm.modules.losses import SUM_DTYPE, sum_over_ranks


class Members(nn.Module):
    """Stacked parameters and buffers of M nets.

    Nets with the same settings of the optimizer share a block, whose parameters are
    stacks; so there are as many parameter groups as there are different settings.

    Args:
        nets: The nets, alike but for their weights.
        settings: Settings of the optimizer that each has of its own.

    Raises:
        ValueError: If the nets' weights differ in name or shape.
    """

    _order: Tensor

    def __init__(
        self, nets: Sequence[nn.Module], settings: Sequence[dict[str, Any]]
    ) -> None:
        super().__init__()
        states = [dict(net.named_parameters()) for net in nets]
        shapes = [{n: p.shape for n, p in state.items()} for state in states]
        if any(other != shapes[0] for other in shapes):
            raise ValueError("members differ in their nets, and not only in weights")
        self._settings: list[dict[str, Any]] = []
        self._of: list[list[int]] = []
        for i, own in enumerate(settings):
            if own not in self._settings:
                self._settings.append(own)
                self._of.append([])
            self._of[self._settings.index(own)].append(i)
        order = torch.tensor([i for block in self._of for i in block]).argsort()
        self.register_buffer("_order", order, persistent=False)
        self._trained = [n for n, p in states[0].items() if p.requires_grad]
        self.blocks = nn.ModuleList(
            nn.ParameterList(
                torch.stack([states[i][name].detach() for i in block])
                for name in self._trained
            )
            for block in self._of
        )
        fixed = [
            {n: p for n, p in net.named_parameters() if not p.requires_grad}
            | dict(net.named_buffers())
            for net in nets
        ]
        self._fixed = [*fixed[0]]
        for place, name in enumerate(self._fixed):
            stack = torch.stack([values[name].detach() for values in fixed])
            self.register_buffer(f"fixed_{place}", stack)
        self._own_buffers = dict(nets[0].named_buffers()).keys()

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups, one for each of the different settings."""
        return [
            {"params": [*block.parameters()], **own}
            for block, own in zip(self.blocks, self._settings, strict=True)
        ]

    def stacked(self) -> dict[str, Tensor]:
        """Return all weights and buffers, shape `(M, ...)`, by name, in order."""
        parts = zip(*(block.parameters() for block in self.blocks), strict=True)
        stacks = {}
        for name, blocks in zip(self._trained, parts, strict=True):
            whole = len(blocks) == 1
            stacks[name] = blocks[0] if whole else torch.cat(blocks)[self._order]
        return stacks | self.buffers_of_nets(only_updated=False)

    def buffers_of_nets(self, *, only_updated: bool = True) -> dict[str, Tensor]:
        """Return the stacked buffers, and frozen parameters unless `only_updated`."""
        return {
            name: self.get_buffer(f"fixed_{place}")
            for place, name in enumerate(self._fixed)
            if not only_updated or name in self._own_buffers
        }

    def rows(self, chosen: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each trained stack with the rows that hold the chosen members.

        Args:
            chosen: Bool, shape `(M,)`.
        """
        found = []
        for block, own in zip(self.blocks, self._of, strict=True):
            rows = chosen[own].nonzero()[:, 0]
            found += [(stack, rows) for stack in block.parameters() if len(rows)]
        return found

    def gradients(self) -> list[dict[str, Tensor]]:
        """Return the gradients of each block's stacks, by name."""
        return [
            {
                name: stack.grad
                for name, stack in zip(self._trained, block.parameters(), strict=True)
                if stack.grad is not None
            }
            for block in self.blocks
        ]


def noisy_labels(data: Any, members: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """Return each member's labels of the training set, shape `(M, N)`.

    Args:
        data: The data module.
        members: Settings of each, of which `label_noise` and `seed` count.

    Returns:
        The labels; None where no member has label noise.

    Raises:
        ValueError: If one has, and the training set has no labels.
    """
    shares = [member.get("label_noise", 0.0) for member in members]
    if not any(shares):
        return None
    classes = getattr(data, "num_classes", None)
    labels = getattr(getattr(data, "train_set", None), "y", None)
    if classes is None or labels is None or labels.is_floating_point():
        raise ValueError("label_noise of members needs a data module with classes")
    for share in shares:
        check_label_noise(share, classes)
    return torch.stack(
        [
            flipped_labels(labels, share, classes, member.get("seed", 0))
            for share, member in zip(shares, members, strict=True)
        ]
    )


def member_targets(
    batch: Sequence[Tensor], num: int, labels_MN: Tensor | None
) -> Tensor:
    """Return each member's targets of a batch, shape `(M, B)` or `(M, B, C)`.

    Args:
        batch: Inputs, targets and, for label noise, indices of the examples.
        num: Number of members M.
        labels_MN: As `noisy_labels` gives them.

    Raises:
        ValueError: If indices are needed and the batch has none.
    """
    if labels_MN is None:
        return batch[1].expand(num, *batch[1].shape)
    if len(batch) < 3:
        raise ValueError(
            "label_noise of members needs batches (x, y, index): give the data"
            " module with_index=True"
        )
    return labels_MN.to(batch[2].device)[:, batch[2]]


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

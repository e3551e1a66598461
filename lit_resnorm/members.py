"""The weights of several nets of one shape, as stacks that one optimizer trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


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

"""Copies of a model that are trained beside it, each on examples of its own.

Dimensions: K copies, B examples of a batch, R rows that a copy takes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_resnorm.measures.copies import Bound, Copies, Losses, eager, trained_parameters
from lit_resnorm.measures.observe import Reduce, take_rows
from lit_resnorm.measures.rehearsal import Around, Rehearsal, rehearse
from lit_resnorm.measures.stacked_optimizer import StackedOptimizer, check_elementwise


@dataclass(frozen=True)
class Share:
    """What some copies train on: rows of a batch, and how much each row counts.

    Attributes:
        members: The copies.
        weights: Factors of the examples' losses in the sum that is differentiated,
            shape `(K, R)`.
        rows: Which rows of the batch each copy takes, shape `(K, R)`; None: all. With
            R = 0 the copies take part in the step with what other ranks add.
    """

    members: list[int]
    weights: Tensor
    rows: Tensor | None = None


class Twins(Copies):
    """Copies of a model in training that are trained beside it.

    A copy is made by `fork`. `accumulate` adds gradients, for many copies in one
    vectorised pass; `step` takes the optimizer's step.

    Args:
        model: The model in training.
        optimizer: Its optimizer, of an elementwise class.
        losses: The losses of examples.
        num: Number of copies K.

    Attributes:
        chunk: How many copies run at once.
        vectorised: Whether they do so in one pass; else one after another.

    Raises:
        ValueError: If copies can't be trained by this optimizer.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, losses: Losses, num: int
    ) -> None:
        check_elementwise(optimizer)
        super().__init__(model, trained_parameters(model, optimizer), num)
        self._bound = Bound(model, losses)
        self._optimizer = StackedOptimizer(
            optimizer, {p: self.params[n] for n, p in self.originals.items()}
        )
        self._grads: dict[str, Tensor] = {}
        self._stepping: set[int] = set()
        self.vectorised = True
        self.chunk = num

    @torch.no_grad()
    def fork(self, member: int, optimizer: Optimizer, grad_scale: float | None) -> None:
        """Make one copy what the model is now.

        Args:
            member: Which copy.
            optimizer: The model's optimizer.
            grad_scale: Not None amid an accumulation: factor at which the gradients
                that the model has so far are taken over.
        """
        for name, value in self.originals.items():
            self.params[name][member] = value
        for name, value in self.model.named_buffers():
            self.buffers[name][member] = value
        self.forked.add(member)
        self._optimizer.fork(member, optimizer)
        if grad_scale is None:
            return
        self._stepping.add(member)
        for name, value in self.originals.items():
            if value.grad is not None:
                self._grad(name)[member] += value.grad * grad_scale

    def rehearse(
        self, batch: Any, around: Around = nullcontext, memory: int = 1 << 30
    ) -> Rehearsal:
        """Return what a pass of the model's own shows; settle how the copies run.

        They run in one vectorised pass where that works, in chunks whose activations
        fit into `memory` bytes; else one after another.
        """
        seen = rehearse(self._bound, batch, around)
        self.vectorised = seen.vectorisable
        fitting = memory // max(seen.num_bytes, 1)
        self.chunk = max(1, min(self.num, fitting)) if self.vectorised else 1
        return seen

    def accumulate(
        self, batch: Any, share: Share, around: Around = nullcontext
    ) -> None:
        """Add the gradients of each copy's weighted sum of losses.

        Args:
            batch: The batch.
            share: What some copies take of it.
            around: Context of each forward pass, which may set random states.
        """
        self._stepping.update(share.members)
        if share.rows is not None and not share.rows.shape[1]:
            return
        share = self._widened(share)
        start = 0
        while start < len(share.members):
            part = slice(start, start + self.chunk)
            try:
                self._accumulate(batch, _cut(share, part), around)
            except (torch.OutOfMemoryError, MemoryError):
                if self.chunk == 1:
                    raise
                self.chunk //= 2
                continue
            start += self.chunk

    def follow(self, optimizer: Optimizer) -> None:
        """Take over the settings, such as the rate, of the model's next step."""
        self._optimizer.follow(optimizer)

    def step(
        self,
        clip: Callable[[dict[str, Tensor]], None],
        reduce: Reduce | None = None,
    ) -> None:
        """Take the optimizer's step with the gradients that were added.

        A copy that trained on no example since the last step takes none.

        Args:
            clip: Clips stacked gradients in place.
            reduce: Sums over ranks; None on one process.
        """
        if reduce is not None:
            for name in self.params:
                self._grads[name] = reduce(self._grad(name))
        with torch.no_grad():
            clip(self._grads)
        if self.forked - self._stepping:
            self._optimizer.split()
        grads: dict[Tensor, Tensor] = {
            self.originals[name]: grad for name, grad in self._grads.items()
        }
        self._optimizer.step(grads, self._stepping)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients since the last step."""
        self._grads, self._stepping = {}, set()

    def state_dict(self) -> dict[str, Any]:
        """Return the copies and their optimizer's state."""
        return super().state_dict() | {"optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; without `optimizer`, with a new optimizer."""
        super().load_state_dict(state_dict)
        if "optimizer" in state_dict:
            self._optimizer.load_state_dict(state_dict["optimizer"])

    def _grad(self, name: str) -> Tensor:
        if name not in self._grads:
            self._grads[name] = torch.zeros_like(self.params[name])
        return self._grads[name]

    def _widened(self, share: Share) -> Share:
        """Return a share of all copies, most of which it is, with no weight on others.

        All rows of a stack are a view of it, where most of them are a copy.
        """
        few = 2 * len(share.members) < self.num
        if few or share.rows is not None or not self.vectorised:
            return share
        weights = share.weights.new_zeros(self.num, share.weights.shape[1])
        weights[share.members] = share.weights
        return Share([*range(self.num)], weights)

    def _accumulate(self, batch: Any, share: Share, around: Around) -> None:
        members = share.members
        # A range of rows is a view, a list of them a copy.
        first, last = members[0], members[-1]
        in_a_row = len(members) == last - first + 1
        at = slice(first, last + 1) if in_a_row else members
        leaves = {n: p[at].detach().requires_grad_() for n, p in self.params.items()}
        buffers = {n: b[at].clone() for n, b in self.buffers.items()}
        with around(), eager():
            losses_KR = self._run(leaves | buffers, batch, share.rows)
            weights = share.weights.to(losses_KR)
            total = (losses_KR * weights).sum()
        grads = torch.autograd.grad(total, [*leaves.values()], allow_unused=True)
        with torch.no_grad():
            self._take_buffers(members, buffers, weights)
            fine_K = (losses_KR.isfinite() | (weights == 0)).all(1)
            self.finite[at] &= fine_K
            for name, grad in zip(leaves, grads, strict=True):
                if grad is None:
                    continue
                if len(members) == self.num and name not in self._grads:
                    self._grads[name] = grad
                else:
                    self._grad(name)[at] += grad

    def _take_buffers(
        self, members: list[int], buffers: dict[str, Tensor], weights_KR: Tensor
    ) -> None:
        """Take the updated buffers of those copies whose losses count."""
        counted = (weights_KR != 0).any(1).tolist()
        if all(counted):
            at: Any = slice(members[0], members[-1] + 1)
            at = at if len(members) == at.stop - at.start else members
            for name, value in buffers.items():
                self.buffers[name][at] = value
            return
        rows = [row for row, counts in enumerate(counted) if counts]
        own = [members[row] for row in rows]
        for name, value in buffers.items():
            self.buffers[name][own] = value[rows]

    def _run(
        self, weights: Mapping[str, Tensor], batch: Any, rows_KR: Tensor | None
    ) -> Tensor:
        if self.vectorised:
            return self._bound.for_each(weights, batch, rows_KR)
        alone = {name: value[0] for name, value in weights.items()}
        rows = batch if rows_KR is None else take_rows(batch, rows_KR[0])
        return self._bound.with_weights(alone, rows)[None]


def _cut(share: Share, part: slice) -> Share:
    rows = None if share.rows is None else share.rows[part]
    return Share(share.members[part], share.weights[part], rows)

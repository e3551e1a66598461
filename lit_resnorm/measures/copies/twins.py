"""Copies of a model that are trained beside it, each on examples of its own.

Dimensions: K copies, B examples of a batch, R rows that a copy takes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_resnorm.measures.copies.attributes import (
    Attributes,
    with_attributes_after,
    with_state,
)
from lit_resnorm.measures.copies.copies import (
    Copies,
    Losses,
    ModelFunction,
    trained_parameters,
    with_buffers,
)
from lit_resnorm.measures.copies.first_pass import Around, FirstPass, run_first_pass
from lit_resnorm.measures.copies.optimizer import StackedOptimizer, check_elementwise
from lit_resnorm.measures.losses import Reduction
from lit_resnorm.measures.passes.batches import take_rows
from lit_resnorm.measures.passes.compilation import uncompiled
from lit_resnorm.measures.passes.parameter_writes import parameters_kept
from lit_resnorm.measures.passes.untouched import Reduce


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
        self._active = trained_parameters(model, optimizer)
        super().__init__(model, self._active, num)
        self._losses = losses
        self._bound = ModelFunction(model, with_buffers(losses))
        self._follow_anew(optimizer)
        self._grads: dict[str, Tensor] = {}
        # Which copies have one: an optimizer leaves parameters without one alone.
        self._having: dict[str, set[int]] = {}
        self._stepping: set[int] = set()
        self.vectorised = True
        self.chunk = num

    def take_up(self, optimizer: Optimizer) -> None:
        """Train what the model's optimizer trains now; call before it steps.

        Parameters may have been frozen or unfrozen and groups added since the last
        step, or the optimizer replaced.

        Raises:
            ValueError: If copies can't be trained by this optimizer.
        """
        trained = [
            (p, p.requires_grad) for g in optimizer.param_groups for p in g["params"]
        ]
        same = len(trained) == len(self._known) and all(
            p is q and needs == needed
            for (p, needs), (q, needed) in zip(trained, self._known, strict=True)
        )
        if same and optimizer is self._source:
            return
        self._active = trained_parameters(self.model, optimizer)
        for name in self._active:
            if name not in self.params:
                self.add(name)
        if optimizer is not self._source:
            check_elementwise(optimizer)
            self._follow_anew(optimizer)
            for member in sorted(self.forked):
                self._optimizer.fork(member, optimizer)
        self._known = trained
        self._optimizer.follow(optimizer)

    def add(self, name: str) -> None:
        """Copy a further parameter, which the copies shared with the model so far."""
        super().add(name)
        self._optimizer.add(self.originals[name], self.params[name])

    @torch.no_grad()
    def fork(
        self,
        member: int,
        optimizer: Optimizer,
        grad_scale: float = 1.0,
        *,
        amid: bool = False,
    ) -> None:
        """Make one copy what the model is now.

        Args:
            member: Which copy.
            optimizer: The model's optimizer.
            grad_scale: Factor at which the gradients that the model has are taken over.
            amid: Whether that is amid an accumulation, at the end of which the copy
                steps in any case.
        """
        for name, value in self.originals.items():
            self.params[name][member] = value
        for name, value in self.model.named_buffers():
            self.buffers[name][member] = value
        self.forked.add(member)
        self._optimizer.fork(member, optimizer)
        if amid:
            self._stepping.add(member)
        for name in self._active:
            grad = self.originals[name].grad
            if grad is not None:
                self._grad(name)[member] = grad * grad_scale
                self._having.setdefault(name, set()).add(member)

    def run_first_pass(
        self,
        batch: Any,
        around: Around = nullcontext,
        memory: int = 1 << 30,
        buffers: Mapping[str, Tensor] | None = None,
        before: Attributes | None = None,
    ) -> FirstPass:
        """Return what a pass of the model's own shows; settle how the copies run.

        They run in one vectorised pass where that works, in chunks whose activations
        fit into `memory` bytes; else one after another.

        Args:
            batch: A batch.
            around: Context of each forward pass.
            memory: Bytes for activations.
            buffers: The model's buffers to begin with; None: as they are.
            before: Its plain attributes to begin with; None: as they are.

        Raises:
            ValueError: If there isn't one loss for each example, or the forward pass
                makes buffers.
        """
        self._check_buffers([name for name, _ in self.model.named_buffers()])
        seen = run_first_pass(self.model, self._losses, batch, around, buffers, before)
        self.kept = seen.kept
        self.vectorised = seen.vectorisable
        fitting = memory // max(seen.num_bytes, 1)
        self.chunk = max(1, min(self.num, fitting)) if self.vectorised else 1
        return seen

    def model_gradients(
        self,
        batch: Any,
        around: Around,
        buffers: Mapping[str, Tensor],
        before: Attributes,
        reduction: Reduction,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses at the model's own weights, and their loss's gradient by name.

        Args:
            batch: The batch.
            around: Context of the forward pass.
            buffers: The model's buffers to begin with.
            before: Its plain attributes to begin with.
            reduction: Makes the batch's loss of the examples'.
        """
        bound = ModelFunction(
            self.model, with_state(self._bound.function, self.kept, before)
        )
        own = {name: self.originals[name] for name in self._active}
        leaves = {n: p.detach().clone().requires_grad_() for n, p in own.items()}
        begin = {name: value.clone() for name, value in buffers.items()}
        with around(), uncompiled():
            losses_B, _ = bound.with_weights(leaves | begin, batch)
            loss = reduction.of_losses(losses_B)
        grads = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
        named = zip(leaves, grads, strict=True)
        return losses_B.detach(), {n: g for n, g in named if g is not None}

    def accumulate(
        self, batch: Any, share: Share, around: Around = nullcontext
    ) -> None:
        """Add the gradients of each copy's weighted sum of losses.

        Where one vectorised pass fails, copies run one after another from then on.

        Args:
            batch: The batch.
            share: What some copies take of it.
            around: Context of each forward pass, which may set random states.
        """
        self._stepping.update(share.members)
        if share.rows is not None and not share.rows.shape[1]:
            return
        asked = share
        share = self._widened(share)
        start = 0
        while start < len(share.members):
            part = slice(start, start + self.chunk)
            try:
                self._accumulate(batch, _cut(share, part), around, asked.members)
            except (torch.OutOfMemoryError, MemoryError):
                if self.chunk == 1:
                    raise
                self.chunk //= 2
                continue
            except Exception:
                if not self.vectorised:
                    raise
                # What was added so far stays; the rest is taken one by one.
                left = [k for k in share.members[start:] if k in {*asked.members}]
                self.vectorised, self.chunk = False, 1
                at = [asked.members.index(k) for k in left]
                self.accumulate(batch, _pick(asked, at), around)
                return
            start += self.chunk

    def zero_as_the_model(self) -> bool:
        """Drop, zero or keep gradients as the model's were; call after it zeroed them.

        Lightning drops them, unless a module zeroes them in place or keeps them.

        Returns:
            Whether the model begins at gradients of nothing.
        """
        grads = [self.originals[name].grad for name in self._active]
        present = [grad for grad in grads if grad is not None]
        if any(bool(grad.any()) for grad in present):
            return False
        if not present:
            self.drop_gradients()
        for grad in self._grads.values():
            grad.zero_()
        return True

    def accumulate_nothing(self) -> None:
        """Take part in the next step with what gradients there are."""
        self._stepping.update(*self._having.values())

    def follow(self, optimizer: Optimizer) -> None:
        """Take over the settings, such as the rate, of the model's step."""
        self._optimizer.follow(optimizer)

    def step(
        self,
        clip: Callable[[dict[str, Tensor]], None],
        reduce: Reduce | None = None,
        *,
        world_size: int = 1,
        keep: bool = False,
    ) -> None:
        """Take the optimizer's step with the gradients that were added.

        A copy that trained on no example since the last step takes none, and leaves a
        parameter that its batches gave no gradient as it is.

        Args:
            clip: Clips stacked gradients in place.
            reduce: Sums over ranks; None on one process.
            world_size: Number of ranks.
            keep: Keep the gradients, which `zero_as_the_model` will see to.
        """
        grads, having = self._grads, self._having
        if reduce is not None and self.params:
            grads, having = self._summed(reduce)
        grads = {name: grads[name] for name in grads if name in {*self._active}}
        with torch.no_grad():
            clip(grads)
        stepping, self._stepping = self._stepping, set()
        if stepping:
            own = self.originals
            self._optimizer.step(
                {own[name]: grad for name, grad in grads.items()},
                stepping,
                {own[name]: members for name, members in having.items()},
            )
        if not keep:
            self.drop_gradients()
        elif reduce is not None:
            # As the model's they are of all ranks, clipped; shares are added up again.
            self._grads |= {name: grad / world_size for name, grad in grads.items()}
            self._having |= having

    def drop_gradients(self) -> None:
        """Forget the gradients since the last step."""
        self._grads, self._having, self._stepping = {}, {}, set()

    def state_dict(self) -> dict[str, Any]:
        """Return the copies and their optimizer's state."""
        return super().state_dict() | {"optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; without `optimizer`, with a new optimizer."""
        super().load_state_dict(state_dict)
        if "optimizer" in state_dict:
            order = [self.originals[name] for name in state_dict["params"]]
            saved = state_dict["optimizer"]
            self._optimizer.load_state_dict(saved, order, self.forked)

    def pending(self) -> dict[str, Any]:
        """Return what the next step adds to, amid an accumulation on this rank."""
        if not self._stepping:
            return {}
        return {
            "grads": dict(self._grads),
            "having": {name: sorted(having) for name, having in self._having.items()},
            "stepping": sorted(self._stepping),
        }

    def add_pending(self, saved: Mapping[str, Any]) -> None:
        """Go on amid an accumulation, with what `pending` gave."""
        for name, grad in saved["grads"].items():
            self._grads[name] = grad.to(self.params[name], copy=True)
            self._having[name] = {*saved["having"].get(name, ())}
        self._stepping = {*saved["stepping"]}

    def _follow_anew(self, optimizer: Optimizer) -> None:
        """Step by copies of another optimizer, which have no state yet."""
        self._source = optimizer
        self._known: list[tuple[Tensor, bool]] = []
        self._optimizer = StackedOptimizer(
            optimizer, {p: self.params[n] for n, p in self.originals.items()}
        )

    def _summed(self, reduce: Reduce) -> tuple[dict[str, Tensor], dict[str, set[int]]]:
        """Return the gradients summed over ranks, and the copies that have one."""
        names = [*self.params]
        holds_NK = torch.zeros(len(names), self.num, device=self.finite.device)
        for at, name in enumerate(names):
            holds_NK[at, sorted(self._having.get(name, ()))] = 1.0
        anywhere_NK = reduce(holds_NK) > 0
        having = {
            name: {*row.nonzero()[:, 0].tolist()}
            for name, row in zip(names, anywhere_NK, strict=True)
            if row.any()
        }
        return {name: reduce(self._grad(name)) for name in having}, having

    def _check_buffers(self, names: Iterable[str]) -> None:
        if others := {*names} ^ {*self.buffers}:
            raise ValueError(
                f"the buffers {', '.join(sorted(others))} come and go with forward"
                " passes; register them before the training"
            )

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

    def _accumulate(
        self, batch: Any, share: Share, around: Around, asked: list[int]
    ) -> None:
        members = share.members
        # A range of rows is a view, a list of them a copy.
        first, last = members[0], members[-1]
        in_a_row = len(members) == last - first + 1
        at = slice(first, last + 1) if in_a_row else members
        own = {name: self.params[name][at].detach() for name in self.params}
        leaves = {name: own[name].requires_grad_() for name in self._active}
        buffers = {n: b[at].clone() for n, b in self.buffers.items()}
        with parameters_kept(self.model):
            with around(), uncompiled():
                losses_KR, left = self._run(members, own | buffers, batch, share.rows)
                weights = share.weights.to(losses_KR)
                total = (losses_KR * weights).sum()
            grads = torch.autograd.grad(total, [*leaves.values()], allow_unused=True)
        self._check_buffers(left)
        with torch.no_grad():
            self._take_buffers(members, left, weights)
            fine_K = (losses_KR.isfinite() | (weights == 0)).all(1)
            self.finite[at] &= fine_K
            for name, grad in zip(leaves, grads, strict=True):
                if grad is None:
                    continue
                self._having.setdefault(name, set()).update({*members} & {*asked})
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
        self,
        members: list[int],
        weights: Mapping[str, Tensor],
        batch: Any,
        rows_KR: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.vectorised:
            return self._bound.for_each(weights, batch, rows_KR)
        alone = {name: value[0] for name, value in weights.items()}
        rows = batch if rows_KR is None else take_rows(batch, rows_KR[0])
        own = self.own.get(members[0], {})
        bound = ModelFunction(
            self.model,
            with_attributes_after(self._bound.function, self.kept, own, self.kept),
        )
        (losses_R, left), self.own[members[0]] = bound.with_weights(alone, rows)
        return losses_R[None], {name: value[None] for name, value in left.items()}


def _cut(share: Share, part: slice) -> Share:
    rows = None if share.rows is None else share.rows[part]
    return Share(share.members[part], share.weights[part], rows)


def _pick(share: Share, at: list[int]) -> Share:
    rows = None if share.rows is None else share.rows[at]
    return Share([share.members[i] for i in at], share.weights[at], rows)

"""One torch optimizer that updates many copies of a model's parameters, and clipping.

Dimensions: N parameters, K copies.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Their updates treat every number of a parameter alike, so a stack of copies is updated
# as each copy would be.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
)

# Those that have a fused kernel on the CPU, several times as fast on large stacks.
_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
# State that is one number for a whole parameter.
_COUNTERS = ("step", "mu_product")


def check_elementwise(optimizer: Optimizer) -> None:
    """Raise where stacked copies can't be updated by an optimizer of this class.

    Raises:
        ValueError: If they can't; the message names the class and those that do.
    """
    if type(optimizer) not in ELEMENTWISE:
        known = ", ".join(kind.__name__ for kind in ELEMENTWISE)
        raise ValueError(
            f"copies of a model can't be trained together by"
            f" {type(optimizer).__name__}, which isn't known to update every number"
            f" of a parameter alike; {known} are"
        )


class StackedOptimizer:
    """Updates K copies of parameters as an optimizer of its own would each.

    It is an optimizer of the same class over stacked parameters, one kernel for all
    copies. Where a copy sits out a step, or has no gradient of a parameter, its step
    count falls behind and the others' doesn't: from then on each copy's rows are
    parameters of their own, which costs time and nothing else.

    Args:
        optimizer: The optimizer of the original parameters, of an elementwise class.
        stacks: Stacked copies, shape `(K, ...)`, by original parameter.
    """

    def __init__(self, optimizer: Optimizer, stacks: Mapping[Tensor, Tensor]) -> None:
        check_elementwise(optimizer)
        self._stacks = dict(stacks)
        self._rows: dict[Tensor, list[Tensor]] | None = None
        self._forked: set[int] = set()
        self._optimizer = copy.copy(optimizer)
        self._optimizer.state = defaultdict(dict)
        self.follow(optimizer)

    def add(self, original: Tensor, stack: Tensor) -> None:
        """Update a further parameter's copies, from the next `follow` on."""
        self._stacks[original] = stack
        if self._rows is not None:
            self._rows[original] = [*stack.unbind()]

    def follow(self, optimizer: Optimizer) -> None:
        """Take over the groups and settings, such as the rate, of the original now."""
        self._members = [
            [p for p in group["params"] if p in self._stacks]
            for group in optimizer.param_groups
        ]
        self._optimizer.param_groups = []
        for original, params in zip(optimizer.param_groups, self._members, strict=True):
            parts = [part for p in params for part in self._parts(p)]
            group = {**original, "params": parts}
            undecided = group.get("fused", True) is group.get("foreach", True) is None
            if undecided and type(optimizer) in _FUSED and _on_cpu(parts):
                group["fused"] = True
            self._optimizer.param_groups.append(group)

    def fork(self, member: int, optimizer: Optimizer) -> None:
        """Give one copy the state that the original has now."""
        if self._forked and not self._in_step_with(optimizer):
            self.split()
        self._forked.add(member)
        state = self._optimizer.state
        for original, stack in self._stacks.items():
            values = optimizer.state.get(original, {})
            if self._rows is not None:
                row = self._rows[original][member]
                state[row] = {
                    key: _like(row, key, value) for key, value in values.items()
                }
                continue
            for key, value in values.items():
                if not _by_number(key, value):
                    state[stack][key] = _clone(value)
                    continue
                if key not in state[stack]:
                    state[stack][key] = torch.zeros_like(stack)
                state[stack][key][member] = value

    def step(
        self,
        grads: Mapping[Tensor, Tensor],
        members: Set[int],
        having: Mapping[Tensor, Set[int]] | None = None,
    ) -> None:
        """Take one step with these gradients.

        Args:
            grads: Stacked gradients by original parameter; a parameter that is left
                out has none.
            members: The copies that take the step; the others of those forked sit it
                out.
            having: Which copies have a gradient, by original parameter, where not all
                have: a copy's parameter without one keeps its value and its state.
        """
        own = {p: members & (having or {}).get(p, members) for p in grads}
        if self._forked - members or any(
            0 < len(k) < len(members) for k in own.values()
        ):
            self.split()
        for original, stack in self._stacks.items():
            grad = grads.get(original) if own.get(original) else None
            if self._rows is None:
                stack.grad = None if grad is None else _laid_out_as(stack, grad)
                continue
            for k, row in enumerate(self._rows[original]):
                row.grad = None
                if grad is not None and k in own[original]:
                    row.grad = _laid_out_as(row, grad[k])
        self._unfuse_sgd()
        self._optimizer.step()
        for part in (part for p in self._stacks for part in self._parts(p)):
            part.grad = None

    def split(self) -> None:
        """Make each copy's rows parameters of their own."""
        if self._rows is not None:
            return
        state = defaultdict(dict)
        self._rows = {p: [*stack.unbind()] for p, stack in self._stacks.items()}
        for original, stack in self._stacks.items():
            values = self._optimizer.state.get(stack, {})
            for k, row in enumerate(self._rows[original]):
                state[row] = {
                    key: value[k] if _by_number(key, value) else _clone(value)
                    for key, value in values.items()
                }
        self._optimizer.state = state
        groups = zip(self._optimizer.param_groups, self._members, strict=True)
        for group, params in groups:
            group["params"] = [part for p in params for part in self._parts(p)]

    def state_dict(self) -> dict[str, Any]:
        """Return whether the copies are split, and the state of each parameter."""
        state = self._optimizer.state
        return {
            "split": self._rows is not None,
            "state": [
                [dict(state.get(part, {})) for part in self._parts(original)]
                for original in self._stacks
            ],
        }

    def load_state_dict(
        self, state_dict: dict[str, Any], originals: Iterable[Tensor], forked: Set[int]
    ) -> None:
        """Go on from a saved state.

        Args:
            state_dict: The state.
            originals: The original parameters, in the order in which it was saved.
            forked: The copies that were forked.
        """
        self._forked = set(forked)
        if state_dict["split"]:
            self.split()
        state = self._optimizer.state
        for original, saved in zip(originals, state_dict["state"], strict=True):
            for part, values in zip(self._parts(original), saved, strict=True):
                state[part] = {
                    key: _like(part, key, value) for key, value in values.items()
                }

    def _unfuse_sgd(self) -> None:
        """Do without SGD's fused kernel, which fails where only some have momentum."""
        if not isinstance(self._optimizer, torch.optim.SGD):
            return
        for group in self._optimizer.param_groups:
            state = [self._optimizer.state.get(p, {}) for p in _stepped(group)]
            if len({each.get("momentum_buffer") is None for each in state}) > 1:
                group["fused"] = None

    def _in_step_with(self, optimizer: Optimizer) -> bool:
        """Return whether a copy with the original's state fits among those forked."""
        if self._rows is not None:
            return True
        for original, stack in self._stacks.items():
            values = optimizer.state.get(original, {})
            own = self._optimizer.state.get(stack, {})
            counts = [key for key in values if not _by_number(key, values[key])]
            if {*values} != {*own} or any(values[key] != own[key] for key in counts):
                return False
        return True

    def _parts(self, original: Tensor) -> list[Tensor]:
        rows = self._rows
        return [self._stacks[original]] if rows is None else rows[original]


def clip_by_norm(grads: Mapping[str, Tensor], max_norm: float) -> None:
    """Scale each copy's gradients, in place, to a norm of at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_` does to each.
    """
    norms_NK = torch.stack([g.reshape(len(g), -1).norm(dim=1) for g in grads.values()])
    scale_K = (max_norm / (norms_NK.norm(dim=0) + 1e-6)).clamp(max=1.0)
    for grad in grads.values():
        grad.mul_(scale_K.to(grad.dtype).view(-1, *[1] * (grad.ndim - 1)))


def clip_by_value(grads: Mapping[str, Tensor], max_value: float) -> None:
    """Clamp gradients, in place, to absolute values of at most `max_value`."""
    for grad in grads.values():
        grad.clamp_(-max_value, max_value)


def _stepped(group: dict[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None]


def _on_cpu(tensors: list[Tensor]) -> bool:
    return all(tensor.device.type == "cpu" for tensor in tensors)


def _laid_out_as(like: Tensor, value: Tensor) -> Tensor:
    """Return a tensor in the layout of another: fused kernels take that for granted."""
    if value.stride() == like.stride():
        return value
    return torch.empty_like(like).copy_(value)


def _like(part: Tensor, key: str, value: Any) -> Any:
    """Return a copy of a state; one for each number lies in memory as its parameter."""
    if not _by_number(key, value):
        return _clone(value)
    return torch.empty_like(part, dtype=value.dtype).copy_(value)


def _by_number(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and key not in _COUNTERS


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

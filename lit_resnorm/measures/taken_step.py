"""One step of a run's optimizers: the weights before it, its gradients, its update.

A :class:`StepWatch` stands by while each optimizer takes one step. It only reads: what
is trained is the same with it and without.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_resnorm.measures.passes.sharded import own_part, times_held


@dataclass
class GradientSize:
    """What is kept of one parameter's gradient, of this rank's part of it.

    All are 0-d and float64.

    Attributes:
        square: Sum of the squares before clipping.
        zeros: Number of exact zeros.
        nonfinite: Number of entries that are infinite or NaN.
        clipped: Sum of the squares as the optimizer got them.
    """

    square: Tensor
    zeros: Tensor
    nonfinite: Tensor
    clipped: Tensor | None = None


@dataclass(frozen=True)
class TakenStep:
    """A step that was taken, by `id` of the parameters.

    Attributes:
        before: Weights before it; of a sharded parameter this rank's part.
        update: What it added.
        gradients: Their sizes, of parameters that have one.
        rate: The largest learning rate in use.
    """

    before: dict[int, Tensor]
    update: dict[int, Tensor]
    gradients: dict[int, GradientSize]
    rate: float

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the weights before the step, by the model's names."""
        return {
            name: self.before[id(p)].detach().requires_grad_(p.requires_grad)
            for name, p in model.named_parameters()
            if id(p) in self.before
        }

    def updates(self, model: nn.Module) -> list[Tensor]:
        """Return what the step added, in the order of `weights`."""
        updates = (self.update.get(id(p)) for p in model.parameters())
        return [update for update in updates if update is not None]


@dataclass
class StepWatch:
    """Stands by while each of a run's optimizers takes one step, the next one.

    Attributes:
        optimizers: The run's optimizers.
        reads_gradients: Whether sizes of gradients are kept too.
    """

    optimizers: Iterable[Optimizer]
    reads_gradients: bool = False
    _handles: list[Any] = field(default_factory=list)
    _before: dict[int, Tensor] = field(default_factory=dict)
    _update: dict[int, Tensor] = field(default_factory=dict)
    _gradients: dict[int, GradientSize] = field(default_factory=dict)
    _begun: set[int] = field(default_factory=set)
    _ended: set[int] = field(default_factory=set)
    _rates: list[float] = field(default_factory=list)
    _read: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for optimizer in self.optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def remove(self) -> None:
        """Stand by no longer; may be called again."""
        while self._handles:
            self._handles.pop().remove()

    def taken(self) -> TakenStep:
        """Return what was seen.

        A step that a gradient scaler skips is one that leaves the weights.

        Raises:
            RuntimeError: If no optimizer has taken a step.
        """
        for optimizer in self.optimizers:
            if id(optimizer) in self._read - self._begun:
                self._before_step(optimizer)
                self._after_step(optimizer)
        if not self._ended:
            raise RuntimeError(
                "the weights have taken a step, and none of the run's optimizers has"
            )
        return TakenStep(self._before, self._update, self._gradients, max(self._rates))

    @torch.no_grad()
    def read_gradients(self, optimizer: Optimizer, scale: float = 1.0) -> None:
        """Keep the sizes of the gradients that an optimizer is about to be given.

        Called before they are clipped; where nobody calls it, they are read as the
        optimizer was given them. Only the first reading counts.

        Args:
            optimizer: One of the run's.
            scale: What the gradients are multiplied by, as a gradient scaler does it.
        """
        if not self.reads_gradients or id(optimizer) in self._ended:
            return
        self._read.add(id(optimizer))
        new = [
            parameter
            for parameter in parameters_of(optimizer)
            if parameter.grad is not None and id(parameter) not in self._gradients
        ]
        sizes = gradient_sizes([p.grad for p in new if p.grad is not None], scale)
        for parameter, size in zip(new, sizes, strict=True):
            # no clipping where an optimizer unscales for itself
            size.clipped = size.square if scale != 1.0 else None
            self._gradients[id(parameter)] = size

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if id(optimizer) in self._begun:
            return
        self._begun.add(id(optimizer))
        self._rates += [float(group["lr"]) for group in optimizer.param_groups]
        for parameter in parameters_of(optimizer):
            self._before.setdefault(id(parameter), own_part(parameter).clone())

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if id(optimizer) in self._ended:
            return
        self.read_gradients(optimizer)
        self._ended.add(id(optimizer))
        sizes: list[GradientSize] = []
        clipped: list[Tensor] = []
        for parameter in parameters_of(optimizer):
            key, grad = id(parameter), parameter.grad
            if key not in self._update:
                self._update[key] = own_part(parameter) - self._before[key]
            size = self._gradients.get(key)
            if size is not None and size.clipped is None:
                size.clipped = size.square
                if grad is not None:
                    sizes.append(size)
                    clipped.append(_entries(grad))
        for size, square in zip(sizes, _sums_of_squares(clipped), strict=True):
            size.clipped = square


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that an optimizer holds, of all its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradient_sizes(grads: Sequence[Tensor], scale: float = 1.0) -> list[GradientSize]:
    """Return what is kept of some gradients.

    Args:
        grads: Dense, sparse or sharded; of the last, this rank's part counts.
        scale: What they are multiplied by.
    """
    parts = [_entries(grad) for grad in grads]
    squares = _sums_of_squares(parts)
    finite = bool(torch.stack(squares).isfinite().all()) if squares else True
    sizes = []
    for grad, entries, square in zip(grads, parts, squares, strict=True):
        zeros = own_part(grad).numel() - entries.count_nonzero().double()
        nonfinite = torch.zeros_like(square)
        if not finite:
            nonfinite = (~entries.isfinite()).sum(dtype=torch.float64)
        sizes.append(GradientSize(square / scale**2, zeros, nonfinite))
    return sizes


SIZES = ("square", "zeros", "nonfinite", "count", "clipped", "weights", "update")
"""Columns of `sizes_of_step`."""


def sizes_of_step(
    step: TakenStep, parameters: Sequence[Tensor], world_size: int
) -> Tensor:
    """Return what a step was to each parameter, in sums that add up over ranks.

    Args:
        step: The step.
        parameters: P of the network's.
        world_size: Number of ranks that share the parameters out; 1 where each rank
            has them all and nothing is summed.

    Returns:
        Shape `(P, 7)`, float64, by :data:`SIZES`: of the gradients the sum of squares,
        the numbers of zeros, of non-finite entries and of all, and the sum of squares
        after clipping; the sums of squares of weights and of update. Zeros of what
        isn't there.
    """
    moved = [id(p) for p in parameters if id(p) in step.before]
    lengths = (
        _sums_of_squares([tensors[key] for key in moved])
        for tensors in (step.before, step.update)
    )
    weights, updates = (dict(zip(moved, each, strict=True)) for each in lengths)
    none = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    rows = []
    for parameter in parameters:
        key = id(parameter)
        row = [none] * 5
        if (size := step.gradients.get(key)) is not None:
            assert size.clipped is not None
            count = torch.full_like(none, own_part(parameter).numel())
            row = [size.square, size.zeros, size.nonfinite, count, size.clipped]
        row += [weights.get(key, none), updates.get(key, none)]
        rows.append(torch.stack([each.to(none.device) for each in row]))
    held = [[times_held(parameter, world_size)] for parameter in parameters]
    return torch.stack(rows) / torch.tensor(held, dtype=torch.float64).to(none.device)


def _entries(grad: Tensor) -> Tensor:
    """Return a gradient's numbers on this rank; of a sparse one those that are held."""
    if grad.is_sparse:
        grad = grad.coalesce().values()
    return own_part(grad)


def _sums_of_squares(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum of the squares of each tensor, 0-d, float64."""
    if not tensors:
        return []
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64)  # pyright: ignore[reportPrivateImportUsage]
    return list(torch._foreach_mul(norms, norms))  # pyright: ignore[reportPrivateImportUsage]

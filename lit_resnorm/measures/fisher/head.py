r"""Heads: how the loss's curvature at the output factors.

The Fisher matrix is :math:`F = \sum_i J_i^\top R_i R_i^\top J_i`, where
:math:`R_i R_i^\top` is the Fisher matrix of the output's own distribution, times the
share of example i in the mean. A head applies :math:`R` and its transpose; the
coefficients it acts on (the *dual* space) are K numbers for each position of a row.

Shapes: N rows, T positions of a row that are examples, C outputs, K dual coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_resnorm.measures.fisher.shards import Shards

Output = Literal["softmax", "bernoulli", "gaussian"]


def check_output(output: str) -> Output:
    """Return `output` if it is one of the known distributions.

    Raises:
        ValueError: If it is not; the message names it and the choices.
    """
    for known in get_args(Output):
        if output == known:
            return known
    choices = ", ".join(get_args(Output))
    raise ValueError(f"output is {output!r}; it must be one of {choices}")


@dataclass(frozen=True)
class Layout:
    """How a network's output lies: which dimension counts outputs, which positions.

    Attributes:
        output: Distribution of the output.
        class_dim: Dimension of the C outputs of an example; None where all numbers of
            a row are one example's (Gaussian and Bernoulli without positions).
        empirical: One gradient an example, at the observed label.
    """

    output: Output
    class_dim: int | None
    empirical: bool = False

    @classmethod
    def of_output(
        cls, output: str, shape: torch.Size, class_dim: int | None, empirical: bool
    ) -> Layout:
        """Return the layout of an output of this shape.

        Raises:
            ValueError: If the distribution does not fit the shape.
        """
        if class_dim is not None and not -len(shape) <= class_dim < len(shape):
            raise ValueError(
                f"class_dim is {class_dim}; the output's shape is {tuple(shape)}"
            )
        if output == "auto":
            dim = (1 if len(shape) > 3 else -1) if class_dim is None else class_dim
            output = "bernoulli" if shape[dim] == 1 else "softmax"
        kind = check_output(output)
        if class_dim is None and kind == "softmax":
            class_dim = 1 if len(shape) > 3 else len(shape) - 1
        if class_dim is not None and class_dim % len(shape) == 0:
            raise ValueError(
                f"output is {kind!r} with class_dim {class_dim}: dimension 0 of the"
                f" output, of shape {tuple(shape)}, counts the rows"
            )
        if kind == "softmax" and class_dim is not None and shape[class_dim] < 2:
            raise ValueError(
                f"output is 'softmax' with {shape[class_dim]} logit (class_dim"
                f" {class_dim} of {tuple(shape)}); one logit is output 'bernoulli'"
            )
        return cls(kind, class_dim, empirical)

    def to_positions(self, values: Tensor) -> Tensor:
        """Return `(N, T, C)` of a tensor laid out as the output."""
        if self.class_dim is None:
            return values.flatten(1).unsqueeze(1)
        moved = values.movedim(self.class_dim, -1)
        return moved.reshape(len(moved), -1, moved.shape[-1])

    def from_positions(self, values_NTC: Tensor, shape: torch.Size) -> Tensor:
        """Return `(..., *shape)` of `(..., N, T, C)`: the inverse, batched in front."""
        lead = values_NTC.shape[:-3]
        if self.class_dim is None:
            return values_NTC.reshape(*lead, *shape)
        dim = self.class_dim % len(shape)
        moved = [*shape[:dim], *shape[dim + 1 :], shape[dim]]
        return values_NTC.reshape(*lead, *moved).movedim(-1, len(lead) + dim)

    def num_coefficients(self, num_outputs: int) -> int:
        """Return K: a softmax over C classes has rank C - 1."""
        if self.empirical:
            return 1
        return num_outputs - 1 if self.output == "softmax" else num_outputs


class Head:
    r"""The factor R at the outputs of some rows.

    For the softmax :math:`\mathrm{diag}(p) - p p^\top = R R^\top` with
    :math:`R = \mathrm{diag}(s) H_{:, 1..C-1}`, :math:`s = \sqrt p` and `H` the
    Householder reflection that takes `s` to the last axis, so R has full column rank
    and depends smoothly on the output. It is applied without being formed.

    Args:
        layout: How the output lies.
        outputs: The rows' outputs, shape `(N, ...)`.
        slots_NT: For each row its positions that count as examples.
        scales_NT: For each of them, the root of its share in the mean.
        targets: Labels, for the empirical Fisher alone: class indices of shape `(N,
            positions)` for the softmax, else numbers laid out as the output.
    """

    def __init__(
        self,
        layout: Layout,
        outputs: Tensor,
        slots_NT: Tensor,
        scales_NT: Tensor,
        targets: Tensor | None = None,
    ) -> None:
        self.layout = layout
        self._shape = outputs.shape
        all_NTC = layout.to_positions(outputs.detach())
        self._num_positions = all_NTC.shape[1]
        self._slots = slots_NT[:, :, None].expand(-1, -1, all_NTC.shape[2])
        self._scales = scales_NT[:, :, None].to(all_NTC.dtype)
        logits_NTC = all_NTC.gather(1, self._slots)
        if layout.empirical:
            self._gradient = self._loss_gradient(logits_NTC, targets)
        elif layout.output == "softmax":
            self._roots = logits_NTC.softmax(-1).sqrt()
            self._axis = self._roots.clone()
            self._axis[..., -1] += 1
        elif layout.output == "bernoulli":
            p = logits_NTC.sigmoid()
            self._roots = (p * (1 - p)).sqrt()

    @property
    def num_rows(self) -> int:
        """Rows N of the output."""
        return self._shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the output."""
        return self._scales.dtype

    @property
    def device(self) -> torch.device:
        """Where the output is."""
        return self._scales.device

    def spread(self, dual_NTK: Tensor) -> Tensor:
        """Return `R u`, laid out as the output; leading dimensions are a batch."""
        if self.layout.empirical:
            values = self._gradient * dual_NTK
        elif self.layout.output == "softmax":
            roots, axis = self._roots, self._axis
            along = (roots[..., :-1] * dual_NTK).sum(-1, keepdim=True)
            padded = F.pad(dual_NTK, (0, 1))
            values = roots * (padded - axis * (along / axis[..., -1:]))
        elif self.layout.output == "bernoulli":
            values = self._roots * dual_NTK
        else:
            values = dual_NTK
        values = values * self._scales
        lead = values.shape[:-3]
        whole = values.new_zeros(
            *lead, values.shape[-3], self._num_positions, values.shape[-1]
        )
        whole.scatter_(-2, self._slots.expand(*lead, *self._slots.shape), values)
        return self.layout.from_positions(whole, self._shape)

    def collect(self, tangent: Tensor) -> Tensor:
        """Return `R^T g`, shape `(N, T, K)`, of a tensor laid out as the output."""
        values = self.layout.to_positions(tangent).gather(1, self._slots) * self._scales
        if self.layout.empirical:
            return (self._gradient * values).sum(-1, keepdim=True)
        if self.layout.output == "softmax":
            values = self._roots * values
            along = (self._axis * values).sum(-1, keepdim=True)
            shrink = self._roots[..., :-1] / self._axis[..., -1:]
            return values[..., :-1] - shrink * along
        return self._roots * values if self.layout.output == "bernoulli" else values

    def _loss_gradient(self, logits_NTC: Tensor, targets: Tensor | None) -> Tensor:
        if targets is None:
            raise ValueError("the empirical Fisher needs targets; they are None")
        # Positions without a weight may have any label, NaN among them.
        active_NT1 = self._scales > 0
        if self.layout.output == "softmax":
            labels_NT = targets.reshape(len(targets), -1).gather(1, self._slots[..., 0])
            labels_NT = labels_NT.masked_fill(~active_NT1[..., 0], 0).long()
            num_classes = logits_NTC.shape[-1]
            beyond = (labels_NT < 0) | (labels_NT >= num_classes)
            if bool(beyond.any()):
                raise ValueError(
                    f"a label is {int(labels_NT[beyond][0])}, with a positive weight;"
                    f" the output has {num_classes} classes"
                )
            return logits_NTC.softmax(-1) - F.one_hot(labels_NT, num_classes)
        shaped = targets.reshape(self._shape).to(logits_NTC)
        labels_NTC = self.layout.to_positions(shaped).gather(1, self._slots)
        labels_NTC = labels_NTC.masked_fill(~active_NT1, 0)
        if self.layout.output == "bernoulli":
            return logits_NTC.sigmoid() - labels_NTC
        return logits_NTC - labels_NTC


@dataclass
class WeightedExamples:
    """The probe batch as the head sees it.

    Attributes:
        x: This rank's rows, as the network takes them.
        num_rows: N of this rank.
        layout: How the output lies.
        slots: `(N, T)`: positions of each row that count as examples.
        scales: `(N, T)`: root of each one's share in the mean.
        targets: Labels, for the empirical Fisher.
        num_coefficients: Dual coefficients of a position.
        num_examples: Examples of all ranks: positions with a weight.
        shards: Rows of all ranks.
    """

    x: Any
    num_rows: int
    layout: Layout
    slots: Tensor
    scales: Tensor
    targets: Tensor | None
    num_coefficients: int
    num_examples: int
    shards: Shards

    @property
    def num_seeds(self) -> int:
        """Dual coefficients K of a row."""
        return self.slots.shape[1] * self.num_coefficients

    @property
    def dim(self) -> int:
        """Dimension of the dual space, over all ranks."""
        return self.shards.total * self.num_seeds

    def head(self, output: Tensor, rows: slice) -> Head:
        """Return the head at the output of some rows."""
        targets = None if self.targets is None else self.targets[rows]
        return Head(self.layout, output, self.slots[rows], self.scales[rows], targets)

"""How parameters enter a network: their uses in one forward pass.

Uses are seen at the level of torch functions, so that a functional `F.linear(x, w)`,
a convolution behind any padding mode, a batch norm in any norm mode and a bare
`alpha * h` are what they are, whatever module they stand in. At each use the gradient
of the output gives the parameter's gradient example by example:

* an *outer* use (linear, convolution, embedding) as a sum of outer products over T
  positions of what comes in (`left`, I numbers) and the output's gradient (`right`, O
  numbers);
* a *scale* use (affine parameters of norms, biases, broadcast factors and summands) as
  a sum over positions.

Shapes: N rows, S dual seeds of one backward pass, I, O, T as above, P parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Use(ABC):
    """One use of parameters.

    Attributes:
        names: The trainable parameters: weight, then bias, where there are both.
        shape: Shape of the output.
    """

    names: tuple[str, ...]
    shape: torch.Size

    @abstractmethod
    def rows(self, grad: Tensor, num_rows: int) -> Tensor:
        """Return each row's and seed's gradient, shape `(N, S, P)`.

        Args:
            grad: Gradient of the output, shape `(S, *shape)`.
            num_rows: N; with 1, all positions of the output are that row's.
        """

    @property
    def separable(self) -> bool:
        """Whether rows can be told apart along dimension 0 of the output."""
        return bool(self.shape)


@dataclass
class OuterUse(Use):
    """A use whose gradient is a sum of outer products.

    Attributes:
        input: What is multiplied; for an embedding the indices.
        has_bias: Whether a trainable bias is added, as one more input that is 1.
        num_outputs: O.
        num_inputs: I, the bias's 1 included.
    """

    input: Tensor
    has_bias: bool
    num_outputs: int
    num_inputs: int

    @abstractmethod
    def left(self, input: Tensor, num_rows: int) -> Tensor:
        """Return `(N, I, T)` of inputs; of an embedding's, indices `(N, T)`."""

    @abstractmethod
    def right(self, grad: Tensor, num_rows: int) -> Tensor:
        """Return the output's gradient as `(N, S, O, T)`."""

    def rows(self, grad: Tensor, num_rows: int) -> Tensor:
        """Return each row's and seed's gradient, shape `(N, S, O I)`."""
        return outer_rows(
            self.left(self.input, num_rows), self.right(grad, num_rows), self.num_inputs
        )


def outer_rows(left: Tensor, right_NSOT: Tensor, num_inputs: int) -> Tensor:
    """Return the sums over T of outer products, shape `(N, S, O I)`."""
    n, s, o, t = right_NSOT.shape
    if left.is_floating_point():
        flat = right_NSOT.reshape(n, s * o, t)
        return torch.bmm(flat, left.transpose(1, 2)).view(n, s, o * num_inputs)
    known = (left >= 0)[:, None, None, :]
    index = left.clamp_min(0)[:, None, None, :].expand(n, s, o, t)
    rows = right_NSOT.new_zeros(n, s, o, num_inputs)
    return rows.scatter_add_(3, index, right_NSOT * known).flatten(2)


class LinearUse(OuterUse):
    """`F.linear`: positions are all dimensions but the last."""

    def left(self, input: Tensor, num_rows: int) -> Tensor:
        """Return inputs as `(N, I, T)`."""
        x_NTI = input.reshape(num_rows, -1, input.shape[-1])
        return _with_one(x_NTI, self.has_bias, dim=2).transpose(1, 2)

    def right(self, grad: Tensor, num_rows: int) -> Tensor:
        """Return the output's gradient as `(N, S, O, T)`."""
        g_SNTO = grad.reshape(grad.shape[0], num_rows, -1, self.num_outputs)
        return g_SNTO.permute(1, 0, 3, 2)


class EmbeddingUse(OuterUse):
    """`F.embedding`: the input is one-hot, given by its indices; -1 is padding."""

    def left(self, input: Tensor, num_rows: int) -> Tensor:
        """Return indices as `(N, T)`."""
        return input.reshape(num_rows, -1)

    right = LinearUse.right


@dataclass
class ConvolutionUse(OuterUse):
    """`F.conv1d`, `conv2d`, `conv3d` in one group: inputs are patches.

    Attributes:
        kernel: Size of the kernel.
        stride: Step between positions.
        padding: Zeros before and after, as `F.pad` takes them.
        dilation: Step within a patch.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def left(self, input: Tensor, num_rows: int) -> Tensor:
        """Return patches as `(N, I, T)`."""
        patches = _patches(
            input, self.kernel, self.stride, self.padding, self.dilation, self.has_bias
        )
        if patches.shape[0] == num_rows:
            return patches
        return patches.transpose(0, 1).reshape(1, patches.shape[1], -1)

    def right(self, grad: Tensor, num_rows: int) -> Tensor:
        """Return the output's gradient as `(N, S, O, T)`."""
        g_SNOT = grad.flatten(3) if grad.ndim > 3 else grad[..., None]
        if g_SNOT.shape[1] == num_rows:
            return g_SNOT.transpose(0, 1)
        return g_SNOT.permute(0, 2, 1, 3).flatten(2)[None]


@dataclass
class ScaleUse(Use):
    """Parameters that multiply or are added, broadcast over positions.

    Attributes:
        factor: What the weight multiplies; None where there is only a bias.
        view: Shape of the parameters, a size for each dimension of the output.
    """

    factor: Tensor | None
    view: tuple[int, ...]

    def rows(self, grad: Tensor, num_rows: int) -> Tensor:
        """Return each row's and seed's gradient, shape `(N, S, P)`."""
        parts = [] if self.factor is None else [grad * self.factor]
        if len(self.names) > len(parts):
            parts.append(grad)
        summed = [self._over_positions(part, num_rows) for part in parts]
        return torch.cat(summed, dim=2) if len(summed) > 1 else summed[0]

    def _over_positions(self, values: Tensor, num_rows: int) -> Tensor:
        # The row stays apart only where several rows were run: then it is dimension 0
        # of the output, and the parameters do not vary along it.
        first = 1 if num_rows > 1 else 0
        dims = [1 + d for d, size in enumerate(self.view) if size == 1 and d >= first]
        kept = values.sum(dim=dims) if dims else values
        return kept.reshape(values.shape[0], num_rows, -1).transpose(0, 1)

    @property
    def separable(self) -> bool:
        """Whether rows can be told apart along dimension 0 of the output."""
        return bool(self.view) and self.view[0] == 1


def _with_one(values: Tensor, has_bias: bool, dim: int) -> Tensor:
    if not has_bias:
        return values
    shape = [*values.shape]
    shape[dim] = 1
    return torch.cat([values, values.new_ones(shape)], dim=dim)


def _patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    has_bias: bool,
) -> Tensor:
    """Return `(N, I, T)`: for each position the inputs under the kernel."""
    if any(padding):
        x = F.pad(x, padding)
    x = x.contiguous()
    sizes = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    steps = x.stride()
    windows = x.as_strided(
        (*x.shape[:2], *kernel, *sizes),
        (
            *steps[:2],
            *(step * d for step, d in zip(steps[2:], dilation, strict=True)),
            *(step * s for step, s in zip(steps[2:], stride, strict=True)),
        ),
    )
    num_inputs = x.shape[1] * _product(kernel)
    filled = x.new_empty(x.shape[0], num_inputs + has_bias, _product(sizes))
    filled[:, :num_inputs].view(windows.shape).copy_(windows)
    filled[:, num_inputs:] = 1
    return filled


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def conv_padding(
    padding: Any, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Return a convolution's padding as `F.pad` takes it: last dimension first."""
    pairs = []
    for place, (k, d) in enumerate(zip(kernel, dilation, strict=True)):
        if padding == "same":
            total = d * (k - 1)
            pairs.append((total // 2, total - total // 2))
        elif padding == "valid":
            pairs.append((0, 0))
        else:
            size = (
                padding if isinstance(padding, int) else padding[place % len(padding)]
            )
            pairs.append((size, size))
    return tuple(side for pair in reversed(pairs) for side in pair)

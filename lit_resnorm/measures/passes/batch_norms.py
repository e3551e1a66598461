"""Calls of batch norm: what they ask for, statistics over ranks, fixed statistics.

Dimensions: R rows (first dimension), C channels (second).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.nn import functional as F

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over ranks and returns a new one; all ranks call it equally often."""

HALF_PRECISION = (torch.half, torch.bfloat16)


@dataclass(frozen=True)
class NormCall:
    """One call of batch norm, whichever way it was spelled.

    Attributes:
        input: What is normalised, shape `(R, C, ...)`.
        running_mean: Mean to use where `training` is False.
        running_var: Variance likewise.
        weight: Factors, shape `(C,)`.
        bias: Summands, shape `(C,)`.
        training: Whether the statistics are the input's own.
        eps: Added to the variance.
    """

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    eps: float

    def by_running_statistics(self) -> Tensor:
        """Return the result by the statistics that the call brings along.

        Raises:
            ValueError: If it brings none.
        """
        if self.running_mean is None or self.running_var is None:
            raise ValueError("a batch norm in eval mode has no running statistics")
        return self.by(self.running_mean, self.running_var)

    def as_it_is(self) -> Tensor:
        """Return what the call asks for."""
        if self.training:
            return self.by_own_statistics()
        return self.by_running_statistics()

    def by_own_statistics(self) -> Tensor:
        """Return the result by the input's statistics, differentiated through."""
        # F.batch_norm refuses a single value a channel, whose variance is 0.
        return torch.batch_norm(
            self.input,
            self.weight,
            self.bias,
            None,
            None,
            True,
            0.0,
            self.eps,
            torch.backends.cudnn.enabled,
        )

    def by(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Return the result by given statistics, taken as constants."""
        dtype = self._statistics_dtype()
        mean, variance = mean.to(dtype), variance.to(dtype)
        if self.needs_elementwise:
            return self._elementwise(mean, variance)
        x, weight, bias = self.input, self.weight, self.bias
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, self.eps)

    @property
    def needs_elementwise(self) -> bool:
        """Whether the kernel's gradient can't be trusted.

        Of a single row it is wrong, its elements out of order, where it comes with the
        channels last: torch takes such a gradient of one row for a contiguous one.
        """
        return len(self.input) == 1 and self.input.ndim > 2 and torch.is_grad_enabled()

    def _elementwise(self, mean: Tensor, variance: Tensor) -> Tensor:
        view = (1, -1) + (1,) * (self.input.ndim - 2)
        factor = (variance + self.eps).rsqrt()
        result = (self.input.to(mean.dtype) - mean.view(view)) * factor.view(view)
        if self.weight is not None:
            result = result * self.weight.view(view)
        if self.bias is not None:
            result = result + self.bias.view(view)
        return result.to(self.input.dtype)

    def _statistics_dtype(self) -> torch.dtype:
        # The kernels take statistics of the weight's type; without one, half-precision
        # inputs keep float32 statistics, as batch norm itself does.
        if self.weight is not None:
            return self.weight.dtype
        return torch.float32 if self.input.dtype in HALF_PRECISION else self.input.dtype


def _functional(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
) -> NormCall:
    return NormCall(input, running_mean, running_var, weight, bias, training, eps)


def _torch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,  # noqa: ARG001
    eps: float,
    cudnn_enabled: bool,  # noqa: ARG001
) -> NormCall:
    return NormCall(input, running_mean, running_var, weight, bias, training, eps)


BATCH_NORMS: dict[Callable[..., Any], Callable[..., NormCall]] = {
    F.batch_norm: _functional,
    torch.batch_norm: _torch,
}
"""What reads the arguments of each function that is a batch norm."""


def over_rows(shape: torch.Size, before: torch.Size) -> bool:
    """Return whether the number of values of a channel follows that of rows.

    Weights have the same shape in a pass on another number of rows; where rows lie
    along the channels (instance norm by hand) the statistics are one example's own.

    Args:
        shape: Of what a batch norm takes, in one pass.
        before: Of the same in a pass on another number of rows.
    """
    return shape != before and shape[1] == before[1]


@torch.no_grad()
def batch_statistics(
    x: Tensor, reduce: Reduce | None = None, *, empty: bool = False
) -> tuple[Tensor, Tensor]:
    """Return mean and variance (by count, not count - 1) of each channel, float64.

    Over ranks they are joined from counts, means and centred squares, so no digits
    cancel (Chan, Golub, LeVeque 1979) and a channel that is constant has variance 0.

    Args:
        x: Values, shape `(R, C, ...)`; `R` may differ between ranks.
        reduce: Sums a tensor over ranks; None: this rank is alone.
        empty: This rank's values count for nothing.
    """
    x = x.detach().float() if x.dtype in HALF_PRECISION else x.detach()
    if empty:
        mean = variance = x.new_zeros(x.shape[1], dtype=torch.float64)
    else:
        mean, variance = _mean_and_variance(x)
    if reduce is None:
        return mean, variance
    count = mean.new_full((1,), 0 if empty else x.numel() // x.shape[1])
    sums = reduce(torch.cat([count, count * mean]))
    total, total_mean = sums[:1], sums[1:] / sums[:1]
    spread = count * (variance + (mean - total_mean) ** 2)
    return total_mean, reduce(spread) / total


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.device.type in ("cpu", "cuda") and not is_batchedtensor(x):
        # The kernel of batch norm itself: 3 to 40 times as fast as var_mean.
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    else:
        dims = [d for d in range(x.ndim) if d != 1]
        variance, mean = torch.var_mean(x, dims, correction=0)
    return mean.double(), variance.double()

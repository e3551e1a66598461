"""References: moments of tensors whose axes are examples, positions and channels.

B examples, C channels; E is the mean over examples and positions, over all ranks.
Source, where none is named: Labatie (2019), arXiv 1811.03087, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_resnorm.measures.moments.sums import ChannelSums
from lit_resnorm.measures.passes.untouched import Reduce, identity


def raw_moment(x: Tensor, p: int, *, reduce: Reduce = identity) -> Tensor:
    r"""Return the moment :math:`\nu_p(x) = E\, x^p`, averaged over channels.

    Args:
        x: Shape `(B, ...)`; `B` may differ between ranks, and be 0 on some.
        p: Positive integer.
        reduce: Sums a tensor over ranks.

    Returns:
        0-d float64 tensor, in the p-th power of x's unit. Exact.

    Raises:
        ValueError: If p is below 1, or all ranks together hold no element.
    """
    return _mean(x.double() ** _power(p), reduce)


def absolute_moment(x: Tensor, *, reduce: Reduce = identity) -> Tensor:
    r"""Return the moment :math:`\nu_1(|x|) = E |x|`, averaged over channels.

    Args:
        x: Shape `(B, ...)`.
        reduce: Sums a tensor over ranks.

    Returns:
        0-d float64 tensor, in x's unit. Exact.

    Raises:
        ValueError: If all ranks together hold no element.
    """
    return _mean(x.double().abs(), reduce)


def central_moment(
    x: Tensor, p: int, *, channel_dim: int = 1, reduce: Reduce = identity
) -> Tensor:
    r"""Return :math:`\mu_p(x) = E (x - E x)^p`, averaged over channels.

    Each channel is centred about its own mean over examples and positions.

    Args:
        x: Shape `(B, ...)`.
        p: Positive integer.
        channel_dim: The dimension that counts channels.
        reduce: Sums a tensor over ranks.

    Returns:
        0-d float64 tensor, in the p-th power of x's unit. Exact; not unbiased.

    Raises:
        ValueError: If p is below 1, or all ranks together hold no element.
    """
    x_nC = x.double().movedim(channel_dim, -1).flatten(0, -2)
    sums = reduce(torch.cat([x_nC.new_tensor([len(x_nC)]), x_nC.sum(0)]))
    return _mean((x_nC - sums[1:] / sums[0]) ** _power(p), reduce)


def effective_rank(
    x: Tensor, *, channel_dim: int = 1, reduce: Reduce = identity
) -> Tensor:
    r"""Return :math:`\mathrm{tr}\, C / \lambda_{\max}(C)` of the channel covariance C.

    1 where the centred examples lie on a line; at most `min(n - 1, channels)` for n
    entries a channel. From the n x n Gram matrix of the centred entries where that is
    smaller than C and lies on one process; both give the same number.

    Args:
        x: Shape `(B, ...)`; on a rank without examples `(0, ...)`.
        channel_dim: The dimension that counts channels.
        reduce: Sums a tensor over ranks.

    Returns:
        0-d float64 tensor, dimensionless. Exact; NaN where all entries are equal.
    """
    sums = ChannelSums(covariance=True)
    empty = not len(x)
    sums.add(x.new_zeros(1, *x.shape[1:]) if empty else x, channel_dim, empty=empty)
    rank = sums.finish(reduce).effective_rank
    if rank is None:
        raise RuntimeError("sums with a covariance give a rank")
    return rank


def branch_share(
    branch: Tensor, skip: Tensor, *, channel_dim: int = 1, reduce: Reduce = identity
) -> Tensor:
    r"""Return the share of a residual branch in the variance of a sum.

    .. math:: \mu_2(F) / (\mu_2(F) + \mu_2(\mathrm{skip}))

    Source: De & Smith (2020), arXiv 2002.10444.

    Args:
        branch: What the branch adds, shape `(B, ...)`.
        skip: What it is added to, of the same shape.
        channel_dim: The dimension that counts channels.
        reduce: Sums a tensor over ranks.

    Returns:
        0-d float64 tensor in [0, 1]; NaN where both are constant.
    """
    added = central_moment(branch, 2, channel_dim=channel_dim, reduce=reduce)
    kept = central_moment(skip, 2, channel_dim=channel_dim, reduce=reduce)
    return added / (added + kept)


def identity_deviation(
    branch: Tensor, skip: Tensor, *, reduce: Reduce = identity
) -> Tensor:
    r"""Return how far a residual block is from the identity, over all examples.

    .. math:: \lVert \mathrm{out} - \mathrm{in} \rVert / \lVert \mathrm{in} \rVert

    `in` is what the branch is added to, so the numerator is the branch's norm.

    Args:
        branch: What the branch adds, shape `(B, ...)`.
        skip: What it is added to, of the same shape.
        reduce: Sums a tensor over ranks.

    Returns:
        0-d float64 tensor, 0 for an identity block.
    """
    added = raw_moment(branch, 2, reduce=reduce)
    return (added / raw_moment(skip, 2, reduce=reduce)).sqrt()


def _mean(x: Tensor, reduce: Reduce) -> Tensor:
    total, count = reduce(torch.stack([x.sum(), x.new_tensor(float(x.numel()))]))
    if not count:
        raise ValueError("the tensor is empty on every rank: no moment")
    return total / count


def _power(p: int) -> int:
    if p < 1:
        raise ValueError(f"p is {p}; it must be a positive integer")
    return p

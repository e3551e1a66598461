r"""How much the gradients of examples scatter about their mean.

With :math:`g_i` the gradient of the loss of example i, of N, and :math:`\bar g` their
mean, unbiased estimates are

.. math::
    \mathrm{tr}\,\Sigma = \frac{N}{N - 1}
        \Bigl(\frac1N \sum_i |g_i|^2 - |\bar g|^2\Bigr), \qquad
    |G|^2 = |\bar g|^2 - \frac{\mathrm{tr}\,\Sigma}{N}

of the variance of a single example's gradient and of the squared length of the true
gradient; their ratio is the gradient noise scale, the batch size from which on larger
batches pay less and less.

Source: McCandlish et al. (2018), arXiv 1812.06162, appendix A.1 with single examples as
the small batch.

Shapes: N examples of all ranks, B of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.fisher.examinations import Examinations
from lit_resnorm.measures.fisher.gram import gram_matrix
from lit_resnorm.measures.fisher.measurement import apart, measurement
from lit_resnorm.measures.fisher.options import FisherOptions, apply
from lit_resnorm.measures.fisher.shards import Shards
from lit_resnorm.measures.passes.batches import Forward, num_rows, take_rows
from lit_resnorm.measures.passes.untouched import Reduce, identity

RowLosses = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class GradientNoise:
    """What the gradients of examples say of the noise of a batch's.

    Attributes:
        scale: Variance over squared length, in examples; infinite where the estimate of
            the squared length is not positive. Biased for few examples.
        stderr: Its standard error to first order, by the jackknife over examples of its
            inverse.
        trace: Variance of an example's gradient, summed over parameters, in units of
            the loss squared; unbiased.
        signal_square: Squared length of the true gradient, likewise; unbiased, so that
            it may be negative.
        num_examples: N.
    """

    scale: Tensor
    stderr: Tensor
    trace: Tensor
    signal_square: Tensor
    num_examples: int


def gradient_noise(
    model: nn.Module,
    x: Any,
    losses: RowLosses,
    *,
    weights: Tensor | None = None,
    norm_mode: str = "frozen",
    reduce: Reduce = identity,
    forward: Forward = apply,
    memory: int = 2**28,
    examinations: Examinations | None = None,
) -> GradientNoise:
    r"""Return the gradient noise scale, from the gradients of single examples.

    Exact for the batch: gradients enter by their inner products, which are formed layer
    by layer, so that no example's gradient of the whole network is held. Frozen
    parameters are left out; the model is untouched.

    Args:
        model: Any module.
        x: This rank's rows of the batch.
        losses: Takes output and rows, returns the loss of each row, shape `(B,)`.
        weights: Weight of each row in the mean, shape `(B,)`; None: all the same.
        norm_mode: `frozen` or `eval`; in mode `train` an example has no gradient of its
            own.
        reduce: Sums a tensor over ranks.
        forward: How the model is applied to rows.
        memory: Bytes that gradients may take at a time.
        examinations: What measurements of the same network found before.

    Raises:
        ValueError: If `norm_mode` is `train`, rows depend on each other, the output is
            no tensor, or no parameter is trainable.
    """
    if norm_mode == "train":
        raise ValueError(
            "norm_mode is 'train', where examples are coupled and none has a gradient"
            " of its own: measure the gradient noise with 'frozen' or 'eval'"
        )
    options = FisherOptions(
        output="gaussian",
        norm_mode=norm_mode,
        reduce=reduce,
        forward=forward,
        memory=memory,
        examinations=examinations or Examinations(),
    )
    with measurement(model, x, options) as measured:
        if measured.coupled:
            raise ValueError(apart(model, norm_mode))
        sweep, shards = measured.sweep, measured.examples.shards
        examples = _LossRows(x, num_rows(x), shards, losses, _shares(weights, shards))
        as_examples: Any = examples
        measured = replace(measured, sweep=replace(sweep, examples=as_examples))
        return noise_of_gram(gram_matrix(measured.sweep, memory))


def noise_of_gram(gram_NN: Tensor) -> GradientNoise:
    """Return the gradient noise of the inner products of examples' gradients."""
    gram_NN = gram_NN.double()
    num = len(gram_NN)
    squares_N = gram_NN.diagonal()
    sums = squares_N.sum(), gram_NN.sum()
    trace, signal = _estimates(*sums, num)
    scale = _ratio(trace, signal)
    # of the inverse, which is finite where the scale without some example is not
    trace_N, signal_N = _estimates(
        sums[0] - squares_N, sums[1] - 2 * gram_NN.sum(1) + squares_N, num - 1
    )
    inverse_N = signal_N / trace_N
    spread = (inverse_N - inverse_N.mean()).square().sum() * (num - 1) / num
    stderr = scale.square() * spread.sqrt()
    return GradientNoise(scale, stderr, trace, signal, num)


def _estimates(squares: Tensor, total: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return variance and squared length, unbiased.

    Args:
        squares: Sum of the squared lengths of the gradients.
        total: Sum of all their inner products.
        num: Number of examples; NaN comes of fewer than two.
    """
    if num < 2:
        return torch.full_like(squares, torch.nan), torch.full_like(total, torch.nan)
    mean_square = total / num**2
    trace = num / (num - 1) * (squares / num - mean_square)
    return trace, mean_square - trace / num


def _ratio(trace: Tensor, signal: Tensor) -> Tensor:
    ratio = trace / signal
    return torch.where(signal <= 0, torch.inf, ratio)


def _shares(weights: Tensor | None, shards: Shards) -> Tensor | None:
    """Return the weights over their mean over all ranks."""
    if weights is None:
        return None
    total = weights.double().sum()
    total = total if shards.alone else shards.reduce(total)
    return weights.double() / (total / shards.total)


class _RowHead:
    """The gradients of rows' losses at their outputs, as a head with one coefficient.

    See :class:`~lit_resnorm.measures.fisher.head.Head`.
    """

    def __init__(self, gradient: Tensor) -> None:
        self._gradient = gradient
        self.num_rows, self.dtype = len(gradient), gradient.dtype
        self.device = gradient.device

    def spread(self, dual_SNTK: Tensor) -> Tensor:
        lead = dual_SNTK.shape[0]
        shape = lead, self.num_rows, *[1] * (self._gradient.ndim - 1)
        return dual_SNTK.reshape(shape) * self._gradient


@dataclass
class _LossRows:
    """Rows with a loss each, as a sweep sees its examples.

    See :class:`~lit_resnorm.measures.fisher.head.WeightedExamples`.
    """

    x: Any
    num_rows: int
    shards: Shards
    losses: RowLosses
    shares: Tensor | None
    num_seeds: int = 1
    num_coefficients: int = 1

    @property
    def dim(self) -> int:
        return self.shards.total

    def head(self, output: Tensor, rows: slice) -> _RowHead:
        place = output.detach().requires_grad_()
        with torch.enable_grad():
            losses = self.losses(place, take_rows(self.x, rows))
        if self.shares is not None:
            losses = losses * self.shares[rows].to(losses)
        (gradient,) = torch.autograd.grad(losses.sum(), place)
        return _RowHead(gradient)

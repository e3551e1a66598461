r"""The covariance of gradients, and its spectrum, through the dual matrix.

.. math:: K = \sum_i s_i (g_i - \bar g)(g_i - \bar g)^\top, \quad
    \bar g = \sum_i s_i g_i,

over examples i of weight s_i (1 / N), with g the gradient of the loss of one; or over
mini-batches. With the rows :math:`\sqrt{s_i} g_i` as a matrix R and :math:`\sigma` the
vector of the :math:`\sqrt{s_i}`, which has length 1, K has the non-zero eigenvalues of
:math:`(I - \sigma \sigma^\top) R R^\top (I - \sigma \sigma^\top)`.

Source: Jastrzebski et al. (2020), The break-even point on optimization trajectories of
deep neural networks, arXiv 2002.09572 (abstract).

Shapes: N rows, M mini-batches, D positions of all rows or mini-batches, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.fisher import Examinations, FisherOptions
from lit_resnorm.measures.fisher.gram import gram_matrix
from lit_resnorm.measures.fisher.measurement import Measurement, measurement
from lit_resnorm.measures.fisher.sweep import OtherWayError
from lit_resnorm.measures.losses.labels import are_labels
from lit_resnorm.measures.losses.probe_loss import ProbeLoss, ShapedForward, as_numbers
from lit_resnorm.measures.passes.batches import (
    Forward,
    network_output,
    occupied,
    take_rows,
)
from lit_resnorm.measures.passes.untouched import Reduce, identity, untouched
from lit_resnorm.measures.spectra import all_pairs


@dataclass(frozen=True)
class GradientCovariance:
    """The spectrum of a covariance of gradients.

    Attributes:
        eigenvalues: All that can differ from zero, descending, float64.
        trace: Their sum.
        num_gradients: Examples, or mini-batches.
        batch_size: Examples of each: the covariance of mini-batches falls as 1 / B.
    """

    eigenvalues: Tensor
    trace: float
    num_gradients: int
    batch_size: int

    @property
    def max(self) -> float:
        """Largest eigenvalue."""
        return float(self.eigenvalues[0])

    @property
    def min(self) -> float:
        """Smallest eigenvalue of those that centring leaves."""
        return float(self.eigenvalues[-1])

    @property
    def conditioning(self) -> float:
        """Smallest over largest eigenvalue; NaN where all gradients are alike."""
        return self.min / self.max if self.max else float("nan")

    @property
    def trace_over_max(self) -> float:
        """Trace over largest eigenvalue; NaN where all gradients are alike."""
        return self.trace / self.max if self.max else float("nan")


@dataclass(frozen=True, kw_only=True)
class CovarianceOptions:
    """How gradients are taken.

    Attributes:
        norm_mode: `frozen`, `eval` or `train`; in mode `train` mini-batches have
            statistics of their own, and examples those of the whole batch, which each
            depends on.
        reduce: Sums a tensor over ranks.
        forward: How the model is applied, `(model, batch) -> output`.
        memory: Bytes that gradients may take at a time.
        examinations: What measurements of the same network found before.
    """

    norm_mode: str = "frozen"
    reduce: Reduce = identity
    forward: Forward = network_output
    memory: int = 2**28
    examinations: Examinations = field(default_factory=Examinations)

    def measuring(self, loss: ProbeLoss, targets: Tensor | None) -> FisherOptions:
        """Return how the passes are made."""
        return FisherOptions(
            output=loss.output,
            class_dim=loss.class_dim,
            norm_mode=self.norm_mode,
            num_eigenvalues=0,
            reduce=self.reduce,
            forward=self.forward,
            weights=loss.weights,
            targets=targets,
            memory=self.memory,
            examinations=self.examinations,
        )


def covariance_spectrum(
    model: nn.Module, batch: Any, loss: ProbeLoss, targets: Tensor, **options: Any
) -> GradientCovariance:
    """Return the spectrum of the covariance of the gradients of single examples.

    Exact: the Gram matrix of the empirical Fisher matrix, centred. Gradients are formed
    layer by layer; the model is untouched.

    Args:
        model: Any module; nothing is converted.
        batch: The batch, or this rank's rows of it.
        loss: A likelihood, of this batch.
        targets: Its labels: class indices for the softmax, else numbers shaped as the
            output.
        **options: See :class:`CovarianceOptions`.

    Raises:
        ValueError: If there are fewer than two examples, or as for the Fisher matrix.
    """
    asked = CovarianceOptions(**options)
    if loss.output == "gaussian" and are_labels(targets):
        targets = _unit_vectors(model, batch, asked, targets)
    with measurement(model, batch, asked.measuring(loss, targets)) as measured:
        try:
            gram_DD = _gram(measured)
        except OtherWayError:
            measured.sweep.take_directly()
            gram_DD = _gram(measured)
        examples = measured.examples
        shares_D = examples.shards.gather(examples.scales.double()).flatten()
        num = int((shares_D > 0).sum())
        return _centred(
            loss.scale**2 * gram_DD.double(),
            shares_D,
            num,
            measured.num_parameters,
            batch_size=1,
        )


def _unit_vectors(
    model: nn.Module, batch: Any, options: CovarianceOptions, targets: Tensor
) -> Tensor:
    """Return classes as the vectors that a squared distance is from."""
    one = take_rows(occupied(batch)[0], slice(1))
    with untouched(model) as run, torch.no_grad():
        output = run(lambda: options.forward(model, one))
    return as_numbers(targets, output.expand(len(targets), *output.shape[1:]))


def _gram(measured: Measurement) -> Tensor:
    """Return inner products of weighted gradients, of all ranks."""
    if measured.coupled:
        return measured.products()(measured.units())
    return gram_matrix(measured.sweep, measured.options.memory)


def batch_covariance_spectrum(
    model: nn.Module,
    batch: Any,
    loss: ProbeLoss,
    *,
    num_batches: int,
    batch_size: int,
    places: Tensor | None = None,
    **options: Any,
) -> GradientCovariance:
    """Return the spectrum of the covariance of the gradients of mini-batches.

    Mini-batch m are the examples `m B` to `(m + 1) B` of the whole batch. Gradients are
    held for some parameters at a time.

    Args:
        model: Any module.
        batch: The batch, or this rank's rows of it.
        loss: Any, of this batch.
        num_batches: M.
        batch_size: B.
        places: Where in the whole batch this rank's rows are, shape `(N,)`; None: rank
            after rank.
        **options: See :class:`CovarianceOptions`.

    Raises:
        ValueError: If the batch holds fewer than M B examples.
    """
    forward = ShapedForward(options.pop("forward", network_output))
    asked = CovarianceOptions(forward=forward, **options)
    with measurement(model, batch, asked.measuring(loss, None)) as measured:
        shards = measured.examples.shards
        if shards.total < num_batches * batch_size:
            raise ValueError(
                f"num_batches is {num_batches} and batch_size {batch_size}, which takes"
                f" {num_batches * batch_size} examples; there are {shards.total}"
            )
        if places is None or shards.alone:
            start = shards.rows.start
            places = torch.arange(start, start + measured.examples.num_rows)
        batches = _MiniBatches(measured, loss, forward, places, num_batches, batch_size)
        shares_M = torch.full((num_batches,), num_batches**-0.5, dtype=torch.float64)
        return _centred(
            batches.gram() / num_batches,
            shares_M.to(measured.sweep.network.device),
            num_batches,
            measured.num_parameters,
            batch_size=batch_size,
        )


@dataclass
class _MiniBatches:
    """The mini-batches of a batch, as ranks hold their rows.

    Attributes:
        measured: The model and the batch.
        loss: The loss.
        forward: How the model is applied.
        places: Where in the whole batch this rank's rows are.
        num: M.
        size: B.
    """

    measured: Measurement
    loss: ProbeLoss
    forward: ShapedForward
    places: Tensor
    num: int
    size: int

    def gram(self) -> Tensor:
        """Return the inner products of the gradients, shape `(M, M)`, float64."""
        network = self.measured.sweep.network
        rows = [self._rows(m) for m in range(self.num)]
        weights_M = self._summed(torch.stack([self._weight(r) for r in rows]))
        gram_MM = torch.zeros(self.num, self.num, dtype=torch.float64)
        gram_MM = gram_MM.to(network.device)
        for group in self._groups():
            grads = [
                self._gradient(part, group) / weight.to(network.dtype)
                for part, weight in zip(rows, weights_M, strict=True)
            ]
            grads_MP = self._summed(torch.stack(grads)).double()
            gram_MM += grads_MP @ grads_MP.T
        return self.loss.scale**2 * gram_MM

    def _rows(self, batch: int) -> Tensor:
        inside = (self.places >= batch * self.size) & (
            self.places < (batch + 1) * self.size
        )
        return inside.nonzero().flatten()

    def _weight(self, rows: Tensor) -> Tensor:
        return self._shares(rows).double().sum()

    def _shares(self, rows: Tensor) -> Tensor:
        scales = self.measured.examples.scales
        return scales[rows.to(scales.device)].square()

    def _summed(self, tensor: Tensor) -> Tensor:
        shards = self.measured.examples.shards
        return tensor if shards.alone else shards.reduce(tensor)

    def _groups(self) -> Iterator[list[Tensor]]:
        """Yield parameters of which all gradients fit into the memory."""
        group: list[Tensor] = []
        taken = 0
        for parameter in self.measured.sweep.network.parameters.values():
            size = 2 * self.num * parameter.numel() * parameter.element_size()
            if group and taken + size > self.measured.options.memory:
                yield group
                group, taken = [], 0
            group.append(parameter)
            taken += size
        yield group

    def _gradient(self, rows: Tensor, group: list[Tensor]) -> Tensor:
        """Return the gradient of the weighted sum of some rows' losses, flat."""
        network, examples = self.measured.sweep.network, self.measured.examples
        zeros = [torch.zeros_like(p).flatten().to(network.dtype) for p in group]
        if not len(rows):
            return torch.cat(zeros)
        part = take_rows(examples.x, rows.to(network.device))
        with torch.enable_grad():
            output = self.measured.sweep.run(lambda: network(part))
            total = self.loss.weighted_sum(
                examples.layout,
                self.forward.as_given(output),
                part,
                self._shares(rows),
                examples.slots[rows.to(examples.slots.device)],
            )
        if not total.requires_grad:
            return torch.cat(zeros)
        grads = torch.autograd.grad(
            total, group, allow_unused=True, materialize_grads=True
        )
        return torch.cat([grad.flatten().to(network.dtype) for grad in grads])


def _centred(
    gram_DD: Tensor, roots_D: Tensor, num: int, num_parameters: int, batch_size: int
) -> GradientCovariance:
    """Return the spectrum of a Gram matrix of weighted gradients, less their mean's.

    Args:
        gram_DD: Inner products of weighted gradients, float64.
        roots_D: Roots of the weights; their squares add up to 1.
        num: How many of them count.
        num_parameters: P.
        batch_size: Examples of each.

    Raises:
        ValueError: If fewer than two count.
    """
    if num < 2:
        raise ValueError(
            f"there are {num} gradients; a covariance takes at least two: give"
            " num_examples or batch"
        )
    roots_D = roots_D / roots_D.norm()
    mean_D = gram_DD @ roots_D
    outer_DD = torch.outer(roots_D, mean_D)
    centred_DD = gram_DD - outer_DD - outer_DD.T
    centred_DD += torch.outer(roots_D, roots_D) * (roots_D @ mean_D)
    values = all_pairs(centred_DD).values
    # One direction is the mean's; of the others there are as many as parameters.
    kept = values[: min(num - 1, num_parameters)].clamp_min(0).cpu()
    return GradientCovariance(kept, float(kept.sum()), num, batch_size)

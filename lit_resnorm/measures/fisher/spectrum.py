r"""Spectra of Fisher information matrices.

.. math:: F = \frac{1}{\sum_i w_i} \sum_i w_i\, J_i^\top H_i J_i

over the examples i, with :math:`J_i` the Jacobian of the output and :math:`H_i` the
Fisher matrix of the output's own distribution: :math:`\mathrm{diag}(p) - p p^\top`
(softmax), :math:`p (1 - p)` (Bernoulli) or 1 (Gaussian); for the empirical Fisher the
outer product of the loss's gradient at the observed label. For the first two this is
also the Gauss-Newton matrix of the mean cross entropy; for the third that of half the
squared distance, summed over outputs, averaged over examples.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from lit_resnorm.measures.fisher.blocks import Block
from lit_resnorm.measures.fisher.gram import gram_matrix
from lit_resnorm.measures.fisher.measurement import Settings, measurement
from lit_resnorm.measures.fisher.names import layers_by_site
from lit_resnorm.measures.fisher.network import Forward, apply
from lit_resnorm.measures.fisher.options import Asked, check_arguments
from lit_resnorm.measures.fisher.result import FisherSpectrum
from lit_resnorm.measures.fisher.routes import spectrum
from lit_resnorm.measures.passes.untouched import Reduce, identity, occupied, take_rows

DEFAULT_MEMORY = 2**28


def fisher_spectrum(
    model: nn.Module,
    x: Any,
    *,
    output: str = "softmax",
    norm_mode: str = "frozen",
    num_eigenvalues: int | Literal["auto"] | None = None,
    tol: float = 1e-5,
    per_layer: bool | str = False,
    layer_eigenvalues: int | Literal["same"] | None = "same",
    reduce: Reduce = identity,
    forward: Forward = apply,
    class_dim: int | None = None,
    weights: Tensor | None = None,
    loss_scale: float = 1.0,
    trace: bool = True,
    start: Tensor | None = None,
    memory: int = DEFAULT_MEMORY,
) -> FisherSpectrum:
    """Return eigenvalues and trace of the Fisher matrix of a batch.

    Exact: an expectation over the output's distribution, nothing is sampled. The model
    is untouched. Frozen parameters are no part of the matrix.

    Args:
        model: Any module; nothing is converted.
        x: The batch, or this rank's rows of it: a tensor, or a nest of tensors whose
            first dimensions count rows.
        output: `softmax`, `bernoulli` or `gaussian`: the distribution that the loss
            belongs to; `auto`: softmax for two or more logits, bernoulli for one.
        norm_mode: `frozen`, `eval` or `train`; in mode `train` rows depend on each
            other, and every rank must hold the whole batch. Where they do in another
            mode (a batch norm that asks for the batch's statistics in eval mode) the
            batch is measured as a whole, on one rank.
        num_eigenvalues: None: all non-zero ones (above 1e-10 of the largest in float64,
            1e-6 in float32); 0: none, trace and mean alone; k: the largest k, fewer
            where the rank is lower; `auto`: all where the matrix has at most 4096 rows,
            else the largest 10.
        tol: Relative error of the largest k.
        per_layer: Also each parameter-owning module's own block of the matrix; a
            regular expression selects them by site.
        layer_eigenvalues: As `num_eigenvalues`, for each block.
        reduce: Sums a tensor over ranks.
        forward: How the model is applied, `(model, x) -> output`.
        class_dim: Dimension of the output that counts an example's outputs; every
            other position is then an example. By default for the softmax the last one,
            or 1 for outputs of four dimensions and more; else all numbers of a row are
            one example's.
        weights: Weight of each example, shape `(N,)` or that of the output without
            `class_dim`: 0 for what `ignore_index` leaves out, class weights.
        loss_scale: Factor between the loss and the mean log-likelihood (2 / C for
            torch's mean over C squared errors).
        trace: False saves the passes for the trace where eigenvalues don't give it.
        start: Dual vectors of a measurement on the same batch (`FisherSpectrum.vectors`
            ): fewer products then reach the same `tol`.
        memory: Bytes that gradients, and what is kept of them, may take at a time.

    Raises:
        ValueError: If an argument can't be right, the model has no trainable parameter,
            a complex one or a TorchScript module, rows that depend on each other are on
            several ranks, or all eigenvalues need a matrix beyond the free memory.
    """
    settings = Settings(
        output, norm_mode, reduce, forward, class_dim, weights, None, loss_scale, memory
    )
    asked = Asked(num_eigenvalues, layer_eigenvalues, tol, trace, start, per_layer)
    return _spectrum(model, x, settings, asked)


def empirical_fisher_spectrum(
    model: nn.Module,
    x: Any,
    y: Tensor,
    *,
    output: str = "softmax",
    norm_mode: str = "frozen",
    num_eigenvalues: int | Literal["auto"] | None = None,
    tol: float = 1e-5,
    per_layer: bool | str = False,
    layer_eigenvalues: int | Literal["same"] | None = "same",
    reduce: Reduce = identity,
    forward: Forward = apply,
    class_dim: int | None = None,
    weights: Tensor | None = None,
    loss_scale: float = 1.0,
    trace: bool = True,
    start: Tensor | None = None,
    memory: int = DEFAULT_MEMORY,
) -> FisherSpectrum:
    """Return the spectrum of the second moment of the gradients at observed labels.

    One gradient an example, of the loss at its label `y`. This is not the Fisher matrix
    (:func:`fisher_spectrum`): near a solution it vanishes, the Fisher matrix does not.

    Args:
        model: Any module.
        x: The batch, or this rank's rows.
        y: Labels: class indices for the softmax, shaped as the output without
            `class_dim`; else numbers shaped as the output. Those of weight 0 may be
            anything.
        output: Which loss: cross entropy (`softmax`, `bernoulli`) or half the squared
            distance (`gaussian`).
        norm_mode: As for the Fisher matrix, and so are all further arguments.
        num_eigenvalues: None all non-zero ones, 0 none, k the largest k.
        tol: Relative error of the largest k.
        per_layer: Also each parameter-owning module's own block.
        layer_eigenvalues: How many eigenvalues of each block.
        reduce: Sums a tensor over ranks.
        forward: How the model is applied.
        class_dim: Dimension of the output that counts an example's outputs.
        weights: Weight of each example.
        loss_scale: Factor on each squared gradient.
        trace: False saves the passes for the trace.
        start: Dual vectors of an earlier measurement.
        memory: Bytes that may be taken at a time.

    Raises:
        ValueError: As for the Fisher matrix.
    """
    settings = Settings(
        output, norm_mode, reduce, forward, class_dim, weights, y, loss_scale, memory
    )
    asked = Asked(num_eigenvalues, layer_eigenvalues, tol, trace, start, per_layer)
    return _spectrum(model, x, settings, asked)


def fisher_gram(
    model: nn.Module,
    x: Any,
    *,
    output: str = "softmax",
    norm_mode: str = "frozen",
    reduce: Reduce = identity,
    forward: Forward = apply,
    class_dim: int | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Tensor:
    r"""Return the Gram matrix :math:`\tilde J \tilde J^\top`, shape `(D, D)`.

    It has the Fisher matrix's non-zero eigenvalues; its Frobenius norm and
    :math:`|\cdot|_F^2/\mathrm{tr}` bound the largest from above and below. Rows are
    ordered by example, then position, then dual coefficient; with output `gaussian`
    it is the neural tangent kernel over N.

    Args:
        model: Any module.
        x: The batch, or this rank's rows.
        output: Distribution of the output.
        norm_mode: `frozen` or `eval`; in mode `train`, by products.
        reduce: Sums a tensor over ranks.
        forward: How the model is applied.
        class_dim: Dimension of the output that counts an example's outputs.
        memory: Bytes that may be taken at a time, besides the matrix.
    """
    settings = Settings(
        output, norm_mode, reduce, forward, class_dim, None, None, 1.0, memory
    )
    with measurement(model, x, settings) as of:
        if of.coupled:
            return of.products()(of.units())
        return gram_matrix(of.sweep, memory)


def _spectrum(
    model: nn.Module, x: Any, settings: Settings, asked: Asked
) -> FisherSpectrum:
    check_arguments(
        output=settings.output,
        num_eigenvalues=asked.num_eigenvalues,
        layer_eigenvalues=asked.layer_eigenvalues,
        tol=asked.tol,
    )
    with measurement(model, x, settings) as of:
        layers: dict[str, tuple[Block, ...]] = {}
        if asked.per_layer:
            some = occupied(x)[0]
            few = some if of.coupled else take_rows(some, slice(0, 1))
            layers = layers_by_site(model, of.sweep.blocks, lambda: of.one_pass(few))
            layers = _matching(layers, asked.per_layer)
        return replace(spectrum(of, asked.of(of), layers), coupled=of.coupled)


def _matching(
    layers: dict[str, tuple[Block, ...]], pattern: bool | str
) -> dict[str, tuple[Block, ...]]:
    if not isinstance(pattern, str):
        return layers
    chosen = {name: own for name, own in layers.items() if re.search(pattern, name)}
    if not chosen:
        raise ValueError(
            f"no layer matches {pattern!r} (per_layer, a probe's sites); there are"
            f" {', '.join(layers)}"
        )
    return chosen

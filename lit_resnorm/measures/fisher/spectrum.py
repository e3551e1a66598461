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

from lit_resnorm.measures.fisher.blocks import (
    ParameterBlock,
    layers_by_registration,
    layers_by_site,
)
from lit_resnorm.measures.fisher.measurement import Measurement, measurement
from lit_resnorm.measures.fisher.options import FisherOptions
from lit_resnorm.measures.fisher.result import FisherSpectrum
from lit_resnorm.measures.fisher.routes import spectrum_by_cheapest_route
from lit_resnorm.measures.fisher.sweep import OtherWayError
from lit_resnorm.measures.passes.batches import occupied, take_rows
from lit_resnorm.measures.passes.untouched import Reduce, identity


def fisher_spectrum(
    model: nn.Module,
    x: Any,
    *,
    output: str = "softmax",
    norm_mode: str = "frozen",
    num_eigenvalues: int | Literal["auto"] | None = None,
    tol: float = 1e-5,
    per_layer: bool | str = False,
    reduce: Reduce = identity,
    targets: Tensor | None = None,
    **further: Any,
) -> FisherSpectrum:
    """Return eigenvalues and trace of the Fisher matrix of a batch.

    Exact: an expectation over the output's distribution, nothing is sampled. The model
    is untouched. Frozen parameters are no part of the matrix.

    With `targets` it is the empirical matrix, the second moment of the gradients at
    observed labels, one gradient an example: near a solution it vanishes, the Fisher
    matrix does not.

    Args:
        model: Any module; nothing is converted.
        x: The batch, or this rank's rows of it: a tensor, or a nest of tensors whose
            first dimensions count rows.
        output: `softmax`, `bernoulli` or `gaussian`: the distribution that the loss
            belongs to; `auto`: softmax for two or more logits, bernoulli for one.
        norm_mode: `frozen`, `eval` or `train`.
        num_eigenvalues: None: all non-zero ones; 0: none, trace and mean alone; k: the
            largest k; `auto`: all where the matrix has at most 4096 rows, else 10.
        tol: Relative error of the largest k.
        per_layer: Also each parameter-owning module's own block of the matrix; a
            regular expression selects them by site.
        reduce: Sums a tensor over ranks.
        targets: Observed labels: class indices for the softmax, shaped as the output
            without `class_dim`; else numbers shaped as the output.
        **further: `layer_eigenvalues`, `forward`, `class_dim`, `weights`, `loss_scale`,
            `trace`, `start`, `memory` and `examinations`, as
            :class:`~lit_resnorm.measures.fisher.options.FisherOptions` says.

    Raises:
        ValueError: If an option can't be right, the model has no trainable parameter,
            a complex one or a TorchScript module, rows that depend on each other are on
            several ranks, or all eigenvalues need a matrix beyond the free memory.
    """
    options = FisherOptions(
        output=output,
        norm_mode=norm_mode,
        num_eigenvalues=num_eigenvalues,
        tol=tol,
        per_layer=per_layer,
        reduce=reduce,
        targets=targets,
        **further,
    )
    with measurement(model, x, options) as measured:
        try:
            found = _spectrum(model, x, measured)
        except OtherWayError:
            measured.sweep.take_directly()
            found = _spectrum(model, x, measured)
        return replace(found, coupled=measured.coupled)


def empirical_fisher_spectrum(
    model: nn.Module, x: Any, y: Tensor, **options: Any
) -> FisherSpectrum:
    """Return the spectrum of the second moment of the gradients at observed labels.

    :func:`fisher_spectrum` with `targets`: another matrix, another name.

    Args:
        model: Any module.
        x: The batch, or this rank's rows.
        y: Labels, as `targets` of :func:`fisher_spectrum`. The loss is the cross
            entropy (`softmax`, `bernoulli`) or half the squared distance (`gaussian`).
        **options: As for :func:`fisher_spectrum`.

    Raises:
        ValueError: As for the Fisher matrix.
    """
    return fisher_spectrum(model, x, targets=y, **options)


def _spectrum(model: nn.Module, x: Any, measured: Measurement) -> FisherSpectrum:
    layers = _layers(model, x, measured) if measured.options.per_layer else {}
    return spectrum_by_cheapest_route(measured, layers)


def _layers(
    model: nn.Module, x: Any, measured: Measurement
) -> dict[str, tuple[ParameterBlock, ...]]:
    """Return the blocks of the layers that are asked for, by site.

    Raises:
        ValueError: If none is of that name.
    """
    some = occupied(x)[0]
    few = some if measured.coupled else take_rows(some, slice(0, 1))
    if measured.sweep.direct:
        layers = layers_by_registration(model, measured.sweep.blocks)
    else:
        layers = layers_by_site(
            model, measured.sweep.blocks, lambda: measured.one_pass(few)
        )
    pattern = measured.options.per_layer
    if not isinstance(pattern, str):
        return layers
    chosen = {name: own for name, own in layers.items() if re.search(pattern, name)}
    if not chosen:
        raise ValueError(
            f"no layer matches {pattern!r} (per_layer, a probe's sites); there are"
            f" {', '.join(layers)}"
        )
    return chosen

r"""The Hessian of a loss: its extreme eigenvalues and its trace, by products.

.. math:: H = \nabla^2_\theta L, \quad L = \frac{1}{\sum_i w_i} \sum_i w_i\, l_i(\theta)

over the examples i of a batch. H v is the gradient of :math:`v^\top \nabla L`, one
backward pass through the graph of the gradient, which is kept: about two training
steps. ReLU has a second derivative almost everywhere, zero.

Source: B. A. Pearlmutter (1994), Fast exact multiplication by the Hessian [R].

Shapes: P parameters, B vectors in a block, K eigenvalues, N rows, T positions of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.hessian.products import (
    HessianOptions,
    HessianProducts,
    hessian_products,
)
from lit_resnorm.measures.losses.probe_loss import ProbeLoss, read_loss
from lit_resnorm.measures.spectra import Matvec, extreme_eigenvalues, top_eigenpairs


@dataclass(frozen=True)
class HessianSpectrum:
    """What was measured of a Hessian.

    Attributes:
        eigenvalues: The largest k, descending, with their signs, float64.
        smallest: The smallest eigenvalue; NaN where it wasn't asked for.
        trace: An unbiased estimate, or exact; NaN where it wasn't asked for.
        trace_error: Its standard error; 0 where exact.
        residuals: Norm of `H v - value v` for each of the largest.
        vectors: Eigenvectors `(P, K)` of the largest k, a start for the next
            measurement; None for one alone, which a start doesn't help.
        num_parameters: P.
        num_products: Products with a vector that it took.
    """

    eigenvalues: Tensor
    smallest: float
    trace: float
    trace_error: float
    residuals: Tensor
    vectors: Tensor | None
    num_parameters: int
    num_products: int

    @property
    def max(self) -> float:
        """Largest eigenvalue."""
        return float(self.eigenvalues[0])


def hessian_spectrum(
    model: nn.Module, batch: Any, loss: ProbeLoss | None = None, **options: Any
) -> HessianSpectrum:
    """Return the extreme eigenvalues and the trace of a loss's Hessian.

    The model is untouched. Frozen parameters are no part of the matrix.

    Args:
        model: Any module; nothing is converted.
        batch: The batch, or this rank's rows of it.
        loss: Of this batch; see :func:`~lit_resnorm.measures.read_loss`. None: what the
            module and the batch tell.
        **options: See :class:`HessianOptions`.

    Raises:
        ValueError: If an option can't be right, the model has no trainable parameter,
            the loss no second derivative (names the operation), or rows that depend on
            each other are on several ranks.
    """
    asked = HessianOptions(**options)
    if loss is None:
        loss = read_loss(model, batch, forward_fn=asked.forward)
    with hessian_products(model, batch, loss, asked) as products:
        return _extremes_and_trace(products, asked)


def _extremes_and_trace(
    products: HessianProducts, options: HessianOptions
) -> HessianSpectrum:
    several = options.num_eigenvalues > 1
    top = _several(products, options) if several else _searched_ends(products, options)
    smallest = top.smallest
    if several and options.smallest_tol is not None and top.converged:
        smallest = _searched_ends(products, replace(options, tol=None)).smallest
    trace = error = float("nan")
    if options.num_trace_vectors and top.converged:
        trace, error = trace_estimate(
            products, products.network.num_parameters, options.num_trace_vectors, top
        )
    return HessianSpectrum(
        eigenvalues=top.values,
        smallest=smallest,
        trace=trace,
        trace_error=error,
        residuals=top.residuals,
        vectors=top.basis.T if several else None,
        num_parameters=products.network.num_parameters,
        num_products=products.num_products,
    )


@dataclass(frozen=True)
class SearchedSpace:
    """What a search found, and the vectors that it leaves.

    Attributes:
        values: The largest eigenvalues, descending, float64.
        residuals: Of these.
        smallest: The smallest eigenvalue; NaN where it wasn't looked for.
        basis: Orthonormal vectors, shape `(M, P)`.
        basis_trace: Sum of `q . H q` over them.
        converged: Whether all came within their tolerances.
    """

    values: Tensor
    residuals: Tensor
    smallest: float
    basis: Tensor
    basis_trace: float
    converged: bool


def _searched_ends(products: HessianProducts, options: HessianOptions) -> SearchedSpace:
    """Return the largest eigenvalue and the smallest, from one Krylov space."""
    network = products.network
    found = extreme_eigenvalues(
        lambda vector_P: products(vector_P[:, None])[:, 0],
        network.num_parameters,
        dtype=network.dtype,
        device=network.device,
        tol=options.tol,
        smallest_tol=options.smallest_tol,
    )
    return SearchedSpace(
        values=torch.tensor([found.largest], dtype=torch.float64),
        residuals=torch.tensor([found.residual], dtype=torch.float64),
        smallest=math.nan if options.smallest_tol is None else found.smallest,
        basis=found.basis,
        basis_trace=found.basis_trace,
        converged=found.converged,
    )


def _several(products: HessianProducts, options: HessianOptions) -> SearchedSpace:
    """Return the largest eigenvalues, as often as they occur, from a warm start."""
    network, start = products.network, options.start
    num = network.num_parameters
    if start is None or start.ndim != 2 or start.shape[0] != num:
        noise = torch.Generator().manual_seed(0)
        start = torch.randn(num, 1, generator=noise, dtype=torch.float64)
    pairs = top_eigenpairs(
        products,
        start.to(network.device, torch.float64),
        options.num_eigenvalues,
        tol=options.tol or 0.0,
        precision=network.eps,
    )
    return SearchedSpace(
        values=pairs.values.cpu(),
        residuals=pairs.residuals.cpu(),
        smallest=math.nan,
        basis=pairs.vectors.T,
        basis_trace=float(pairs.values.sum()),
        converged=pairs.converged,
    )


def trace_estimate(
    matvec: Matvec, num: int, num_vectors: int, known: SearchedSpace
) -> tuple[float, float]:
    r"""Return an unbiased estimate of the trace, with its standard error.

    With V vectors that were multiplied before, orthonormal, and z random signs,

    .. math:: \mathrm{tr}(V^\top H V) + \frac{1}{B} \sum_b y_b^\top H y_b, \quad
        y_b = z_b - V V^\top z_b:

    what stands out adds nothing to the variance. Exact, with unit vectors in the place
    of the random ones, where these would be no fewer than the parameters.

    Source: R. A. Meyer, C. Musco, C. Musco, D. P. Woodruff (2021), Hutch++: optimal
    stochastic trace estimation [R].

    Args:
        matvec: Symmetric operator.
        num: Its dimension.
        num_vectors: Number B of random vectors, at least 2.
        known: Vectors, and what they add to the trace.
    """
    basis_MP = known.basis
    if num_vectors >= num:
        units = torch.eye(num, dtype=torch.float64, device=basis_MP.device).unbind(1)
        diagonal = [float(matvec(unit[:, None])[:, 0] @ unit) for unit in units]
        return math.fsum(diagonal), 0.0
    noise = torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(num_vectors):
        signs_P = torch.randint(0, 2, (num,), generator=noise, dtype=torch.int8)
        left_P = (2.0 * signs_P - 1.0).to(basis_MP)
        left_P = left_P - (basis_MP @ left_P) @ basis_MP
        image_P = matvec(left_P[:, None])[:, 0]
        estimates.append(left_P.double() @ image_P)
    estimates_B = torch.stack(estimates)
    mean = known.basis_trace + float(estimates_B.mean())
    return mean, float(estimates_B.std() / num_vectors**0.5)

"""Eigenvalues and traces of symmetric operators that are known by their products.

Shapes: D the dimension of the operator, B vectors in a block, K wanted eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]
"""A symmetric operator: a block of float64 vectors `(D, B)` to its product, alike."""


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues of an operator.

    Attributes:
        values: Shape `(K,)`, float64, descending.
        vectors: Shape `(D, K)`, orthonormal, float64.
        residuals: Shape `(K,)`: norm of `A v - value v`; an eigenvalue of the operator
            lies within this distance of the value.
        num_products: Vectors that were multiplied.
        converged: Whether each value's error estimate came below the tolerance.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    num_products: int
    converged: bool


def top_eigenpairs(
    matvec: Matvec,
    start_DB: Tensor,
    num_eigenvalues: int,
    *,
    tol: float = 1e-5,
    block: int = 1,
    precision: float = torch.finfo(torch.float64).eps,
    min_products: int = 0,
    max_products: int = 1000,
) -> Eigenpairs:
    r"""Return the largest eigenvalues by Rayleigh-Ritz on a growing Krylov space.

    The space begins as the span of the start vectors and grows by the residuals of the
    largest Ritz pairs that are not yet within tolerance, `block` at a time. All vectors
    are kept orthogonal. From one start vector this is the method of Lanczos with full
    reorthogonalisation; from the eigenvectors of a nearby operator it takes little more
    than one product each.

    A Ritz value :math:`\theta` with residual norm :math:`\rho` and distance
    :math:`\delta` to the next Ritz value is taken to be off by at most
    :math:`\min(\rho, \rho^2/\delta)`, the bound of Kato and Temple with the gap
    estimated from the Ritz values themselves.

    Args:
        matvec: Symmetric positive semi-definite operator.
        start_DB: Start vectors, shape `(D, B)`, any norm. A start that is orthogonal
            to an eigenvector can't find it: include some randomness.
        num_eigenvalues: How many; with more than the dimension, all there are.
        tol: Bound on each value's error relative to the value.
        block: Residuals that join the space at once: more where a product of a block
            costs little more than that of a vector.
        precision: Relative rounding of the products; residuals are not pressed below.
        min_products: Go on up to these many products, as a gap estimated from few Ritz
            values may hide an eigenvector that the start hardly contains.
        max_products: Stop after these many products, converged or not.

    Returns:
        The pairs; with a non-finite product, NaN values and `converged` False.
    """
    dim = start_DB.shape[0]
    wanted = min(num_eigenvalues, dim)
    noise = torch.Generator().manual_seed(0)
    basis_DM = _orthonormal(start_DB.double(), start_DB.new_empty(dim, 0).double())
    image_DM = matvec(basis_DM)
    while True:
        gram = basis_DM.T @ image_DM
        if not bool(torch.isfinite(gram).all()):
            return _failed(start_DB, wanted, basis_DM.shape[1])
        ritz, rotation = torch.linalg.eigh((gram + gram.T) / 2)
        ritz, rotation = ritz.flip(0), rotation.flip(1)
        k = min(wanted, ritz.numel())
        residual_DK = image_DM @ rotation[:, :k] - (
            basis_DM @ rotation[:, :k] * ritz[:k]
        )
        norms = residual_DK.norm(dim=0)
        open_ = ~_within(ritz, norms, tol, precision)
        size = basis_DM.shape[1]
        whole = size == dim
        done = k == wanted and (
            whole or (size > max(k, min_products - 1) and not bool(open_.any()))
        )
        if done or whole or size >= max_products:
            return Eigenpairs(ritz[:k], basis_DM @ rotation[:, :k], norms, size, done)
        room = min(block, dim - size, max_products - size)
        grow = open_ if bool(open_.any()) else torch.ones_like(open_)
        grown_DB = _orthonormal(residual_DK[:, grow][:, :room], basis_DM)
        while grown_DB.shape[1] == 0:  # an invariant space: go on in a fresh direction
            fresh = torch.randn(dim, 1, generator=noise, dtype=torch.float64)
            grown_DB = _orthonormal(fresh.to(basis_DM), basis_DM)
        basis_DM = torch.cat([basis_DM, grown_DB], dim=1)
        image_DM = torch.cat([image_DM, matvec(grown_DB)], dim=1)


def _within(ritz: Tensor, norms: Tensor, tol: float, precision: float) -> Tensor:
    # Norms below rounding are as good as they get, also for eigenvalues of zero.
    values = ritz[: norms.numel()]
    following = torch.cat([ritz[1:], ritz.new_zeros(1)])[: norms.numel()]
    error = torch.minimum(norms, norms**2 / (values - following).clamp_min(1e-300))
    rounding = 32 * precision * ritz[0].abs()
    return (error <= tol * values.abs()) | (norms <= rounding)


def _orthonormal(new_DB: Tensor, basis_DM: Tensor) -> Tensor:
    """Return an orthonormal basis of what `new_DB` adds to the space of `basis_DM`."""
    tiny = torch.finfo(new_DB.dtype).tiny
    left_DB = new_DB / new_DB.norm(dim=0).clamp_min(tiny)
    for _ in range(2):  # twice is enough (Kahan, Parlett)
        left_DB = left_DB - basis_DM @ (basis_DM.T @ left_DB)
    left_DB = left_DB[:, left_DB.norm(dim=0) > 1e-10]
    if left_DB.shape[1] == 0:
        return left_DB
    found_DB, triangle_BB = torch.linalg.qr(left_DB / left_DB.norm(dim=0))
    found_DB = found_DB[:, triangle_BB.diagonal().abs() > 1e-10]
    # Columns that nearly cancelled have grown back what little of the basis was left.
    found_DB = found_DB - basis_DM @ (basis_DM.T @ found_DB)
    return torch.linalg.qr(found_DB)[0]


def _failed(start_DB: Tensor, wanted: int, num_products: int) -> Eigenpairs:
    nan = start_DB.new_full((wanted,), float("nan"), dtype=torch.float64)
    vectors = start_DB.new_zeros((start_DB.shape[0], wanted), dtype=torch.float64)
    return Eigenpairs(nan, vectors, nan, num_products, converged=False)


def hutchinson_trace(
    matvec: Matvec, dim: int, num_vectors: int, generator: torch.Generator
) -> tuple[float, float]:
    r"""Return an unbiased estimate of the trace and its standard error.

    .. math:: \frac{1}{B} \sum_b z_b^\top A z_b, \quad z_b \in \{-1, 1\}^D

    Source: M. F. Hutchinson (1990), A stochastic estimator of the trace of the
    influence matrix. The variance is twice the sum of the squared off-diagonal
    entries over B, so it is exact for a diagonal operator.

    Args:
        matvec: Symmetric operator.
        dim: Its dimension D.
        num_vectors: Number B of random vectors, at least 2.
        generator: Source of the signs.

    Raises:
        ValueError: If `num_vectors` is below 2: one vector has no standard error.
    """
    if num_vectors < 2:
        raise ValueError(f"num_vectors is {num_vectors}; it must be at least 2")
    signs = torch.randint(
        0, 2, (dim, num_vectors), generator=generator, device=generator.device
    )
    signs_DB = 2.0 * signs.double() - 1.0
    estimates_B = (signs_DB * matvec(signs_DB)).sum(dim=0)
    return float(estimates_B.mean()), float(estimates_B.std() / num_vectors**0.5)

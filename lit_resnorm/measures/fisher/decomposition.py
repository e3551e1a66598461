"""Eigenvalues of a Fisher or Gram matrix that is there as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_resnorm.measures.spectra import Eigenpairs, top_eigenpairs

# Beyond this, single precision decomposes single-precision matrices: half the time,
# and eigenvalues off by some 1e-8 of the largest one.
_DOUBLE_UP_TO = 1536

# Up to this, a whole decomposition takes no longer than iterations.
_DECOMPOSED_UP_TO = 160


def all_pairs(matrix: Tensor) -> Eigenpairs:
    """Return all eigenvalues of a symmetric matrix, without vectors; or one NaN."""
    num = len(matrix)
    if not bool(torch.isfinite(matrix).all()):
        values = torch.full((1,), float("nan"), dtype=torch.float64)
    else:
        values = torch.linalg.eigvalsh(
            matrix.double() if num <= _DOUBLE_UP_TO else matrix
        )
        values = values.flip(0).double()
    none = matrix.new_empty(num, 0)
    return Eigenpairs(values, none, torch.zeros_like(values), 0, converged=True)


def top_pairs(matrix: Tensor, count: int, tol: float) -> Eigenpairs:
    """Return the largest eigenvalues of a symmetric matrix, to a relative `tol`."""
    k, num = count, len(matrix)
    if num <= max(4 * k, _DECOMPOSED_UP_TO):
        every = all_pairs(matrix)
        return Eigenpairs(
            every.values[:k], every.vectors, every.residuals[:k], 0, converged=True
        )
    # Products of a block cost little more than those of a vector.
    block = max(k, 4)
    noise = torch.Generator().manual_seed(0)
    start = torch.randn(num, block, generator=noise, dtype=torch.float64)
    return top_eigenpairs(
        lambda dual_DB: (matrix @ dual_DB.to(matrix.dtype)).double(),
        start.to(matrix.device),
        k,
        tol=tol,
        block=block,
        precision=torch.finfo(matrix.dtype).eps,
        trace=float(matrix.diagonal().sum(dtype=torch.float64)),
    )


def stand_out(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which descending values of a matrix of this precision are not zero.

    NaN stays.
    """
    if not values.numel() or bool(values.isnan().any()):
        return torch.ones_like(values, dtype=torch.bool)
    share = 1e-10 if dtype == torch.float64 else 1e-6
    return values > max(0.0, float(values[0])) * share

"""Eigenvalues of symmetric matrices that are there as a whole.

G matrices side by side, of n rows.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor

from lit_resnorm.measures.spectra.products import Eigenpairs, top_eigenpairs

# Beyond this, single precision decomposes single-precision matrices: half the time,
# and eigenvalues off by some 1e-8 of the largest one.
_DOUBLE_UP_TO = 1536

# Up to this, a whole decomposition takes no longer than iterations.
_DECOMPOSED_UP_TO = 160

# Up to this, all eigenvalues take no longer than one with its certificate.
_ALL_UP_TO = 512


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


def largest_eigenvalue(matrix_Gnn: Tensor) -> Tensor:
    r"""Return the largest eigenvalue of each symmetric matrix, to rounding.

    Of a large matrix Lanczos iterations give a value, which may be another
    eigenvalue than the largest. A Cholesky factorisation of
    :math:`(\lambda + \epsilon) I - A` exists only if no eigenvalue is above, at a
    fraction of the cost of all eigenvalues, which are taken where it fails. Rounding
    in it is below :math:`(n + 1) u` times the trace of what is factorised, u being
    the unit roundoff, and so is chosen :math:`\epsilon`.

    Source: N. J. Higham (2002), Accuracy and stability of numerical algorithms,
    theorems 10.3 and 10.7, for the rounding [R].

    Args:
        matrix_Gnn: Float64, shape `(G, n, n)`.

    Returns:
        Shape `(G,)`; NaN for a matrix that isn't finite.
    """
    finite_G = matrix_Gnn.sum((1, 2)).isfinite()
    matrix_Gnn = torch.where(finite_G[:, None, None], matrix_Gnn, 0)
    if matrix_Gnn.shape[1] <= _ALL_UP_TO:
        values_G = torch.linalg.eigvalsh(matrix_Gnn)[:, -1]
    else:
        values_G = torch.stack([_largest(matrix_nn) for matrix_nn in matrix_Gnn])
    return torch.where(finite_G, values_G, torch.nan)


def _largest(matrix_nn: Tensor) -> Tensor:
    value = _by_lanczos(matrix_nn.cpu().numpy())
    if value is not None and is_largest(matrix_nn, value):
        return matrix_nn.new_tensor(value)
    return torch.linalg.eigvalsh(matrix_nn)[-1]


def _by_lanczos(matrix_nn: np.ndarray) -> float | None:
    if not matrix_nn.any():
        return 0.0
    # A fixed start makes two measurements agree to the bit.
    start = np.random.default_rng(0).standard_normal(len(matrix_nn))
    options = {"which": "LA", "v0": start, "return_eigenvectors": False}
    try:
        return float(eigsh(matrix_nn, 1, **options)[0])
    except ArpackNoConvergence:
        return None


def is_largest(matrix_nn: Tensor, value: float) -> bool:
    """Return whether no eigenvalue of a matrix is above one, but for rounding.

    False is no proof that one does.
    """
    num = len(matrix_nn)
    # The trace of what is factorised, and the rounding of the value itself.
    scale = num * value - float(matrix_nn.trace()) + float(matrix_nn.norm())
    above = 2 * (num + 1) * torch.finfo(matrix_nn.dtype).eps * max(0.0, scale)
    shifted_nn = -matrix_nn
    shifted_nn.diagonal().add_(value + above)
    return int(torch.linalg.cholesky_ex(shifted_nn).info) == 0

"""Eigenvalues and traces of symmetric operators that are known by their products.

Shapes: D the dimension of the operator, B vectors in a block, K wanted eigenvalues, M
vectors of the search space, R directions in which its products leave it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_resnorm.measures.spectra.certificates import ComplementSearch, UpperBounds
from lit_resnorm.measures.spectra.search_space import Eigenpairs, Matvec, SearchSpace

# Pairs whose errors look this small beside the tolerance keep their bounds although
# other eigenvalues lie close below. With larger shares searches begin that fail, with
# smaller ones they begin late: on Fisher matrices 0.01 to 0.1 cost the same.
_SHARE_OF_TOL = 0.01


def top_eigenpairs(
    matvec: Matvec,
    start_DB: Tensor,
    num_eigenvalues: int,
    *,
    tol: float = 1e-5,
    block: int = 1,
    precision: float = torch.finfo(torch.float64).eps,
    trace: float | None = None,
    failure: float = 1e-6,
    max_products: int = 1000,
) -> Eigenpairs:
    r"""Return the largest eigenvalues, each within tolerance but for a small chance.

    Rayleigh-Ritz on a growing space. It begins with `block` vectors, each a sum of some
    of the start vectors, and grows by the residuals of the largest Ritz pairs, `block`
    at a time, until these look converged: from one vector this is the method of Lanczos
    with full reorthogonalisation. Then it is made sure of. With V a basis of the space,
    :math:`H = V^\top A V` and C the operator on what is orthogonal to V,

    .. math:: A = \begin{pmatrix} H & B^\top \\ B & C \end{pmatrix}
        \preceq \begin{pmatrix} H & B^\top \\ B & \eta I \end{pmatrix}
        \quad\text{if } C \preceq \eta I,

    and the eigenvalues of the right side, which are known, bound those of A from above,
    one by one; Ritz values bound them from below. The ceiling :math:`\eta` is what is
    left of the trace where that is given, or comes from the Krylov space that C and a
    random unit vector g span. Its orthonormal basis is :math:`q_j = p_j(C) g` with
    polynomials p of degree j, so an eigenvector u of C with eigenvalue x has

    .. math:: 1 \ge \sum_j (u^\top q_j)^2 = (u^\top g)^2 \sum_j p_j(x)^2.

    In n dimensions :math:`|u^\top g| \le s` has a probability of at most
    :math:`s \sqrt{2 n / \pi}`, and the largest eigenvalue's u does not depend on g:
    with probability 1 - `failure` it lies below the x beyond all Ritz values from where
    on the sum is above :math:`2 n / (\pi` `failure` :math:`^2)`, after any number of
    products. Where g finds a larger eigenvalue, or residuals turn out too large for
    what lies close below, the space grows on and all is made sure of once more, with
    `failure` shared out so that its sum over attempts stays.

    Source: Jos L. M. van Dorsselaer, M. E. Hochstenbach, H. A. van der Vorst (2000),
    Computing probabilistic bounds for extreme eigenvalues of symmetric matrices with
    the Lanczos method, which bounds x by the last p alone [R]; the sum, and that it is
    used on the complement, with a direction drawn after convergence, are ours [D].

    Args:
        matvec: Symmetric operator; it need not be semi-definite without `trace`. The
            smallest eigenvalues are those of its negative.
        start_DB: Start vectors, shape `(D, B)`, any norm. Columns that are zero or not
            finite are left out, and where none is left a random vector starts.
        num_eigenvalues: How many; with more than the dimension, all there are. Multiple
            eigenvalues count as often as they occur.
        tol: Bound on each value's error relative to the value.
        block: Residuals that join the space at once: more where a product of a block
            costs little more than that of a vector.
        precision: Relative rounding of the products. Errors of 32 roundings of the
            largest value are allowed beside `tol`.
        trace: Sum of all eigenvalues of a semi-definite operator, if known.
        failure: Chance that a value is off by more than `tol`.
        max_products: Stop after these many products, converged or not.

    Returns:
        The pairs; with a non-finite product, NaN values and `converged` False.
    """
    dim = start_DB.shape[0]
    wanted = min(num_eigenvalues, dim)
    space = SearchSpace(matvec, start_DB, block)
    search: ComplementSearch | None = None
    num_searches, share_of_tol = 0, _SHARE_OF_TOL
    while bool(torch.isfinite(space.gram_MM).all()):
        pairs = space.pairs(wanted, precision)
        enough = len(pairs.values) == wanted
        lowest = float(pairs.values[-1])
        lowest += tol * abs(lowest) + pairs.rounding
        whole = space.size == dim
        if search:
            search.look(pairs.rounding)
        # With a ceiling above the lowest, nothing forbids that many more of its height.
        met = whole
        rest = _rest_of_trace(space, trace, precision)
        if enough and not met and rest <= lowest:
            met = UpperBounds(space, pairs.rounding).hold(pairs, rest, tol)
        if search and enough and not met and search.ceiling <= lowest:
            met = search.bounds.hold(pairs, search.ceiling, tol)
        if met or space.size >= max_products:
            return pairs.found(space.size, converged=met)
        if search and not search.can_end(pairs, lowest, tol):
            if search.largest <= lowest:  # the residuals are too large for what is near
                share_of_tol /= 4
            search = None
        room = min(block, dim - space.size, max_products - space.size)
        if search:
            space.grow(search.next_D1)
        elif enough and not bool(pairs.open(share_of_tol * tol).any()):
            num_searches += 1
            share = failure / (num_searches * (num_searches + 1))
            search = ComplementSearch(space, share, pairs.rounding)
        else:
            space.grow(pairs.next(share_of_tol * tol)[:, :room])
    return _failed(start_DB, wanted, space.size)


def _rest_of_trace(space: SearchSpace, trace: float | None, precision: float) -> float:
    """Return a ceiling on the complement of the space of a semi-definite operator."""
    if trace is None or not math.isfinite(trace):
        return math.inf
    left = trace - float(space.gram_MM.trace())
    return max(0.0, left) + 32 * precision * abs(trace)


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

"""Eigenvalues and traces of symmetric operators that are known by their products.

Shapes: D the dimension of the operator, B vectors in a block, K wanted eigenvalues, M
vectors of the search space, R directions in which its products leave it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]
"""A symmetric operator: a block of float64 vectors `(D, B)` to its product, alike."""

# The seed of fresh directions: no caller's, whose start would then hold them already.
_SEED = 7_236_067_977

# Pairs whose errors look this small beside the tolerance keep their bounds although
# other eigenvalues lie close below. With larger shares searches begin that fail, with
# smaller ones they begin late: on Fisher matrices 0.01 to 0.1 cost the same.
_SHARE_OF_TOL = 0.01


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues of an operator.

    Attributes:
        values: Shape `(K,)`, float64, descending.
        vectors: Shape `(D, K)`, orthonormal, float64.
        residuals: Shape `(K,)`: norm of `A v - value v`; an eigenvalue of the operator
            lies within this distance of the value.
        num_products: Vectors that were multiplied.
        converged: Whether each value's bound came within the tolerance.
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
    space = _Space(matvec, start_DB, block)
    search: _Search | None = None
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
            met = _Bounds(space, pairs.rounding).hold(pairs, rest, tol)
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
            search = _Search(space, share, pairs.rounding)
        else:
            space.grow(pairs.next(share_of_tol * tol)[:, :room])
    return _failed(start_DB, wanted, space.size)


def _rest_of_trace(space: _Space, trace: float | None, precision: float) -> float:
    """Return a ceiling on the complement of the space of a semi-definite operator."""
    if trace is None or not math.isfinite(trace):
        return math.inf
    left = trace - float(space.gram_MM.trace())
    return max(0.0, left) + 32 * precision * abs(trace)


class _Space:
    """A search space: orthonormal vectors, their products, and how these overlap.

    Attributes:
        basis_DM: The vectors.
        image_DM: Their products.
        gram_MM: The operator on the space.
    """

    def __init__(self, matvec: Matvec, start_DB: Tensor, num_starts: int) -> None:
        self._matvec = matvec
        self._noise = torch.Generator().manual_seed(_SEED)
        none_D0 = start_DB.new_empty(len(start_DB), 0, dtype=torch.float64)
        self.basis_DM, self.image_DM = none_D0, none_D0
        self.gram_MM = none_D0.new_empty(0, 0)
        start_DB = start_DB.double()
        usable_DB = _orthonormal(start_DB[:, start_DB.isfinite().all(dim=0)], none_D0)
        # Orthonormal vectors don't cancel.
        self.grow(
            torch.stack(
                [usable_DB[:, i::num_starts].sum(1) for i in range(num_starts)], 1
            )
        )

    @property
    def size(self) -> int:
        """Number of vectors."""
        return self.basis_DM.shape[1]

    def grow(self, new_DB: Tensor) -> None:
        """Take in vectors; where they add nothing, a random one."""
        grown_DB = _orthonormal(new_DB, self.basis_DM)
        while grown_DB.shape[1] == 0:
            grown_DB = _orthonormal(self.noise(), self.basis_DM)
        image_DB = self._matvec(grown_DB)
        cross_MB = self.basis_DM.T @ image_DB
        own_BB = grown_DB.T @ image_DB
        upper = torch.cat([self.gram_MM, cross_MB], dim=1)
        lower = torch.cat([cross_MB.T, (own_BB + own_BB.T) / 2], dim=1)
        self.gram_MM = torch.cat([upper, lower])
        self.basis_DM = torch.cat([self.basis_DM, grown_DB], dim=1)
        self.image_DM = torch.cat([self.image_DM, image_DB], dim=1)

    def noise(self) -> Tensor:
        """Return a standard normal vector of the complement, shape `(D, 1)`."""
        size = len(self.basis_DM), 1
        drawn = torch.randn(size, generator=self._noise, dtype=torch.float64)
        drawn_D1 = drawn.to(self.basis_DM)
        return drawn_D1 - self.basis_DM @ (self.basis_DM.T @ drawn_D1)

    def pairs(self, wanted: int, precision: float) -> _RitzPairs:
        """Return the largest Ritz pairs, at most `wanted`."""
        ritz_M, rotation_MM = torch.linalg.eigh(self.gram_MM)
        ritz_M, rotation_MK = ritz_M.flip(0), rotation_MM.flip(1)[:, :wanted]
        vectors_DK = self.basis_DM @ rotation_MK
        residual_DK = self.image_DM @ rotation_MK - vectors_DK * ritz_M[:wanted]
        rounding = 32 * precision * float(ritz_M.abs().max())
        return _RitzPairs(ritz_M, vectors_DK, residual_DK, rounding)


@dataclass(frozen=True)
class _RitzPairs:
    """The largest Ritz pairs of a space.

    Attributes:
        ritz: All Ritz values, shape `(M,)`, descending.
        vectors: Ritz vectors of the largest, shape `(D, K)`.
        residual: Their residuals, shape `(D, K)`.
        rounding: Error of the products, of 32 roundings.
    """

    ritz: Tensor
    vectors: Tensor
    residual: Tensor
    rounding: float

    @property
    def values(self) -> Tensor:
        """The largest Ritz values."""
        return self.ritz[: self.vectors.shape[1]]

    def open(self, tol: float) -> Tensor:
        """Return which do not look converged, by gaps among the Ritz values alone."""
        norms_K = self.residual.norm(dim=0)
        rest = self.ritz[len(norms_K) :]
        below = float(rest[0]) if len(rest) else 0.0
        gaps_K = (self.values - below).clamp_min(1e-300)
        error_K = torch.minimum(norms_K, norms_K**2 / gaps_K)
        small_K = norms_K <= self.rounding
        return ~((error_K <= tol * self.values.abs()) | small_K)

    def next(self, tol: float) -> Tensor:
        """Return the residuals of those that do not look converged, else all."""
        open_K = self.open(tol)
        return self.residual[:, open_K] if bool(open_K.any()) else self.residual

    def found(self, num_products: int, *, converged: bool) -> Eigenpairs:
        """Return them as the answer."""
        norms_K = self.residual.norm(dim=0)
        return Eigenpairs(self.values, self.vectors, norms_K, num_products, converged)


class _Bounds:
    """Upper bounds of the largest eigenvalues, from a ceiling on the complement.

    They are those of the space as it is, whatever becomes of it.
    """

    def __init__(self, space: _Space, rounding: float) -> None:
        left_DM = space.image_DM - space.basis_DM @ space.gram_MM
        _, scales_R, ways_RM = torch.linalg.svd(left_DM, full_matrices=False)
        keep_R = scales_R > rounding
        self._gram_MM = space.gram_MM
        self._left_RM = scales_R[keep_R, None] * ways_RM[keep_R]
        self._num_others = len(space.basis_DM) - sum(self._left_RM.shape)

    def hold(self, pairs: _RitzPairs, ceiling: float, tol: float) -> bool:
        """Return whether each wanted value is within tolerance of its bound."""
        num_out, size = self._left_RM.shape
        bordered = torch.diag_embed(self._gram_MM.new_full((size + num_out,), ceiling))
        bordered[:size, :size] = self._gram_MM
        bordered[size:, :size] = self._left_RM
        upper = torch.linalg.eigvalsh(bordered)  # reads the lower triangle
        # On all that the products leave out, the ceiling is the bound.
        k = len(pairs.values)
        others = upper.new_full((max(0, min(k, self._num_others)),), ceiling)
        upper_K = torch.cat([upper, others]).sort(descending=True).values[:k]
        allowed_K = tol * upper_K.abs() + pairs.rounding
        return bool((upper_K - pairs.values <= allowed_K).all())


class _Search:
    """The Krylov space of a random vector in the complement of a space, which it joins.

    Attributes:
        ceiling: Bound on the operator's largest eigenvalue on the complement of the
            space as it was, hence of all larger spaces.
        largest: Largest Ritz value there: no ceiling comes below.
        next_D1: Where it goes on.
    """

    def __init__(self, space: _Space, failure: float, rounding: float) -> None:
        dim = len(space.basis_DM) - space.size
        self.bounds = _Bounds(space, rounding)
        self._space, self._first = space, space.size
        self._needed = 2 * dim / (math.pi * failure**2)
        self._norms: list[float] = []
        self._ended = False
        self.ceiling = self.largest = math.inf
        self.next_D1 = space.noise()
        space.grow(self.next_D1)

    def look(self, rounding: float) -> None:
        """Take in the product of the vector that joined the space last."""
        basis_DM, left_D1 = self._space.basis_DM, self._space.image_DM[:, -1:]
        for _ in range(2):
            left_D1 = left_D1 - basis_DM @ (basis_DM.T @ left_D1)
        own_QQ = self._space.gram_MM[self._first :, self._first :].cpu()
        self.largest = float(torch.linalg.eigvalsh(own_QQ)[-1])
        norm = float(left_D1.norm())
        self._ended = norm <= rounding
        if self._ended:  # the space holds all that its vector has a part of
            self.ceiling = self.largest + rounding
            return
        self._norms.append(norm)
        self.next_D1 = left_D1 / norm
        self.ceiling = self._lowest_ceiling(own_QQ.diagonal().tolist()) + rounding

    def _lowest_ceiling(self, diagonal: list[float]) -> float:
        """Return from where on no eigenvalue could have escaped, by bisection."""
        low, step = self.largest, self._norms[-1]
        while step < math.inf and not self._excludes(low + step, diagonal):
            step *= 2
        high = low + step
        for _ in range(60):
            middle = (low + high) / 2
            if self._excludes(middle, diagonal):
                high = middle
            else:
                low = middle
        return high

    def _excludes(self, value: float, diagonal: list[float]) -> bool:
        """Return whether an eigenvalue has so small a part of the random vector."""
        before, now, total, norm_before = 0.0, 1.0, 1.0, 0.0
        for own, norm in zip(diagonal, self._norms, strict=True):
            # Three-term recurrence of the polynomials that make the basis.
            after = ((value - own) * now - norm_before * before) / norm
            before, now, norm_before = now, after, norm
            total += now**2
            if total >= self._needed:
                return True
        return False

    def can_end(self, pairs: _RitzPairs, lowest: float, tol: float) -> bool:
        """Return whether more products of it may settle what is open."""
        if self._ended or self.largest > lowest:
            return False
        return self.bounds.hold(pairs, self.largest, tol)


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

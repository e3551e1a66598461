"""A growing space in which the largest eigenvalues of an operator are looked for.

Shapes: D the dimension of the operator, B vectors in a block, K wanted eigenvalues, M
vectors of the space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]
"""A symmetric operator: a block of float64 vectors `(D, B)` to its product, alike."""

# The seed of fresh directions: no caller's, whose start would then hold them already.
_SEED = 7_236_067_977


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


@dataclass(frozen=True)
class RitzPairs:
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


class SearchSpace:
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

    def pairs(self, wanted: int, precision: float) -> RitzPairs:
        """Return the largest Ritz pairs, at most `wanted`."""
        ritz_M, rotation_MM = torch.linalg.eigh(self.gram_MM)
        ritz_M, rotation_MK = ritz_M.flip(0), rotation_MM.flip(1)[:, :wanted]
        vectors_DK = self.basis_DM @ rotation_MK
        residual_DK = self.image_DM @ rotation_MK - vectors_DK * ritz_M[:wanted]
        rounding = 32 * precision * float(ritz_M.abs().max())
        return RitzPairs(ritz_M, vectors_DK, residual_DK, rounding)


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

"""Both ends of a spectrum, from one Krylov space of an operator of many dimensions.

Shapes: D the dimension of the operator, M vectors of the Krylov space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VectorProduct = Callable[[Tensor], Tensor]
"""A symmetric operator: a vector `(D,)` to its product, alike."""

# The seed of the start: no caller's.
_START_SEED = 2_718_281_829

_GROWTH = 16
"""Vectors by which the space's memory grows."""


@dataclass(frozen=True)
class Extremes:
    """The largest and the smallest eigenvalue of an operator.

    Attributes:
        largest: The largest Ritz value; NaN where products weren't finite.
        smallest: The smallest Ritz value.
        residual: Norm of `A v - largest v`.
        basis: Orthonormal basis of the Krylov space, `(M, D)`, in the precision of the
            products.
        basis_trace: Sum of `q . A q` over the basis.
        converged: Whether each that was asked for came within its tolerance.
    """

    largest: float
    smallest: float
    residual: float
    basis: Tensor
    basis_trace: float
    converged: bool


def extreme_eigenvalues(
    matvec: VectorProduct,
    dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tol: float | None,
    smallest_tol: float | None = None,
    failure: float = 1e-6,
    max_products: int = 500,
) -> Extremes:
    r"""Return the largest and smallest eigenvalue, but for a small chance of error.

    The method of Lanczos with full reorthogonalisation, from a random unit vector g.
    With :math:`q_j = p_j(A) g` the Krylov space's basis, an eigenvector u with
    eigenvalue x has

    .. math:: 1 \ge \sum_j (u^\top q_j)^2 = (u^\top g)^2 \sum_j p_j(x)^2.

    In n dimensions :math:`|u^\top g| \le s` has a probability of at most
    :math:`s \sqrt{2 n / \pi}`, so that with probability 1 - `failure` neither end of
    the spectrum lies where the sum is above :math:`2 n / (\pi` `failure` :math:`^2)`.
    That bounds both ends from outside, after any number of products; Ritz values bound
    them from inside. Multiplicities don't show.

    Source: Jos L. M. van Dorsselaer, M. E. Hochstenbach, H. A. van der Vorst (2000),
    Computing probabilistic bounds for extreme eigenvalues of symmetric matrices with
    the Lanczos method, which uses the last p alone [R]; the sum is ours [D].

    Args:
        matvec: Symmetric operator; it need not be semi-definite.
        dim: Its dimension.
        dtype: Precision of its products, and of what is kept.
        device: Where vectors are.
        tol: Error of the largest, relative; None: it need not converge. Errors of 32
            roundings of the largest in magnitude are allowed beside it.
        smallest_tol: Error of the smallest, as a share of the largest less the
            smallest; None: it need not converge.
        failure: Chance that one of both is off by more.
        max_products: Stop after these many products, converged or not.
    """
    krylov = _Krylov(matvec, dim, dtype, device)
    needed = 2 * dim / (math.pi * (failure / 2) ** 2)
    while krylov.step():
        ritz_M = krylov.ritz_values()
        low, high = ritz_M[0], ritz_M[-1]
        rounding = 32 * torch.finfo(dtype).eps * max(abs(low), abs(high))
        # Else the space holds all that its start has a part of.
        met = krylov.norms[-1] <= rounding or krylov.size == dim
        if not met:
            above = 0.0 if tol is None else tol * abs(high) + rounding
            met = tol is None or krylov.excludes(high + above, needed)
            if met and smallest_tol is not None:
                below = smallest_tol * (high - low) + rounding
                met = krylov.excludes(low - below, needed)
        if met or krylov.size >= max_products:
            return krylov.found(converged=met)
    nan = float("nan")
    return Extremes(nan, nan, nan, krylov.basis_MD[:0], nan, converged=False)


class _Krylov:
    """A Krylov space with an orthonormal basis.

    Attributes:
        size: Number of vectors that were multiplied.
        own: Diagonal of the operator in the basis.
        norms: Beside the diagonal; the last is that of what comes next.
        basis_MD: Room for the basis.
    """

    def __init__(
        self, matvec: VectorProduct, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._matvec, self._dim = matvec, dim
        noise = torch.Generator().manual_seed(_START_SEED)
        start_D = torch.randn(dim, generator=noise, dtype=torch.float64)
        self._next_D = (start_D / start_D.norm()).to(device, dtype)
        self.basis_MD = self._next_D.new_empty(0, dim)
        self.size = 0
        self.own: list[float] = []
        self.norms: list[float] = []

    def step(self) -> bool:
        """Multiply one more vector; return whether the product is finite."""
        if self.size == len(self.basis_MD):
            room = min(_GROWTH, self._dim - self.size)
            more = self.basis_MD.new_empty(room, self._dim)
            self.basis_MD = torch.cat([self.basis_MD, more])
        self.basis_MD[self.size] = self._next_D
        self.size += 1
        basis_MD = self.basis_MD[: self.size]
        left_D = self._matvec(self._next_D).to(basis_MD)
        parts_M = basis_MD @ left_D
        left_D = left_D - parts_M @ basis_MD
        left_D = left_D - (basis_MD @ left_D) @ basis_MD  # twice is enough
        self.own.append(float(parts_M[-1]))
        self.norms.append(float(left_D.norm()))
        self._next_D = left_D / self.norms[-1] if self.norms[-1] else left_D
        return math.isfinite(self.norms[-1]) and math.isfinite(self.own[-1])

    def ritz_values(self) -> list[float]:
        """Return the Ritz values, ascending."""
        return torch.linalg.eigvalsh(self._matrix()).tolist()

    def _matrix(self) -> Tensor:
        beside = torch.tensor(self.norms[:-1], dtype=torch.float64)
        diagonal = torch.tensor(self.own, dtype=torch.float64)
        return diagonal.diag() + beside.diag(1) + beside.diag(-1)

    def excludes(self, value: float, needed: float) -> bool:
        """Return whether no end of the spectrum is at, or beyond, a value."""
        return squares_add_up(value, self.own, self.norms, needed)

    def found(self, *, converged: bool) -> Extremes:
        """Return both ends."""
        values_M, vectors_MM = torch.linalg.eigh(self._matrix())
        return Extremes(
            largest=float(values_M[-1]),
            smallest=float(values_M[0]),
            residual=self.norms[-1] * float(vectors_MM[-1, -1].abs()),
            basis=self.basis_MD[: self.size],
            basis_trace=math.fsum(self.own),
            converged=converged,
        )


def squares_add_up(
    value: float, own: Sequence[float], norms: Sequence[float], needed: float
) -> bool:
    """Return whether the squares of a Krylov basis's polynomials reach a sum.

    Args:
        value: Where the polynomials are taken, outside the Ritz values.
        own: Diagonal of the operator in the basis.
        norms: Beside the diagonal; the last is that of what comes next.
        needed: The sum.
    """
    before, now, total, norm_before = 0.0, 1.0, 1.0, 0.0
    for diagonal, norm in zip(own, norms, strict=True):
        # Three-term recurrence of the polynomials that make the basis.
        after = ((value - diagonal) * now - norm_before * before) / norm
        before, now, norm_before = now, after, norm
        total += now**2
        if total >= needed:
            return True
    return False

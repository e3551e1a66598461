"""Making sure that no larger eigenvalue is left: bounds from above, and a search.

Shapes: D the dimension of the operator, K wanted eigenvalues, M vectors of the search
space, R directions in which its products leave it, Q products of a search.
"""

from __future__ import annotations

import math

import torch

from lit_resnorm.measures.spectra.search_space import RitzPairs, SearchSpace


class UpperBounds:
    """Upper bounds of the largest eigenvalues, from a ceiling on the complement.

    They are those of the space as it is, whatever becomes of it.
    """

    def __init__(self, space: SearchSpace, rounding: float) -> None:
        left_DM = space.image_DM - space.basis_DM @ space.gram_MM
        _, scales_R, ways_RM = torch.linalg.svd(left_DM, full_matrices=False)
        keep_R = scales_R > rounding
        self._gram_MM = space.gram_MM
        self._left_RM = scales_R[keep_R, None] * ways_RM[keep_R]
        self._num_others = len(space.basis_DM) - sum(self._left_RM.shape)

    def hold(self, pairs: RitzPairs, ceiling: float, tol: float) -> bool:
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


class ComplementSearch:
    """The Krylov space of a random vector in the complement of a space, which it joins.

    Attributes:
        ceiling: Bound on the operator's largest eigenvalue on the complement of the
            space as it was, hence of all larger spaces.
        largest: Largest Ritz value there: no ceiling comes below.
        next_D1: Where it goes on.
    """

    def __init__(self, space: SearchSpace, failure: float, rounding: float) -> None:
        dim = len(space.basis_DM) - space.size
        self.bounds = UpperBounds(space, rounding)
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

    def can_end(self, pairs: RitzPairs, lowest: float, tol: float) -> bool:
        """Return whether more products of it may settle what is open."""
        if self._ended or self.largest > lowest:
            return False
        return self.bounds.hold(pairs, self.largest, tol)

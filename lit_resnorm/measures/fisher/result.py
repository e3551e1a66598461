"""What a measurement of a Fisher matrix returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class FisherSpectrum:
    """Eigenvalues and trace of a Fisher matrix, or of one layer's block of it.

    Attributes:
        eigenvalues: Float64, descending: all non-zero ones, or the largest that were
            asked for; empty where none were. NaN where the network's gradients are.
        trace: Sum of all eigenvalues, from the gradients; NaN where not asked for.
        num_parameters: P, trainable parameters.
        num_examples: N: rows, or positions with a weight.
        residuals: Norm of `F v - value v` for each eigenvalue; zero where the whole
            matrix was decomposed.
        vectors: Dual eigenvectors, one column each, where iterations gave them: a start
            for the next measurement on the same batch.
        num_products: Matrix-vector products that the iterations took.
        layers: The same of each layer's own block, by site, where asked for.
        coupled: Whether rows depend on each other, so that ranks can't hold them apart.
    """

    eigenvalues: Tensor
    trace: float
    num_parameters: int
    num_examples: int
    residuals: Tensor
    vectors: Tensor | None = None
    num_products: int = 0
    layers: dict[str, FisherSpectrum] = field(default_factory=dict)
    coupled: bool = False

    @property
    def max(self) -> float:
        """Largest eigenvalue; 0 of a zero matrix, NaN where none was asked for."""
        if self.eigenvalues.numel():
            return float(self.eigenvalues[0])
        return 0.0 if self.trace == 0 else float("nan")

    @property
    def mean(self) -> float:
        """Mean over all P eigenvalues: trace / P."""
        return self.trace / self.num_parameters

    @property
    def rate_bound(self) -> float:
        """Rate 2 / max, above which gradient descent diverges on a quadratic."""
        return 2.0 / self.max if self.max else float("inf")

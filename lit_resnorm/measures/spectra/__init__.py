"""Eigenvalues: the one place for them, by products or of a matrix."""

from lit_resnorm.measures.spectra.lanczos import Extremes, extreme_eigenvalues
from lit_resnorm.measures.spectra.matrices import (
    all_pairs,
    largest_eigenvalue,
    top_pairs,
)
from lit_resnorm.measures.spectra.products import (
    Eigenpairs,
    Matvec,
    hutchinson_trace,
    top_eigenpairs,
)

__all__ = [
    "Eigenpairs",
    "Extremes",
    "Matvec",
    "all_pairs",
    "extreme_eigenvalues",
    "hutchinson_trace",
    "largest_eigenvalue",
    "top_eigenpairs",
    "top_pairs",
]

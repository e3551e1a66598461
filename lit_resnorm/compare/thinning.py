"""Fewer points of a long curve that look the same.

Dimensions: S steps, N bins, K steps a bin.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MOST = 500
"""Points that a series of the document has at most."""

SHOWN_STEPS = 24
"""Steps by depth that the document keeps of a run and quantity."""


def kept_places(value: NDArray[np.float64], most: int = MOST) -> NDArray[np.int64]:
    """Return the places of the points to keep, ascending.

    First and last, the first that isn't finite, and the least and the largest of equal
    bins between: no peak is lost.

    Args:
        value: The curve, shape `(S,)`.
        most: Number of points to keep at most, at least 5.
    """
    size = len(value)
    if size <= most:
        return np.arange(size)
    bins = (most - 3) // 2
    width = -(-(size - 2) // bins)
    inner = np.full(bins * width, np.nan)
    inner[: size - 2] = value[1:-1]
    inner_NK = inner.reshape(bins, width)
    nan_NK = np.isnan(inner_NK)
    low = np.where(nan_NK, np.inf, inner_NK).argmin(1)
    high = np.where(nan_NK, -np.inf, inner_NK).argmax(1)
    start = 1 + np.arange(bins) * width
    found = np.concatenate([[0, size - 1], start + low, start + high])
    broken = np.flatnonzero(~np.isfinite(value))[:1]
    return np.unique(np.concatenate([found[found < size], broken]))


def even_places(size: int, most: int) -> NDArray[np.int64]:
    """Return at most `most` even places among `size`, the first and the last in."""
    if size <= most:
        return np.arange(size)
    return np.unique(np.linspace(0, size - 1, most).round().astype(np.int64))

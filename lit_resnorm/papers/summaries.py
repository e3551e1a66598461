"""Curves of an item's rows: a quantity over draws, by an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lit_resnorm.papers.drawing import Look

__all__ = ["Curve", "band", "curve", "means", "where"]


class Curve(NamedTuple):
    """A quantity over draws: arrays by place, of equal length."""

    x: np.ndarray
    mean: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    deviation: np.ndarray
    error: np.ndarray


def where(rows: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Return the rows whose columns have these values."""
    chosen = np.ones(len(rows), dtype=bool)
    for column, value in values.items():
        chosen &= np.asarray(rows[column] == value)
    return cast(pd.DataFrame, rows.loc[chosen])


def curve(rows: pd.DataFrame, by: str, value: str) -> Curve:
    """Return mean, median, range, deviation and standard error of a column.

    Rows without the value are left out.

    Args:
        rows: An item's rows.
        by: The column of places.
        value: The column.
    """
    groups = [
        (place, part[value].to_numpy(dtype=float))
        for place, part in rows.dropna(subset=[value]).groupby(by)
    ]
    values = [one for _, one in groups]
    deviation = np.array([one.std(ddof=1) if len(one) > 1 else 0.0 for one in values])
    return Curve(
        x=np.array([place for place, _ in groups]),
        mean=np.array([one.mean() for one in values]),
        median=np.array([np.median(one) for one in values]),
        low=np.array([one.min() for one in values]),
        high=np.array([one.max() for one in values]),
        deviation=deviation,
        error=deviation / np.sqrt([len(one) for one in values]),
    )


def means(
    rows: pd.DataFrame, by: str | Sequence[str], value: str, *, median: bool = False
) -> dict[Any, float]:
    """Return the mean, or median, of a column by the values of one or more others."""
    key = by if isinstance(by, str) else list(by)
    return {
        place: float(np.median(part[value]) if median else np.mean(part[value]))
        for place, part in rows.groupby(key)
    }


def band(
    axes: Axes,
    x: np.ndarray,
    middle: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    look: Look,
    label: str | None = None,
) -> None:
    """Draw a line with a few open markers, and a band around it."""
    axes.fill_between(x, low, high, color=look.colour, alpha=0.15, lw=0)
    axes.plot(
        x,
        middle,
        color=look.colour,
        ls=look.dashes,
        marker=look.marker,
        markevery=max(1, len(x) // 8),
        markerfacecolor="white",
        label=look.label if label is None else label,
    )

"""One run as it is compared: its series, its values by depth, its flat config.

Dimensions: S steps at which a value was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lit_resnorm.runs.files import SITE

Kind = Literal["directory", "offline", "online", "csv"]

VERDICTS = {0.0: "none", 1.0: "signal", 2.0: "snr", -1.0: "undetermined"}
"""Words of a logged verdict, see `lit_resnorm.measures.moments.pathology`."""

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Series:
    """A value over training.

    Attributes:
        step: Optimizer steps, int64, strictly increasing, shape `(S,)`.
        value: The values, float64, shape `(S,)`; NaN and infinities as measured.
    """

    step: NDArray[np.int64]
    value: NDArray[np.float64]


@dataclass(frozen=True)
class Recorded:
    """A run that was read back.

    Attributes:
        name: Name of the run.
        source: Where it was read, as the user can type it.
        kind: What it was read from.
        status: `finished`, `diverged`, `interrupted` or `failed`; empty: not
            recorded.
        config: Flat: dotted keys, scalars.
        verdicts: Words by key, as `moments/pathology`.
        seconds: Duration; None: not known.
        series: By key; keys of single sites are not among them.
        depth: By quantity and site, in the order of execution.
    """

    name: str
    source: str
    kind: Kind
    status: str
    config: Mapping[str, Any]
    verdicts: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    series: Mapping[str, Series] = field(default_factory=dict)
    depth: Mapping[str, Mapping[str, Series]] = field(default_factory=dict)


def series_of_rows(
    rows: Iterable[Mapping[str, Any]],
) -> tuple[dict[str, Series], dict[str, dict[str, Series]]]:
    """Return the series of a history, and its values by quantity and site.

    Args:
        rows: Objects with a whole `step` and values; what is no number is left out,
            and of two values of one step the later counts.
    """
    points: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        step = row["step"]
        for key, value in row.items():
            number = _WORDS.get(value) if isinstance(value, str) else value
            if not isinstance(number, int | float):
                continue
            found = points.get(key)
            if found is None:
                found = points[key] = ([], [])
            found[0].append(step)
            found[1].append(number)
    points.pop("step", None)
    points.pop("epoch", None)
    series: dict[str, Series] = {}
    depth: dict[str, dict[str, Series]] = {}
    for key, (steps, values) in points.items():
        match = SITE.fullmatch(key)
        one = sorted_series(steps, values)
        if match is None:
            series[key] = one
        else:
            depth.setdefault(match["quantity"], {})[match["site"]] = one
    ordered = {name: dict(sorted(sites.items())) for name, sites in depth.items()}
    return series, ordered


def sorted_series(steps: Iterable[int], values: Iterable[float]) -> Series:
    """Return a series in the order of its steps, the later of two equal ones alone."""
    step = np.fromiter(steps, np.int64)
    value = np.fromiter(values, np.float64)
    if (np.diff(step) > 0).all():
        return Series(step, value)
    order = np.argsort(step, kind="stable")
    step, value = step[order], value[order]
    last = np.append(step[1:] != step[:-1], True)
    return Series(step[last], value[last])


def recorded_of_rows(
    rows: Iterable[Mapping[str, Any]],
    *,
    name: str,
    source: str,
    kind: Kind,
    status: str,
    config: Mapping[str, Any],
    verdicts: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> Recorded:
    """Return a run from its history.

    Verdicts that were logged as numbers become words: so they are the same wherever a
    run was recorded.

    Raises:
        ValueError: If the history holds no number.
    """
    series, depth = series_of_rows(rows)
    if not series and not depth:
        raise ValueError("it holds no values")
    words = {
        key: VERDICTS.get(one.value[-1], "undetermined")
        for key, one in series.items()
        if key.endswith("/pathology")
    }
    return Recorded(
        name=name,
        source=source,
        kind=kind,
        status=status,
        config=config,
        verdicts={**(verdicts or {}), **words},
        seconds=seconds,
        series=series,
        depth=depth,
    )

"""One run as it is compared: its series, its values by depth, its flat config.

Dimensions: S steps at which a value was measured.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lit_resnorm.compare.depth_tables import DepthTable
from lit_resnorm.compare.shipped import shipped_quantities
from lit_resnorm.quantities import SITE_KEY, Code, Declared, find_declared
from lit_resnorm.runs.files import check_summary
from lit_resnorm.runs.json_lines import NOT_FINITE

RunKind = Literal["directory", "offline", "online", "csv"]


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
        logs: Where it was read, if several loggers kept it, `source` first.
        status: `finished`, `diverged`, `interrupted` or `failed`; empty: not
            recorded.
        config: Flat: dotted keys, scalars.
        verdicts: Words by key, as `moments/pathology`.
        seconds: Duration; None: not known.
        series: By key; keys of single sites are not among them.
        depth: By quantity and site, in the order of execution.
        kinds: By site what it is, as far as that was kept: `addition`, `activation`,
            `norm` or `module`.
        quantities: What its probes declared of their values, by key; of a run that
            holds nothing of the kind, what the probes here declare.
    """

    name: str
    source: str
    kind: RunKind
    status: str
    config: Mapping[str, Any]
    verdicts: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    series: Mapping[str, Series] = field(default_factory=dict)
    depth: Mapping[str, Mapping[str, Series]] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    quantities: Mapping[str, Declared] = field(default_factory=shipped_quantities)
    logs: tuple[str, ...] = ()

    def probes_with(self, *names: str) -> Iterator[str]:
        """Yield the prefixes of the probes that declare all of these quantities."""
        for prefix in dict.fromkeys(one.prefix for one in self.quantities.values()):
            if all(f"{prefix}/{name}" in self.quantities for name in names):
                yield prefix


MOST_VALUES = 10_000_000
"""Numbers of one run that are compared."""

MOST_KEYS = 20_000
"""Names of values of one run."""


def series_of_rows(
    rows: Iterable[Mapping[str, Any]],
) -> tuple[dict[str, Series], dict[str, dict[str, Series]]]:
    """Return the series of a history, and its values by quantity and site.

    Args:
        rows: Objects with a whole `step` and values; what is no number is left out,
            and of two values of one step the later counts.

    Raises:
        ValueError: If there are too many values or names, or one that is beyond what
            a float or a step can be.
    """
    points = _points(rows)
    points.pop("step", None)
    points.pop("epoch", None)
    series: dict[str, Series] = {}
    depth: dict[str, dict[str, Series]] = {}
    for key in list(points):
        match = SITE_KEY.fullmatch(key)
        one = sorted_series(*points.pop(key))
        if match is None:
            series[key] = one
        else:
            depth.setdefault(match["quantity"], {})[match["site"]] = one
    ordered = {name: dict(sorted(sites.items())) for name, sites in depth.items()}
    return series, ordered


def _points(
    rows: Iterable[Mapping[str, Any]],
) -> dict[str, tuple[array[int], array[float]]]:
    """Return steps and values by name, as compact as they can be held."""
    points: dict[str, tuple[array[int], array[float]]] = {}
    number = 0
    for row in rows:
        step = row["step"]
        for key, value in row.items():
            found = NOT_FINITE.get(value) if isinstance(value, str) else value
            if not isinstance(found, int | float):
                continue
            known = points.get(key)
            if known is None:
                known = points[key] = (array("q"), array("d"))
            try:
                known[0].append(step)
                known[1].append(found)
            except OverflowError as error:
                raise ValueError(
                    f"a step or value of {key} takes more than 64 bits"
                ) from error
        number += len(row)
        if number > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES} values")
        if len(points) > MOST_KEYS:
            raise ValueError(f"its values have more than {MOST_KEYS} names")
    return points


def sorted_series(steps: Iterable[int], values: Iterable[float]) -> Series:
    """Return a series in the order of its steps, the later of two equal ones alone."""
    step = np.fromiter(steps, np.int64)
    value = np.fromiter(values, np.float64)
    # no difference of steps: it may be beyond an int64
    if (step[1:] > step[:-1]).all():
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
    kind: RunKind,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    quantities: Mapping[str, Declared] | None = None,
    tables: Iterable[DepthTable] = (),
) -> Recorded:
    """Return a run from its history.

    Verdicts that were logged as numbers become words: so they are the same wherever a
    run was recorded.

    Args:
        rows: As `series_of_rows` takes them.
        name: As `Recorded.name`; `source` and `kind` likewise.
        source: Where it was read.
        kind: What it was read from.
        config: Its config, flat.
        summary: `status`, `verdicts`, `seconds`, as far as known.
        quantities: What its probes declared.
        tables: Values by site that stand in tables.

    Raises:
        ValueError: If the history holds no number, or the summary isn't one.
    """
    check_summary(summary)
    kinds: dict[str, str] = {}
    series, depth = series_of_rows(chain(rows, _rows_of_tables(tables, kinds)))
    if not series and not depth:
        raise ValueError("it holds no values")
    quantities = quantities or shipped_quantities()
    words = {}
    for key, one in series.items():
        declared = find_declared(quantities, key)
        code = code_of(declared, float(one.value[-1])) if declared else None
        if code is not None:
            words[key] = code.word
    return Recorded(
        name=name,
        source=source,
        kind=kind,
        status=summary.get("status", ""),
        config=config,
        verdicts={**summary.get("verdicts", {}), **words},
        seconds=summary.get("seconds"),
        series=series,
        depth=depth,
        kinds=kinds,
        quantities=quantities,
    )


def _rows_of_tables(
    tables: Iterable[DepthTable], kinds: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Yield tables as rows of a history, and note the kinds of their sites."""
    for table in tables:
        kinds |= table.kinds()
        yield table.values()


def code_of(declared: Declared, value: float) -> Code | None:
    """Return what a logged number stands for.

    A number that is none of the codes, such as the NaN of a measurement that failed,
    is the code that tells nothing; None where there is no such code.
    """
    codes = declared.quantity.codes
    silent = next((code for code in codes if not code.shown), None)
    return next((code for code in codes if code.number == value), silent)

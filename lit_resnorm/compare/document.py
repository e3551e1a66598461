"""The comparison as plain JSON: what the page embeds and `--json` writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_resnorm.compare.columns import Column, columns_of, declared_of
from lit_resnorm.compare.config import differences, known_key, same
from lit_resnorm.compare.findings import findings_of
from lit_resnorm.compare.grouping import (
    Group,
    default_groups,
    group_series,
    grouped,
    spread,
)
from lit_resnorm.compare.recorded import Recorded, Series
from lit_resnorm.compare.thinning import SHOWN_STEPS, even_places, kept_places
from lit_resnorm.quantities import (
    Declared,
    Quantity,
    across,
    along_depth,
    find_declared,
)
from lit_resnorm.quantities.explanations import EXPLANATIONS
from lit_resnorm.runs.json_lines import plain


# runs may hold the largest numbers that there are
@np.errstate(over="ignore", invalid="ignore")
def comparison_document(
    runs: Sequence[Recorded],
    skipped: Sequence[Mapping[str, str]] = (),
    by: Sequence[str] | None = None,
    *,
    best: bool = False,
) -> dict[str, Any]:
    """Return the comparison of runs.

    Means are taken at exact steps, before long series are thinned.

    Args:
        runs: The runs, as `read_runs` returns them.
        skipped: `name` and `reason` of what could not be read.
        by: Config keys by which runs are grouped; None: so that runs are averaged that
            differ in seeds alone, see `telling.default_by`.
        best: Give the best accuracy, loss and gap in the table, not the last.

    Returns:
        What JSON can hold; numbers that aren't finite are words.
    """
    if by is None:
        keys, groups = default_groups(runs)
    else:
        keys = [known_key(key) for key in by]
        groups = grouped(runs, keys)
    configs = [run.config for run in runs]
    columns = columns_of(runs, best=best)
    findings = findings_of(runs)
    number = len(runs)
    return {
        "format": 1,
        "title": runs[0].name if number == 1 else f"{number} runs",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": metadata.version("lit-resnorm"),
        "skipped": [dict(one) for one in skipped],
        "by": keys,
        "differences": [
            {"key": key, "values": [plain(value) for value in values]}
            for key, values in differences(configs, also=keys).items()
        ],
        "same": _plain_values(same(configs)),
        "runs": _runs(runs, groups),
        "groups": [
            {**asdict(group), "key": _plain_values(group.key)} for group in groups
        ],
        "columns": [
            {"key": c.key, "title": c.title, "better": c.better, "digits": c.digits}
            for c in columns
        ],
        "table": _table_cells(number, groups, columns),
        "series": _series(runs),
        "group_series": _group_series(runs, groups),
        "depth": _depth(runs),
        "quantities": _quantities(runs),
        "findings": [asdict(one) for one in findings],
        "explanations": {
            name: asdict(EXPLANATIONS[name])
            for name in dict.fromkeys(one.name for one in findings)
        },
    }


def _plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: plain(value) for key, value in values.items()}


def _runs(runs: Sequence[Recorded], groups: Sequence[Group]) -> list[dict[str, Any]]:
    group_of = {place: g for g, group in enumerate(groups) for place in group.runs}
    return [
        {
            "name": run.name,
            "source": run.source,
            "kind": run.kind,
            "group": group_of[place],
            "status": run.status,
            "verdicts": dict(run.verdicts),
            "seconds": run.seconds,
            "config": _plain_values(run.config),
            **({"logs": [*run.logs]} if run.logs else {}),
        }
        for place, run in enumerate(runs)
    ]


def _table_cells(
    number: int, groups: Sequence[Group], columns: Sequence[Column]
) -> dict[str, list[dict[str, Any]]]:
    return {
        "runs": [
            {column.key: plain(column.cells[place]) for column in columns}
            for place in range(number)
        ],
        "groups": [_group_cells(group, columns) for group in groups],
    }


def _group_cells(group: Group, columns: Sequence[Column]) -> dict[str, Any]:
    """Return the spread of every column with numbers."""
    cells = {}
    for column in columns:
        found = [column.cells[place] for place in group.runs]
        numbers = [cell for cell in found if isinstance(cell, int | float)]
        if numbers and len(numbers) == sum(cell is not None for cell in found):
            cells[column.key] = _plain_values(asdict(spread(numbers)))
    return cells


def _all_keys(maps: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({key for one in maps for key in one})


def _series(runs: Sequence[Recorded]) -> dict[str, list[dict[str, Any]]]:
    return {
        key: [
            {"run": place, **_thinned(run.series[key])}
            for place, run in enumerate(runs)
            if key in run.series
        ]
        for key in _all_keys(run.series for run in runs)
    }


def _thinned(series: Series) -> dict[str, Any]:
    places = kept_places(series.value)
    curve = {
        "step": series.step[places].tolist(),
        "value": _numbers(series.value[places]),
    }
    return curve if len(places) == len(series.value) else {**curve, "thinned": True}


def _numbers(values: NDArray[np.float64]) -> list[Any]:
    numbers = values.tolist()
    return numbers if np.isfinite(values).all() else [plain(one) for one in numbers]


def _group_series(
    runs: Sequence[Recorded], groups: Sequence[Group]
) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for key in _all_keys(run.series for run in runs):
        for place, group in enumerate(groups):
            series = [
                runs[run].series[key] for run in group.runs if key in runs[run].series
            ]
            if series:
                curve = _group_curve(series)
                found.setdefault(key, []).append({"group": place, **curve})
    return found


def _group_curve(series: Sequence[Series]) -> dict[str, Any]:
    whole = group_series(series)
    places = kept_places(whole.mean)
    curve: dict[str, Any] = {
        "step": whole.step[places].tolist(),
        "mean": _known(whole.mean[places]),
        "std": _known(whole.std[places]),
        "count": whole.count[places].tolist(),
    }
    if whole.not_finite.any():
        curve["not_finite"] = whole.not_finite[places].tolist()
    if len(places) < len(whole.step):
        curve["thinned"] = True
    return curve


def _known(values: NDArray[np.float64]) -> list[Any]:
    """Return numbers with null where there is none: no finite value was measured."""
    return [None if math.isnan(one) else plain(one) for one in values.tolist()]


def _depth(runs: Sequence[Recorded]) -> dict[str, list[dict[str, Any]]]:
    return {
        key: [
            {"run": place, **_profile(run.depth[key], run.kinds)}
            for place, run in enumerate(runs)
            if key in run.depth
        ]
        for key in _all_keys(run.depth for run in runs)
    }


def _quantities(runs: Sequence[Recorded]) -> dict[str, dict[str, Any]]:
    """Return what is declared of the series, and of what is by depth, by key."""
    found: dict[str, Declared] = {}
    for run in runs:
        found = {**run.quantities, **found}
    order = {one.identity: k for k, one in enumerate(declared_of(found.values()))}
    series = _all_keys(run.series for run in runs)
    depth = _all_keys(run.depth for run in runs)
    parts = {
        "series": {key: find_declared(found, key) for key in series},
        "depth": {key: find_declared(found, key, by_site=True) for key in depth},
    }
    return {
        part: {
            key: _quantity_entry(one.quantity)
            for key, one in sorted(
                ((key, one) for key, one in known.items() if one is not None),
                key=lambda item: order[item[1].identity],
            )
        }
        for part, known in parts.items()
    }


def _quantity_entry(quantity: Quantity) -> dict[str, Any]:
    described: dict[str, Any] = {
        "title": quantity.label,
        "scale": quantity.scale,
        "has_chart": bool(quantity.panel_title),
    }
    if quantity.codes:
        described["codes"] = {str(c.number): c.shown or c.word for c in quantity.codes}
    return described


def _profile(sites: Mapping[str, Series], kinds: Mapping[str, str]) -> dict[str, Any]:
    """Return a quantity by step and site, null where a site lacks the step.

    Where sites are of several kinds, `axis` has the places of those that stand on one
    axis, and `across` says what they are.
    """
    steps = np.unique(np.concatenate([one.step for one in sites.values()]))
    steps = steps[even_places(len(steps), SHOWN_STEPS)]
    columns = []
    for one in sites.values():
        at = np.searchsorted(one.step, steps).clip(max=len(one.step) - 1)
        has = one.step[at] == steps
        values = one.value[at].tolist()
        columns.append(
            [plain(v) if h else None for v, h in zip(values, has.tolist(), strict=True)]
        )
    rows = [list(row) for row in zip(*columns, strict=True)]
    profile = {"steps": steps.tolist(), "sites": list(sites), "values": rows}
    along = along_depth(sites, kinds)
    if (word := across(along, kinds)) != "site":
        profile["across"] = word
    if len(along) < len(sites):
        chosen = set(along)
        profile["axis"] = [k for k, site in enumerate(sites) if site in chosen]
    return profile

"""Which of the measured values become scalars of the loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from lit_resnorm.quantities import (
    SITE_KEY,
    WORST,
    Declared,
    along_depth,
    find_declared,
)

Log = Literal["scalars", "summary", "all"]
LOGS: tuple[Log, ...] = ("scalars", "summary", "all")


def logged_scalars(
    numbers: Mapping[str, float],
    log: Log,
    *,
    prefix: str,
    declared: Mapping[str, Declared],
    kinds: Mapping[str, str],
) -> dict[str, float]:
    """Return the scalars to log, by name without the probe's.

    Args:
        numbers: What was measured, by `<quantity>` or `<quantity>/<site>`.
        log: `all`: those; `scalars`: of the whole network alone; `summary`: these,
            and of a quantity by site `first`, `middle` and `last` along the depth
            (see `along_depth`), and `worst` of all sites where it is declared which
            values are good. Both leave out what is declared as a detail.
        prefix: First part of the logged names.
        declared: What the probe says of its quantities.
        kinds: Kinds of sites, by name.
    """
    if log == "all":
        return {**numbers}
    scalars: dict[str, float] = {}
    by_site: dict[str, dict[str, float]] = {}
    for key, value in numbers.items():
        if match := SITE_KEY.fullmatch(key):
            by_site.setdefault(match["quantity"], {})[match["site"]] = value
            continue
        one = find_declared(declared, f"{prefix}/{key}")
        if one is None or not one.quantity.detail:
            scalars[key] = value
    if log == "summary":
        for quantity, values in by_site.items():
            one = find_declared(declared, f"{prefix}/{quantity}", by_site=True)
            if one is None or not one.quantity.detail:
                places = _values_at_places(values, one, kinds)
                scalars |= {f"{quantity}/{place}": v for place, v in places.items()}
    return scalars


def _values_at_places(
    values: Mapping[str, float], declared: Declared | None, kinds: Mapping[str, str]
) -> dict[str, float]:
    sites = along_depth(values, kinds)
    chosen = {"first": sites[0], "middle": sites[len(sites) // 2], "last": sites[-1]}
    worst = declared.quantity.worst(values) if declared else None
    if worst is not None:
        chosen[WORST] = worst
    return {place: values[site] for place, site in chosen.items()}

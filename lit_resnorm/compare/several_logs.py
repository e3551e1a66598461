"""One fit that several loggers kept is one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lit_resnorm.compare.recorded import Recorded, RunKind, Series

_BEST_KNOWN: tuple[RunKind, ...] = ("directory", "online", "offline", "csv")
"""Kinds of logs, those first that hold most of how a run ended."""


def with_logs_joined(runs: Sequence[Recorded]) -> list[Recorded]:
    """Return runs, the logs of one fit as one, in the order of its first.

    Logs of different kinds are of one fit where all values and settings that both hold
    are equal, and there is a value that both hold.
    """
    fits: list[list[Recorded]] = []
    for run in runs:
        for logs in fits:
            if all(_are_of_one_fit(run, other) for other in logs):
                logs.append(run)
                break
        else:
            fits.append([run])
    return [_joined_log(logs) for logs in fits]


def _are_of_one_fit(one: Recorded, other: Recorded) -> bool:
    if one.kind == other.kind:
        return False
    shared = one.config.keys() & other.config.keys()
    if any(one.config[key] != other.config[key] for key in shared):
        return False
    keys = one.series.keys() & other.series.keys()
    return bool(keys) and all(
        _is_same_series(one.series[k], other.series[k]) for k in keys
    )


def _is_same_series(one: Series, other: Series) -> bool:
    return np.array_equal(one.step, other.step) and np.array_equal(
        one.value, other.value, equal_nan=True
    )


def _joined_log(logs: list[Recorded]) -> Recorded:
    if len(logs) == 1:
        return logs[0]
    main, *others = sorted(logs, key=lambda run: _BEST_KNOWN.index(run.kind))

    def union(maps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {key: value for one in reversed(maps) for key, value in one.items()}

    both = [main, *others]
    return replace(
        main,
        logs=tuple(run.source for run in both),
        status=next((run.status for run in both if run.status), ""),
        config=union([run.config for run in both]),
        verdicts=union([run.verdicts for run in both]),
        series=union([run.series for run in both]),
        depth=union([run.depth for run in both]),
        kinds=union([run.kinds for run in both]),
        quantities=union([run.quantities for run in both]),
    )

"""Group runs by their configs, and average what they measured at exact steps.

Dimensions: R runs of a group, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_resnorm.compare.config import known_key
from lit_resnorm.compare.recorded import Recorded, Series
from lit_resnorm.compare.telling import CALLBACKS, default_by


@dataclass(frozen=True)
class Group:
    """Runs that have the same values of some config keys.

    Attributes:
        label: What tells it from the other groups.
        key: The values.
        runs: Places of its runs.
    """

    label: str
    key: dict[str, Any]
    runs: list[int]


@dataclass(frozen=True)
class Spread:
    """A quantity over the runs of a group.

    Attributes:
        mean: Over runs with a finite value; None: there is none.
        std: Sample standard deviation (n - 1); None: fewer than two finite values.
        count: Number of finite values.
        min: Least of them.
        max: Largest of them.
        not_finite: Number of runs where it is NaN or infinite.
    """

    mean: float | None
    std: float | None
    count: int
    min: float | None
    max: float | None
    not_finite: int


@dataclass(frozen=True)
class GroupSeries:
    """A quantity over training and the runs of a group, at each exact step.

    Attributes:
        step: Steps at which any run has a value, shape `(S,)`.
        mean: Over the runs with a finite value there, NaN without one, shape `(S,)`.
        std: Sample standard deviation, NaN below two values, shape `(S,)`.
        count: Number of finite values, shape `(S,)`.
        not_finite: Number of values that are NaN or infinite, shape `(S,)`.
    """

    step: NDArray[np.int64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    count: NDArray[np.int64]
    not_finite: NDArray[np.int64]


def default_groups(runs: Sequence[Recorded]) -> tuple[list[str], list[Group]]:
    """Return the keys by which runs are grouped unasked, and the groups.

    Our runs and those of other projects are grouped apart, each by `default_by`; beside
    ours the others go by their names.
    """
    ours = [place for place, run in enumerate(runs) if "variant" in run.config]
    others = [place for place in range(len(runs)) if place not in ours]
    keys: list[str] = []
    groups: list[Group] = []
    for places in (ours, others):
        part = [runs[place] for place in places]
        by = default_by(part)
        keys += [key for key in by if key not in keys]
        for group in grouped(part, by):
            at = [places[place] for place in group.runs]
            guest = ours and places is others
            label = _names([runs[place] for place in at]) if guest else group.label
            groups.append(Group(label, group.key, at))
    return keys, sorted(groups, key=lambda group: group.runs[0])


def _names(runs: Sequence[Recorded]) -> str:
    more = f" and {len(runs) - 1} more" if runs[1:] else ""
    return runs[0].name + more


def grouped(runs: Sequence[Recorded], by: Sequence[str]) -> list[Group]:
    """Return the groups of runs, in the order of their first runs.

    A run without any of the keys is a group of its own.
    """
    keys = [known_key(key) for key in by]
    found: dict[tuple[Any, ...], list[int]] = {}
    for place, run in enumerate(runs):
        values = tuple(run.config.get(key) for key in keys)
        nothing = all(value is None for value in values) and bool(keys)
        found.setdefault((*values, place if nothing else None), []).append(place)
    telling = [
        index
        for index in range(len(keys))
        if len({values[index] for values in found}) > 1
    ]
    return [
        Group(
            _label(keys, values, telling, runs[places[0]]),
            dict(zip(keys, values[:-1], strict=True)),
            places,
        )
        for values, places in found.items()
    ]


def _label(
    keys: Sequence[str], values: Sequence[Any], telling: Sequence[int], first: Recorded
) -> str:
    """Return the variant, and the values that differ between groups."""
    if values[-1] is not None or not keys:
        return first.name
    parts = []
    for index, key in enumerate(keys):
        if key == "variant" and values[index] is not None:
            parts.append(str(values[index]))
        elif index in telling and values[index] is not None:
            parts.append(_setting(key, values[index]))
    alike = [f"{k} {v}" for k, v in zip(keys, values, strict=False) if v is not None]
    return ", ".join(parts or alike)


def _setting(key: str, value: Any) -> str:
    """Return a key and its value in few words; a callback by its class alone."""
    short = key.removeprefix("model.").removeprefix("trainer.")
    name = key.removeprefix(CALLBACKS)
    is_callback = name != key and str(value).rpartition(".")[2] == name
    return name if is_callback else f"{short} {value}"


def spread(values: Sequence[float]) -> Spread:
    """Return mean, spread and count of a quantity over runs.

    NaN and infinities are counted apart. Equal values average to themselves.
    """
    column = np.array(values, np.float64)[:, None]
    mean, std, count, not_finite = _moments(column)
    finite = column[np.isfinite(column)]
    return Spread(
        mean=None if np.isnan(mean[0]) else float(mean[0]),
        std=None if np.isnan(std[0]) else float(std[0]),
        count=int(count[0]),
        min=float(finite.min()) if finite.size else None,
        max=float(finite.max()) if finite.size else None,
        not_finite=int(not_finite[0]),
    )


def group_series(series: Sequence[Series]) -> GroupSeries:
    """Return mean and spread of the runs' series at every exact step."""
    step = np.unique(np.concatenate([one.step for one in series]))
    value_RS = np.zeros((len(series), len(step)))
    known_RS = np.zeros((len(series), len(step)), bool)
    for row, one in enumerate(series):
        places = np.searchsorted(step, one.step)
        value_RS[row, places] = one.value
        known_RS[row, places] = True
    mean, std, count, not_finite = _moments(value_RS, known_RS)
    return GroupSeries(step, mean, std, count, not_finite)


def _moments(
    value_RS: NDArray[np.float64], known_RS: NDArray[np.bool_] | None = None
) -> tuple[
    NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]
]:
    """Return mean, standard deviation, and numbers of finite and other values."""
    known_RS = np.ones_like(value_RS, bool) if known_RS is None else known_RS
    finite_RS = np.isfinite(value_RS) & known_RS
    count = finite_RS.sum(0)
    # taken from a value of the group: equal values then average to themselves exactly
    first = np.take_along_axis(value_RS, finite_RS.argmax(0)[None], 0)
    first = np.where(count > 0, first, 0.0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        off_RS = np.where(finite_RS, value_RS - first, 0.0)
        mean_off = off_RS.sum(0) / count
        mean = first[0] + mean_off
        square = np.where(finite_RS, off_RS - mean_off, 0.0) ** 2
        std = np.sqrt(square.sum(0) / np.where(count > 1, count - 1, np.nan))
    return mean, std, count, (known_RS & ~finite_RS).sum(0)

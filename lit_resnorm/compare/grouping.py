"""Group runs by their configs, and average what they measured at exact steps.

Dimensions: R runs of a group, S steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_resnorm.compare.config import FLAT, differences, known_key
from lit_resnorm.compare.recorded import Recorded, Series

DEFAULT_BY = tuple(key for key in FLAT if key != "seed")

CALLBACKS = "trainer.callbacks."

# Settings of a Trainer that change what is shown, kept or checked. All others count,
# those of the hardware too: they change the order of sums, or what a step averages.
_WATCHING = re.compile(
    r"trainer\.(log_every_n_steps|enable_\w+|profiler|barebones|detect_anomaly"
    r"|num_sanity_val_steps|limit_predict_batches|inference_mode|model_registry)(\..*)?"
)
# Callbacks that measure, show or save.
_WATCHERS = re.compile(
    r"(lit_resnorm|lit_resnorm_callbacks)\..*"
    r"|(lightning\.pytorch|pytorch_lightning)\.(.*\.)?(LearningRateMonitor"
    r"|DeviceStatsMonitor|ThroughputMonitor|\w*ModelSummary|\w*ProgressBar"
    r"|ModelCheckpoint|OnExceptionCheckpoint|BasePredictionWriter)"
)
_CALLBACK = re.compile(re.escape(CALLBACKS) + r"\w+(\.\d+)?")


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
            label = (
                _names_in_words([runs[place] for place in at]) if guest else group.label
            )
            groups.append(Group(label, group.key, at))
    return keys, sorted(groups, key=lambda group: group.runs[0])


def _names_in_words(runs: Sequence[Recorded]) -> str:
    more = f" and {len(runs) - 1} more" if runs[1:] else ""
    return runs[0].name + more


def grouped(runs: Sequence[Recorded], by: Sequence[str]) -> list[Group]:
    """Return the groups of runs, in the order of their first runs.

    A run without any of the keys, or without any setting, is a group of its own.
    """
    keys = [known_key(key) for key in by]
    found: dict[tuple[Any, ...], list[int]] = {}
    for place, run in enumerate(runs):
        values = tuple(run.config.get(key) for key in keys)
        nothing = all(value is None for value in values) and bool(keys)
        nothing |= not run.config
        found.setdefault((*values, place if nothing else None), []).append(place)
    telling = [
        index
        for index in range(len(keys))
        if len({values[index] for values in found}) > 1
    ]
    return [
        Group(
            _group_label(keys, values, telling, runs[places[0]]),
            dict(zip(keys, values[:-1], strict=True)),
            places,
        )
        for values, places in found.items()
    ]


def _group_label(
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


def default_by(runs: Sequence[Recorded]) -> list[str]:
    """Return the keys by which runs are grouped unless a user says otherwise.

    The flat keys of `fit` but the seed, as far as a run has them, and what else of
    model, data or trainer tells runs apart that these don't, unless it only watches
    the training; in runs of other projects anything but seeds. So runs are averaged
    that differ in seeds alone.

    Args:
        runs: Runs of our command line, or of other projects.
    """
    configs = [run.config for run in runs]
    known = [key for key in DEFAULT_BY if any(c.get(key) is not None for c in configs)]
    foreign = any("variant" not in config for config in configs)
    # a callback that one run has alone tells it from the others
    own = {key for config in configs for key in config if key.startswith("trainer.")}
    for key in differences(configs, also=() if foreign else own):
        tells = len(_values(configs, [*known, key])) > len(_values(configs, known))
        if key not in known and tells and _counts(key, configs, foreign=foreign):
            known.append(key)
    return known


def _counts(key: str, configs: Sequence[Mapping[str, Any]], *, foreign: bool) -> bool:
    """Say whether a setting may change what is trained, and is no seed."""
    if "seed" in key.rpartition(".")[2]:
        return False
    if key.startswith("trainer."):
        return not _WATCHING.fullmatch(key) and not _watches(key, configs)
    return foreign or key.startswith(("model.", "data."))


def _watches(key: str, configs: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether a key is of a callback that measures, shows or saves."""
    callback = _CALLBACK.match(key)
    if callback is None:
        return False
    classes = {str(c[callback[0]]) for c in configs if callback[0] in c}
    return bool(classes) and all(map(_WATCHERS.fullmatch, classes))


def _values(
    configs: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> set[tuple[Any, ...]]:
    return {tuple(config.get(key) for key in keys) for config in configs}

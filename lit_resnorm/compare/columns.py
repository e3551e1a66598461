"""The columns of a comparison's table: which there are, and each run's values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lit_resnorm.compare.recorded import Recorded, Series

Cell = float | str | None
Better = Literal["high", "low"] | None

WORDS = {"signal": "signal", "snr": "noise", "none": "none"}
"""Verdicts as the table says them; `undetermined` says nothing."""

_STAGES = {"test": "test", "val": "val", "valid": "val", "validation": "val"}
_QUANTITIES = {"acc": "accuracy", "accuracy": "accuracy", "loss": "loss"}


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        key: Its name in the document.
        title: Its heading.
        better: Which values are good, if that can be said.
        digits: Significant digits to show.
        cells: A value a run; None where it lacks one.
    """

    key: str
    title: str
    better: Better
    digits: int
    cells: list[Cell]


def columns_of(runs: Sequence[Recorded], *, best: bool = False) -> list[Column]:
    """Return the columns in which any run has a value.

    Args:
        runs: The runs.
        best: Show the best accuracy, loss and gap of each run instead of its last.
    """
    found = [
        _config("variant", "variant", runs),
        _config("depth", "depth", runs),
        _config("lr", "lr", runs),
        _measured("accuracy", "high", runs, best=best),
        _measured("loss", "low", runs, best=best),
        _scalar("generalization_gap", "gap", runs, "low" if best else None),
        _scalar("fim/lambda_max", "lambda_max", runs),
        _scalar("fim/rate_bound", "rate bound", runs),
        _of_sites("moments/effective_rank", "effective rank, last layer", runs, _last),
        _scalar("moments/power_exponent", "sensitivity exponent", runs),
        _of_sites("activation/dead", "dead units", runs, _mean),
        _scalar("stability/eps_hyp", "eps_hyp", runs),
        Column("verdict", "pathology", None, 0, [verdict(run) for run in runs]),
        Column("status", "status", None, 0, [_trouble(run) for run in runs]),
    ]
    return [c for c in found if any(cell is not None for cell in c.cells)]


def _config(key: str, title: str, runs: Sequence[Recorded]) -> Column:
    return Column(key, title, None, 4, [_cell(run.config.get(key)) for run in runs])


def _cell(value: Any) -> Cell:
    if value is None or isinstance(value, str):
        return value
    return float(value) if isinstance(value, float) else value


def _measured(
    quantity: str, better: Better, runs: Sequence[Recorded], *, best: bool
) -> Column:
    """Return accuracy or loss of the stage that most runs have, test first."""
    series: dict[str, list[Series | None]] = {
        stage: [stage_series(run, stage, quantity) for run in runs]
        for stage in ("test", "val")
    }
    stage = max(series, key=lambda s: sum(one is not None for one in series[s]))
    cells: list[Cell] = [
        None if one is None else _shown(one, better if best else None)
        for one in series[stage]
    ]
    title = f"{'best ' if best else ''}{stage} {quantity}"
    return Column(f"{stage}/{quantity}", title, better, 4, cells)


def stage_series(run: Recorded, stage: str, quantity: str) -> Series | None:
    """Return a run's accuracy or loss of a stage, whatever its project calls it.

    Read are names such as `val/accuracy`, `val_acc`, `valid-loss`, `test_loss_epoch`.
    """
    own = run.series.get(f"{stage}/{quantity}")
    if own is not None:
        return own
    for key in sorted(run.series):
        parts = [part for part in re.split(r"[^a-z]+", key.lower()) if part]
        parts = [part for part in parts if part not in ("epoch", "dataloader", "idx")]
        if len(parts) != 2 or re.search(r"step|\d", key):
            continue
        if _STAGES.get(parts[0]) == stage and _QUANTITIES.get(parts[1]) == quantity:
            return run.series[key]
    return None


def _scalar(
    key: str, title: str, runs: Sequence[Recorded], better: Better = None
) -> Column:
    # the Fisher matrix of the coupled batch where it alone was measured
    name, _, quantity = key.partition("/")
    keys = (key, f"{name}_batch/{quantity}")
    cells: list[Cell] = []
    for run in runs:
        one = next((run.series[k] for k in keys if k in run.series), None)
        cells.append(None if one is None else _shown(one, better))
    title = f"best {title}" if better else title
    return Column(key, title, better, 4, cells)


def _shown(series: Series, best: Better) -> float:
    """Return the last value, or the best that is finite."""
    finite = series.value[np.isfinite(series.value)]
    if best is None or not finite.size:
        return float(series.value[-1])
    return float(finite.max() if best == "high" else finite.min())


def _of_sites(
    key: str,
    title: str,
    runs: Sequence[Recorded],
    pick: Callable[[Mapping[str, Series]], float],
) -> Column:
    cells: list[Cell] = [
        pick(run.depth[key]) if key in run.depth else None for run in runs
    ]
    return Column(key, title, None, 4, cells)


def _last(sites: Mapping[str, Series]) -> float:
    return float(sites[max(sites)].value[-1])


def _mean(sites: Mapping[str, Series]) -> float:
    return float(np.mean([one.value[-1] for one in sites.values()]))


def verdict(run: Recorded) -> str | None:
    """Return what a run's first and last verdicts say: `noise`, `noise → none`."""
    series = run.series.get("moments/pathology")
    if series is None:
        word = run.verdicts.get("moments/pathology")
        return WORDS.get(word) if word else None
    codes = {0.0: "none", 1.0: "signal", 2.0: "noise"}
    words = [codes.get(series.value[place]) for place in (0, -1)]
    told = [word for word in dict.fromkeys(words) if word is not None]
    return " → ".join(told) or None


def _trouble(run: Recorded) -> str | None:
    """Return how a run ended, unless it finished as it should or nobody knows."""
    return run.status if run.status not in ("finished", "") else None

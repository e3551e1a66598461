"""The columns of a comparison's table: which there are, and each run's values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lit_resnorm.compare.config import told_setting
from lit_resnorm.compare.recorded import Recorded, Series, code_of
from lit_resnorm.compare.shipped import shipped_quantities
from lit_resnorm.quantities import SITE, Better, Declared

TableCell = float | str | None

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
    cells: list[TableCell]


def columns_of(runs: Sequence[Recorded], *, best: bool = False) -> list[Column]:
    """Return the columns in which any run has a value.

    Args:
        runs: The runs.
        best: Show the best accuracy, loss and gap of each run instead of its last.
    """
    found = [
        _config("variant", "variant", runs),
        _config("depth", "depth", runs),
        *_optimizer_column(runs),
        _config("lr", "lr", runs),
        _best_stage("accuracy", "high", runs, best=best),
        _best_stage("loss", "low", runs, best=best),
        _gap_column(runs, "low" if best else None),
    ]
    # first, so that it is seen however many columns there are
    status = Column("status", "status", None, 0, [_trouble(run) for run in runs])
    columns = [status, *found, *_declared_columns(runs, best=best)]
    return [c for c in columns if any(cell is not None for cell in c.cells)]


def declared_of(quantities: Iterable[Declared]) -> list[Declared]:
    """Return each quantity once, our own probes' first.

    The order is the same wherever runs were recorded: W&B keeps none.
    """
    found: dict[tuple[str, str], Declared] = {}
    for one in quantities:
        found.setdefault(one.identity, one)
    known = dict.fromkeys(one.identity for one in shipped_quantities().values())
    ours = [found[identity] for identity in known if identity in found]
    others = [one for identity, one in found.items() if identity not in known]
    return [*ours, *sorted(others, key=lambda one: one.probe)]


def _declared_columns(runs: Sequence[Recorded], *, best: bool) -> list[Column]:
    """Return the headlines of the runs' probes: numbers first, then words."""
    declared = declared_of(one for run in runs for one in run.quantities.values())
    headlines = [one for one in declared if one.quantity.headline]
    columns: dict[str, tuple[Declared, Column]] = {}
    for one in sorted(headlines, key=lambda one: bool(one.quantity.codes)):
        cells = [_declared_cell(run, one, best=best) for run in runs]
        if any(cell is not None for cell in cells):
            quantity = one.quantity
            key = f"{one.probe}/{quantity.stem}"
            key = f"{key}/{SITE}" if key in columns else key
            title = quantity.heading or quantity.title
            is_best = best and quantity.better is not None and not quantity.by_site
            title = f"best {title}" if is_best else title
            digits = 0 if quantity.codes else 4
            # nearer to a number is no order of the column
            better = quantity.better if quantity.better in ("high", "low") else None
            columns[key] = one, Column(key, title, better, digits, cells)
    titles = [column.title for _, column in columns.values()]
    return [
        replace(column, title=f"{column.title} ({one.probe})")
        if titles.count(column.title) > 1
        else column
        for one, column in columns.values()
    ]


def _declared_cell(run: Recorded, wanted: Declared, *, best: bool) -> TableCell:
    own = [one for one in run.quantities.values() if one.identity == wanted.identity]
    for one in own or [wanted]:
        quantity = one.quantity
        if quantity.codes:
            cell = told(run, one)
        elif quantity.by_site:
            sites = run.depth.get(one.stem)
            cell = _OVER_SITES[quantity.over_sites](sites) if sites else None
        else:
            series = run.series.get(one.key)
            better = quantity.better if best else None
            cell = None if series is None else _last_or_best(series, better)
        if cell is not None:
            return cell
    return None


def told(run: Recorded, declared: Declared) -> str | None:
    """Return what a run's first and last codes say: `noise`, `noise → none`.

    Where no numbers were kept it is what the word at the run's end says.
    """
    series = run.series.get(declared.key)
    if series is None:
        word = run.verdicts.get(declared.key)
        codes = [code for code in declared.quantity.codes if code.word == word]
    else:
        ends = (float(series.value[place]) for place in (0, -1))
        codes = [code for end in ends if (code := code_of(declared, end))]
    return " → ".join(dict.fromkeys(c.shown for c in codes if c.shown)) or None


def _config(key: str, title: str, runs: Sequence[Recorded]) -> Column:
    cells = [_cell(told_setting(run.config, key)) for run in runs]
    return Column(key, title, None, 4, cells)


def _optimizer_column(runs: Sequence[Recorded]) -> list[Column]:
    """Return the column of optimizers, where they differ or are another project's."""
    column = _config("optimizer", "optimizer", runs)
    foreign = any("variant" not in run.config for run in runs)
    return [column] if foreign or len({*column.cells}) > 1 else []


def _cell(value: Any) -> TableCell:
    if value is None or isinstance(value, str):
        return value
    return float(value) if isinstance(value, float) else value


def _best_stage(
    quantity: str, better: Better, runs: Sequence[Recorded], *, best: bool
) -> Column:
    """Return accuracy or loss of the stage that most runs have, test first."""
    series: dict[str, list[Series | None]] = {
        stage: [stage_series(run, stage, quantity) for run in runs]
        for stage in ("test", "val")
    }
    stage = max(series, key=lambda s: sum(one is not None for one in series[s]))
    cells: list[TableCell] = [
        None if one is None else _last_or_best(one, better if best else None)
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


def _gap_column(runs: Sequence[Recorded], better: Better) -> Column:
    key = "generalization_gap"
    found = [run.series.get(key) for run in runs]
    cells: list[TableCell] = [
        None if one is None else _last_or_best(one, better) for one in found
    ]
    return Column(key, "best gap" if better else "gap", better, 4, cells)


def _last_or_best(series: Series, best: Better) -> float:
    """Return the last value, or the best that is finite."""
    finite = series.value[np.isfinite(series.value)]
    if best is None or not finite.size:
        return float(series.value[-1])
    if isinstance(best, int | float):
        return float(finite[np.abs(finite - best).argmin()])
    return float(finite.max() if best == "high" else finite.min())


def _last(sites: Mapping[str, Series]) -> float:
    return float(sites[max(sites)].value[-1])


def _last_mean(sites: Mapping[str, Series]) -> float:
    return float(np.mean([one.value[-1] for one in sites.values()]))


_OVER_SITES: dict[str, Callable[[Mapping[str, Series]], float]] = {
    "last": _last,
    "mean": _last_mean,
}


def _trouble(run: Recorded) -> str | None:
    """Return how a run ended, unless it finished as it should or nobody knows."""
    return run.status if run.status not in ("finished", "") else None

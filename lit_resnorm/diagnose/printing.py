"""A diagnosis in the terminal: the table by depth, the findings, the rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from lit_resnorm.diagnose.report import (
    Curvature,
    DepthRow,
    Diagnosis,
    Finding,
    StableRates,
    Suggestion,
)
from lit_resnorm.errors import escaped
from lit_resnorm.quantities.explanations import SLOW, ratio_in_words, reference

MOST_ROWS = 24
_PROVENANCE = {"P": "published", "D": "derived", "A": "abstract", "R": "literature"}
_COLORS = {
    "pathology": "bold red",
    "warning": "yellow",
    "note": "dim",
    "healthy": "bold green",
    "undetermined": "yellow",
    "pathological": "bold red",
}
_WIDTH = 100


def show(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Print a diagnosis.

    Args:
        diagnosis: What to print.
        console: Where; default: standard output, at least 100 columns wide in a file.
    """
    out = Console() if console is None else console
    if console is None and not out.is_terminal:
        out = Console(width=max(out.width, _WIDTH))
    shown = thinned(diagnosis.rows)
    out.print(_depth_table(diagnosis, shown, out.width))
    out.print(_legend(shown))
    if len(shown) < len(diagnosis.rows):
        out.print(
            f"{len(shown)} of {len(diagnosis.rows)} rows; --json has all",
            style="dim",
            highlight=False,
        )
    if diagnosis.curvature is not None:
        out.print(escaped(_curvature_line(diagnosis.curvature)), highlight=False)
    if diagnosis.stable_rates is not None:
        out.print(escaped(_stable_rates_line(diagnosis.stable_rates)), highlight=False)
    advised: list[Suggestion] = []
    for finding in diagnosis.findings:
        _print_finding(out, finding, advised)
    color = _COLORS[diagnosis.status]
    out.print(f"\n[{color}]{escaped(diagnosis.verdict)}[/]", highlight=False)


def thinned(rows: Sequence[DepthRow], most: int = MOST_ROWS) -> list[DepthRow]:
    """Return at most so many rows, evenly spaced, the first and last among them.

    Of residual nets the additions come first: they carry the trend.
    """
    additions = [row for row in rows if row.kind == "addition"]
    if len(rows) > most and 4 * len(additions) >= len(rows):
        rows = additions
    if len(rows) <= most:
        return list(rows)
    step = (len(rows) - 1) / (most - 1)
    return [rows[round(place * step)] for place in range(most)]


@dataclass(frozen=True)
class DepthColumn:
    """A column of the table by depth.

    Attributes:
        title: Its heading.
        meaning: What it holds, in the words of the documentation.
        cell: Takes a row and returns its text, empty where there is nothing.
    """

    title: str
    meaning: str
    cell: Callable[[DepthRow], str]


DEPTH_COLUMNS = (
    DepthColumn(
        "rate",
        "activation rate, the share of positive preactivations; about 0.5 at a usual"
        " initialisation",
        lambda row: _number(row.activation_rate, "{:.2f}"),
    ),
    DepthColumn(
        "dead",
        "share of dead units, on for no example",
        lambda row: _number(row.dead, "{:.2f}"),
    ),
    DepthColumn(
        "rank",
        "effective rank of the channels; 1 where the examples lie on a line",
        lambda row: _number(row.effective_rank),
    ),
    DepthColumn(
        "separation",
        "share of the examples' power off the best straight line",
        lambda row: _number(row.separation, "{:.2g}"),
    ),
    DepthColumn(
        "chi",
        "sensitivity: noise over signal, 1 at the input",
        lambda row: _exponential(row.log_sensitivity),
    ),
    DepthColumn(
        "share",
        "share of the residual branch in the variance of an addition",
        lambda row: _number(row.branch_share, "{:.2g}"),
    ),
    DepthColumn(
        "forward",
        "root mean square of the activations",
        lambda row: _number(row.forward),
    ),
    DepthColumn(
        "backward",
        "root mean square of the loss's gradient there, of an example",
        lambda row: _number(row.backward),
    ),
)
"""What stands in the table after depth and site."""


def _depth_table(diagnosis: Diagnosis, rows: Sequence[DepthRow], width: int) -> Table:
    count = diagnosis.settings["num_examples"]
    table = Table(
        title=f"{escaped(diagnosis.network)}, {count} examples",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("depth", justify="right", no_wrap=True)
    columns = _filled_columns(rows)
    cells = [[column.cell(row) for row in rows] for column in columns]
    # a space between columns, and at both edges
    taken = (
        len("depth")
        + 3
        + sum(
            1 + max(len(column.title), *map(len, own), 0)
            for column, own in zip(columns, cells, strict=True)
        )
    )
    table.add_column("site", no_wrap=True)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for row, own in zip(rows, zip(*cells, strict=True), strict=True):
        site = escaped(_shortened(row.site, max(12, width - taken)))
        table.add_row(str(row.depth), site, *own)
    return table


def _shortened(site: str, width: int) -> str:
    """Return a site's name in so many characters: its place and the end of it."""
    place, dot, name = site.partition(".")
    room = width - len(place) - 2
    return site if len(site) <= width else f"{place}{dot}…{name[-room:]}"


def _filled_columns(rows: Sequence[DepthRow]) -> list[DepthColumn]:
    return [column for column in DEPTH_COLUMNS if any(map(column.cell, rows))]


def _legend(rows: Sequence[DepthRow]) -> Table:
    legend = Table(box=None, show_header=False, padding=(0, 1), style="dim")
    legend.add_row(
        "depth", "layers up to there: activations; in transformers, residual additions"
    )
    for column in _filled_columns(rows):
        legend.add_row(column.title, column.meaning)
    return legend


def _number(value: float | None, form: str = "{:.3g}") -> str:
    return "" if value is None else form.format(value)


def _exponential(log: float) -> str:
    try:
        return f"{math.exp(log):.3g}"
    except OverflowError:
        return f"e^{log:.0f}"


def _curvature_line(found: Curvature) -> str:
    of_loss = f" ({found.loss})" if found.loss else ""
    line = f"lambda_max {found.lambda_max:.3g}{of_loss}, mean {found.lambda_mean:.3g};"
    rate = "" if found.rate is None else f"; configured rate {found.rate:.3g}"
    if found.bound is None:
        return f"{line} it bounds no rate of {found.optimizer}{rate}"
    line += f" rate bound of {found.optimizer} {found.bound:.3g}{rate}"
    if found.ratio is None:
        return line
    line += f", {found.ratio:.3g} of the bound"
    # of any other a finding speaks
    passes = SLOW <= found.ratio <= 1
    return f"{line} ({ratio_in_words(found.ratio)})" if passes else line


def _stable_rates_line(found: StableRates) -> str:
    words = f"{found.num_steps} full-batch steps of {found.optimizer}: "
    trials = {
        "stable up to": found.largest_stable,
        "unstable from": found.smallest_unstable,
    }
    parts = [
        f"{how} {trial.rate:.3g}"
        + ("" if trial.in_bounds is None else f", {trial.in_bounds:.3g} bounds")
        for how, trial in trials.items()
        if trial is not None
    ]
    bound = ""
    if found.bound is not None:
        bound = f" (bound {found.bound:.3g}, norm_mode {found.norm_mode})"
    return words + "; ".join(parts) + bound


def _print_finding(out: Console, finding: Finding, advised: list[Suggestion]) -> None:
    """Print a finding, and what is advised that wasn't before."""
    color = _COLORS[finding.severity]
    sources = [finding.source, f"see {reference(finding.name)}"]
    source = f" [dim]({escaped('; '.join(filter(None, sources)))})[/]"
    out.print(
        f"[{color}]{finding.severity}[/]: {escaped(finding.words)}{source}",
        highlight=False,
    )
    fresh = [advice for advice in finding.suggestions if advice not in advised]
    for advice in fresh:
        mark = _PROVENANCE[advice.mark]
        words, source = escaped(advice.words), escaped(advice.source)
        out.print(f"  try: {words} [dim]({source}; {mark})[/]", highlight=False)
    if len(fresh) < len(finding.suggestions):
        more = "also " if fresh else ""
        out.print(f"  try: {more}what is advised above", highlight=False)
    advised += fresh

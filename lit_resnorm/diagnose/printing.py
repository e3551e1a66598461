"""A diagnosis in the terminal: the table by depth, the findings, the rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from lit_resnorm.diagnose.report import (
    Curvature,
    DepthRow,
    Diagnosis,
    Finding,
    StableRates,
)
from lit_resnorm.errors import escaped

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
    out.print(_depth_table(diagnosis, shown))
    if len(shown) < len(diagnosis.rows):
        out.print(
            f"{len(shown)} of {len(diagnosis.rows)} rows; --json has all",
            style="dim",
            highlight=False,
        )
    if diagnosis.curvature is not None:
        out.print(escaped(_curvature_line(diagnosis.curvature)), highlight=False)
    if diagnosis.stable_rates is not None:
        out.print(escaped(_stable(diagnosis.stable_rates)), highlight=False)
    for finding in diagnosis.findings:
        _print_finding(out, finding)
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


def _depth_table(diagnosis: Diagnosis, rows: Sequence[DepthRow]) -> Table:
    count = diagnosis.settings["num_examples"]
    table = Table(
        title=f"{escaped(diagnosis.network)}, {count} examples",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    table.add_column("depth", justify="right")
    table.add_column("site", no_wrap=True, max_width=30)
    for name in ("on", "dead", "rank", "apart", "chi", "branch", "forward", "backward"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.depth),
            escaped(row.site),
            _number(row.activation_rate, "{:.2f}"),
            _number(row.dead, "{:.2f}"),
            _number(row.effective_rank),
            _number(row.separation, "{:.2g}"),
            _exponential(row.log_sensitivity),
            _number(row.branch_share, "{:.2g}"),
            _number(row.forward),
            _number(row.backward),
        )
    return table


def _number(value: float | None, form: str = "{:.3g}") -> str:
    return "" if value is None else form.format(value)


def _exponential(log: float) -> str:
    try:
        return f"{math.exp(log):.3g}"
    except OverflowError:
        return f"e^{log:.0f}"


def _curvature_line(found: Curvature) -> str:
    of_loss = f" ({found.loss})" if found.loss else ""
    line = (
        f"lambda_max {found.lambda_max:.3g}{of_loss}, mean {found.lambda_mean:.3g};"
        f" rate bound of {found.optimizer if found.binding else 'gradient descent'}"
        f" {found.bound:.3g}"
    )
    if found.rate is None or found.ratio is None:
        return line
    if not found.binding:
        return f"{line}; configured: {found.optimizer} at {found.rate:.3g}"
    return f"{line}; configured rate {found.rate:.3g}, {found.ratio:.3g} of the bound"


def _stable(found: StableRates) -> str:
    words = f"{found.num_steps} full-batch steps of {found.optimizer}: "
    stable, unstable = found.largest_stable, found.smallest_unstable
    parts = []
    if stable is not None:
        parts.append(f"stable up to {stable.rate:.3g}, {stable.in_bounds:.3g} bounds")
    if unstable is not None:
        parts.append(f"unstable from {unstable.rate:.3g}, {unstable.in_bounds:.3g}")
    bound = f" (bound {found.bound:.3g}, norm_mode {found.norm_mode})"
    return words + "; ".join(parts) + bound


def _print_finding(out: Console, finding: Finding) -> None:
    color = _COLORS[finding.severity]
    source = f" [dim]({escaped(finding.source)})[/]" if finding.source else ""
    out.print(
        f"[{color}]{finding.severity}[/]: {escaped(finding.words)}{source}",
        highlight=False,
    )
    for advice in finding.suggestions:
        mark = _PROVENANCE[advice.mark]
        words, source = escaped(advice.words), escaped(advice.source)
        out.print(f"  try: {words} [dim]({source}; {mark})[/]", highlight=False)

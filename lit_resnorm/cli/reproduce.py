"""`lit-resnorm reproduce`: run items of papers and print their verdicts."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from lit_resnorm.errors import UsageError
from lit_resnorm.papers.catalogue import all_items
from lit_resnorm.papers.data import check_data
from lit_resnorm.papers.item import MARKS, Item
from lit_resnorm.papers.printing import output, print_table
from lit_resnorm.papers.results import Results, results_key
from lit_resnorm.papers.running import Interrupted, curves, executor, run_cells

__all__ = ["reproduce", "reproduce_item"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def reproduce(args: Sequence[str]) -> int:
    """Run `lit-resnorm reproduce` and return its exit status.

    Args:
        args: The words after `reproduce`.

    Returns:
        0 where every verdict passed, 1 where one failed, 130 interrupted.

    Raises:
        UsageError: On an unknown item or option, an output folder that can't be
            written, data that isn't there, or a scheduler that doesn't answer.
    """
    options = _parser().parse_args(args)
    if options.list:
        _print_items(all_items().values())
        return 0
    items = _chosen(options.items)
    if options.scale == "full":
        for item in items:
            check_data(item.name, item.data)
    _check_writable(options.out)
    console = Console(stderr=True)
    verdicts = []
    try:
        with _executor(options.scheduler, options.jobs):
            for item in items:
                verdict = reproduce_item(
                    item, options.scale, options.out, options.seed, console=console
                )
                verdicts.append(verdict)
                if options.logger == "wandb":
                    from lit_resnorm.papers.wandb_items import log_item

                    log_item(verdict, Path(verdict["folder"]))
    except Interrupted as error:
        sys.stderr.write(f"{error}; the same command goes on from there\n")
        return 130
    if len(verdicts) > 1:
        _print_summary(verdicts)
    return 0 if all(verdict["passed"] for verdict in verdicts) else 1


def reproduce_item(
    item: Item,
    scale: str,
    out: Path,
    seed: int = 0,
    *,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run an item, or go on with it, and write and print its verdict.

    Args:
        item: The item.
        scale: `small` or `full`.
        out: Folder of all items.
        seed: Base seed.
        console: Where the progress bar goes; None: nowhere, and nothing is printed.

    Returns:
        The content of `verdict.json`, and its `folder`.

    Raises:
        Interrupted: On Ctrl-C.
    """
    settings = item.scales[scale]
    results = Results(out, item, results_key(item, settings, seed))
    if results.beside and console is not None:
        console.print(
            f"{out / item.name} holds results of other settings or another version: "
            f"kept, and run anew in {results.folder}"
        )
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    progress = Progress(
        *columns, console=console or Console(quiet=True), transient=True
    )
    with progress:
        task = progress.add_task(item.name)
        run_cells(
            item,
            settings,
            seed,
            results,
            on_done=lambda done, total: progress.update(
                task, completed=done, total=total
            ),
        )
    frame = curves(item, settings, results)
    verdict = results.write(
        frame,
        item.figure(frame, settings),
        item.checks(frame, settings),
        scale=scale,
        settings=settings,
        seed=seed,
        seconds=results.seconds(item.cells(settings)),
    )
    if console is not None:
        _print_verdict(verdict, results.folder)
    return {**verdict, "folder": str(results.folder)}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lit-resnorm reproduce",
        description="Run figures and tables of papers; print whether what must come "
        "out came out. An interrupted run goes on by the same command.",
    )
    parser.add_argument("items", nargs="*", metavar="ITEM", help="see --list; or all")
    parser.add_argument("--scale", choices=("small", "full"), default="small")
    parser.add_argument(
        "--out", type=Path, default=Path("reproduced"), help="folder of the results"
    )
    parser.add_argument("--list", action="store_true", help="print the items and leave")
    parser.add_argument("--seed", type=int, default=0, help="base of all seeds")
    parser.add_argument("--jobs", type=int, help="processes; default: one a core")
    parser.add_argument(
        "--scheduler", metavar="tcp://HOST:PORT", help="a Dask cluster to run on"
    )
    parser.add_argument(
        "--logger", choices=("wandb",), help="send verdicts and figures there too"
    )
    return parser


def _chosen(names: Sequence[str]) -> list[Item]:
    items = all_items()
    if not names:
        raise UsageError("reproduce: name an item, or all; --list shows them")
    if "all" in names:
        return list(items.values())
    for name in names:
        if name not in items:
            close = difflib.get_close_matches(name, items, cutoff=0.3)
            nearest = f"; nearest: {', '.join(close)}" if close else ""
            raise UsageError(f"reproduce: there is no item {name!r}{nearest}")
    return [items[name] for name in dict.fromkeys(names)]


def _check_writable(out: Path) -> None:
    probe = out / ".writable"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from error


def _executor(scheduler: str | None, jobs: int | None) -> Any:
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs must be at least 1; got {jobs}")
    return executor(scheduler, jobs)


def _print_items(items: Any) -> None:
    rows = [(item.name, item.title, MARKS[item.mark], item.source) for item in items]
    print_table(("item", "title", "mark", "source"), rows)


def _print_verdict(verdict: dict[str, Any], folder: Path) -> None:
    word = "passed" if verdict["passed"] else "FAILED"
    rows = [
        (
            check["name"],
            _shown(check["expected"]),
            _shown(check["measured"]),
            _shown(check["tolerance"]),
            "pass" if check["passed"] else "FAIL",
            check["mark"],
        )
        for check in verdict["checks"]
    ]
    title = escape(f"{verdict['item']}: {verdict['title']}: {word}")
    columns = ("check", "expected", "measured", "tolerance", "", "mark")
    print_table(columns, rows, title, names=False)
    output().print(f"{verdict['seconds']:.1f} s of work; {folder}")


def _shown(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"


def _print_summary(verdicts: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            verdict["item"],
            verdict["title"],
            f"{sum(c['passed'] for c in verdict['checks'])}/{len(verdict['checks'])}",
            f"{verdict['seconds']:.0f}",
            "passed" if verdict["passed"] else "FAILED",
        )
        for verdict in verdicts
    ]
    print_table(("item", "title", "checks", "seconds", "verdict"), rows)

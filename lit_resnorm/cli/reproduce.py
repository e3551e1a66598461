"""`lit-resnorm reproduce`: run items of papers and print their verdicts."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lit_resnorm.cli.arguments import CommandParser
from lit_resnorm.errors import (
    FAILURE,
    INTERRUPTED,
    SUCCESS,
    UsageError,
    nearest,
    printable,
    suggestion,
)
from lit_resnorm.papers.contents import ENTRIES
from lit_resnorm.papers.item import MARKS
from lit_resnorm.papers.printing import checks_held, outcome_word, print_table

__all__ = ["reproduce"]

_ADDRESS = re.compile(r"\w+://.+:\d+")


def reproduce(args: Sequence[str]) -> int:
    """Run `lit-resnorm reproduce` and return its exit status.

    Args:
        args: The words after `reproduce`.

    Returns:
        0 where no verdict failed, 1 where one did, 130 interrupted.

    Raises:
        UsageError: On an unknown item or option, an output folder that can't be
            written, data that isn't there, or a scheduler that doesn't answer.
    """
    options = _parser().parse_args(args)
    if options.list:
        _print_items()
        return SUCCESS
    names = _chosen(options.items)
    from lit_resnorm.papers.catalogue import load_item
    from lit_resnorm.papers.data import check_data
    from lit_resnorm.papers.running import Interrupted, reproduce_item

    items = [load_item(name) for name in names]
    if options.scale == "full":
        for item in items:
            check_data(item.name, item.data)
    console = Console(stderr=True)
    verdicts = []
    try:
        with _executor(options.scheduler, options.jobs):
            _check_folder_writable(options.out)
            for item in items:
                verdict = reproduce_item(
                    item, options.scale, options.out, options.seed, console=console
                )
                verdicts.append(verdict)
                if options.logger == "wandb":
                    from lit_resnorm.papers.wandb_items import log_item

                    log_item(verdict, Path(verdict["folder"]))
    except Interrupted as error:
        sys.stderr.write(f"{printable(error)}; the same command goes on from there\n")
        return INTERRUPTED
    if len(verdicts) > 1:
        _print_summary(verdicts)
    return FAILURE if any(one["passed"] is False for one in verdicts) else SUCCESS


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="lit-resnorm reproduce",
        description="Run figures and tables of papers; print whether what must come "
        "out came out. An interrupted run goes on by the same command.",
    )
    parser.add_argument("items", nargs="*", metavar="ITEM", help="see --list; or all")
    parser.add_argument(
        "--scale",
        choices=("small", "full"),
        default="small",
        help="small (default): narrower or fewer networks and seeds, on data that come"
        " with scikit-learn, in seconds to minutes an item on a laptop; full: the"
        " paper's own sizes and data ($LIT_RESNORM_DATA), in hours",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("reproduced"),
        metavar="DIR",
        help="folder of the results (default: reproduced, here); DIR/ITEM/ gets"
        " verdict.json, curves.csv, figure.png and figure.svg",
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


def _chosen(names: Sequence[str]) -> list[str]:
    if not names:
        raise UsageError("reproduce: name an item, or all; --list shows them")
    if "all" in names:
        return list(ENTRIES)
    for name in names:
        if name not in ENTRIES:
            close = suggestion(nearest(name, ENTRIES)) or "; --list shows them"
            raise UsageError(f"reproduce: there is no item {name!r}{close}")
    return list(dict.fromkeys(names))


def _check_folder_writable(out: Path) -> None:
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
    if scheduler is not None and not _ADDRESS.fullmatch(scheduler):
        raise UsageError(f"--scheduler {scheduler}: it must be tcp://HOST:PORT")
    from lit_resnorm.papers.running import executor

    return executor(scheduler, jobs)


def _print_items() -> None:
    rows = [(e.name, e.title, MARKS[e.mark], e.source) for e in ENTRIES.values()]
    print_table(("item", "title", "mark", "source"), rows)


def _print_summary(verdicts: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            verdict["item"],
            verdict["title"],
            checks_held(verdict["checks"], "/"),
            f"{verdict['seconds']:.0f}",
            outcome_word(verdict["passed"], "passed", "FAILED"),
        )
        for verdict in verdicts
    ]
    print_table(("item", "title", "checks", "seconds", "verdict"), rows)

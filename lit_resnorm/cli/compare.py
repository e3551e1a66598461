"""`lit-resnorm compare`: several runs side by side."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lit_resnorm.cli.arguments import CommandParser
from lit_resnorm.errors import UsageError, printable

if TYPE_CHECKING:
    from lit_resnorm.compare.recorded import Recorded
    from lit_resnorm.compare.sources import Skipped

PAGE = "compare.html"
_PROJECT = re.compile(r"[\w.-]+/[\w.-]+")
_RUNS = "runs"
"""Folder of runs, which is no entity of W&B's."""
_FILE_WIDTH = 250
"""Columns of an output that is no terminal: no line is cut."""


def compare(args: Sequence[str]) -> int:
    """Run `lit-resnorm compare` and return its exit status.

    Args:
        args: The words after `compare`.

    Returns:
        0 where runs were compared, 1 where there was none.

    Raises:
        UsageError: On an unknown option or config key, or an output file that can't be
            written.
    """
    options = _parser().parse_args(args)
    if options.workspace or options.report:
        return _saved_views(options)
    _check_there(options.runs)
    for option, path in (("--out", options.out), ("--json", options.json)):
        _check_file_writable(option, path)
    from lit_resnorm.compare.document import comparison_document
    from lit_resnorm.compare.sources import read_runs
    from lit_resnorm.compare.table import print_comparison

    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    with Console(stderr=True).status("reading runs"):
        runs, skipped = read_runs(options.runs)
    if not runs:
        sys.stderr.write(_nothing(skipped))
        return 1
    by = _checked_by(options.by, runs)
    document = comparison_document(runs, skipped, by, best=options.best)
    print_comparison(document, console)
    if options.json is not None:
        text = json.dumps(document, allow_nan=False)
        options.json.write_text(text + "\n", encoding="utf-8")
        sys.stdout.write(f"JSON: {printable(options.json)}\n")
    if options.out is not None:
        from lit_resnorm.compare.page import write_page

        write_page(document, options.out)
        sys.stdout.write(f"Page: {printable(options.out)}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="lit-resnorm compare",
        description="Put runs side by side: what differs in their configs, a table,"
        " what is pathological in which run and why, and one HTML page that needs no"
        " network.",
        epilog="Exit status: 0 compared, 1 nothing to compare, 2 wrong use. What can't"
        " be read is named and left out.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run directory; an offline W&B run; a folder that CSVLogger wrote; a"
        " folder of such ones; or, where there is no such path, entity/project or"
        " entity/project/run on the W&B server",
    )
    parser.add_argument(
        "--by",
        nargs="+",
        metavar="KEY",
        help="config keys by which runs are grouped and averaged, such as variant or"
        " model.optimizer.momentum; default: what may change training, but seeds. Put"
        " it after the runs",
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="the best accuracy, loss and gap of each run in the table, not the last",
    )
    parser.add_argument(
        "--out",
        type=_optional_path,
        default=Path(PAGE),
        metavar="FILE",
        help=f"the page (default: {PAGE} here, written anew; '' for none)",
    )
    parser.add_argument(
        "--json",
        type=_optional_path,
        metavar="FILE",
        help="everything compared, as JSON",
    )
    parser.add_argument(
        "--workspace",
        action="store_true",
        help="instead: save a W&B workspace in ENTITY/PROJECT with panels for our"
        " probes, or for those of runs on this machine that are named beside it;"
        " without a connection write what it would hold to a file",
    )
    parser.add_argument(
        "--report", action="store_true", help="likewise, a W&B report (a draft)"
    )
    return parser


def _optional_path(text: str) -> Path | None:
    return Path(text) if text else None


def _check_there(words: Sequence[str]) -> None:
    """Raise UsageError for a path that isn't there and can't be meant as a project."""
    from lit_resnorm.compare.online import ADDRESS

    for word in words:
        first = Path(word).parts[:1]
        local = word.endswith("/") or first == (_RUNS,) or Path(*first).is_dir()
        if not Path(word).exists() and (local or not ADDRESS.fullmatch(word)):
            raise UsageError(f"compare: {word}: no such file or directory")


def _check_file_writable(option: str, path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} {path}: it is a directory")
    try:
        # appending nothing leaves a file as it is
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from error


def _nothing(skipped: Sequence[Skipped]) -> str:
    reasons = "; ".join(f"{one['name']}: {one['reason']}" for one in skipped)
    return f"lit-resnorm: error: nothing to compare ({printable(reasons)})\n"


def _checked_by(by: Sequence[str] | None, runs: Sequence[Recorded]) -> list[str] | None:
    if by is None:
        return None
    from lit_resnorm.compare.config import known_key

    keys = {key for run in runs for key in run.config}
    for key in by:
        if known_key(key) not in keys:
            close = [k for k in sorted(keys) if k.rpartition(".")[2] in key.split(".")]
            known = f"; did you mean {' or '.join(close[:3])}?" if close else ""
            raise UsageError(f"--by {key}: no run has this config key{known}")
    return list(by)


def _saved_views(options: argparse.Namespace) -> int:
    from lit_resnorm.compare.columns import declared_of
    from lit_resnorm.compare.shipped import shipped_quantities
    from lit_resnorm.compare.sources import read_runs
    from lit_resnorm.compare.workspace import save_views

    paths = [word for word in options.runs if Path(word).exists()]
    projects = [word for word in options.runs if word not in paths]
    for word in projects or paths:
        if Path(word).exists() or not _PROJECT.fullmatch(word):
            raise UsageError(f"--workspace, --report: {word!r} is no ENTITY/PROJECT")
    runs, skipped = read_runs(paths)
    for one in skipped:
        line = printable(f"skipped {one['name']}: {one['reason']}")
        sys.stderr.write(f"{line}\n")
    found = [one for run in runs for one in run.quantities.values()]
    declared = declared_of(found or shipped_quantities().values())
    for word in projects:
        save_views(
            word,
            declared,
            workspace=options.workspace,
            report=options.report,
        )
    return 0

"""Find and read the runs that a user names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lit_resnorm.compare.config import flat_config
from lit_resnorm.compare.recorded import Recorded, series_of_rows
from lit_resnorm.run_files import read_run

Skipped = dict[str, str]
"""`name` and `reason` of what could not be read."""


def read_runs(words: Iterable[str]) -> tuple[list[Recorded], list[Skipped]]:
    """Return the runs that words name, and what could not be read."""
    runs: list[Recorded] = []
    skipped: list[Skipped] = []
    for word in words:
        try:
            runs.append(read_directory(Path(word)))
        except (OSError, ValueError) as error:
            skipped.append({"name": word, "reason": str(error)})
    return runs, skipped


def read_directory(path: Path) -> Recorded:
    """Return the run of a run directory.

    Raises:
        ValueError: If it is none, or damaged.
    """
    run = read_run(path)
    series, depth = series_of_rows(run.history.to_dict("records"))
    return Recorded(
        name=run.name,
        source=str(path),
        kind="directory",
        status=run.summary["status"],
        config=flat_config(run.config),
        verdicts=run.summary["verdicts"],
        seconds=run.summary.get("seconds"),
        series=series,
        depth=depth,
    )

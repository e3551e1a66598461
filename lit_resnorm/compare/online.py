"""Runs on a W&B server."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lit_resnorm.compare.config import flat_config, parted_config
from lit_resnorm.compare.depth_tables import DepthTable, json_table
from lit_resnorm.compare.recorded import Recorded, recorded_of_rows
from lit_resnorm.compare.thinning import SHOWN_STEPS, even_places
from lit_resnorm.runs.files import STEP_KEY
from lit_resnorm.runs.json_lines import flat_values, whole_step
from lit_resnorm.runs.wandb_offline import table_file

ADDRESS = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")
"""`entity/project` or `entity/project/run`."""

_STATES = {
    "finished": "finished",
    "running": "interrupted",
    "killed": "interrupted",
    "preempted": "interrupted",
    "preempting": "interrupted",
}
_TIMEOUT_SECONDS = 30


def online_runs(address: str) -> list[tuple[str, Any]]:
    """Return the runs of a project, or the one run that an address names.

    Returns:
        The address of each, and the run of `wandb.Api`.

    Raises:
        ValueError: If the server can't be asked, or has no such run.
    """
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError("it needs wandb, which is not installed") from error
    try:
        if not wandb.login(prompt=False):
            raise ValueError("no API key is configured: see `wandb login`")
        api = wandb.Api(timeout=_TIMEOUT_SECONDS)
        if address.count("/") == 2:
            return [(address, api.run(address))]
        runs = [(f"{address}/{run.id}", run) for run in api.runs(address)]
    except (wandb.Error, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"no such file or directory, and the W&B server gave nothing: {reason}"
        ) from error
    if not runs:
        raise ValueError("the project holds no runs")
    return runs


def recorded_online(run: Any, source: str) -> Recorded:
    """Return a run of `wandb.Api`.

    Args:
        run: With `id`, `name`, `state`, `config`, `summary` and `scan_history()`.
        source: Its address.
    """
    summary = dict(run.summary)
    status = _STATES.get(run.state, "failed")
    config, quantities = parted_config(
        {k: v for k, v in run.config.items() if not k.startswith("_")}
    )
    said = summary.get("status")
    files: dict[str, list[tuple[int, str]]] = {}
    return recorded_of_rows(
        _history_rows(run.scan_history(), files),
        name=run.name or run.id,
        source=source,
        kind="online",
        config=flat_config(config),
        summary={
            "status": status if said in (None, "running") else said,
            "seconds": (summary.get("_wandb") or {}).get("runtime"),
        },
        quantities=quantities,
        # which are known once the rows have been read
        tables=_fetched_tables(run, files),
    )


def _fetched_tables(
    run: Any, files: Mapping[str, list[tuple[int, str]]]
) -> Iterator[DepthTable]:
    """Yield the tables by site, of each probe so many as a page shows steps."""
    with TemporaryDirectory() as folder:
        for key, found in files.items():
            for place in even_places(len(found), SHOWN_STEPS):
                step, path = found[place]
                run.file(path).download(root=folder, replace=True)
                yield json_table(step, key, Path(folder) / path)


def _history_rows(
    history: Iterable[dict[str, Any]], files: dict[str, list[tuple[int, str]]]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a history; note step and place of tables by site."""
    for row in history:
        key = STEP_KEY if row.get(STEP_KEY) is not None else "_step"
        values = {
            key: value
            for key, value in flat_values(row).items()
            if key != STEP_KEY and not key.startswith("_")
        }
        step = whole_step(key, row.get(key, 0))
        for name, value in values.items():
            if path := table_file(name, value):
                files.setdefault(name, []).append((step, path))
        yield {**values, "step": step}

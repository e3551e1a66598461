"""Runs on a W&B server."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lit_resnorm.compare.config import flat_config, parted_config
from lit_resnorm.compare.recorded import Recorded, recorded_of_rows
from lit_resnorm.runs.files import STEP_KEY
from lit_resnorm.runs.json_lines import flat_values, whole_step

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
    return recorded_of_rows(
        _history_rows(run.scan_history()),
        name=run.name or run.id,
        source=source,
        kind="online",
        config=flat_config(config),
        summary={
            "status": status if said in (None, "running") else said,
            "seconds": (summary.get("_wandb") or {}).get("runtime"),
        },
        quantities=quantities,
    )


def _history_rows(history: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for row in history:
        key = STEP_KEY if row.get(STEP_KEY) is not None else "_step"
        values = {
            key: value
            for key, value in flat_values(row).items()
            if key != STEP_KEY and not key.startswith("_")
        }
        yield {**values, "step": whole_step(key, row.get(key, 0))}

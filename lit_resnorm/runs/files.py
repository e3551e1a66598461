"""The files of a run directory: their names, their form, and how to read them back.

`config.yaml` holds the resolved configuration; `history.jsonl` one flat object a
line and logging event (`step`, `epoch`, and each value under its own name);
`tables/<key>.jsonl` records that are no scalars (`step`, `columns`, `data`);
`figures/<key>.png` the newest picture of a key; `summary.json` how the run ended, and
what its probes declared of their values (`quantities`, see `lit_resnorm.quantities`).
NaN and infinities are the strings `"NaN"`, `"Infinity"` and `"-Infinity"`.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_resnorm.runs.json_lines import NOT_FINITE, plain, read_rows
from lit_resnorm.runs.reading import parsed_json, read_text, read_yaml

if TYPE_CHECKING:
    import pandas as pd

HISTORY = "history.jsonl"
SUMMARY = "summary.json"
CONFIG = "config.yaml"
TABLES = "tables"
FIGURES = "figures"
CHECKPOINTS = "checkpoints"
RUN_DIR = "LIT_RESNORM_RUN_DIR"
"""Tells the processes that Lightning starts for DDP which directory rank 0 made."""
FORMER_PATHS = {
    "lit_resnorm.sampling.StepSeed": "lit_resnorm.data.StepSeed",
    "lit_resnorm.wandb_history.WandbHistory": "lit_resnorm.runs.WandbHistory",
    **{
        f"lit_resnorm_callbacks.probe_batch.{name}": (
            f"lit_resnorm.measures.passes.batches.{name}"
        )
        for name in ("network_output", "targets_of")
    },
    **{
        f"lit_resnorm_callbacks.{module}": f"lit_resnorm_callbacks.{name}"
        for module, name in (
            ("base.Cadence", "Cadence"),
            ("cadence.Cadence", "Cadence"),
            ("stability_probe.StabilityProbe", "StabilityProbe"),
        )
    },
}
"""What configs of earlier versions name, and where it is now."""
STEP_KEY = "trainer/global_step"
"""Key of a value's step in W&B runs, ours and Lightning's."""
RESUMED = "resumed_from_step"
"""Key of a W&B config: the step of the checkpoint with which a process began."""
PENDING = "pending"
"""Key of a checkpoint: what the run had still to do at its step."""
LOGGED = "logged"
"""Key of a checkpoint: for each `RunHistory` the number of its rows and a checksum."""


def installed_versions(*packages: str) -> dict[str, str]:
    """Return the version of Python and of each package that made a run's numbers."""
    versions = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **versions}


@dataclass(frozen=True)
class Run:
    """A run that was read back.

    Attributes:
        name: Name of the run.
        path: Where it was read.
        config: Configuration as every logger gets it: nested under `config`, and
            flat `variant`, `depth`, `width`, `data`, `optimizer`, `lr`,
            `batch_size`, `seed`; other projects' keys as they were logged.
        history: One row a logged line: `step`, `epoch`, and a column a value.
        summary: `status`, `values`, `verdicts`, `seconds`, `versions`, as far as
            known. The status of a run that didn't come to an end (it was killed, or
            still runs) is `interrupted`.
    """

    name: str
    path: Path
    config: dict[str, Any]
    history: pd.DataFrame
    summary: dict[str, Any]


@dataclass(frozen=True)
class RunRows:
    """A run as its files hold it.

    Attributes:
        name: As `Run.name`; `path` and `config` likewise.
        path: Where it was read.
        config: Its configuration.
        rows: The lines of the history: `step`, `epoch` and values; NaN and infinities
            are words.
        summary: As `Run.summary`, without `values`.
        tables: Of an offline W&B run the tables by site: step, key and file.
    """

    name: str
    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    tables: Sequence[tuple[int, str, Path]] = ()

    def run(self) -> Run:
        """Return the same with a frame for the history, and a summary of its values."""
        # a summary that a kill left behind may be older than the history
        summary = {**self.summary, "values": summarise(self.rows)}
        return Run(self.name, self.path, self.config, history_frame(self.rows), summary)


def read_run(path: str | os.PathLike[str]) -> Run:
    """Return the run that a run directory holds.

    A last line that a kill cut short is left out.

    Raises:
        ValueError: If `path` is no run directory, or a file in it is damaged.
    """
    return read_run_rows(path).run()


def read_run_rows(path: str | os.PathLike[str]) -> RunRows:
    """Return what `read_run` does as plain rows, which is quicker.

    Raises:
        ValueError: As there.
    """
    path = Path(path)
    if not (path / HISTORY).is_file():
        raise ValueError(f"{path} is no run directory: it has no {HISTORY}")
    return RunRows(
        path.resolve().name,
        path,
        read_logged_config(path),
        read_rows(path / HISTORY),
        read_summary(path),
    )


def read_summary(path: Path) -> dict[str, Any]:
    """Return how a run ended, as its directory says; `interrupted` where it doesn't.

    Raises:
        ValueError: If its `summary.json` is damaged.
    """
    file = path / SUMMARY
    summary: dict[str, Any] = {"status": "interrupted", "verdicts": {}}
    if os.path.lexists(file):
        try:
            read = parsed_json(read_text(file))
            if not isinstance(read, dict):
                raise ValueError("it holds no object")
            summary |= read
            check_summary(summary)
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    if summary["status"] == "running":
        summary["status"] = "interrupted"
    return summary


def check_summary(summary: Mapping[str, Any]) -> None:
    """Raise ValueError unless a summary says what one says, as far as it does."""
    for key, kind in _SUMMARY.items():
        if key in summary and not isinstance(summary[key], kind):
            raise ValueError(f"{key} is {summary[key]!r}")
    for key, word in summary.get("verdicts", {}).items():
        if not isinstance(word, str):
            raise ValueError(f"the verdict of {key} is {word!r}")
    try:
        finite = math.isfinite(summary.get("seconds") or 0)
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError(f"seconds is {summary['seconds']!r}")


_SUMMARY = {"status": str, "verdicts": Mapping, "seconds": int | float | None}
"""Kinds of what a whole summary holds."""


def read_logged_config(path: Path) -> dict[str, Any]:
    """Return the config in a run directory as loggers got it, empty where none is.

    Raises:
        ValueError: If its `config.yaml` is damaged.
    """
    file = path / CONFIG
    try:
        return logged_config(read_config(file)) if os.path.lexists(file) else {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def read_config(path: Path) -> dict[str, Any]:
    """Return a `config.yaml` as plain dicts, lists and scalars."""
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise ValueError("no mapping")
    return with_present_paths(config)


def with_present_paths(config: Any) -> Any:
    """Return what a config holds, with classes named as they are in this version."""
    if isinstance(config, dict):
        return {key: with_present_paths(value) for key, value in config.items()}
    if isinstance(config, list):
        return [with_present_paths(value) for value in config]
    return FORMER_PATHS.get(config, config) if isinstance(config, str) else config


def logged_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run config that loggers get for a resolved command-line config.

    Nested as in `config.yaml` under `config`, and flat under the names by which runs
    are grouped and filtered. A mapping without a `model` that names a class is
    another project's, and is returned as it is.
    """
    model = config.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("class_path"), str):
        return dict(config)
    data = _inner(config, "data")
    init = _inner(model, "init_args")
    optimizer = _inner(init, "optimizer")
    stages = init.get("stages")
    depth, width = init.get("depth"), init.get("width")
    if depth is None and isinstance(stages, list):
        depth = sum(stage for stage in stages if isinstance(stage, int)) or None
    return {
        "variant": _class_name(model),
        "depth": depth,
        "width": init.get("widths") if width is None else width,
        "data": _class_name(data),
        "optimizer": _class_name(optimizer),
        "lr": _inner(optimizer, "init_args").get("lr"),
        "batch_size": _inner(data, "init_args").get("batch_size"),
        "seed": config.get("seed_everything"),
        "config": dict(config),
    }


def _inner(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the mapping under a key, empty where there is something else."""
    value = values.get(key)
    return value if isinstance(value, Mapping) else {}


def _class_name(component: Mapping[str, Any]) -> str | None:
    path = component.get("class_path")
    return path.rpartition(".")[2] if isinstance(path, str) and path else None


def history_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return rows as a frame with `step`, `epoch` and a column a value."""
    import pandas as pd

    read = [
        {
            key: NOT_FINITE.get(value, value) if isinstance(value, str) else value
            for key, value in row.items()
        }
        for row in rows
    ]
    return pd.DataFrame(read) if read else pd.DataFrame(columns=["step", "epoch"])


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return `{key: {last, min, max, step_of_min, step_of_max}}` of a history.

    Minimum and maximum leave NaN out (None where there is nothing else); of equal
    values the first counts.
    """
    series: dict[str, list[tuple[int, Any]]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("step", "epoch"):
                series.setdefault(key, []).append((row["step"], value))
    return {key: _extremes(points) for key, points in series.items()}


def _extremes(points: Sequence[tuple[int, Any]]) -> dict[str, Any]:
    numbers = [
        (NOT_FINITE[value] if isinstance(value, str) else value, step)
        for step, value in points
        if value is not None and value != "NaN"
    ]
    if not numbers:
        empty = ("min", "max", "step_of_min", "step_of_max")
        return {"last": points[-1][1], **dict.fromkeys(empty)}
    low = min(numbers, key=lambda number: number[0])
    high = max(numbers, key=lambda number: number[0])
    return {
        "last": points[-1][1],
        "min": plain(low[0]),
        "max": plain(high[0]),
        "step_of_min": low[1],
        "step_of_max": high[1],
    }

"""Running an item's cells: processes here, or a Dask cluster, with equal numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, cpu_count, delayed, parallel_config
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from lit_resnorm.errors import escaped
from lit_resnorm.papers.item import Cell, Item, Row, Settings
from lit_resnorm.papers.printing import print_verdict
from lit_resnorm.papers.results import Results, results_key

__all__ = ["Interrupted", "curves", "executor", "reproduce_item", "run_cells"]

TIMEOUT_S = 10
SECONDS_BETWEEN_LINES = 10.0
"""Of progress, where output is no terminal."""
_Timed = tuple[Cell, Sequence[Row], float]


class Interrupted(KeyboardInterrupt):
    """A run stopped by Ctrl-C.

    Args:
        item: The item's name.
        done: Number of finished cells.
        total: Number of all cells.
    """

    def __init__(self, item: str, done: int, total: int) -> None:
        super().__init__(f"{item}: {done} of {total} cells are done")


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
            f"{escaped(out / item.name)} holds results of other settings or another"
            f" version: kept, and run anew in {escaped(results.folder)}"
        )
    with _progress(item.name, console or Console(quiet=True)) as on_done:
        run_cells(item, settings, seed, results, on_done=on_done)
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
        if lost := _num_diverged(frame):
            console.print(f"{item.name}: {lost} of {len(frame)} trainings diverged")
        print_verdict(verdict, results.folder)
    return {**verdict, "folder": str(results.folder)}


@contextmanager
def _progress(name: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Yield what shows how many cells are finished: a bar, or lines now and then."""
    said = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            console.print(f"{name}: {done} of {total} cells")

    if not console.is_terminal:
        yield say
        return
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _num_diverged(frame: pd.DataFrame) -> int:
    """Return how many trainings ended with an infinite loss, as some are meant to."""
    losses = frame.filter(["loss"]).select_dtypes("number")
    return int(np.isinf(losses.to_numpy()).sum())


def run_cells(
    item: Item,
    settings: Settings,
    seed: int,
    results: Results,
    *,
    on_done: Callable[[int, int], object],
) -> None:
    """Run the cells that aren't finished, in the processes of `executor`.

    Each is kept as it finishes.

    Args:
        item: The item.
        settings: Its settings.
        seed: Base seed.
        results: Where finished cells are kept.
        on_done: Called with the numbers of finished and of all cells.

    Raises:
        Interrupted: On Ctrl-C; finished cells stay.
    """
    cells = item.cells(settings)
    waiting = [cell for cell in cells if results.finished(cell) is None]
    done = len(cells) - len(waiting)
    on_done(done, len(cells))
    tasks = (delayed(_timed)(item.run, dict(settings), cell, seed) for cell in waiting)
    try:
        if not waiting:
            return
        finished = Parallel(return_as="generator_unordered")(tasks)
        for cell, rows, seconds in cast(Iterator[_Timed], finished):
            results.finish(cell, rows, seconds)
            done += 1
            on_done(done, len(cells))
    except KeyboardInterrupt:
        raise Interrupted(item.name, done, len(cells)) from None


def _timed(
    run: Callable[[Settings, Cell, int], Sequence[Row]],
    settings: Settings,
    cell: Cell,
    seed: int,
) -> _Timed:
    # One thread whichever process runs it: sums, and so numbers, depend on how many.
    torch.set_num_threads(1)
    begin = time.perf_counter()
    rows = run(settings, cell, seed)
    return cell, rows, time.perf_counter() - begin


def curves(item: Item, settings: Settings, results: Results) -> pd.DataFrame:
    """Return the rows of all cells in the cells' order, each with its cell's values.

    Raises:
        ValueError: If a cell isn't finished.
    """
    rows: list[dict[str, Any]] = []
    for cell in item.cells(settings):
        finished = results.finished(cell)
        if finished is None:
            raise ValueError(f"{item.name}: cell {dict(cell)} isn't finished")
        rows += [{**cell, **row} for row in finished]
    return pd.DataFrame(rows)


@contextmanager
def executor(scheduler: str | None = None, jobs: int | None = None) -> Iterator[None]:
    """Make `run_cells` use processes on this machine, or those of a Dask cluster.

    Args:
        scheduler: Address of a Dask scheduler, `tcp://HOST:PORT`; None: this machine.
        jobs: Number of processes here; None: one a core.

    Raises:
        ValueError: If Dask isn't installed, or the scheduler doesn't answer.
    """
    if scheduler is None:
        with parallel_config("loky", n_jobs=jobs or cpu_count()):
            yield
        return
    try:
        from distributed import Client  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--scheduler {scheduler}: Dask isn't installed; "
            "pip install 'lit-resnorm[cluster]' brings it"
        ) from error
    try:
        client = Client(scheduler, timeout=TIMEOUT_S)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--scheduler {scheduler}: no answer within {TIMEOUT_S} s ({error})"
        ) from error
    with client, parallel_config("dask"):
        yield

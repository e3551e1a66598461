"""Real clusters, interrupts and recorded runs of `lit-resnorm reproduce`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from lit_resnorm.cli import main
from lit_resnorm.runs.wandb_offline import read_offline_wandb

pytestmark = pytest.mark.slow
ITEM = "furusho_sep.angles"
NUM_CELLS = 15
BIN = Path(sys.executable).parent


def started(args, folder, name):
    """Start a command in a process group of its own; its words go to a file."""
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            args, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )


def reproduce(*args):
    return [str(BIN / "lit-resnorm"), "reproduce", ITEM, *map(str, args)]


def cells(out):
    """Return when each finished cell was written."""
    folder = out / ITEM / "cells"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < end, f"nothing within {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path):
    """A scheduler on the loopback and two worker processes."""
    if find_spec("distributed") is None:
        pytest.skip("Dask isn't installed: the extra cluster")
    dask, place = str(BIN / "dask"), tmp_path / "scheduler.json"
    options = ["--host", "127.0.0.1", "--no-dashboard"]
    scheduler = started(
        [dask, "scheduler", *options, "--port", "0", "--scheduler-file", str(place)],
        tmp_path,
        "scheduler",
    )
    processes = [scheduler]
    try:
        wait_for(lambda: place.exists() and place.read_text().strip(), scheduler)
        address = json.loads(place.read_text())["address"]
        words = [dask, "worker", address, *options, "--no-nanny", "--nthreads", "1"]
        workers = [started(words, tmp_path, f"worker{i}") for i in range(2)]
        processes += workers
        yield address, workers
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_cluster_that_loses_a_worker_gives_the_numbers_of_processes(
    tmp_path, cluster
):
    address, workers = cluster
    far, here = tmp_path / "far", tmp_path / "here"
    words = reproduce("--out", far, "--scheduler", address)
    run = started(words, tmp_path, "run")
    try:
        wait_for(lambda: len(cells(far)) >= 2, run)
        workers[0].send_signal(signal.SIGKILL)
        workers[0].wait()
        left = NUM_CELLS - len(cells(far))
        assert run.wait(300) == 0, (tmp_path / "run.log").read_text()
    finally:
        run.kill()
    assert left > 1
    assert workers[1].poll() is None
    subprocess.run(reproduce("--out", here, "--jobs", 2), check=True, timeout=300)
    tables = [(out / ITEM / "curves.csv").read_bytes() for out in (far, here)]
    assert tables[0] == tables[1]


def test_ctrl_c_says_what_is_done_and_the_same_command_goes_on(tmp_path):
    out = tmp_path / "out"
    words = reproduce("--out", out, "--jobs", 2)
    run = started(words, tmp_path, "first")
    try:
        wait_for(lambda: len(cells(out)) >= 2, run)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all its processes
        status = run.wait(60)
    finally:
        run.kill()
    kept = cells(out)
    said = (tmp_path / "first.log").read_text().strip().splitlines()
    assert status == 130, said
    *progress, last = said
    assert last == (
        f"{ITEM}: {len(kept)} of {NUM_CELLS} cells are done; "
        "the same command goes on from there"
    )
    told = rf"{re.escape(ITEM)}: \d+ of {NUM_CELLS} cells"
    assert all(re.fullmatch(told, line) for line in progress)
    assert 2 <= len(kept) < NUM_CELLS
    assert not (out / ITEM / "verdict.json").exists()
    assert subprocess.run(words, check=False, timeout=300).returncode == 0
    after = cells(out)
    assert len(after) == NUM_CELLS
    assert {name: after[name] for name in kept} == kept


def test_offline_wandb_has_the_verdict(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    item = "furusho2020.fig1"
    args = ["reproduce", item, "--out", str(tmp_path), "--jobs", "1"]
    assert main([*args, "--logger", "wandb"]) == 0
    (run,) = read_offline_wandb(tmp_path / item)
    verdict = json.loads((tmp_path / item / "verdict.json").read_text())
    assert run.name == f"{item}-small"
    assert run.config["item"] == item
    assert run.config["settings"] == verdict["settings"]
    assert run.config["seeds"] == {"base": 0}
    assert run.history["passed"].tolist() == [True]
    media = tmp_path / item / "wandb" / "latest-run" / "files" / "media"
    (checks,) = media.glob("table/checks*.json")
    written = json.loads(checks.read_text())
    names = written["columns"].index("name")
    assert [row[names] for row in written["data"]] == [
        check["name"] for check in verdict["checks"]
    ]
    (curves,) = media.glob("table/curves*.json")
    rows = (tmp_path / item / "curves.csv").read_text().strip().splitlines()[1:]
    assert len(json.loads(curves.read_text())["data"]) == len(rows)
    assert [path.suffix for path in media.glob("images/figure*")] == [".png"]

"""Runs of the command line in forked processes that are killed at a named moment.

The parent has imported everything, so that a process starts in no time. A moment is a
call of some function, counted from 1, before or after which the process and all that
it has forked are killed with the hard signal.
"""

import contextlib
import ctypes
import functools
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

from lit_resnorm.cli import main
from lit_resnorm.runs.files import FIGURES, HISTORY, SUMMARY, TABLES
from lit_resnorm.runs.json_lines import read_rows


class Moment(NamedTuple):
    """The `count`-th call of a function, named by its module and its path therein."""

    function: str
    count: int = 1
    after: bool = False


def kill_all():
    """Kill this process group with the hard signal."""
    os.killpg(0, signal.SIGKILL)


def forked(function, *, said):
    """Return the exit status of `function()` in a forked process, a signal negative.

    Args:
        function: Returns the process's exit status.
        said: File that gets what it writes.
    """
    pid = started(function, said=said)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def started(function, *, said):
    """Return the process, of a group of its own, in which `function` goes on."""
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    # A look for devices in the parent marks forks as bad for CUDA, which isn't used.
    torch.cuda._is_in_bad_fork = lambda: False
    try:
        os.setpgid(0, 0)
        with Path(said).open("a") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        status = function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def fit(folder, *words, at=None, act=kill_all, before=None):
    """Return the exit status of a `fit` in `folder`, which `act` may interrupt.

    Args:
        folder: Holds `small.yaml`; gets what is said in `said.txt`.
        words: Further words of the command line.
        at: A `Moment`; None: the run is left alone.
        act: What is done then.
        before: What is done first, in the process.
    """

    def run():
        os.chdir(folder)
        if before is not None:
            before()
        if at is not None:
            interrupt(at, act)
        return main(["fit", "--config", "small.yaml", *words])

    return forked(run, said=folder / "said.txt")


def obey_modes():
    """Have this process keep to the modes of files, though it is root's."""
    if os.geteuid():
        return
    version = (ctypes.c_uint32 * 2)(0x20080522, 0)  # capabilities of 64 bits, own
    effective_permitted_inheritable = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(version, effective_permitted_inheritable):
        raise OSError(ctypes.get_errno(), "capset")


def interrupt(moment, act):
    """Have `act` called at a moment of this process."""
    module, _, path = moment.function.partition(":")
    place = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        place = getattr(place, part)
    own = vars(place)[name]
    function = own.__func__ if isinstance(own, staticmethod) else own
    calls = 0

    @functools.wraps(function)
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        hit = calls == moment.count
        if hit and not moment.after:
            act()
        result = function(*args, **kwargs)
        if hit and moment.after:
            act()
        return result

    setattr(place, name, staticmethod(counted) if own is not function else counted)


def recorded(run):
    """Return what a run directory says, times aside."""
    return {
        "history": [_untimed(row) for row in read_rows(run / HISTORY)],
        "tables": {
            str(path.relative_to(run)): read_rows(path)
            for path in run.glob(f"{TABLES}/**/*.jsonl")
        },
        "figures": {
            str(path.relative_to(run)): path.read_bytes()
            for path in run.glob(f"{FIGURES}/**/*")
            if path.is_file()
        },
        "summary": _summary(run),
    }


def _untimed(values):
    return {k: v for k, v in values.items() if not k.endswith("/seconds")}


def _summary(run):
    summary = json.loads((run / SUMMARY).read_text())
    with contextlib.suppress(KeyError):
        del summary["seconds"]
    return {**summary, "values": _untimed(summary["values"])}

"""One writer a run: a lock on its directory, which ends with the process.

The kernel lets go of it when the process ends in whatever way, a kill included. What
the process forks (loader workers, ranks) doesn't keep it.
"""

from __future__ import annotations

import errno
import os
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
"""File of a run directory that its writer holds; it names the process."""

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


@dataclass
class _Held:
    file: int | None
    times: int = 1


_locks: dict[Path, _Held] = {}


def hold(run: Path) -> None:
    """Keep other processes from writing a run directory, until as many `release`s.

    A process that the holder started as a rank of its own may write, too.

    Args:
        run: The directory, which exists.

    Raises:
        ValueError: If another process holds it.
        OSError: If it can't be written.
    """
    key = run.resolve()
    if key in _locks:
        _locks[key].times += 1
    else:
        _locks[key] = _Held(_locked(run))


def release(run: Path) -> None:
    """Undo one `hold`; without one, do nothing."""
    key = run.resolve()
    held = _locks.get(key)
    if held is None:
        return
    held.times -= 1
    if not held.times:
        del _locks[key]
        if held.file is not None:
            os.close(held.file)


def _locked(run: Path) -> int | None:
    path = run / LOCK
    if not os.access(run, os.W_OK):  # a lock that is there may be written all the same
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(run))
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(file, run):
                os.close(file)
                return None
        except BaseException:
            os.close(file)
            raise
        # the holder before may have taken the file away with the directory
        try:
            is_there = os.path.samestat(os.fstat(file), path.stat())
        except FileNotFoundError:
            is_there = False
        if is_there:
            break
        os.close(file)
    os.ftruncate(file, 0)
    os.write(file, f"{os.getpid()} {socket.gethostname()}\n".encode())
    return file


def _lock(file: int, run: Path) -> bool:
    """Lock an open file; return False where that can't or needn't be."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        words = os.read(file, 300).decode(errors="replace").split()
        if words[:1] == [str(os.getppid())]:
            return False  # a rank of the process that holds it
        who = f"process {words[0]} on {words[1]}" if len(words) > 1 else "a process"
        raise ValueError(
            f"{run} is being written by {who}: wait until it ends, or choose another"
            " --run"
        ) from error
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        warnings.warn(
            f"{run} lies where files can't be locked ({error.strerror}): see that one"
            " process writes it",
            stacklevel=2,
        )
        return False
    return True


def _in_child() -> None:
    for held in _locks.values():
        if held.file is not None:
            os.close(held.file)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)

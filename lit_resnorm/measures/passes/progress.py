"""How far a long measurement has come, told to whoever watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Watcher = Callable[[float], None]
"""Takes the work that was done since the last call, in passes forward."""

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def advanced(passes: float) -> None:
    """Tell the watcher of work that is done.

    Args:
        passes: In passes forward on the whole batch; what takes longer counts as more.
    """
    if (watcher := _watcher.get()) is not None:
        watcher(passes)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` of the work that is done within.

    Args:
        watcher: Called on every rank as often as this rank works.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)

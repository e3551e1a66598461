"""Passes without activation checkpointing.

A checkpointed function runs a second time in the backward pass, outside of what the
first run was made in: batch norms would take other statistics, and the reentrant kind
works with `backward()` alone. Values and gradients are the same without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint

# What `checkpoint` runs around a function, of the two kinds, by torch's version.
_GENERATORS = (
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)


class _Plain:
    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:  # noqa: ARG004
        return function(*args)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:  # noqa: ARG001
    yield


@contextmanager
def uncheckpointed() -> Iterator[None]:
    """Run what `torch.utils.checkpoint` would run twice once, as it stands."""
    substitutes: dict[str, Any] = dict.fromkeys(_GENERATORS, _nothing_around)
    substitutes["CheckpointFunction"] = _Plain
    own = {name: getattr(checkpoint, name, None) for name in substitutes}
    own = {name: value for name, value in own.items() if value is not None}
    for name in own:
        setattr(checkpoint, name, substitutes[name])
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(checkpoint, name, value)

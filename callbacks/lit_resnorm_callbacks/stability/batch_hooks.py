"""Sees whether hooks that change batches before the step keep their rows apart."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_resnorm.measures.passes.batches import joined, num_rows, take_rows
from lit_resnorm.measures.passes.kept_state import data_kept, state_kept
from lit_resnorm.measures.passes.random_states import random_states_kept
from lit_resnorm_callbacks.stability.collation import NUM_CHECKED, other_rows_stay

_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")


class WatchedBatchHooks:
    """Sees whether replacing an example of a training batch changes other rows.

    A hook that mixes or sorts rows makes it impossible to say which row lacks when an
    example is left out. The first batches are tried.

    Attributes:
        found: Name of a hook by which other rows changed; None: by none.
    """

    def __init__(self) -> None:
        self.found: str | None = None
        self._put_back: list[Callable[[], Any]] = []

    def watch(self, trainer: Trainer) -> None:
        """Have the hooks of the module and the data module watched."""
        self.release()
        self.found = None
        for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None)):
            for name in _HOOKS:
                if owner is not None and is_overridden(name, owner):
                    self._watch(trainer, owner, name)

    def release(self) -> None:
        """Give the owners their hooks back."""
        while self._put_back:
            self._put_back.pop()()

    def _watch(self, trainer: Trainer, owner: Any, name: str) -> None:
        hook = getattr(owner, name)
        left, module = NUM_CHECKED, trainer.lightning_module

        def again(rows: list[Any]) -> Any:
            # Whatever generators and counters it has, each call begins alike.
            kept = nullcontext() if owner is module else data_kept(owner)
            with state_kept(module), kept:
                return outer.inner(joined(rows), 0)

        @functools.wraps(hook)
        def watched(batch: Any, dataloader_idx: int) -> Any:
            nonlocal left
            if left and trainer.training:
                left -= 1
                with random_states_kept():
                    self._check(again, batch, name)
            return outer.inner(batch, dataloader_idx)

        outer: Any = watched
        outer.inner = hook
        vars(owner)[name] = outer
        self._put_back.append(lambda: _take_off(owner, name, outer))

    def _check(self, hook: Callable[[list[Any]], Any], batch: Any, name: str) -> None:
        try:
            rows = [
                take_rows(batch, torch.tensor([row])) for row in range(num_rows(batch))
            ]
            apart = other_rows_stay(hook, rows)
        except Exception:
            apart = False  # of a batch without rows: what they become can't be told
        if not apart:
            self.found = name


def _take_off(owner: Any, name: str, watched: Any) -> None:
    """Take one watch off a hook; another probe's may lie over it."""
    inner, over = watched.inner, vars(owner).get(name)
    if over is watched:
        if getattr(inner, "__self__", None) is owner:
            del vars(owner)[name]
        else:
            vars(owner)[name] = inner
        return
    while over is not None and getattr(over, "inner", None) is not watched:
        over = getattr(over, "inner", None)
    if over is not None:
        over.inner = inner

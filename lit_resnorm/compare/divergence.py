"""Whether a run diverged: by its status, else by the losses that it logged."""

from __future__ import annotations

import re

import numpy as np

from lit_resnorm.compare.recorded import Recorded, Series

_ADDED = ("epoch", "step", "dataloader", "idx")
"""What Lightning adds to a name."""

_OTHER_STAGES = {"val", "valid", "validation", "test", "eval"}


def run_has_diverged(run: Recorded) -> bool:
    """Say whether a run says so, or a loss of its isn't finite at the end."""
    return run.status == "diverged" or broken_loss(run) is not None


def broken_loss(run: Recorded) -> tuple[str, int] | None:
    """Return the loss that isn't finite from some step to the end, and that step.

    Of several the one that broke first; None where every loss ends finite.
    """
    found = [
        (int(one.step[finite[-1] + 1 if finite.size else 0]), key)
        for key, one in _losses(run).items()
        if not np.isfinite(one.value[-1])
        for finite in [np.flatnonzero(np.isfinite(one.value))]
    ]
    if not found:
        return None
    step, key = min(found)
    return key, step


def training_loss(run: Recorded) -> Series | None:
    """Return a run's training loss, whatever its project calls it."""
    losses = _losses(run)
    if "train/loss" in losses:
        return losses["train/loss"]
    own = (key for key in losses if not _OTHER_STAGES.intersection(_words_of_key(key)))
    return losses.get(next(own, ""))


def _losses(run: Recorded) -> dict[str, Series]:
    """Return what is named a loss: `train/loss`, `val_loss`, `loss_epoch`."""
    parts = {key: _words_of_key(key) for key in sorted(run.series)}
    return {key: run.series[key] for key, of in parts.items() if of[-1:] == ["loss"]}


def _words_of_key(key: str) -> list[str]:
    parts = re.split(r"[^a-z]+", key.lower())
    return [part for part in parts if part and part not in _ADDED]

"""When a probe measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning.pytorch import Trainer

from lit_resnorm_callbacks.probe.counts import check_count


@dataclass(frozen=True)
class Cadence:
    """When to measure, in optimizer steps.

    Attributes:
        every_n_steps: Steps between measurements.
        at_start: Measure before the first step.
        at_end: Measure after the last one.
    """

    every_n_steps: int = 100
    at_start: bool = True
    at_end: bool = True

    def __post_init__(self) -> None:
        check_count("cadence", self.every_n_steps)

    @classmethod
    def from_option(cls, option: Cadence | Mapping[str, Any] | int) -> Cadence:
        """Return the cadence that a probe's option asks for.

        Args:
            option: A cadence, the optimizer steps between measurements, or some of a
                cadence's attributes by name.

        Raises:
            ValueError: If it is none of these.
        """
        if isinstance(option, Cadence):
            return option
        if not isinstance(option, Mapping):
            return cls(option)
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in option if key not in known]:
            raise ValueError(
                f"cadence has {', '.join(map(str, unknown))}; it knows"
                f" {', '.join(known)}"
            )
        return cls(**option)

    def due(self, step: int, since: int | None = None) -> bool:
        """Return whether to measure after this many steps.

        Args:
            step: Steps taken.
            since: Steps that had been taken when this was asked last: a batch may take
                several; None: one fewer.
        """
        since = step - 1 if since is None else since
        return step // self.every_n_steps > since // self.every_n_steps


def is_dry_run(trainer: Trainer) -> bool:
    """Say whether this is Lightning's `fast_dev_run`."""
    return bool(getattr(trainer, "fast_dev_run", False))

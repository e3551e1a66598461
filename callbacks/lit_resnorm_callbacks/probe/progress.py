"""Lines that say how far a long measurement has come."""

from __future__ import annotations

import math
import time

from lightning_utilities.core.rank_zero import rank_zero_info

FIRST, NEXT = 2.0, 10.0
"""Seconds until the first line, and from one to the next."""


class MeasuringLines:
    """Says how long a measurement has taken, and will take by what it did so far.

    The clock decides nothing but the words.

    Args:
        name: The probe's.
        passes: Passes forward that the measurement takes; NaN where nobody counted.
    """

    def __init__(self, name: str, passes: float) -> None:
        self._name, self._passes, self._done = name, passes, 0.0
        self._began = time.monotonic()
        self._due = FIRST

    def __call__(self, passes: float) -> None:
        """Say so if it is time to.

        Args:
            passes: Done since the last call.
        """
        self._done += passes
        taken = time.monotonic() - self._began
        if taken < self._due:
            return
        self._due = taken + NEXT
        whole = taken * max(1.0, self._passes / self._done) if self._done else math.nan
        about = f", of about {whole:.0f} s" if math.isfinite(whole) else ""
        rank_zero_info(f"{self._name}: measuring for {taken:.0f} s{about}")

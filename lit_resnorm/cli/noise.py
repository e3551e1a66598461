"""What Lightning says that tells nobody anything."""

from __future__ import annotations

import logging
import warnings

_EMPTY = ("💡 Tip", "GPU available: False", "TPU available", "HPU available")
"""Beginnings of advertisements, and of lists of devices that aren't there."""


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_EMPTY)


def silence_lightning() -> None:
    """Leave out what Lightning says to whoever starts a run, whatever the run."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(one, _Filter) for one in logger.filters):
        logger.addFilter(_Filter())
    # of Lightning's own doing
    warnings.filterwarnings("ignore", message=r".*LeafSpec\)?` is deprecated")

"""What Lightning says that tells nobody anything."""

from __future__ import annotations

import logging
import warnings

from lit_resnorm.errors import printable

_EMPTY = ("💡 Tip", "GPU available: False", "TPU available", "HPU available")
"""Beginnings of advertisements, and of lists of devices that aren't there."""


_STOPPED = "`Trainer."
"""Beginning of why a run stopped, said each time that Lightning looks."""


class _Filter(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        record.msg, record.args = _printable_lines(text), ()
        again = text.startswith(_STOPPED) and text == self._last
        self._last = text
        return not again and not text.startswith(_EMPTY)


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


_OF_OUR_DOING = (
    # our summary gives no size, which this is about
    "Precision .* the model summary",
    # a run that goes on does so in its own directory
    "Checkpoint directory .* exists and is not empty",
    # Lightning's use of torch
    r".*LeafSpec\)?` is deprecated",
    r"torch\.distributed\.nn\.functional\.all_gather is deprecated",
)
"""Beginnings of warnings of what the user has not chosen."""


def silence_lightning() -> None:
    """Leave out what Lightning says to whoever starts a run, whatever the run.

    What it and warnings say else is printed as a terminal may show it.
    """
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(one, _Filter) for one in logger.filters):
        logger.addFilter(_Filter())
        form = warnings.formatwarning
        warnings.formatwarning = lambda *parts, **options: _printable_lines(
            form(*parts, **options)
        )
    for message in _OF_OUR_DOING:
        warnings.filterwarnings("ignore", message=message)


def silence_advice_on_intervals() -> None:
    """Leave out that an epoch has fewer steps than lie between two rows.

    For runs that leave the interval as it is: the rows come in later epochs.
    """
    warnings.filterwarnings("ignore", message="The number of training batches .* is")

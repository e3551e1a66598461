"""Recorded runs side by side: numbers, a table, one HTML page."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_resnorm.compare.document import comparison_document
    from lit_resnorm.compare.recorded import Recorded
    from lit_resnorm.compare.report import RunReport
    from lit_resnorm.compare.sources import read_runs

# Imported when asked for: a training callback must not load the command's table.
_PLACES = {
    "RunReport": "lit_resnorm.compare.report",
    "Recorded": "lit_resnorm.compare.recorded",
    "comparison_document": "lit_resnorm.compare.document",
    "read_runs": "lit_resnorm.compare.sources",
}

__all__ = ["Recorded", "RunReport", "comparison_document", "read_runs"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)

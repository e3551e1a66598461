"""What our own probes declare, for runs that hold no declarations.

So are runs from before there were declarations, and those of loggers that keep none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources

from lit_resnorm.quantities import Declared, declared_quantities

FILE = "shipped_quantities.json"
"""Rows of the probes under their usual names, made by tests/shipped_quantities.py."""


@cache
def shipped_quantities() -> Mapping[str, Declared]:
    """Return the quantities of our probes by key, also those of coupled examples."""
    text = resources.files(__package__ or __name__).joinpath(FILE).read_text("utf-8")
    found = declared_quantities(json.loads(text))
    coupled = [replace(one, prefix=f"{one.probe}_batch") for one in found.values()]
    return {**found, **{one.key: one for one in coupled}}

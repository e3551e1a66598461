"""Configs of runs, flat, and where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flat_config(value, f"{name}.")
        else:
            flat[name] = value if not isinstance(value, list) else str(value)
    return flat

"""The items themselves, each loaded from its module when it is asked for."""

from __future__ import annotations

from importlib import import_module

from lit_resnorm.papers.contents import ENTRIES
from lit_resnorm.papers.item import Item

__all__ = ["all_items", "load_item"]


def load_item(name: str) -> Item:
    """Return an item by name.

    Raises:
        KeyError: If there is none of the name.
    """
    module = import_module(f"lit_resnorm.papers.{ENTRIES[name].module}")
    (item,) = {
        id(value): value
        for value in vars(module).values()
        if isinstance(value, Item) and value.name == name
    }.values()
    return item


def all_items() -> dict[str, Item]:
    """Return every item by name, in the order of the papers."""
    return {name: load_item(name) for name in ENTRIES}

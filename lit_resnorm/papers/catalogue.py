"""All items, in the order of the papers."""

from __future__ import annotations

from lit_resnorm.papers.furusho2020 import fig1, fig2, fig3, fig7, table1, table2
from lit_resnorm.papers.item import Item

__all__ = ["all_items"]


def all_items() -> dict[str, Item]:
    """Return every item by name."""
    items = (
        fig1.FIG1,
        fig2.FIG2,
        table1.TABLE1,
        fig3.FIG3,
        table2.TABLE2,
        fig7.FIG7,
    )
    return {item.name: item for item in items}

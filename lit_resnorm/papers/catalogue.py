"""All items, in the order of the papers."""

from __future__ import annotations

from lit_resnorm.papers.furusho2020 import (
    fig1,
    fig2,
    fig3,
    fig4,
    fig5,
    fig6,
    fig7,
    fig8,
    fig9,
    table1,
    table2,
)
from lit_resnorm.papers.furusho_sep.angles import ANGLES
from lit_resnorm.papers.furusho_sep.coactivation import COACTIVATION
from lit_resnorm.papers.furusho_sep.distance_ratio import DISTANCE_RATIO
from lit_resnorm.papers.item import Item
from lit_resnorm.papers.labatie2019 import fig2 as labatie_fig2
from lit_resnorm.papers.labatie2019 import fig3 as labatie_fig3
from lit_resnorm.papers.labatie2019 import fig4 as labatie_fig4
from lit_resnorm.papers.labatie2019 import fig5 as labatie_fig5
from lit_resnorm.papers.labatie2019 import nobn
from lit_resnorm.papers.labatie2019.convolutional import CONVOLUTIONAL

__all__ = ["all_items"]


def all_items() -> dict[str, Item]:
    """Return every item by name."""
    items = (
        fig1.FIG1,
        fig2.FIG2,
        table1.TABLE1,
        fig3.FIG3,
        table2.TABLE2,
        fig4.FIG4,
        fig5.FIG5,
        fig6.FIG6,
        fig7.FIG7,
        fig8.FIG8,
        fig9.FIG9,
        ANGLES,
        COACTIVATION,
        DISTANCE_RATIO,
        labatie_fig2.FIG2,
        labatie_fig3.FIG3,
        labatie_fig4.FIG4,
        labatie_fig5.FIG5,
        *CONVOLUTIONAL,
        nobn.NOBN,
    )
    return {item.name: item for item in items}

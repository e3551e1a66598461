"""Convolutional counterparts of Figures 3 to 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.item import Settings
from lit_resnorm.papers.labatie2019.convolutional_verdict import (
    check_collapse,
    check_dilution,
    check_explosion,
)
from lit_resnorm.papers.labatie2019.fig3 import FIG3
from lit_resnorm.papers.labatie2019.fig4 import FIG4
from lit_resnorm.papers.labatie2019.fig5 import FIG5

__all__ = ["CONVOLUTIONAL", "FIG3_CONV", "FIG4_CONV", "FIG5_CONV"]


def _scales(
    scales: Mapping[str, Settings], small: Settings, full: Settings
) -> dict[str, Settings]:
    """Return the settings of a fully connected item with convolutions and changes."""
    return {
        "small": {**scales["small"], "kernel_size": 3, **small},
        "full": {**scales["full"], "kernel_size": 3, **full},
    }


DIFFERS = (
    "small: convolutions of 3 x 3 on digits, which the stem's stride of 2 leaves 4 x 4 "
    "positions; full: the author's width 512, batch 64 and images."
)
SEEN = (
    "Width, depth and draws of small, and the bounds of its checks, with a few nets "
    "of each family in view."
)
LAYERS = [2, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 100]
FIG3_CONV = replace(
    FIG3,
    **said_of("labatie2019.fig3_conv"),
    differs=f"{DIFFERS} No stored values are at hand for convolutions, so limits are "
    "checked: the growth against 1 with the drift that finite width leaves (derived), "
    "the rank against 2, below which `pathology` calls a signal collapsed. Positions "
    "must mix before examples can, so the rank rises first, and falls later than in "
    "fully connected nets. The logarithm of a rank spreads over nets as sqrt(l/D) "
    f"does, so medians are judged, and small is wide and of 100 layers.",
    chosen=SEEN,
    scales=_scales(
        FIG3.scales,
        {"width": 256, "depth": 100, "layers": LAYERS, "draws": 4},
        {"layers": [*LAYERS, 120, 140, 160, 180, 200]},
    ),
    checks=check_collapse,
)
DEEP_LAYERS = [2, 5, 10, 15, 20, 30, 40, 50, 75, 100, 125, *range(150, 201, 10)]
FIG4_CONV = replace(
    FIG4,
    **said_of("labatie2019.fig4_conv"),
    differs=f"{DIFFERS} The author's values (slope 0.1536, rank 2.03, delta_BN 1.14, "
    "delta_phi 1.02, mu_4 127) are those of 12,544 values a channel on MNIST; small "
    "has 1,024 and width 128, so it is judged by order and theory, full by the stored "
    "values too.",
    chosen=SEEN,
    scales=_scales(
        FIG4.scales,
        {"width": 128, "draws": {"64": 4}, "layers": DEEP_LAYERS, "stored": False},
        {
            "data": "MNIST",
            "draws": {"64": 200},
            "layers": DEEP_LAYERS,
            "stored": True,
        },
    ),
    checks=check_explosion,
    data=("MNIST",),
)
FIG5_CONV = replace(
    FIG5,
    **said_of("labatie2019.fig5_conv"),
    differs=f"{DIFFERS} small: 150 units of width 64. tau is computed from the growth "
    "d of the second half, where the slope is fitted, because d falls slowly with "
    "depth.",
    chosen=SEEN,
    scales=_scales(
        FIG5.scales,
        {
            "width": 64,
            "depth": 150,
            "units": [u for u in FIG5.scales["small"]["units"] if u <= 150],
            "stored": False,
        },
        {"stored": True},
    ),
    checks=check_dilution,
)
CONVOLUTIONAL = (FIG3_CONV, FIG4_CONV, FIG5_CONV)

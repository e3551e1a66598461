"""What each block does: cosine, ratio, early read-outs and dropped blocks."""

from __future__ import annotations

from itertools import pairwise

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import Look, legend, measured, panels
from lit_resnorm.papers.item import (
    Check,
    Item,
    Settings,
    all_of,
    between,
    near,
    not_shown,
    ordered,
)
from lit_resnorm.papers.jastrzebski2018.recipe import (
    DATA,
    DIFFERS,
    END,
    SCALES,
    START,
    draws,
    inference_rows,
)
from lit_resnorm.papers.summaries import Curve, curve, where

__all__ = ["COSINE", "DROP", "RATIO", "READOUT"]

SPLITS = {"train": "training set", "test": "test set"}


def _by_block(curves: pd.DataFrame, name: str, when: str, split: str) -> Curve:
    return curve(where(curves, when=when, split=split), "block", name)


def cosine_checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge the cosines."""
    found = []
    for split, words in SPLITS.items():
        mean = _by_block(curves, "cosine", "end", split).mean
        found.append(
            all_of(
                f"cosine of trained blocks, mean over draws ({words})",
                "negative",
                int((mean < 0).sum()),
                len(mean),
                "P",
            )
        )
    mean = _by_block(curves, "cosine", "end", "train").mean
    found.append(
        near("cosine of the last block, trained", float(mean[-1]), -0.1, 0.05, "P")
    )
    start = _by_block(curves, "cosine", "start", "train").mean
    found.append(
        between(
            "cosine before training, mean over blocks",
            float(start.mean()),
            -0.02,
            0.15,
            "P",
        )
    )
    half = len(mean) // 2
    top = {
        "upper half": float(mean[half:].mean()),
        "lower half": float(mean[:half].mean()),
    }
    growth = ordered("cosine, most negative near the top", top, "P")
    return [*found, growth if settings["data"] == "CIFAR10" else not_shown(growth)]


def ratio_checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge how much blocks add."""
    del settings
    mean = _by_block(curves, "ratio", "end", "train").mean
    return [
        between("branch over skip in the first block", float(mean[0]), 0.5, 2.5, "P"),
        ordered(
            "branch over skip",
            {"last block": float(mean[-1]), "first block": float(mean[0])},
            "P",
        ),
        between(
            "branch over skip in the last block, over the first's",
            float(mean[-1] / mean[0]),
            None,
            0.5,
            "P",
        ),
    ]


def readout_checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge early read-outs."""
    del settings
    found = []
    for split, words in SPLITS.items():
        mean = _by_block(curves, "readout", "end", split).mean
        places = [0, len(mean) // 4, len(mean) // 2, len(mean) - 1]
        steps = {f"block {place + 1}": float(mean[place]) for place in places}
        found.append(ordered(f"accuracy of early read-outs ({words})", steps, "P"))
    mean = _by_block(curves, "readout", "end", "train").mean
    gains = [later - earlier for earlier, later in pairwise(mean)]
    found.append(
        between("largest gain of one block in accuracy", max(gains), None, 0.5, "P")
    )
    return found


def drop_checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge dropped blocks."""
    del settings
    found = []
    for split, words in SPLITS.items():
        rows = _by_block(curves, "drop", "end", split)
        whole = float(_by_block(curves, "accuracy", "end", split).mean[0])
        lost = whole - rows.mean
        half = len(lost) // 2
        found += [
            between(
                f"accuracy lost without a block of the upper half, the most ({words})",
                float(lost[half:].max()),
                None,
                0.05,
                "D",
            ),
            ordered(
                f"accuracy lost without a block ({words})",
                {"last block": float(lost[-1]), "first block": float(lost[0])},
                "D",
            ),
        ]
    return found


def _figure(curves: pd.DataFrame, settings: Settings, name: str, label: str) -> Figure:
    drawing, axes = panels(
        1,
        2,
        title=f"{label}: {settings['model']} on {settings['data']},"
        f" {settings['draws']} draws",
        size=(9.6, 4.2),
    )
    for one, (split, words) in zip(axes, SPLITS.items(), strict=True):
        _panel(one, curves, name, split, START)
        _panel(one, curves, name, split, END)
        one.set(xlabel="block", ylabel=label)
        one.set_title(words, fontsize=10)
        if name == "cosine":
            one.axhline(0, color="0.6", lw=1, zorder=0)
    legend(drawing, axes)
    return drawing


def _panel(axes: Axes, curves: pd.DataFrame, name: str, split: str, look: Look) -> None:
    when = "start" if look is START else "end"
    found = _by_block(curves, name, when, split)
    measured(axes, found.x, found.mean, look, error=found.error, line=True)


COSINE = Item(
    **said_of("jastrzebski2018.cosine"),
    claim="In trained residual nets almost every block moves the state along the "
    "negative gradient of the loss, most so near the top (about -0.1 in the last "
    "block of ResNet-110); before training the cosine is about 0.",
    differs=DIFFERS,
    scales=SCALES,
    cells=draws,
    run=inference_rows,
    checks=cosine_checks,
    figure=lambda curves, settings: _figure(
        curves, settings, "cosine", "cosine of branch and gradient"
    ),
    data=DATA,
)
RATIO = Item(
    **said_of("jastrzebski2018.ratio"),
    claim="The first blocks change the state much (up to about twice its norm), those "
    "above little.",
    differs=DIFFERS,
    scales=SCALES,
    cells=draws,
    run=inference_rows,
    checks=ratio_checks,
    figure=lambda curves, settings: _figure(
        curves, settings, "ratio", "norm of branch over skip"
    ),
    data=DATA,
)
READOUT = Item(
    **said_of("jastrzebski2018.readout"),
    claim="The network's own classifier on the states of its last stage is the better "
    "the later the block: accuracy rises gradually.",
    differs=f"{DIFFERS} All ten blocks are one stage.",
    scales=SCALES,
    cells=draws,
    run=inference_rows,
    checks=readout_checks,
    figure=lambda curves, settings: _figure(
        curves, settings, "readout", "accuracy after the block"
    ),
    data=DATA,
)
DROP = Item(
    **said_of("jastrzebski2018.drop"),
    claim="Blocks that refine can be left out: accuracy hardly falls without one of "
    "those near the top.",
    differs=f"{DIFFERS} The paper's numbers weren't recovered: how little is our "
    "bound, 5 points.",
    scales=SCALES,
    cells=draws,
    run=inference_rows,
    checks=drop_checks,
    figure=lambda curves, settings: _figure(
        curves, settings, "drop", "accuracy without the block"
    ),
    data=DATA,
)

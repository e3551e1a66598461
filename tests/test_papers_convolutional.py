"""Labatie's convolutional items: right nets pass, wrong ones fail, full ones start."""

import math
from functools import partial

import pytest
from judging import judged

from lit_resnorm.errors import UsageError
from lit_resnorm.modules import LitBNFeedForward, LitBNResNet
from lit_resnorm.papers.data import check_data
from lit_resnorm.papers.labatie2019 import fig3, fig4, fig5
from lit_resnorm.papers.labatie2019.convolutional import (
    FIG3_CONV,
    FIG4_CONV,
    FIG5_CONV,
)


def passes(item, **changes):
    """Return whether each check passes, at small settings with changes."""
    return [check.passed for check in judged(item, **changes).values()]


@pytest.mark.slow
def test_convolutions_collapse_and_with_batch_norm_do_not(monkeypatch):
    small = {"width": 64, "draws": 2}
    right = passes(FIG3_CONV, **small)
    monkeypatch.setattr(fig3, "LitVanillaNet", LitBNFeedForward)
    growth, _, rank = passes(FIG3_CONV, **small)
    assert right[0]
    assert right[1]
    assert not growth
    assert not rank


@pytest.mark.slow
def test_convolutions_explode_with_batch_norm_and_with_layer_norm_do_not(monkeypatch):
    small = {"width": 64, "draws": {"64": 2}}
    assert all(passes(FIG4_CONV, **small))
    layer_norm = partial(LitBNFeedForward, norm="layer")
    monkeypatch.setattr(fig4, "LitBNFeedForward", layer_norm)
    linear, *_, growths, _ = passes(FIG4_CONV, **small)
    assert not linear
    assert not growths


@pytest.mark.slow
def test_convolutions_are_diluted_and_with_halved_skips_are_not(monkeypatch):
    small = {"width": 32, "draws": 2}
    assert all(passes(FIG5_CONV, **small))
    monkeypatch.setattr(fig5, "LitBNResNet", partial(LitBNResNet, scale="half"))
    _, power, _, share, _ = passes(FIG5_CONV, **small)
    assert not power
    assert not share


@pytest.mark.slow
@pytest.mark.parametrize(
    "item", [FIG3_CONV, FIG4_CONV, FIG5_CONV], ids=lambda i: i.name
)
def test_full_settings_start(item):
    try:
        check_data(item.name, item.data)
    except UsageError as error:
        pytest.skip(str(error))
    settings = {**item.scales["full"], "depth": 2, "batch": 8}
    settings |= {"layers": [1, 2]} if "layers" in settings else {"units": [1, 2]}
    settings["draws"] = {"8": 1} if item is FIG4_CONV else 1
    (cell,) = item.cells(settings)
    rows = item.run(settings, cell, 0)
    assert len(rows) == 2
    assert all(math.isfinite(row["log_chi"]) for row in rows)
    assert all(row["rank"] >= 1 for row in rows)
    assert settings["width"] == 512

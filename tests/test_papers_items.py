"""Items on small settings: right nets pass, wrong ones fail."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from judging import judged

from lit_resnorm.modules import LitBNFeedForward, LitBNResNet, LitMLP
from lit_resnorm.papers.furusho2020 import fig7
from lit_resnorm.papers.furusho2020.fig1 import leave_one_out_losses, ridge
from lit_resnorm.papers.furusho2020.fig7_verdict import fitted_growth
from lit_resnorm.papers.furusho2020.fig8_verdict import boundaries
from lit_resnorm.papers.furusho2020.source import build, num_blocks
from lit_resnorm.papers.furusho_sep import states
from lit_resnorm.papers.furusho_sep.angles import ANGLES
from lit_resnorm.papers.furusho_sep.distance_ratio import (
    distance_ratio,
    threshold_error,
)
from lit_resnorm.papers.labatie2019 import fig3, fig5

FIG7 = {
    "width": 100,
    "num_examples": 30,
    "depths": [2, 4],
    "draws": 4,
    "chunk": 4,
    "averaged_depths": [1],
    "averaged_draws": 10,
}


def without_skips(variant, depth, width, **options):
    if variant == "mlp":
        return build(variant, depth, width, **options)
    return LitMLP(depth, width, layers_per_block=2, **options)


@pytest.mark.slow
def test_fisher_eigenvalues_pass_and_without_skips_fail(monkeypatch):
    growth = "growth of the mean eigenvalue of res2: exponential (doublings a block)"
    value = "mean eigenvalue of mlp at L=2 (3% and 3 standard errors)"
    right = judged(fig7.FIG7, **FIG7)
    assert right[growth].passed
    assert right[value].passed
    monkeypatch.setattr(fig7, "build", without_skips)
    faulty = judged(fig7.FIG7, **FIG7)
    assert not faulty[growth].passed
    assert faulty[value].passed


ANGLE_SETTINGS = {"width": 300, "num_examples": 40, "depth": 5, "draws": 2}


def test_angles_pass_and_without_skips_fail(monkeypatch):
    angle = "mean angle of res2 after 3 blocks (radians)"
    assert judged(ANGLES, **ANGLE_SETTINGS)[angle].passed
    monkeypatch.setattr(states, "build", without_skips)
    assert not judged(ANGLES, **ANGLE_SETTINGS)[angle].passed


COLLAPSE = {"depth": 50, "layers": [2, 50], "draws": 1}


@pytest.mark.slow
def test_collapse_passes_and_with_batch_norm_fails(monkeypatch):
    assert all(c.passed for c in judged(fig3.FIG3, **COLLAPSE).values())
    monkeypatch.setattr(fig3, "LitVanillaNet", LitBNFeedForward)
    faulty = judged(fig3.FIG3, **COLLAPSE)
    assert not faulty["r_eff after ReLU at l=50 (4 standard errors)"].passed


DILUTION = {"width": 128, "depth": 20, "units": [1, 5, 10, 20], "draws": 2}


@pytest.mark.slow
def test_dilution_passes_and_with_halved_skips_fails(monkeypatch):
    share = "share of branch 20 in the variance"
    assert judged(fig5.FIG5, **DILUTION)[share].passed
    monkeypatch.setattr(fig5, "LitBNResNet", partial(LitBNResNet, scale="half"))
    assert not judged(fig5.FIG5, **DILUTION)[share].passed


def test_ridge_leave_one_out_is_retraining():
    rng = np.random.default_rng(0)
    x_ND, y_N = rng.standard_normal((12, 4)), rng.standard_normal(12)
    closed = leave_one_out_losses(x_ND, y_N, 0.3)
    for i in range(12):
        rest = np.arange(12) != i
        weights = ridge(x_ND[rest], y_N[rest], 0.3)
        loss = (x_ND[i] @ weights - y_N[i]) ** 2 / 2
        assert closed[i] == pytest.approx(loss, abs=1e-9)


def test_distance_ratio_of_two_lines_is_their_gap_over_their_spreads():
    # classes at x = 3 -+ 1 and x = -3 -+ 2: v = 6 e_x, spreads 1 and 2
    h = torch.tensor([[4.0, 7.0], [2.0, 7.0], [-1.0, 7.0], [-5.0, 7.0]])
    y = torch.tensor([1, 1, 0, 0])
    assert distance_ratio(h, y) == pytest.approx(36 / (6 * 1 + 6 * 2), abs=1e-9)
    assert threshold_error(h, y) == 0.0
    overlapping = torch.tensor([1, 0, 1, 0])
    ratio = distance_ratio(h, overlapping)
    assert threshold_error(h, overlapping) <= 1 / (1 + ratio**2)


def test_growth_finds_power_and_doublings():
    depths = [1, 2, 4, 8]
    assert fitted_growth(depths, [d**0.5 for d in depths])["power"] == pytest.approx(
        0.5
    )
    doublings = fitted_growth(depths, [2.0**d for d in depths])["doublings"]
    assert doublings == pytest.approx(1)


def test_the_boundary_lies_between_the_last_and_the_first_diverging_rate():
    rates = [0.5, 1.0, 2.0, 4.0]
    rows = [
        {
            "variant": "mlp",
            "depth": 1,
            "draw": 0,
            "rate": rate,
            "bound": 0.5,
            "loss": np.inf if rate >= 2 else 0.1,
        }
        for rate in rates
    ]
    found = boundaries(pd.DataFrame(rows))
    assert found.rate[("mlp", 1)] == pytest.approx(2**0.5)
    assert found.in_bounds[("mlp", 1)] == pytest.approx(4)


def test_blocks_of_two_layers_need_an_even_number_of_weights():
    assert num_blocks("res2_bn", 10) == 5
    assert num_blocks("res1", 10) == 10
    with pytest.raises(ValueError, match="got 5"):
        num_blocks("res2", 5)

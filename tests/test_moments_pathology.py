"""The verdict on the four families, and on profiles made by hand."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from lit_resnorm.diagnose import diagnose
from lit_resnorm.measures.moments import (
    DepthProfile,
    SiteMoments,
    pathology,
    signal_and_noise,
    spine,
)
from lit_resnorm.nets import Style, stacked_net

NORMED = Style(norm="batch", eps=1e-3)
NETS = {
    "vanilla": {"style": Style(), "residual": False, "layers_per_block": 1},
    "bn_ff": {"style": NORMED, "residual": False, "layers_per_block": 1},
    "res": {"style": Style(), "order": "pre"},
    "bn_res": {"style": NORMED, "order": "pre"},
}
EXPECTED = {"vanilla": "signal", "bn_ff": "snr", "res": "signal", "bn_res": "none"}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", NETS)
def test_fully_connected_families_have_the_papers_pathologies(family, seed):
    torch.manual_seed(seed)
    net = stacked_net((100,), 10, depth=60, width=128, **NETS[family])
    verdict = pathology(signal_and_noise(net, torch.randn(64, 100)))
    assert verdict.pathology == EXPECTED[family]


@pytest.mark.parametrize(
    ("family", "expected"),
    [("vanilla", "signal"), ("bn_ff", "snr"), ("bn_res", "none")],
)
def test_convolutional_families_have_the_papers_pathologies(family, expected):
    torch.manual_seed(0)
    options = {**NETS[family]}
    norm = options["style"].norm
    options["style"] = Style(norm=norm, eps=1e-3, boundary="periodic")
    net = stacked_net((3, 6, 6), 10, depth=40, width=32, kernel_size=3, **options)
    coarse = torch.randn(32, 3, 2, 2)
    images = nn.functional.interpolate(coarse, (6, 6), mode="bilinear")
    assert pathology(signal_and_noise(net, images)).pathology == expected


def profile(log_chi, ranks=10.0, kind="activation"):
    """A profile of activations with these values."""
    count = len(log_chi)
    ranks = [ranks] * count if isinstance(ranks, float) else ranks
    one = torch.ones((), dtype=torch.float64)
    return DepthProfile(
        tuple(
            SiteMoments(
                name=f"{place:03d}.act",
                kind=kind,
                mu2=one,
                nu2=one,
                log_noise_power=one,
                log_sensitivity=torch.tensor(value, dtype=torch.float64),
                effective_rank=torch.tensor(rank, dtype=torch.float64),
            )
            for place, (value, rank) in enumerate(zip(log_chi, ranks, strict=True))
        )
    )


def linear(slope, count=40):
    return [slope * layer for layer in range(1, count + 1)]


def power(exponent, count=40):
    return [exponent * math.log(layer) for layer in range(1, count + 1)]


def falling(end, count=40):
    """Effective ranks that fall from 10 halfway down to `end`."""
    return [max(end, 10 - 0.5 * layer) for layer in range(count)]


def test_fits_recover_slope_and_exponent():
    verdict = pathology(profile(linear(0.2)))
    assert verdict.exponential.slope == pytest.approx(0.2)
    assert verdict.exponential.goodness == pytest.approx(1)
    assert verdict.power.goodness < 1
    verdict = pathology(profile(power(0.65)))
    assert verdict.power.slope == pytest.approx(0.65)
    assert verdict.power.goodness == pytest.approx(1)
    assert verdict.num_layers == 40


@pytest.mark.parametrize(
    ("log_chi", "ranks", "expected", "code"),
    [
        (linear(0.2), 10.0, "snr", 2),
        (linear(0.2), falling(2.03), "snr", 2),
        (linear(0.05), 10.0, "none", 0),
        (power(0.65), 10.0, "none", 0),
        (power(0.1), falling(2.03), "signal", 1),
        (power(0.1), falling(1.9), "signal", 1),
        (linear(0.2), falling(1.1), "signal", 1),
        (power(0.1), 1.9, "none", 0),
        (power(0.1), 1.0, "none", 0),
        ([*power(0.1)[:-1], math.inf], 10.0, "signal", 1),
        ([*power(0.1)[:-1], math.nan], 10.0, "undetermined", -1),
        (linear(0.2, 7), 10.0, "undetermined", -1),
        (linear(0.2, 8), 10.0, "snr", 2),
        (
            [4 * (layer % 2) + 0.2 * layer for layer in range(40)],
            10.0,
            "undetermined",
            -1,
        ),
        ([], 10.0, "undetermined", -1),
    ],
)
def test_thresholds(log_chi, ranks, expected, code):
    ranks = ranks if isinstance(ranks, float) else ranks[: len(log_chi)]
    verdict = pathology(profile(log_chi, ranks))
    assert verdict.pathology == expected
    assert verdict.code == code


@pytest.mark.parametrize(("count", "expected"), [(20, "none"), (50, "snr")])
def test_noise_of_a_residual_net_grows_long_before_it_is_a_pathology(count, expected):
    # the branches of ResNet-18, two units a stage, never come to be diluted
    alternating = []
    for place, site in enumerate(profile(linear(0.13, count)).sites):
        kind = "addition" if place % 2 else "activation"
        alternating.append(dataclasses.replace(site, kind=kind))
    assert pathology(DepthProfile(tuple(alternating))).pathology == expected


def test_depth_of_a_residual_net_counts_the_activations_in_its_branches():
    torch.manual_seed(0)
    net = stacked_net((20,), 10, depth=6, width=16, **NETS["bn_res"])
    verdict = pathology(signal_and_noise(net, torch.randn(32, 20)))
    assert verdict.num_layers == 12


def test_depth_of_a_transformer_counts_its_additions():
    torch.manual_seed(0)
    blocks = [
        nn.TransformerEncoderLayer(
            16, 2, 32, dropout=0.0, batch_first=True, norm_first=True
        )
        for _ in range(6)
    ]
    net, x = nn.Sequential(*blocks), torch.randn(16, 5, 16)
    profile = signal_and_noise(net, x)
    assert len(profile.of_kind("activation")) == 6
    assert [*spine(profile).values()] == [*range(1, 13)]
    verdict = pathology(profile)
    assert (verdict.pathology, verdict.num_layers) == ("none", 12)
    assert verdict.effective_rank == profile.of_kind("addition")[-1].effective_rank
    found = diagnose(
        nn.Sequential(net, nn.Flatten(), nn.Linear(80, 3)),
        [(x, (x[:, 0, 0] > 0).long())],
    )
    assert [row.depth for row in found.rows if row.kind == "addition"] == [
        *range(1, 13)
    ]
    assert "signal and noise" not in found.not_judged


def test_a_network_without_activations_has_no_verdict():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    verdict = pathology(signal_and_noise(net, torch.randn(8, 4)))
    assert verdict.pathology == "undetermined"
    assert math.isnan(verdict.effective_rank)

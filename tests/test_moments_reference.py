"""Moments of random networks against the values their author stored.

Labatie (2019), arXiv 1811.03087, and the arrays stored with its code: mean and standard
deviation of one draw over 200 draws, width 512, new images and weights every draw. Each
comparison allows 4 combined standard errors.
"""

import functools
import os
from math import sqrt

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.datasets import CIFAR10, MNIST

from lit_resnorm.measures.moments import propagate
from lit_resnorm.nets import Style, stacked_net

ROOT = os.environ.get("LIT_RESNORM_DATA", "data")
NUM_DRAWS = 20
NUM_STORED = 200
pytestmark = pytest.mark.slow


@functools.cache
def images(dataset):
    """Return the training images, float32, channels before positions."""
    try:
        pixels = torch.as_tensor(np.asarray(dataset(ROOT, download=False).data))
    except RuntimeError:
        pytest.skip(f"no {dataset.__name__} in LIT_RESNORM_DATA")
    return pixels.movedim(-1, 1) if pixels.ndim == 4 else pixels[:, None]


def draws(dataset, batch_size, *, depth, width=512, flat=True, device="cpu", **options):
    """Return a function that fills one network anew and takes new images."""
    data = images(dataset)
    shape = data.shape[1:]
    kernel = None if flat else 3
    net = stacked_net(
        (shape.numel(),) if flat else shape,
        10,
        depth=depth,
        width=width,
        kernel_size=kernel,
        stem_stride=1 if flat else 2,
        **options,
    ).to(device)
    weights = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    def draw():
        for place, layer in enumerate(weights):
            gain = 1 if place == 0 else 2  # no activation follows the stem
            nn.init.normal_(layer.weight, 0, sqrt(gain / layer.weight[0].numel()))
        x = data[torch.randperm(len(data))[:batch_size]].float()
        x = x.flatten(1) if flat else x
        # Per channel over (images, positions): per pixel where images are flattened.
        dims = 0 if flat else (0, 2, 3)
        x = x - x.mean(dims, keepdim=True)
        return net, (x / (x.std(dims, keepdim=True) + 1e-12)).to(device)

    return draw


VANILLA = {"style": Style(), "residual": False, "layers_per_block": 1}
NORMED = Style(norm="batch", eps=1e-3)
BN_FF = {"style": NORMED, "residual": False, "layers_per_block": 1}
CONV_BN_FF = {
    "style": Style(norm="batch", eps=1e-3, boundary="periodic"),
    "residual": False,
    "layers_per_block": 1,
}
BN_RES = {"style": NORMED, "order": "pre", "layers_per_block": 2}


def assert_agrees(samples, stored, deviation=None, *, digits=0.0):
    """Compare a mean over draws with a stored one.

    `deviation` is the stored one of a draw (ours where it is not known), `digits` half
    a unit of the last digit that is known.
    """
    own = samples.std()
    stored_variance = float(own if deviation is None else deviation) ** 2 / NUM_STORED
    error = sqrt(float(own) ** 2 / len(samples) + stored_variance)
    difference = abs(float(samples.mean()) - stored)
    assert difference <= 4 * error + digits, f"{samples.mean():.5g} against {stored}"


def slope(x, y):
    """Return the least-squares slopes of the rows of y against x."""
    x = x - x.mean()
    return (y * x).sum(1) / (x * x).sum()


def test_vanilla_collapses_to_a_line_as_stored():
    result = propagate(draws(CIFAR10, 64, depth=200, **VANILLA), NUM_DRAWS)
    ranks = result.at("effective_rank", "activation")
    for layer, mean, deviation in [
        (2, 5.558, 0.92),
        (4, 5.514, 1.0),
        (10, 2.81, 0.47),
        (20, 1.667, 0.2),
        (50, 1.155, 0.068),
        (100, 1.043, 0.028),
        (200, 1.010, 0.0075),
    ]:
        assert_agrees(ranks[:, layer - 1], mean, deviation)
    growth = result.at("delta", "activation")
    for layer, mean, deviation in [
        (2, 1.146, 0.015),
        (4, 1.093, 0.015),
        (10, 1.041, 0.018),
        (20, 1.014, 0.024),
        (50, 1.001, 0.031),
        (100, 1.006, 0.031),
        (200, 0.999, 0.026),
    ]:
        assert_agrees(growth[:, layer - 1], mean, deviation)


STORED_BN_FF = {
    64: {
        "slope": (0.2065, 0.0010),
        "rank": {2: (8.70, 0.95), 10: (13.1, 2.0), 50: (11.2, 2.8), 200: (10.2, 2.4)},
        "mu4": (3.73, 0.33),
        "nu1": 0.780,
        "delta_bn": 1.0250,
        "delta_phi": 1.1997,
    },
    128: {
        "slope": (0.1935, 0.0010),
        "rank": {2: (9.29, 0.90), 10: (12.4, 1.9), 50: (5.51, 0.86), 200: (4.57, 0.48)},
        "mu4": (8.04, 0.88),
        "nu1": 0.715,
        "delta_bn": 1.0458,
        "delta_phi": 1.1611,
    },
    256: {
        "slope": (0.1849, 0.0011),
        "rank": {2: (9.67, 0.80), 10: (11.9, 1.6), 50: (3.86, 0.35), 200: (2.93, 0.18)},
        "mu4": (18.3, 1.5),
        "nu1": 0.607,
        "delta_bn": 1.0827,
        "delta_phi": 1.1116,
    },
    512: {
        "slope": (0.1779, 0.0014),
        "rank": {2: (9.83, 0.85), 10: (11.6, 1.4), 50: (3.15, 0.22), 200: (2.41, 0.10)},
        "mu4": (34.5, 2.5),
        "nu1": 0.492,
        "delta_bn": 1.1153,
        "delta_phi": 1.0719,
    },
}


@pytest.mark.parametrize("batch_size", STORED_BN_FF)
def test_batch_norm_feed_forward_explodes_as_stored(batch_size):
    stored = STORED_BN_FF[batch_size]
    result = propagate(
        draws(CIFAR10, batch_size, depth=200, **BN_FF),
        NUM_DRAWS,
        quantities=(
            "log_sensitivity",
            "effective_rank",
            "mu4",
            "nu1",
            "delta_bn",
            "delta_phi",
        ),
        ranks_at=r"blocks\.(1|9|49|199)\.act1",
    )
    log_chi = result.at("log_sensitivity", "activation")
    layers = torch.arange(1.0, 201.0, dtype=torch.float64)
    assert_agrees(slope(layers[20:], log_chi[:, 20:]), *stored["slope"])
    ranks = result.at("effective_rank", "activation")
    for layer, (mean, deviation) in stored["rank"].items():
        assert_agrees(ranks[:, layer - 1], mean, deviation, digits=0.05)
    assert_agrees(result.at("mu4", "norm")[:, -1], *stored["mu4"], digits=0.05)
    assert_agrees(result.at("nu1", "norm")[:, -1], stored["nu1"], digits=5e-4)
    for quantity, kind in [("delta_bn", "norm"), ("delta_phi", "activation")]:
        last = result.at(quantity, kind)[:, -1]
        assert_agrees(last, stored[quantity], digits=5e-5)


def test_batch_norm_residual_grows_as_a_power_as_stored():
    result = propagate(
        draws(CIFAR10, 64, depth=500, **BN_RES),
        NUM_DRAWS,
        quantities=("log_sensitivity", "effective_rank"),
        ranks_at=r"blocks\.(4|49|499)\.act1",
    )
    log_chi = result.at("log_sensitivity", "addition")
    for unit, mean, deviation in [
        (5, 2.256, 0.07),
        (50, 8.16, 0.41),
        (100, 12.6, 0.7),
        (250, 22.5, 1.4),
        (500, 35.1, 2.2),
    ]:
        assert_agrees(log_chi[:, unit - 1].exp(), mean, deviation, digits=0.05)
    units = torch.arange(251.0, 501.0, dtype=torch.float64)
    assert_agrees(slope(units.log(), log_chi[:, 250:]), 0.6396, 0.0198)
    ranks = result.at("effective_rank", ending="act1")
    for unit, mean, deviation in [(5, 10.0, 1.1), (50, 13.0, 1.9), (500, 12.8, 2.4)]:
        assert_agrees(ranks[:, unit - 1], mean, deviation, digits=0.05)


def test_histograms_of_the_second_moment_widen_linearly_in_depth():
    num_draws = 300
    result = propagate(
        draws(CIFAR10, 64, depth=200, width=128, **VANILLA),
        num_draws,
        quantities=("nu2",),
        sites=r"blocks\.(49|99|149|199)\.act1",
    )
    log_nu2 = result.at("nu2", "activation").log()
    for column, mean, variance in zip(
        log_nu2.T,
        (-0.858, -1.851, -2.830, -3.820),
        (1.697, 3.708, 5.826, 7.768),
        strict=True,
    ):
        assert abs(column.mean() - mean) < 4 * sqrt(variance / num_draws)
        assert abs(column.var() - variance) < 4 * variance * sqrt(2 / num_draws)


def test_convolutions_on_mnist_begin_as_stored():
    result = propagate(
        draws(MNIST, 64, depth=2, flat=False, **CONV_BN_FF),
        NUM_DRAWS,
        quantities=("effective_rank",),
    )
    assert_agrees(result.at("effective_rank", "activation")[:, 1], 4.24, 0.18)


def test_convolutions_on_mnist_explode_as_stored():
    # An hour on one core.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = propagate(
        draws(MNIST, 64, depth=200, flat=False, device=device, **CONV_BN_FF),
        NUM_DRAWS,
        quantities=("log_sensitivity", "effective_rank"),
        ranks_at=r"blocks\.(1|9|49|199)\.act1",
    )
    log_chi = result.at("log_sensitivity", "activation")
    layers = torch.arange(1.0, 201.0, dtype=torch.float64)
    assert_agrees(slope(layers[20:], log_chi[:, 20:]), 0.1536, 0.0016)
    ranks = result.at("effective_rank", "activation")
    for layer, mean, deviation in [
        (2, 4.24, 0.18),
        (10, 12.5, 1.3),
        (50, 4.29, 1.5),
        (200, 2.03, 0.06),
    ]:
        assert_agrees(ranks[:, layer - 1], mean, deviation, digits=0.05)

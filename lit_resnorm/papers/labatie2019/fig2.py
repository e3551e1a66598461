"""Histograms of log powers over initialisations (Figure 2)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lit_resnorm.measures.moments import flow_between_sites, signal_and_noise
from lit_resnorm.modules import LitVanillaNet
from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.drawing import legend, panels
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    grid,
    near,
    ordered,
)
from lit_resnorm.papers.labatie2019.propagation import (
    block_index,
    images,
    random_net,
    sites_of,
)
from lit_resnorm.papers.summaries import curve, where
from lit_resnorm.papers.training import device
from lit_resnorm.theory import collapsed_log_power

__all__ = ["FIG2"]

# Means and variances of log nu_2 over 10,000 draws at width 128 (stored data).
STORED = {
    50: (-0.858, 1.697),
    100: (-1.851, 3.708),
    150: (-2.830, 5.826),
    200: (-3.820, 7.768),
}


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return log powers of signal and noise of a chunk of random nets."""
    rows = []
    flow = None
    place = device(settings)
    shape = {**settings, "depth": max(settings["layers"])}
    sites = sites_of((layer - 1 for layer in settings["layers"]), "act1")
    for draw in range(cell["first"], cell["first"] + settings["chunk"]):
        x = images(settings, draw, seed).to(place)
        module = random_net(LitVanillaNet, shape, draw, seed).to(place)
        flow = flow_between_sites(module, x, sites=sites)
        found = signal_and_noise(module, x, sites=flow, seed=draw, effective_rank=False)
        start = found.sites[0]
        rows += [
            {
                "draw": draw,
                "layer": block_index(site.name) + 1,
                "signal": float(site.nu2.log() - start.nu2.log()),
                "noise": float(site.log_noise_power - start.log_noise_power),
            }
            for site in found.sites[1:]
        ]
    return rows


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 2."""
    found = []
    for layer, part in curves.groupby("layer"):
        num = len(part)
        mean, variance = STORED[int(str(layer))]
        if settings["kernel_size"] is not None:
            expected = collapsed_log_power(int(str(layer)), settings["width"])
            mean, variance = expected
        signal = np.asarray(part.signal)
        found += [
            near(
                f"mean of log nu_2 at l={layer} (4 standard errors)",
                float(signal.mean()),
                mean,
                4 * math.sqrt(variance * (1 / num + 1e-4)),
                "P",
            ),
            near(
                f"variance of log nu_2 at l={layer} (4 standard errors)",
                float(signal.var(ddof=1)),
                variance,
                4 * variance * math.sqrt(2 * (1 / num + 1e-4)),
                "P",
            ),
        ]
    shallow = where(curves, layer=min(settings["layers"]))
    power = np.exp(np.asarray(shallow.signal))
    error = float(power.std()) / math.sqrt(len(power))
    name = f"mean of nu_2 at l={min(settings['layers'])} (4 standard errors)"
    found.append(near(name, float(power.mean()), 1.0, 4 * error, "D"))
    noise = curve(curves, "layer", "noise")
    places = [f"l={place}" for place in noise.x]
    means = dict(zip(places, noise.mean.tolist(), strict=True))
    spreads = dict(zip(places, (noise.deviation**2).tolist(), strict=True))
    falling = dict(reversed(means.items()))
    found.append(ordered("mean of log mu_2 of the noise", falling, "P"))
    found.append(ordered("variance of log mu_2 of the noise", spreads, "P"))
    return found


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 2."""
    layers = settings["layers"]
    drawing, axes = panels(
        1,
        len(layers),
        title=f"Powers of signal and noise in ReLU nets of width {settings['width']} "
        f"over {settings['draws']} draws, and the collapsed net's law",
        size=(3.0 * len(layers), 4.0),
    )
    width = 4 * math.sqrt(collapsed_log_power(max(layers), settings["width"]).variance)
    edges = np.linspace(-1.3 * width, 0.8 * width, 40)
    for one, layer in zip(axes, layers, strict=True):
        part = where(curves, layer=layer)
        one.hist(
            part.signal,
            edges.tolist(),
            density=True,
            color="0.75",
            label="signal, measured",
        )
        one.hist(
            part.noise,
            edges.tolist(),
            density=True,
            histtype="step",
            color="#D55E00",
            linewidth=1.4,
            label="noise, measured",
        )
        law = collapsed_log_power(layer, settings["width"])
        normal = np.exp(-((edges - law.mean) ** 2) / (2 * law.variance))
        one.plot(
            edges,
            normal / math.sqrt(2 * math.pi * law.variance),
            color="black",
            ls="--",
            label="normal of mean $-5l/2D$, variance $5l/D$ (derived)",
        )
        one.set(xlabel=r"$\log \nu_2$, $\log \mu_2$ of noise", title=f"l = {layer}")
        one.set_ylabel("density")
    legend(drawing, axes)
    return drawing


FIG2 = Item(
    **said_of("labatie2019.fig2"),
    claim="The log powers of signal and noise diffuse: their distribution over "
    "initialisations widens linearly with depth and drifts to smaller values, while "
    "the mean power stays 1.",
    differs="small: fully connected nets of width 128 on batches of 64 digits instead "
    "of convolutional ones on 1024 images; the stored moments are those of fully "
    "connected nets of width 128. full: convolutional, whose law is compared with the "
    "derived one only.",
    chosen="How the noise is judged: it was first compared with the signal's law, "
    "which it doesn't have. Only its drift and spread are published, so their order is "
    "checked.",
    scales={
        "small": {
            "device": "cpu",
            "data": "Digits",
            "batch": 64,
            "kernel_size": None,
            "width": 128,
            "layers": [50, 100, 150, 200],
            "draws": 300,
            "chunk": 30,
        },
        "full": {
            "device": "auto",
            "data": "CIFAR10",
            "batch": 1024,
            "kernel_size": 3,
            "width": 128,
            "layers": [50, 100, 150, 200],
            "draws": 10_000,
            "chunk": 50,
        },
    },
    cells=lambda settings: grid(first=range(0, settings["draws"], settings["chunk"])),
    run=run,
    checks=checks,
    figure=figure,
    data=("CIFAR10",),
)

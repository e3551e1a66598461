"""Eigenvalues of the Fisher information by depth (Figure 7)."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from lit_resnorm.data.gaussian import gaussian_inputs
from lit_resnorm.measures.fisher import fisher_spectrum
from lit_resnorm.measures.observe import untouched
from lit_resnorm.papers.drawing import STYLES, legend, measured, panels, theory
from lit_resnorm.papers.furusho2020.source import SOURCE, build
from lit_resnorm.papers.item import (
    Cell,
    Check,
    Item,
    Row,
    Settings,
    between,
    cell_seed,
    grid,
    near,
)
from lit_resnorm.papers.summaries import where
from lit_resnorm.papers.training import device
from lit_resnorm.theory import (
    averaged_maxima,
    fisher_theory,
    mean_eigenvalue,
)

__all__ = ["FIG7", "realised"]

VARIANTS = ("mlp", "res2", "res2_bn")


def realised(settings: Settings, variant: str, depth: int, draw: int, seed: int) -> Row:
    """Return mean and largest eigenvalue of one random net over its blocks' weights.

    Args:
        settings: `width`, `num_examples`, `device`.
        variant: `mlp`, `res2` or `res2_bn`.
        depth: Number of blocks.
        draw: Number of the initialisation.
        seed: Base seed.
    """
    torch.manual_seed(cell_seed(seed, "net", draw))
    width = settings["width"]
    module = build(
        variant, depth, width, in_shape=(width,), num_classes=1, train_head=False
    ).to(device(settings))
    x_ND = inputs(settings, seed).float().to(device(settings))
    spectrum = fisher_spectrum(module, x_ND, output="gaussian", num_eigenvalues=1)
    return {"mean": spectrum.mean, "max": spectrum.max}


def inputs(settings: Settings, seed: int) -> Tensor:
    """Return the inputs that all nets of these settings see, float64."""
    key = cell_seed(seed, "inputs")
    size, width = settings["num_examples"], settings["width"]
    return gaussian_inputs("gauss", [size], width, key)[0]


def run(settings: Settings, cell: Cell, seed: int) -> list[Row]:
    """Return eigenvalues of one kind, for one variant."""
    variant = cell["variant"]
    if cell["kind"] == "theory":
        return _theory_rows(settings, variant, seed)
    if cell["kind"] == "averaged":
        return [_averaged(settings, variant, cell["depth"], seed)]
    draws = range(cell["first"], cell["first"] + settings["chunk"])
    return [
        {"draw": draw, **realised(settings, variant, cell["depth"], draw, seed)}
        for draw in draws
    ]


def _theory_rows(settings: Settings, variant: str, seed: int) -> list[Row]:
    x_ND = inputs(settings, seed)
    width = settings["width"]
    gram_NN = x_ND @ x_ND.T / width
    rows = []
    for depth in range(1, max(settings["depths"]) + 1):
        expected = fisher_theory(variant, gram_NN, depth, width)
        rows.append(
            {
                "depth": depth,
                "mean": expected.mean,
                "max": expected.max,
                "closed_form": mean_eigenvalue(variant, depth, width),
                "matrix_max": max(
                    averaged_maxima(variant, depth, settings["averaged_width"])
                ),
            }
        )
    return rows


def _averaged(settings: Settings, variant: str, depth: int, seed: int) -> Row:
    """Return maxima of the Fisher matrix averaged over weights and inputs.

    A sampled average has a top eigenvalue that is too large. Of one weight matrix's
    block the top eigenvectors are known: each sums the inputs of one unit, and its
    Rayleigh quotient is unbiased. The whole matrix's maximum is bracketed: from above
    by the average's own, from below by the quotient, on the other half of the draws,
    of the top eigenvector of one half.
    """
    width, num = settings["averaged_width"], settings["num_examples"]
    halves: list[Tensor] = []
    quotients = []
    for draw in range(settings["averaged_draws"]):
        key = cell_seed(seed, "averaged", draw)
        torch.manual_seed(key)
        module = build(
            variant, depth, width, in_shape=(width,), num_classes=1, train_head=False
        )
        (x_ND,) = gaussian_inputs("gauss", [num], width, key)
        jac_NP = jacobian(module.double(), x_ND)
        sums = jac_NP.view(num, -1, width, width).sum(3)
        quotients.append((sums**2 / width).mean((0, 2)))
        product_PP = jac_NP.T @ jac_NP / num
        if draw < 2:
            halves.append(product_PP)
        else:
            halves[draw % 2] += product_PP
    per_half = settings["averaged_draws"] / 2
    first_PP, second_PP = (half / per_half for half in halves)
    lower = 0.0
    for one, other in ((first_PP, second_PP), (second_PP, first_PP)):
        _, top = top_pair(one)
        lower += float(top @ other @ top) / 2
    means = torch.stack(quotients).mean(0)
    largest = int(means.argmax())
    errors = torch.stack(quotients).std(0) / math.sqrt(len(quotients))
    return {
        "matrix_max": float(means[largest]),
        "matrix_error": float(errors[largest]),
        "full_low": lower,
        "full_high": top_pair((first_PP + second_PP) / 2)[0],
    }


def top_pair(matrix_PP: Tensor) -> tuple[float, Tensor]:
    """Return the largest eigenvalue of a symmetric matrix, and its vector."""
    start = np.ones(len(matrix_PP))
    values, vectors = eigsh(matrix_PP.numpy(), 1, which="LA", v0=start)
    return float(values[0]), torch.from_numpy(vectors[:, 0])


def jacobian(model: nn.Module, x_ND: Tensor) -> Tensor:
    """Return gradients of the one output over trainable weights, `(N, P)`."""
    weights = [p for p in model.parameters() if p.requires_grad]
    eye_NN = torch.eye(len(x_ND), dtype=x_ND.dtype)
    with untouched(model) as passes:
        output_N = passes(lambda: model(x_ND))[:, 0]
        grads = torch.autograd.grad(output_N, weights, eye_NN, is_grads_batched=True)
    return torch.cat([grad.flatten(1) for grad in grads], 1)


def _cells(settings: Settings) -> list[Cell]:
    drawn = grid(
        kind=["realised"],
        variant=VARIANTS,
        depth=settings["depths"],
        first=range(0, settings["draws"], settings["chunk"]),
    )
    averaged = grid(
        kind=["averaged"], variant=VARIANTS, depth=settings["averaged_depths"]
    )
    return [*grid(kind=["theory"], variant=VARIANTS), *averaged, *drawn]


def _statistics(curves: pd.DataFrame) -> pd.DataFrame:
    """Return mean and standard error over draws, by variant and depth."""
    drawn = where(curves, kind="realised").groupby(["variant", "depth"])
    return cast(pd.DataFrame, drawn[["mean", "max"]].agg(["mean", "sem"]))


def growth(depths: list[int], values: list[float]) -> dict[str, float]:
    """Return the exponent of a power law, and the doublings a block, fitted to logs."""
    logs = np.log(values)
    power = np.polyfit(np.log(depths), logs, 1)[0]
    doublings = np.polyfit(depths, logs, 1)[0] / math.log(2)
    return {"power": float(power), "doublings": float(doublings)}


def checks(curves: pd.DataFrame, settings: Settings) -> list[Check]:
    """Judge Figure 7."""
    drawn = _statistics(curves)
    expected = where(curves, kind="theory").set_index(["variant", "depth"])
    found = []
    for variant in VARIANTS:
        for depth in settings["depths"]:
            row = drawn.loc[(variant, depth)]
            share = 0.03 if depth <= 5 else 0.10
            for name in ("mean", "max"):
                value = float(expected.loc[(variant, depth), name])
                error = 3 * float(row[name, "sem"]) / value
                found.append(
                    near(
                        f"{name} eigenvalue of {variant} at L={depth} "
                        f"({share:.0%} and 3 standard errors)",
                        float(row[name, "mean"]),
                        value,
                        share + error,
                        "D",
                        relative=True,
                    )
                )
    depths = list(settings["depths"])
    for variant in VARIANTS:
        means = [float(drawn.loc[(variant, d), ("mean", "mean")]) for d in depths]
        fitted = growth(depths, means)
        found.append(_growth_check(variant, fitted))
    return [*found, *_averaged_checks(curves)]


def _growth_check(variant: str, fitted: dict[str, float]) -> Check:
    name = f"growth of the mean eigenvalue of {variant}"
    if variant == "mlp":
        power = fitted["power"]
        return near(f"{name}: flat (power of L)", power, 0.0, 0.1, "A")
    if variant == "res2":
        doublings = fitted["doublings"]
        return near(f"{name}: exponential (doublings a block)", doublings, 1, 0.1, "A")
    power = fitted["power"]
    return between(f"{name}: sub-linear (power of L)", power, 0.1, 0.9, "A")


def _averaged_checks(curves: pd.DataFrame) -> list[Check]:
    averaged = where(curves, kind="averaged").set_index(["variant", "depth"])
    expected = where(curves, kind="theory").set_index(["variant", "depth"])
    found = []
    for variant, depth in averaged.index:
        row = averaged.loc[(variant, depth)]
        if variant != "res2_bn":  # the closed form has population variances
            found.append(
                near(
                    f"per-matrix maximum of averaged {variant} at L={depth} "
                    "(15% and 3 standard errors)",
                    float(row.matrix_max),
                    value := float(expected.loc[(variant, depth), "matrix_max"]),
                    0.15 * value + 3 * float(row.matrix_error),
                    "D",
                )
            )
        limits = {2: (1.1, 1.9), 4: (2.5, 2.9)}.get(depth)
        if limits is not None:
            low, high = (
                float(row[k] / row.matrix_max) for k in ("full_low", "full_high")
            )
            found.append(
                Check(
                    f"full over per-matrix maximum of averaged {variant} at L={depth} "
                    "(bracket)",
                    f"meets {limits[0]} to {limits[1]}",
                    f"{low:.3g} to {high:.3g}",
                    None,
                    low <= limits[1] and high >= limits[0],
                    "D",
                )
            )
    return found


def figure(curves: pd.DataFrame, settings: Settings) -> Figure:
    """Draw Figure 7."""
    title = (
        f"Fisher eigenvalues at initialisation. a, b: D = {settings['width']}, "
        f"N = {settings['num_examples']}, {settings['draws']} draws;\n"
        f"c, d: weight-averaged, D = {settings['averaged_width']}; "
        "bars: standard error, in d a bracket"
    )
    drawing, axes = panels(2, 2, title=title, size=(9.6, 7.8))
    drawn = _statistics(curves)
    expected = where(curves, kind="theory").set_index("variant")
    averaged = where(curves, kind="averaged").set_index("variant")
    for variant in VARIANTS:
        look = STYLES[variant]
        part, rows = drawn.loc[variant], expected.loc[variant]
        for one, name in zip(axes[:2], ("mean", "max"), strict=True):
            theory(one, rows.depth, rows[name], look)
            points = part[name]
            measured(one, points.index, points["mean"], look, error=points["sem"])
        few = averaged.loc[variant]
        short = rows[rows.depth <= max(settings["averaged_depths"])]
        theory(axes[2], short.depth, short.matrix_max, look)
        measured(axes[2], few.depth, few.matrix_max, look, error=few.matrix_error)
        middle = (few.full_low + few.full_high) / 2
        half = (few.full_high - few.full_low) / 2
        measured(axes[3], few.depth, middle, look, error=half)
    titles = (
        "a  mean of all eigenvalues (realised)",
        "b  largest eigenvalue (realised)",
        "c  largest of one weight matrix, weight-averaged",
        "d  largest of all weights, weight-averaged",
    )
    for one, name in zip(axes, titles, strict=True):
        _label(one, name)
    legend(drawing, axes)
    return drawing


def _label(axes: Axes, title: str) -> None:
    axes.set(yscale="log", xlabel="number of blocks $L$", ylabel="eigenvalue")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=10)


FIG7 = Item(
    name="furusho2020.fig7",
    title="Fisher eigenvalues by depth: flat, exponential, sub-linear",
    source=f"{SOURCE}, Figure 7 and section IV (abstract and caption)",
    mark="A",
    claim="With depth the eigenvalues of the Fisher information matrix are constant "
    "for MLPs, grow exponentially for ResNets, and sub-linearly with batch norm.",
    differs="Which maximum the figure shows isn't known, so all three are here: of the "
    "realised matrix, of one weight matrix's block of the weight-averaged matrix, and "
    "of the whole averaged matrix. The mean eigenvalue has all three published growth "
    "laws; the realised maximum of MLPs grows linearly. The whole averaged matrix's "
    "maximum was expected 2.5 to 2.9 times that of one matrix at L = 4; of MLPs it is "
    "at most 2.4 times, and that check fails. Theory has the batch's own "
    "statistics for batch norm, frozen, but population variances in panel c.",
    scales={
        "small": {
            "device": "cpu",
            "width": 300,
            "num_examples": 60,
            "depths": [2, 5, 10, 20],
            "draws": 40,
            "chunk": 10,
            "averaged_width": 16,
            "averaged_depths": [1, 2, 3, 4],
            "averaged_draws": 400,
        },
        "full": {
            "device": "auto",
            "width": 1000,
            "num_examples": 500,
            "depths": [2, 5, 10, 20, 35, 50],
            "draws": 100,
            "chunk": 5,
            "averaged_width": 16,
            "averaged_depths": [1, 2, 3, 4],
            "averaged_draws": 3000,
        },
    },
    cells=_cells,
    run=run,
    checks=checks,
    figure=figure,
)

"""Eigenvalues of the Fisher information by depth (Figure 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_resnorm.data.gaussian import gaussian_inputs
from lit_resnorm.measures.fisher import fisher_spectrum
from lit_resnorm.papers.contents import said_of
from lit_resnorm.papers.furusho2020.fig7_averaged import averaged
from lit_resnorm.papers.furusho2020.fig7_verdict import VARIANTS, checks, figure
from lit_resnorm.papers.furusho2020.source import build
from lit_resnorm.papers.item import Cell, Item, Row, Settings, cell_seed, grid
from lit_resnorm.papers.training import device
from lit_resnorm.theory import averaged_maxima, fisher_theory, mean_eigenvalue

__all__ = ["FIG7", "realised"]


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
        return [averaged(settings, variant, cell["depth"], seed)]
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


FIG7 = Item(
    **said_of("furusho2020.fig7"),
    claim="With depth the eigenvalues of the Fisher information matrix are constant "
    "for MLPs, grow exponentially for ResNets, and sub-linearly with batch norm.",
    differs="Which maximum the figure shows isn't known, so all three are here: of the "
    "realised matrix, of one weight matrix's block of the weight-averaged matrix, and "
    "of the whole averaged matrix. The mean eigenvalue has all three published growth "
    "laws; the realised maximum of MLPs grows linearly. Theory has the batch's own "
    "statistics for batch norm, frozen, but population variances in panel c.",
    chosen="How averaged matrices are measured: sums over draws bias a maximum "
    "upwards, so one matrix's is an unbiased quotient, with a tolerance of 15%, and "
    "the whole one's a bracket. It was first judged by factors over the closed form of "
    "one matrix's maximum (2.52 for MLPs at L = 4), which are larger than those over "
    "the measured one (2.15).",
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

"""Maxima of weight-averaged Fisher matrices (Figure 7, panels c and d)."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from lit_resnorm.data.gaussian import gaussian_inputs
from lit_resnorm.measures.passes.untouched import untouched
from lit_resnorm.papers.furusho2020.source import build
from lit_resnorm.papers.item import Row, Settings, cell_seed

__all__ = ["averaged"]


def averaged(settings: Settings, variant: str, depth: int, seed: int) -> Row:
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

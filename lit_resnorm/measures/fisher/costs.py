"""Estimates of work and memory, by which a route is chosen."""

from __future__ import annotations

import os

import torch

from lit_resnorm.measures.fisher.blocks import outer_uses
from lit_resnorm.measures.fisher.measurement import Measurement
from lit_resnorm.measures.fisher.stores import Sizes


def matrix_is_cheaper(measured: Measurement, num_eigenvalues: int) -> bool:
    """Return whether the whole matrix costs less than products for the largest k.

    Both are counted in multiplications. A product is a backward pass and a forward-mode
    pass, four and a half times the multiplications of a forward pass with its
    elementwise work.
    """
    examples = measured.examples
    dim = min(examples.dim, measured.num_parameters)
    if 4 * dim**2 * measured.sweep.network.dtype.itemsize > least_free_memory(measured):
        return False
    products = num_products(num_eigenvalues)
    if measured.coupled:
        return examples.dim <= products
    forward = matrix = 0.0
    rows, seeds = examples.shards.total, examples.num_seeds
    for block in measured.sweep.blocks:
        if uses := outer_uses(block.uses(measured.sweep.traced)):
            sizes = Sizes.of_uses(uses)
            forward += rows * sizes.positions * sizes.inputs * sizes.outputs
            matrix += sizes.work(rows, seeds)
        else:
            forward += rows * block.num_parameters
            matrix += examples.dim**2 * block.num_parameters / 2
    if measured.num_parameters < examples.dim:
        matrix = examples.dim * measured.num_parameters**2 / 2
    # Memory bounds a product with the matrix: it takes the time of about ten
    # multiplications a number.
    iterations = 10.0 * dim**2 * products
    return seeds * forward + 0.8 * matrix + iterations < 4.5 * forward * products


def num_products(num_eigenvalues: int) -> int:
    """Return about how many products find the largest k.

    They also make sure that no larger one is left, and a warm start saves few of them.
    """
    return 9 + 3 * num_eigenvalues


def least_free_memory(measured: Measurement) -> int:
    """Return the bytes that can still be taken on every rank's device.

    All ranks make the same choices by it.
    """
    device = measured.sweep.network.device
    return -measured.examples.shards.largest(-free_memory(device), device)


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

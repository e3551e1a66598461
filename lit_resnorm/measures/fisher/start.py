"""Where the iterations for eigenvalues start without those of a measurement before.

Shapes: D dual coefficients of all ranks, B start vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_resnorm.measures.fisher.measurement import Measurement
from lit_resnorm.measures.fisher.stores import Store, block_product
from lit_resnorm.measures.spectra import top_eigenpairs


def cold_start(of: Measurement, num_vectors: int) -> Tensor:
    """Return start vectors for the largest eigenvalues, shape `(D, B)`, float64.

    They are the largest eigenvectors of the last layer's block, whose Gram matrix is
    nearly free and resembles that of the whole, with noise that keeps every eigenvector
    within reach.
    """
    noise = torch.Generator().manual_seed(0)
    mixed_DB = torch.randn(
        of.examples.dim, num_vectors, generator=noise, dtype=torch.float64
    ).to(of.sweep.network.device)
    mixed_DB /= mixed_DB.norm(dim=0)
    last = [block for block in of.sweep.blocks if block.places][-1:]
    if of.coupled or not last:
        return mixed_DB
    store = Store(last[0], of.sweep)
    of.sweep(last, lambda _, left: store.keep(left))
    kept = store.kept(of.examples.shards)
    if kept.left is not None and not kept.left.is_floating_point():
        return mixed_DB
    pairs = top_eigenpairs(
        lambda dual_DB: block_product(kept, dual_DB),
        mixed_DB,
        num_vectors,
        tol=0.1,
        block=num_vectors,
        max_products=6 * num_vectors,
        precision=torch.finfo(kept.rows.dtype).eps,
    )
    return pairs.vectors + 0.1 * mixed_DB


def usable_start(start: Tensor | None, of: Measurement) -> Tensor | None:
    """Return the start vectors that are such of this measurement; None without any.

    Of another batch, or of a measurement that came to nothing, none are: columns must
    have the dual space's dimension, finite numbers, and not be zero.
    """
    if start is None or start.ndim != 2 or start.shape[0] != of.examples.dim:
        return None
    lengths_B = start.double().norm(dim=0)
    start = start[:, lengths_B.isfinite() & (lengths_B > 0)]
    return start if start.shape[1] else None

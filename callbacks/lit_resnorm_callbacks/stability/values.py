"""What a stability probe logs of a run and its twins.

Dimensions: K twins, Z examples of the probe batch, S examples left out that were seen,
M networks: the run and the twins that differ from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_resnorm.measures.copies.copies import Copies, Losses
from lit_resnorm.measures.copies.stability import Stability, losses_at, stability
from lit_resnorm.measures.passes.untouched import Reduce
from lit_resnorm_callbacks.stability.left_out import LeftOut

COLUMNS = ["removed", "first_step", "eps_hyp", "signed", "distance", "diverged"]


def twin_values(
    module: LightningModule,
    losses: Losses,
    batch: Any,
    left_out: LeftOut,
    copies: Copies | None,
    *,
    norm_mode: str,
    reduce: Reduce,
) -> tuple[dict[str, Tensor], list[list[Any]]]:
    """Return the values to log, and a table row for each twin.

    Args:
        module: The run's module.
        losses: The losses of examples.
        batch: This rank's share of the probe batch.
        left_out: The examples that the twins lack.
        copies: The twins; None: all are the run.
        norm_mode: `frozen` or `eval`.
        reduce: Sums over ranks.
    """
    num, seen = len(left_out.removed), left_out.seen
    forked = sorted(copies.forked) if copies else []
    diverged: list[int] = []
    if copies:
        diverged = (reduce((~copies.finite).double()) > 0).nonzero()[:, 0].tolist()
    healthy = [k for k in forked if k not in diverged]
    test_MZ, own_MS = losses_at(
        module,
        losses,
        [{}, *(copies.weights(k) for k in healthy)] if copies else [{}],
        [{}, *(copies.own.get(k, {}) for k in healthy)] if copies else [{}],
        batch,
        left_out.examples() if seen else None,
        norm_mode=norm_mode,
        reduce=reduce,
        rank=module.global_rank,
    )
    twin_KZ = test_MZ[:1].repeat(num, 1)
    own_K = test_MZ.new_zeros(num)
    own_K[seen] = own_MS[0]
    twin_own_K = own_K.clone()
    for row, k in enumerate(healthy, 1):
        twin_KZ[k] = test_MZ[row]
        twin_own_K[k] = own_MS[row, seen.index(k)]
    twin_KZ[diverged] = torch.nan
    result = stability(test_MZ[0], twin_KZ, own_K, twin_own_K)
    distance_K = copies.distances() if copies else torch.zeros_like(own_K)
    values = _named(result, distance_K)
    if seen:
        values["generalization_gap"] = test_MZ[0].mean() - own_K[seen].mean()
    return values, _twin_rows(result, distance_K, left_out)


def _named(result: Stability, distance_K: Tensor) -> dict[str, Tensor]:
    values = {
        "eps_hyp": result.eps_hyp,
        "eps_point": result.eps_point,
        "eps_unif": result.eps_unif,
        "replace_signed": result.replace_signed,
        "distance": distance_K[result.finite].mean(),
        "diverged": (~result.finite).sum(),
    }
    if len(distance_K) > 1:
        values |= {
            "eps_hyp/stderr": result.eps_hyp_stderr,
            "eps_point/stderr": result.eps_point_stderr,
            "eps_unif/stderr": result.eps_unif_stderr,
            "replace_signed/stderr": result.replace_signed_stderr,
        }
    return values


def _twin_rows(
    result: Stability, distance_K: Tensor, left_out: LeftOut
) -> list[list[Any]]:
    numbers = torch.stack([result.twin_eps_hyp, result.twin_signed, distance_K], 1)
    return [
        [index, step, *row, not finite]
        for index, step, row, finite in zip(
            left_out.removed,
            left_out.first_steps,
            numbers.tolist(),
            result.finite.tolist(),
            strict=True,
        )
    ]


def num_bytes(state: Any) -> int:
    """Return how many bytes the tensors in a state hold, whatever holds them."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(num_bytes, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(num_bytes, state))
    return 0

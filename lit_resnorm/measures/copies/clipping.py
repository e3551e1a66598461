"""Clipping the gradients of stacked copies, each as if it were alone.

Dimensions: N parameters, K copies.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def clip_by_norm(grads: Mapping[str, Tensor], max_norm: float) -> None:
    """Scale each copy's gradients, in place, to a norm of at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_` does to each.
    """
    norms_NK = torch.stack([g.reshape(len(g), -1).norm(dim=1) for g in grads.values()])
    scale_K = (max_norm / (norms_NK.norm(dim=0) + 1e-6)).clamp(max=1.0)
    for grad in grads.values():
        grad.mul_(scale_K.to(grad.dtype).view(-1, *[1] * (grad.ndim - 1)))


def clip_by_value(grads: Mapping[str, Tensor], max_value: float) -> None:
    """Clamp gradients, in place, to absolute values of at most `max_value`."""
    for grad in grads.values():
        grad.clamp_(-max_value, max_value)

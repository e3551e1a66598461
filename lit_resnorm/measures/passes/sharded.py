"""Sharded tensors, of which a rank holds a part (FSDP2, tensor parallelism).

They are known by what they can do: importing their class takes a second, and nobody
has one who has not imported it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is one of torch's distributed ones, a `DTensor`."""
    return hasattr(tensor, "to_local")


def own_part(tensor: Tensor) -> Tensor:
    """Return a tensor's numbers on this rank, detached: all, unless it is sharded."""
    tensor = tensor.detach()
    local: Any = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def times_held(tensor: Tensor, world_size: int) -> float:
    """Return on how many ranks each number of a tensor lies.

    Args:
        tensor: Sharded, replicated, or both on a mesh of several dimensions.
        world_size: Number of ranks.
    """
    if not is_sharded(tensor):
        return float(world_size)
    placed: Any = tensor
    shards = 1
    for size, placement in zip(
        placed.device_mesh.shape, placed.placements, strict=True
    ):
        shards *= size if placement.is_shard() else 1
    return world_size / shards

"""Stages of a network: how many blocks and channels each has."""

from collections.abc import Sequence

__all__ = ["all_stages", "all_widths"]


def all_stages(depth: int | None, stages: Sequence[int] | None) -> list[int]:
    """Return the number of blocks in each stage.

    Raises:
        ValueError: If neither is given, or they disagree.
    """
    if stages is None:
        if depth is None:
            raise ValueError("depth or stages must be given")
        return [depth]
    if depth is not None and depth != sum(stages):
        raise ValueError(f"depth={depth} isn't the sum of stages={list(stages)}")
    return list(stages)


def all_widths(
    width: int | None, widths: Sequence[int] | None, num_stages: int
) -> list[int]:
    """Return the channels of each stage.

    Raises:
        ValueError: If neither is given, or they disagree.
    """
    if widths is None:
        if width is None:
            raise ValueError("width or widths must be given")
        return [width * 2**stage for stage in range(num_stages)]
    if width is not None and [width] != list(widths[:1]):
        raise ValueError(f"width={width} isn't the first of widths={list(widths)}")
    return list(widths)

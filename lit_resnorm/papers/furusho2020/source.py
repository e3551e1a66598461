"""The paper that this package's items come from, and the variants they compare."""

from typing import Any

from lit_resnorm.modules import LitClassifier, LitMLP, LitResNet, LitResNetBN

__all__ = ["build", "num_blocks"]


def num_blocks(variant: str, num_weights: int) -> int:
    """Return how many blocks of a variant have so many weight matrices.

    Raises:
        ValueError: If a two-layer variant is to have an odd number.
    """
    per_block = 2 if variant.startswith("res2") else 1
    if num_weights % per_block:
        raise ValueError(f"{variant} has two weights a block; got {num_weights}")
    return num_weights // per_block


def build(variant: str, depth: int, width: int, **options: Any) -> LitClassifier:
    """Return the LightningModule of a fully connected variant.

    Args:
        variant: `mlp`, `res1`, `res2` or `res2_bn`.
        depth: Number of blocks.
        width: Units of every layer.
        **options: Further arguments of the module.
    """
    if variant == "res1":
        return LitResNet(depth, width, layers_per_block=1, **options)
    kinds = {"mlp": LitMLP, "res2": LitResNet, "res2_bn": LitResNetBN}
    return kinds[variant](depth, width, **options)

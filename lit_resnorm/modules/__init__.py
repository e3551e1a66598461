"""LightningModules: thin names over the switches of `LitStack` and `LitStaged`.

Every class takes `depth` (number of blocks), `width` (units or channels), `in_shape`
and `num_classes` (those of the handwritten digits unless given; the command line fills
them in from the data), the switches that its name leaves open, and the arguments of
`LitClassifier`. All variants can be imported from here.
"""

from lit_resnorm.modules.classifier import LitClassifier
from lit_resnorm.modules.families import LitStack, LitStaged
from lit_resnorm.modules.variants import (
    LitBNFeedForward,
    LitBNResNet,
    LitFixup,
    LitMLP,
    LitMLPBN,
    LitPreactResNet,
    LitResNet,
    LitResNetBN,
    LitScaledResNet,
    LitSharedResNet,
    LitShortcutResNet,
    LitSkipInit,
    LitSmoothResNet,
    LitTinyResNet,
    LitVanillaNet,
    LitWeightNormResNet,
)

__all__ = [
    "LitBNFeedForward",
    "LitBNResNet",
    "LitClassifier",
    "LitFixup",
    "LitMLP",
    "LitMLPBN",
    "LitPreactResNet",
    "LitResNet",
    "LitResNetBN",
    "LitScaledResNet",
    "LitSharedResNet",
    "LitShortcutResNet",
    "LitSkipInit",
    "LitSmoothResNet",
    "LitStack",
    "LitStaged",
    "LitTinyResNet",
    "LitVanillaNet",
    "LitWeightNormResNet",
]

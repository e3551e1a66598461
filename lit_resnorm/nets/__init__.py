"""Networks of equal or staged width, plain `nn.Module`s with named taps.

`stacked_net` builds the fully connected and convolutional families of constant width,
`staged_net` the convolutional training family, `tiny_net` the small shortcut net; all
from one `Block` and the switches of one `Style`.
"""

from lit_resnorm.nets.blocks import Block
from lit_resnorm.nets.initialization import Draws
from lit_resnorm.nets.layers import Style
from lit_resnorm.nets.stacked import Net, Tap, stacked_net
from lit_resnorm.nets.staged import staged_net
from lit_resnorm.nets.tiny import tiny_net

__all__ = [
    "Block",
    "Draws",
    "Net",
    "Style",
    "Tap",
    "stacked_net",
    "staged_net",
    "tiny_net",
]

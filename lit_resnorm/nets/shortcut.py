"""Skip connections across a change of shape."""

import torch.nn.functional as F
from torch import Tensor, nn

from lit_resnorm.nets.initialization import Draws
from lit_resnorm.nets.layers import Layer, draw_weights, fan_in, weight_layer

__all__ = ["Shortcut"]


class Shortcut(nn.Module):
    """A strided 1 x 1 convolution, and with `pooled` a scaled average beside it.

    The average over `stride x stride` positions, times `stride`, is added on as many
    channels as the input has: those after the first `front`. Both settings have the
    same parameters.

    Source: MacDonald, Valmadre, Saratchandran & Lucey (2022), arXiv 2210.05371, public
    code.

    Args:
        width: Channels of the input.
        out: Channels of the output.
        stride: Of the convolution and of the average.
        pooled: Whether the average is added.
        front: Zero channels before the average's; None: half of them, rounded up.
        bias: Whether the convolution has a bias.
    """

    def __init__(
        self,
        width: int,
        out: int,
        stride: int,
        *,
        pooled: bool = False,
        front: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv = weight_layer(width, Layer(out, 1, stride), bias=bias)
        self.pooled = pooled
        self.stride = stride
        missing = out - width
        self.front = (missing + 1) // 2 if front is None else front
        self.behind = missing - self.front

    def forward(self, x: Tensor) -> Tensor:
        """Return the shortcut's output, shape `(B, out, H', W')`."""
        if not self.pooled:
            return self.conv(x)
        mean = F.avg_pool2d(x, self.stride, ceil_mode=True) * self.stride
        mean = F.pad(mean, (0, 0, 0, 0, self.front, self.behind))
        return self.conv(x) + mean

    def draw(self, draws: Draws, block: str, *, variance: float) -> None:
        """Initialise the convolution with `variance / fan_in`, its bias with 0."""
        std = (variance / fan_in(self.conv)) ** 0.5
        draw_weights(self.conv, draws, f"{block}.shortcut.conv", std)

"""The networks and batches that the benchmarks measure."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(num_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or num_in != num_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(num_in, num_out, 1, stride, bias=False),
                nn.BatchNorm2d(num_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


def mlp() -> nn.Module:
    """Return ten linear layers of width 128."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(784, 128), nn.ReLU()]
    for _ in range(8):
        layers += [nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def resnet20() -> nn.Module:
    """Return the CIFAR ResNet-20."""
    layers = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    num_in = 16
    for width in (16, 32, 64):
        for block in range(3):
            stride = 2 if block == 0 and width > 16 else 1
            layers.append(BasicBlock(num_in, width, stride))
            num_in = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


ITEMS = {
    "W1": (mlp, (256, 1, 28, 28)),
    "W2": (resnet20, (128, 3, 32, 32)),
    "W3": (lambda: torchvision.models.resnet18(num_classes=10), (64, 3, 32, 32)),
}


def work_item(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the network in eval mode, its inputs and labels.

    Weights are kaiming-normal; batch norm's statistics are those of the batch.
    """
    make, shape = ITEMS[name]
    torch.manual_seed(0)
    net = make()
    x = torch.randn(shape)
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(x)
    return net.eval(), x, torch.arange(len(x)) % 10

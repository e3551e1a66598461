"""Several networks of one architecture as one network, side by side.

G networks of C channels are one network of G C channels whose weights are block
diagonal: one pass and one call a layer for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

_Layer = TypeVar("_Layer", bound=nn.Module)
Norm = nn.modules.batchnorm._BatchNorm


class BlockLinear(nn.Module):
    """Linear layers side by side: `(B, G * in)` to `(B, G * out)`.

    Args:
        weight_GOI: One matrix a network.
        bias_GO: One bias a network, or None.
    """

    def __init__(self, weight_GOI: Tensor, bias_GO: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_GOI, requires_grad=False)
        self.bias = None if bias_GO is None else nn.Parameter(bias_GO, False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, networks one after the other."""
        x_GBI = x.unflatten(1, (len(self.weight), -1)).transpose(0, 1)
        y_GBO = torch.bmm(x_GBI, self.weight.mT)
        if self.bias is not None:
            y_GBO = y_GBO + self.bias[:, None]
        return y_GBO.transpose(0, 1).flatten(1)


def side_by_side(nets: Sequence[nn.Module]) -> nn.Module:
    """Return one network that applies each of these to its share of the channels.

    Its input has the networks' inputs joined along dimension 1, and so its output.
    Weights are copied. Layers that mix no channels (activations, pooling, flattening
    from dimension 1 on) stay as they are; linear and convolutional layers, batch and
    group norms are joined.

    Args:
        nets: Networks of one architecture that differ in parameters and buffers alone.

    Raises:
        ValueError: If they differ otherwise, or own parameters in other layers.
    """
    if len(nets) == 1:
        return nets[0]
    joined = copy.deepcopy(nets[0])
    for name, module in nets[0].named_modules():
        others = [net.get_submodule(name) for net in nets]
        join = _joiner(module)
        if join is not None:
            joined = _replaced(joined, name, join(others))
        elif module._parameters or module._buffers:
            raise ValueError(
                f"{name or 'the network'} is a {type(module).__name__} with weights of"
                " its own; only linear, convolutional, batch and group norm layers can"
                " stand side by side"
            )
    return joined


def _joiner(module: nn.Module) -> Callable[[Sequence[nn.Module]], nn.Module] | None:
    for kind, join in _JOINERS.items():
        if isinstance(module, kind):
            return join
    return None


def _replaced(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    if not name:
        return module
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
    return root


def _join_linear(layers: Sequence[nn.Linear]) -> nn.Module:
    weight_GOI = torch.stack([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    return BlockLinear(weight_GOI, torch.stack(biases) if biases else None)


def _join_conv(layers: Sequence[nn.Conv2d]) -> nn.Module:
    joined = _concatenated(layers)
    joined.in_channels = sum(layer.in_channels for layer in layers)
    joined.out_channels = sum(layer.out_channels for layer in layers)
    joined.groups = sum(layer.groups for layer in layers)
    return joined


def _join_batch_norm(layers: Sequence[Norm]) -> nn.Module:
    joined = _concatenated(layers)
    joined.num_features = sum(layer.num_features for layer in layers)
    return joined


def _join_group_norm(layers: Sequence[nn.GroupNorm]) -> nn.Module:
    joined = _concatenated(layers)
    joined.num_channels = sum(layer.num_channels for layer in layers)
    joined.num_groups = sum(layer.num_groups for layer in layers)
    return joined


def _concatenated(layers: Sequence[_Layer]) -> _Layer:
    joined = copy.deepcopy(layers[0])
    for name in [*joined._parameters, *joined._buffers]:
        parts = [getattr(layer, name) for layer in layers]
        if parts[0] is not None and parts[0].ndim:
            value = torch.cat([part.detach() for part in parts])
            if name in joined._parameters:
                value = nn.Parameter(value, requires_grad=False)
            setattr(joined, name, value)
    return joined


_JOINERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: _join_linear,
    nn.Conv2d: _join_conv,
    Norm: _join_batch_norm,
    nn.GroupNorm: _join_group_norm,
}

"""The network as the Fisher estimators see it: a function of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.passes.batch_norms import HALF_PRECISION
from lit_resnorm.measures.passes.batches import Forward, mapped
from lit_resnorm.measures.passes.forward_walk import refuse_torchscript
from lit_resnorm.measures.passes.functional_calls import with_weights


class Network:
    """A model with its trainable parameters, in at least single precision.

    Args:
        model: Any module.
        forward: How it is applied, `(model, x) -> output`.
        double: Whether to run in double precision, with copies of the model's tensors.

    Attributes:
        model: The model itself.
        parameters: Trainable parameters by name: the model's own tensors, or for a
            half-precision model copies in float32.

    Raises:
        ValueError: If no parameter is trainable, one is complex, or a module is
            TorchScript's.
    """

    def __init__(
        self, model: nn.Module, forward: Forward, *, double: bool = False
    ) -> None:
        self.model = model
        self._forward = forward
        self._narrow = (*HALF_PRECISION, torch.float32) if double else HALF_PRECISION
        self._wide = torch.float64 if double else torch.float32
        check_readable(model)
        own = dict(model.named_parameters())
        self.parameters = {n: p for n, p in own.items() if p.requires_grad}
        if not self.parameters:
            raise ValueError(
                f"{type(model).__name__} has no trainable parameter"
                f" ({len(own)} frozen): its Fisher matrix is empty"
            )
        self._stand_ins: dict[str, Tensor] = {}
        if any(p.dtype in self._narrow for p in own.values()):
            everything = {**own, **dict(model.named_buffers())}
            self._stand_ins = {
                name: self._widened(tensor.detach()).requires_grad_(
                    tensor.requires_grad
                )
                for name, tensor in everything.items()
                if tensor.dtype in self._narrow
            }
            self.parameters = {
                n: self._stand_ins.get(n, p) for n, p in self.parameters.items()
            }

    @property
    def num_parameters(self) -> int:
        """Number P of trainable numbers."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def dtype(self) -> torch.dtype:
        """Type that holds all gradients: the widest of the parameters'."""
        return max(self._dtypes, key=lambda dtype: dtype.itemsize)

    @property
    def eps(self) -> float:
        """Relative error of one rounding, in the narrowest type of a parameter."""
        return max(torch.finfo(dtype).eps for dtype in self._dtypes)

    @property
    def _dtypes(self) -> list[torch.dtype]:
        return [parameter.dtype for parameter in self.parameters.values()]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    def __call__(
        self, x: Any, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the output for a batch, with the given parameters or its own.

        Raises:
            ValueError: If the output is not one floating-point tensor.
        """
        if self._stand_ins:
            x = mapped(self._widened, x)
        with with_weights(self.model, {**self._stand_ins, **(parameters or {})}):
            output = self._forward(self.model, x)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            found = (
                f"a tensor of {output.dtype}"
                if isinstance(output, Tensor)
                else f"a {type(output).__name__}"
            )
            raise ValueError(
                f"the output of {type(self.model).__name__} is {found}; a Fisher matrix"
                " needs a tensor of logits or predictions: give a function of (model,"
                " x) that returns it, `forward` or a probe's `forward_fn`"
            )
        return output if output.ndim > 1 else output.reshape(-1, 1)

    def in_double_precision(self) -> Network:
        """Return the same function of copies of its tensors in float64."""
        return Network(self.model, self._forward, double=True)

    def _widened(self, leaf: Any) -> Any:
        narrow = isinstance(leaf, Tensor) and leaf.dtype in self._narrow
        return leaf.to(self._wide) if narrow else leaf


def check_readable(model: nn.Module) -> None:
    """Refuse models of which there is no Fisher matrix, or none that can be followed.

    Raises:
        ValueError: If a module is TorchScript's or a parameter complex; it is named.
    """
    refuse_torchscript(model)
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is of {parameter.dtype}; a Fisher matrix is of"
                " real parameters: keep real and imaginary parts apart"
            )

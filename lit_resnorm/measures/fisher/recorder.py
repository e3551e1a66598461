"""Recording the uses of parameters in a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lit_resnorm.measures.fisher.handlers import HANDLERS, Function
from lit_resnorm.measures.fisher.uses import Use


class Recorder(TorchFunctionMode):
    """Records each use of the given parameters.

    Affine parameters of a norm are applied apart from the normalisation, so that the
    normalised values are at hand; the output is the same up to rounding.

    Args:
        parameters: Trainable parameters, as the pass will meet them, by name.

    Attributes:
        uses: Those of a kind with a formula of its own, in order.
        edges: Where the gradient of each one's output is found, also after the output
            was overwritten in place.
        general: Names of parameters that are used in any other way.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.edges: list[GradientEdge] = []
        self.general: set[str] = set()
        self._names = {id(tensor): name for name, tensor in parameters.items()}

    def __torch_function__(
        self,
        func: Function,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        names = self._met((args, kwargs))
        if not names:
            return func(*args, **kwargs)
        handler = HANDLERS.get(getattr(func, "__name__", ""))
        if handler is not None:
            recorded = handler(self.name, func, *args, **kwargs)
            if recorded is not None:
                output, use = recorded
                if output.requires_grad:
                    self.uses.append(use)
                    self.edges.append(get_gradient_edge(output))
                    self.general |= names - set(use.names)
                return output
        output = func(*args, **kwargs)
        if any(
            isinstance(leaf, Tensor) and leaf.requires_grad
            for leaf in pytree.tree_leaves(output)
        ):
            self.general |= names
        return output

    def name(self, tensor: Any) -> tuple[str, ...]:
        """Return the tensor's name as a trainable parameter, or nothing."""
        name = self._names.get(id(tensor))
        return () if name is None else (name,)

    def _met(self, values: Any) -> set[str]:
        return {
            self._names[id(leaf)]
            for leaf in pytree.tree_leaves(values)
            if id(leaf) in self._names
        }

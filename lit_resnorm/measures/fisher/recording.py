"""Recording the uses of parameters in a forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from inspect import Signature, signature
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lit_resnorm.measures.fisher.function_uses import HANDLERS, Function, RecordedUse
from lit_resnorm.measures.fisher.network import Network
from lit_resnorm.measures.fisher.parameter_uses import Use
from lit_resnorm.measures.passes.untouched import Passes


@cache
def _signature_of(function: Callable[..., Any]) -> Signature:
    """Return the function's signature."""
    return signature(function)


class UseRecorder(TorchFunctionMode):
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
        recorded = self._handled(func, args, kwargs)
        if recorded is None:
            output = func(*args, **kwargs)
            if any(
                isinstance(leaf, Tensor) and leaf.requires_grad
                for leaf in pytree.tree_leaves(output)
            ):
                self.general.update(names)
            return output
        output, use = recorded
        if output.requires_grad:
            self.uses.append(use)
            self.edges.append(get_gradient_edge(output))
            # What enters twice, or elsewhere too, has no formula.
            left_over = Counter(names)
            left_over.subtract(use.names)
            self.general.update(+left_over)
        return output

    def _handled(
        self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RecordedUse:
        handler = HANDLERS.get(func)
        if handler is None:
            return None
        try:
            fitted = _signature_of(handler).bind(self.name, func, *args, **kwargs)
        except TypeError:  # spelled as the handler does not know it
            return None
        return handler(*fitted.args, **fitted.kwargs)

    def name(self, tensor: Any) -> tuple[str, ...]:
        """Return the tensor's name as a trainable parameter, or nothing."""
        name = self._names.get(id(tensor))
        return () if name is None else (name,)

    def _met(self, values: Any) -> list[str]:
        return [
            self._names[id(leaf)]
            for leaf in pytree.tree_leaves(values)
            if id(leaf) in self._names
        ]


def recorded_pass(
    network: Network, run: Passes, x: Any, **how: bool
) -> tuple[UseRecorder, Tensor]:
    """Return what a pass on some rows found, and its output.

    Args:
        network: What is measured.
        run: Runner of forward passes.
        x: The rows.
        **how: Options of the runner.
    """
    recorder = UseRecorder(network.parameters)

    def recorded() -> Tensor:
        with recorder:
            return network(x)

    return recorder, run(recorded, **how)

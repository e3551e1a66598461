"""Second derivatives: which operation has none, and one that torch gets wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ComposedWeightNorm(TorchFunctionMode):
    """Applies weight norm by single operations.

    Torch's own kernel takes the norms for constants in its second derivative, which is
    then neither right nor symmetric.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch._weight_norm:  # pyright: ignore[reportPrivateImportUsage]
            return _weight_normed(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_normed(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextmanager
def naming_operations() -> Iterator[None]:
    """Say which operation has no second derivative.

    Raises:
        ValueError: In the place of torch's errors.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        found = re.search(r"derivative for aten::(\w+?)(_backward)?\b", text)
        if found:
            name = found[1]
        elif "does not require grad and does not have a grad_fn" in text:
            name = "an operation whose backward leaves the graph of autograd"
        else:
            raise
        raise ValueError(
            f"the loss has no second derivative: torch gives none for {name}"
        ) from error


def graph_nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """Yield the nodes of the graph behind some tensors, each once."""
    waiting: list[Any] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [each for each, _ in node.next_functions if each is not None]


def check_differentiable(grads: Sequence[Tensor]) -> None:
    """Refuse gradients through functions that say that they have no derivative.

    Their node is an error, which torch leaves out where it leads to no parameter.
    """
    nodes = [*graph_nodes(grads)]
    if not any(node.name() == "torch::autograd::Error" for node in nodes):
        return
    names = [k.__name__ for k in functions_in(grads) if _is_once(k)]
    raise ValueError(
        "the loss has no second derivative: torch gives none for "
        + (", ".join(names) or "a custom function")
    )


def functions_in(grads: Sequence[Tensor]) -> list[Any]:
    """Return the functions behind some tensors that aren't torch's own, by name."""
    kinds = {getattr(node, "_forward_cls", None) for node in graph_nodes(grads)}
    return sorted((k for k in kinds if k is not None), key=lambda k: k.__name__)


def _is_once(function: Any) -> bool:
    """Say whether a function is marked as differentiable once."""
    return hasattr(function.backward, "__wrapped__")

"""A forward pass that shows how copies of a model can run.

Dimensions: K copies, B examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lit_resnorm.measures.copies import Bound, eager
from lit_resnorm.measures.observe import num_rows

Around = Callable[[], AbstractContextManager[Any]]
"""Makes the context of a forward pass, which may set random states."""


@dataclass(frozen=True)
class Rehearsal:
    """What one forward pass of the model's own showed.

    Attributes:
        losses: The losses of the examples, shape `(B,)`.
        draws: Whether the pass draws random numbers, as dropout does.
        coupled: Whether batch norm couples the examples.
        vectorisable: Whether copies run in one vectorised pass, with the same losses.
        num_bytes: Bytes that the pass keeps for its gradient.
    """

    losses: Tensor
    draws: bool
    coupled: bool
    vectorisable: bool
    num_bytes: int


def rehearse(bound: Bound, batch: Any, around: Around = nullcontext) -> Rehearsal:
    """Return what a forward pass at the model's own weights shows.

    Nothing is changed but the random states.

    Args:
        bound: The losses of examples, as a function of the model.
        batch: A batch.
        around: Makes the context of each pass.

    Raises:
        ValueError: If there isn't one loss for each example.
    """
    params = dict(bound.model.named_parameters())
    buffers = {n: b.clone() for n, b in bound.model.named_buffers()}
    with around(), _counted_bytes() as kept, eager(), _NormWatch() as norms:
        before = _generator_states()
        losses_B = bound.with_weights(buffers, batch).detach()
        draws = not torch.equal(before, _generator_states())
    if losses_B.shape != (num_rows(batch),):
        raise ValueError(
            f"losses of {num_rows(batch)} examples have shape {tuple(losses_B.shape)};"
            " there must be one for each"
        )
    owned = dict(bound.model.named_buffers())
    pair = {n: torch.stack([x, x]).detach() for n, x in (params | owned).items()}
    together = _losses_of_pair(bound, pair, batch, around)
    return Rehearsal(
        losses=losses_B,
        draws=draws,
        coupled=norms.coupled,
        vectorisable=together is not None and _agree(together, losses_B),
        num_bytes=kept[0],
    )


@torch.no_grad()
def _losses_of_pair(
    bound: Bound, pair: dict[str, Tensor], batch: Any, around: Around
) -> Tensor | None:
    try:
        with around(), eager():
            return bound.for_each(pair, batch)
    except Exception:
        # Whatever a model does that vmap can't; the pass alone has just worked.
        return None


def _agree(together_KB: Tensor, alone_B: Tensor) -> bool:
    tolerance = torch.finfo(alone_B.dtype).eps ** 0.75
    expected = alone_B.expand_as(together_KB)
    return torch.allclose(together_KB, expected, tolerance, tolerance, equal_nan=True)


class _NormWatch(TorchFunctionMode):
    """Sees whether a batch norm takes its statistics from the batch."""

    coupled = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            training = args[5] if len(args) > 5 else kwargs.get("training", False)
            self.coupled |= bool(training)
        return func(*args, **kwargs)


def _generator_states() -> Tensor:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return torch.cat(states)


@contextmanager
def _counted_bytes() -> Iterator[list[int]]:
    """Count the bytes of distinct tensors that autograd keeps for the backward pass."""
    seen: set[int] = set()
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total[0] += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total

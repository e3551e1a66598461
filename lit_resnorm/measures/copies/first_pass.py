"""A forward pass that shows how copies of a model can run.

Dimensions: K copies, B examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_resnorm.measures.copies.attributes import (
    Attributes,
    attributes,
    changed,
    with_attributes_after,
    with_state,
)
from lit_resnorm.measures.copies.copies import (
    Losses,
    ModelFunction,
    with_buffers,
)
from lit_resnorm.measures.passes.batch_norms import BATCH_NORMS, over_rows
from lit_resnorm.measures.passes.batches import num_rows, take_rows
from lit_resnorm.measures.passes.compilation import uncompiled
from lit_resnorm.measures.passes.random_states import RandomStates

Around = Callable[[], AbstractContextManager[Any]]
"""Makes the context of a forward pass, which may set random states."""


@dataclass(frozen=True)
class FirstPass:
    """What one forward pass of the model's own showed.

    Attributes:
        losses: The losses of the examples, shape `(B,)`.
        draws: Whether the pass draws random numbers, as dropout does.
        coupled: Whether a batch norm takes its statistics over the examples.
        kept: Names of the plain attributes that the pass updates.
        vectorisable: Whether copies run in one vectorised pass, with the same losses.
        num_bytes: Bytes that the pass keeps for its gradient.
    """

    losses: Tensor
    draws: bool
    coupled: bool
    kept: list[str]
    vectorisable: bool
    num_bytes: int


def run_first_pass(
    model: nn.Module,
    losses: Losses,
    batch: Any,
    around: Around = nullcontext,
    buffers: Mapping[str, Tensor] | None = None,
    before: Attributes | None = None,
) -> FirstPass:
    """Return what a forward pass at the model's own weights shows.

    Nothing is changed but the random states.

    Args:
        model: The model.
        losses: The losses of examples.
        batch: A batch.
        around: Makes the context of each pass.
        buffers: Buffers to begin with; None: as they are.
        before: Plain attributes to begin with; None: as they are.

    Raises:
        ValueError: If there isn't one loss for each example.
    """
    now = attributes(model)
    before = now if before is None else before
    moved = changed(before, now)
    bound = ModelFunction(
        model, with_attributes_after(with_buffers(losses), moved, before)
    )
    buffers = dict(model.named_buffers() if buffers is None else buffers)
    # Copies, as the pass may write into them, and the run's own graph has saved them.
    own = {
        n: p.detach().clone().requires_grad_(p.requires_grad)
        for n, p in model.named_parameters()
    }
    own |= {n: b.clone() for n, b in buffers.items()}
    with around(), _counted_bytes() as memory, uncompiled(), _NormWatch() as norms:
        states = RandomStates.now()
        (losses_B, left), after = bound.with_weights(own, batch)
        draws = states.moved()
    with around(), uncompiled():
        # With buffers of its own: those of `own` are what the first pass left.
        again = own | {n: b.clone() for n, b in buffers.items()}
        coupled = _over_rows(
            norms.shapes, lambda rows: bound.with_weights(again, rows), batch
        )
    num = num_rows(batch)
    if losses_B.shape != (num,):
        raise ValueError(
            f"losses of {num} examples have shape {tuple(losses_B.shape)};"
            " there must be one for each"
        )
    kept = changed(before, after)
    alike = ModelFunction(model, with_state(with_buffers(losses), moved, before))
    return FirstPass(
        losses=losses_B.detach(),
        draws=draws,
        coupled=coupled,
        kept=kept,
        vectorisable=not kept
        and _side_by_side(alike, buffers, batch, around, losses_B.detach(), left),
        num_bytes=memory[0],
    )


def _side_by_side(
    bound: ModelFunction,
    buffers: Mapping[str, Tensor],
    batch: Any,
    around: Around,
    losses_B: Tensor,
    left: Mapping[str, Tensor],
) -> bool:
    """Return whether two copies in one vectorised pass do what the model does alone.

    Args:
        bound: The losses, at any weights, and buffers as the pass leaves them.
        buffers: Buffers to begin with.
        batch: A batch.
        around: Makes the context of the pass.
        losses_B: Losses of the pass alone.
        left: Buffers that it left.
    """
    owned = dict(bound.model.named_parameters()) | dict(buffers)
    pair = {n: torch.stack([x, x]).detach() for n, x in owned.items()}
    # Each copy takes rows of its own, so that rows are batched as they will be.
    rows_KR = torch.arange(len(losses_B)).expand(2, len(losses_B)).contiguous()
    together = _pair(bound, pair, batch, rows_KR, around)
    return (
        together is not None
        and _agree(together[0], losses_B)
        and all(_agree(together[1][name], left[name]) for name in left)
    )


@torch.no_grad()
def _pair(
    bound: ModelFunction,
    pair: dict[str, Tensor],
    batch: Any,
    rows_KR: Tensor,
    around: Around,
) -> Any:
    try:
        with around(), uncompiled():
            return bound.for_each(pair, batch, rows_KR)
    except Exception:
        # Whatever a model does that vmap can't; the pass alone has just worked.
        return None


def _agree(together: Tensor, alone: Tensor) -> bool:
    expected = alone.expand_as(together)
    if not alone.is_floating_point():
        return torch.equal(together, expected)
    tolerance = torch.finfo(alone.dtype).eps ** 0.75
    return torch.allclose(together, expected, tolerance, tolerance, equal_nan=True)


class _NormWatch(TorchFunctionMode):
    """Keeps the shapes of what batch norms take statistics of."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if (read := BATCH_NORMS.get(func)) is not None:
            call = read(*args, **kwargs)
            if call.training:
                self.shapes.append(call.input.shape)
        return func(*args, **kwargs)


@torch.no_grad()
def _over_rows(shapes: list[torch.Size], run: Callable[[Any], Any], batch: Any) -> bool:
    """Say whether statistics of these shapes follow the number of rows.

    Those of weights are the same in a pass on one row more.
    """
    if not shapes:
        return False
    num = num_rows(batch)
    with _NormWatch() as longer:
        try:
            run(take_rows(batch, torch.arange(num + 1) % num))
        except Exception:
            return True  # of a model that takes no other number of rows
    pairs = zip(shapes, longer.shapes, strict=False)
    alike = len(shapes) == len(longer.shapes)
    return not alike or any(over_rows(longer, first) for first, longer in pairs)


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

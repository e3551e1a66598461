"""The residual blocks of a network: their additions, and the head behind the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.passes.batches import Forward, occupied, take_rows
from lit_resnorm.measures.passes.example_dims import example_dims
from lit_resnorm.measures.passes.flow import follow
from lit_resnorm.measures.passes.sites import Site, Visitor, select, visiting
from lit_resnorm.measures.passes.tracing import trace
from lit_resnorm.measures.passes.untouched import untouched


@dataclass(frozen=True)
class ResidualBlocks:
    """Additions that end residual branches, and what follows the last of them.

    Attributes:
        sites: The additions, in the order of execution.
        dims: By name the dimension of an addition's output that counts examples.
        last: The network's last addition, behind which the head begins; None where the
            output depends on something else beside it.
        fitting: Names of the additions whose output has the shape of the last one's,
            so that the head takes it.
        together: Whether the head takes the outputs of several additions as one larger
            batch.
    """

    sites: tuple[Site, ...]
    dims: dict[str, int]
    last: Site | None
    fitting: tuple[str, ...]
    together: bool


def residual_blocks(
    model: nn.Module,
    x: Any,
    *,
    sites: str | Sequence[Site] = "",
    forward: Forward = nn.Module.__call__,
) -> ResidualBlocks:
    """Return the residual blocks of a network, as passes on two examples show them.

    Additions whose output counts examples in no dimension are left out.

    Args:
        model: Any module; it is left as it was.
        x: A batch of which two examples are run.
        sites: All sites of the model, or a pattern searched in names of additions.
        forward: Runs the model on a batch.

    Raises:
        ValueError: If a pattern matches none of the additions.
    """
    few = take_rows(occupied(x)[0], slice(2))
    with untouched(model, norm_mode="eval") as run, torch.no_grad():
        traced = run(lambda: trace(model, lambda: forward(model, few)))
        additions = select(traced, kinds=("addition",))
        if isinstance(sites, str):
            chosen = select(traced, sites, kinds=("addition",))
        else:
            chosen = select(sites, kinds=("addition",))
        if not chosen:
            return ResidualBlocks((), {}, None, (), False)
        flow = run(lambda: follow(model, few, lambda: forward(model, few), additions))
    dims = example_dims(model, few, additions, forward)
    last = additions[-1]
    readable = tuple(site for site in chosen if site.name in dims)
    if last.name not in flow.cuts or last.name not in dims:
        return ResidualBlocks(readable, dims, None, (), False)
    keeper = OutputKeeper(additions)
    with untouched(model, norm_mode="eval") as run, torch.no_grad():
        output = run(lambda: keeper.seen(model, lambda: forward(model, few)))
        shape = keeper.outputs[last.name].shape
        fitting = [s.name for s in readable if keeper.outputs[s.name].shape == shape]
        states = [keeper.outputs[last.name]] * 2

        def replaced() -> Any:
            joined = torch.cat(states, dims[last.name])
            with visiting(model, [last], Replacing(joined)):
                return forward(model, few)

        try:
            twice = run(replaced)
        except Exception:  # whatever a head says of a batch of another size
            twice = None
    return ResidualBlocks(
        readable, dims, last, tuple(fitting), _is_twice(twice, output)
    )


def _is_twice(twice: Any, output: Any) -> bool:
    """Say whether an output is another one, and that one again."""
    if not isinstance(twice, Tensor) or not isinstance(output, Tensor):
        return False
    if not output.ndim or len(twice) != 2 * len(output):
        return False
    tolerance = torch.finfo(output.dtype).eps ** 0.5
    pair = torch.cat([output, output])
    return torch.allclose(twice, pair, rtol=tolerance, atol=tolerance, equal_nan=True)


class OutputKeeper(Visitor):
    """Keeps what sites put out in a pass.

    Attributes:
        outputs: By name of the site; copies, as later operations may overwrite it.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.outputs: dict[str, Tensor] = {}

    def seen(self, model: nn.Module, forward: Any) -> Any:
        """Return the output of a pass of the model."""
        with visiting(model, self.sites, self):
            return forward()

    def after(self, site: Site, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG002
        """Keep the output."""
        self.outputs[site.name] = output.detach().clone()


class Replacing(Visitor):
    """Puts another tensor in the place of an addition's output; needs no gradients.

    Args:
        value: The tensor; None: the operand that skips the branch.
    """

    def __init__(self, value: Tensor | None = None) -> None:
        self._value = value
        self._skip: Tensor | None = None

    def before(self, site: Site, args: Any, kwargs: Any) -> None:
        """Copy the skip: an addition in place may overwrite it."""
        if self._value is None:
            self._skip = operands(site, args, kwargs)[0].clone()

    def after(self, site: Site, args: Any, kwargs: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        """Return the other tensor, and write it where the addition was in place."""
        value = self._skip if self._value is None else self._value
        if value is None:
            raise RuntimeError(f"{site.name} was left before it was entered")
        if output is args[0] and output.shape == value.shape:
            output.copy_(value)
        return value


def operands(
    site: Site, args: Sequence[Tensor], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return what an addition adds up: the skip, then the branch.

    The second operand is multiplied by the addition's `alpha`, where it has one.
    """
    alpha = kwargs.get("alpha", 1)
    first, second = args[0], args[1] if alpha == 1 else alpha * args[1]
    return (second, first) if site.skip == 1 else (first, second)

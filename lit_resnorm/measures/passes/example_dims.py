"""Where the outputs of sites count the examples of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.passes.batches import Forward, occupied, take_rows
from lit_resnorm.measures.passes.sites import Site, Visitor, first_tensor, visiting
from lit_resnorm.measures.passes.untouched import untouched


def example_dims(
    model: nn.Module, x: Any, sites: Sequence[Site], forward: Forward
) -> dict[str, int]:
    """Return by site the dimension of its output that counts examples.

    It is the one that is twice as long for four examples as for two. Sites whose output
    has none, or several, are left out.

    Args:
        model: Any module; it is left as it was.
        x: A batch; one example of it is run.
        sites: Sites of this model.
        forward: Runs the model on a batch.
    """
    two, four = _Shapes(), _Shapes()
    with untouched(model, norm_mode="eval") as run, torch.no_grad():
        for shapes, num in ((two, 2), (four, 4)):
            rows = take_rows(occupied(x)[0], torch.zeros(num, dtype=torch.long))

            def visited(rows: Any = rows, shapes: _Shapes = shapes) -> None:
                with visiting(model, sites, shapes):
                    forward(model, rows)

            run(visited)
    found = {}
    for name, few in two.by_site.items():
        more = four.by_site[name]
        longer = [d for d, size in enumerate(few) if more[d : d + 1] != (size,)]
        if len(few) == len(more) and len(longer) == 1:
            (dim,) = longer
            if more[dim] == 2 * few[dim]:
                found[name] = dim
    return found


def example_rows(tensor: Tensor, dim: int, num: int) -> Tensor:
    """Return a site's output as `(num, ...)` rows, one an example, flattened.

    Args:
        tensor: The output.
        dim: Its dimension that counts examples, as `example_dims` finds it.
        num: Number of examples.
    """
    return tensor.movedim(dim, 0).reshape(num, -1)


class _Shapes(Visitor):
    def __init__(self) -> None:
        self.by_site: dict[str, tuple[int, ...]] = {}

    def after(self, site: Site, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG002
        found = first_tensor(output)
        self.by_site[site.name] = () if found is None else tuple(found.shape)

"""How far apart a network keeps its examples, by depth.

B examples, F features: all units, and positions, of one example at one site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.passes.sites import Site, Visitor, first_tensor, visiting
from lit_resnorm.measures.passes.untouched import untouched
from lit_resnorm.measures.spectra import largest_eigenvalue

_NUMBERS_AT_ONCE = 2**22


def separation(x: Tensor) -> float:
    r"""Return the share of a batch's power that lies off the best straight line.

    .. math:: \frac{\mathrm{tr}\, G - \lambda_{\max}(G)}{\sum_b |x_b|^2}, \quad
              G_{bc} = (x_b - \bar x) \cdot (x_c - \bar x)

    Examples are whole feature maps, so what zero padding adds to all of them alike
    counts as nothing. 0 where all examples lie on a line, or are equal; of B
    independent examples of mean 0 it is `(B - 2) / B` at most.

    Source: derived here. For examples of equal norm at angles theta to each other it
    is `(1 - cos theta) (B - 2) / B`; these angles fall to 0 with depth without
    normalisation (Furusho and Ikeda (2019), PMLR 101:94-108).

    Args:
        x: Shape `(B, ...)`.

    Returns:
        In [0, 1]; NaN where x isn't finite, or is 0.
    """
    x_BF = x.detach().flatten(1)
    num = len(x_BF)
    gram_BB = torch.zeros(num, num, dtype=torch.float64, device=x.device)
    power = gram_BB.new_zeros(())
    for part_BF in x_BF.split(max(1, _NUMBERS_AT_ONCE // num), dim=1):
        wide_BF = part_BF.double()
        power += wide_BF.square().sum()
        wide_BF = wide_BF - wide_BF.mean(0)
        gram_BB += wide_BF @ wide_BF.T
    if not bool(gram_BB.isfinite().all()) or not power:
        return math.nan
    largest = largest_eigenvalue(gram_BB[None])[0]
    return max(0.0, float((gram_BB.trace() - largest) / power))


def separations(
    model: nn.Module,
    x: Any,
    sites: Sequence[Site],
    *,
    forward: Callable[[nn.Module, Any], Any] = nn.Module.__call__,
    norm_mode: str = "frozen",
) -> dict[str, float]:
    """Return the separation of the examples at the output of each site.

    Args:
        model: Any module; it is left as it was.
        x: Examples, as `forward` takes them.
        sites: Sites of this model, with the examples in the first dimension.
        forward: Runs the model on the examples.
        norm_mode: What batch norm does: `frozen`, `eval` or `train`.
    """
    visitor = _Separations()
    with untouched(model, norm_mode=norm_mode) as run, torch.no_grad():

        def visited() -> None:
            with visiting(model, sites, visitor):
                forward(model, x)

        run(visited)
    return visitor.found


class _Separations(Visitor):
    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def after(
        self,
        site: Site,
        args: tuple[Any, ...],  # noqa: ARG002
        kwargs: dict[str, Any],  # noqa: ARG002
        output: Any,
    ) -> None:
        x = first_tensor(output)
        if x is not None:
            self.found[site.name] = separation(x)

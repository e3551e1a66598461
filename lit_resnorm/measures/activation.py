"""Activation rates: how often each unit of each layer is on.

B examples (and positions), U units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.passes.batches import occupied, take_rows
from lit_resnorm.measures.passes.forward_walk import ACTIVATION_NAMES
from lit_resnorm.measures.passes.sites import (
    Site,
    Visitor,
    first_tensor,
    select,
    visiting,
)
from lit_resnorm.measures.passes.tracing import trace
from lit_resnorm.measures.passes.untouched import Reduce, identity, untouched

# Activations that let positive preactivations through and damp negative ones: only
# there does a sign say whether a unit is on.
RECTIFIERS = ACTIVATION_NAMES - {
    "hardsigmoid",
    "hardtanh",
    "logsigmoid",
    "sigmoid",
    "softplus",
    "softsign",
    "tanh",
    "tanhshrink",
}


@dataclass(frozen=True)
class ActivationRates:
    """Activation rates of one site over all examples, positions and ranks.

    Attributes:
        unit_rates: Rate of each unit, shape `(U,)`, float64 in [0, 1].
        count: Examples times positions behind each rate, 0-d float64.
    """

    unit_rates: Tensor
    count: Tensor

    @property
    def rate(self) -> Tensor:
        """Mean rate over units, 0-d float64."""
        return self.unit_rates.mean()

    @property
    def dead(self) -> Tensor:
        """Share of units that are on for no example, 0-d float64."""
        return self._share(self.unit_rates == 0)

    @property
    def always_on(self) -> Tensor:
        """Share of units that are on for every example, 0-d float64."""
        return self._share(self.unit_rates == 1)

    def _share(self, which: Tensor) -> Tensor:
        share = which.double().mean()
        return torch.where(self.unit_rates.isnan().any(), torch.nan, share)


def rectifier_sites(sites: Sequence[Site], pattern: str = "") -> tuple[Site, ...]:
    """Return the sites at which an activation rate has a meaning.

    Raises:
        ValueError: If there are some and the pattern matches none of them.
    """
    return select(sites, pattern, kinds=("activation",), ops=RECTIFIERS)


def activation_rates(
    model: nn.Module,
    x: Any,
    *,
    sites: str | Sequence[Site] = "",
    forward: Callable[[nn.Module, Any], Any] = nn.Module.__call__,
    norm_mode: str = "frozen",
    reduce: Reduce = identity,
) -> dict[str, ActivationRates]:
    r"""Return the activation rates of every rectifier of a network, by site.

    .. math:: \frac{1}{BU} \sum_{b,u} 1[x_{bu} > 0]

    x is the preactivation; a preactivation of exactly 0 counts as off. Counts are
    integers summed over ranks before anything is divided, so that a unit is dead only
    if it is off for all examples of all ranks. Exact.

    Source: Furusho and Ikeda (2020), doi 10.1017/ATSIP.2020.7, Figure 6, read in its
    caption and abstract only; that 0 counts as off, and units as dead over all
    examples, is our definition.

    Args:
        model: Any module; it is left as it was.
        x: This rank's examples, as `forward` takes them; may be empty on some ranks.
        sites: A pattern searched in the sites' names, or sites of this model.
        forward: Runs the model on the examples.
        norm_mode: What batch norm does: `frozen`, `eval` or `train`.
        reduce: Sums a tensor over ranks.

    Returns:
        Rates by site name, in the order of execution. A site whose preactivations
        hold a NaN has NaN rates.

    Raises:
        ValueError: If all ranks together hold no example, or a pattern matches nothing.
    """
    x, empty = occupied(x)
    if isinstance(sites, str):
        with untouched(model) as run, torch.no_grad():
            few = take_rows(x, slice(2))
            sites = rectifier_sites(
                run(lambda: trace(model, lambda: forward(model, few))), sites
            )
    counter = _Counter(empty)
    with untouched(model, norm_mode=norm_mode, reduce=reduce) as run, torch.no_grad():

        def counted() -> None:
            with visiting(model, sites, counter):
                forward(model, x)

        run(counted, empty=empty)
    return _rates(counter.counts, reduce)


class _Counter(Visitor):
    """Counts, at each site, the examples for which each unit is on."""

    def __init__(self, empty: bool) -> None:
        self.empty = empty
        self.counts: dict[str, Tensor] = {}  # (U + 1,): per unit, then the total
        self._scratch = torch.empty(0)

    def before(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        u = first_tensor((args, kwargs))
        if u is None:
            raise RuntimeError(f"{site.name} was called without a tensor")
        u = (u[:, None] if u.ndim == 1 else u).detach()
        num_units = u.shape[site.channel_dim]
        total = 0 if self.empty else u.numel() // num_units
        if self.empty:
            on = torch.zeros(num_units, dtype=torch.float64, device=u.device)
        else:
            on = self._count_positive(u, site.channel_dim)
        self.counts[site.name] = torch.cat([on, on.new_tensor([total])])

    def _count_positive(self, u: Tensor, channel_dim: int) -> Tensor:
        """Return how often each unit is positive, `(U,)`, float64; NaN for a NaN."""
        # A float result in a buffer that is used again is nine times as fast as a new
        # boolean one. float32 counts are exact below 2^24: of one example, that is.
        if self._scratch.numel() < u.numel() or self._scratch.device != u.device:
            self._scratch = torch.empty(u.numel(), device=u.device)
        on = torch.gt(u, 0, out=self._scratch[: u.numel()].view(u.shape))
        on = on.movedim(channel_dim, 1)
        per_example = on.flatten(2).sum(2) if on.ndim > 2 else on
        total = per_example.sum(0, dtype=torch.float64)
        return torch.where(u.sum().isnan(), torch.nan, total)


def _rates(counts: dict[str, Tensor], reduce: Reduce) -> dict[str, ActivationRates]:
    if not counts:
        return {}
    sizes = [count.numel() for count in counts.values()]
    summed = reduce(torch.cat(list(counts.values()))).split(sizes)
    if not summed[0][-1] > 0:
        raise ValueError("the probe batch holds no example on any rank")
    return {
        name: ActivationRates(total[:-1] / total[-1], total[-1])
        for name, total in zip(counts, summed, strict=True)
    }

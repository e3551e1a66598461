"""Signal and noise over many random networks and inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lit_resnorm.measures.copies.side_by_side import side_by_side
from lit_resnorm.measures.moments.profile import DepthProfile
from lit_resnorm.measures.moments.signal_and_noise import (
    flow_between_sites,
    signal_and_noise,
)

Draw = Callable[[], tuple[nn.Module, Tensor]]


@dataclass(frozen=True)
class Propagation:
    """What many draws gave.

    Only the numbers are kept, 8 bytes each; networks and activations are not.

    Attributes:
        sites: Names of the measured sites, the input first.
        kinds: Their kinds.
        samples: By quantity (an attribute of `SiteMoments`), shape `(draws, sites)`,
            float64; NaN where a site has no such quantity.
    """

    sites: tuple[str, ...]
    kinds: tuple[str, ...]
    samples: dict[str, Tensor]

    def at(self, quantity: str, *kinds: str, ending: str = "") -> Tensor:
        """Return the samples of a quantity at some sites, shape `(draws, sites)`.

        Args:
            quantity: A key of `samples`.
            *kinds: Kinds of sites; all where none is given.
            ending: What the sites' names end in.
        """
        chosen = [
            place
            for place, (name, kind) in enumerate(
                zip(self.sites, self.kinds, strict=True)
            )
            if (not kinds or kind in kinds) and name.endswith(ending)
        ]
        return self.samples[quantity][:, chosen]

    def mean(self, quantity: str) -> Tensor:
        """Return the mean over draws by site, shape `(sites,)`."""
        return self.samples[quantity].mean(0)

    def deviation(self, quantity: str) -> Tensor:
        """Return the standard deviation of one draw by site, shape `(sites,)`."""
        return self.samples[quantity].std(0)

    def quantile(self, quantity: str, q: float) -> Tensor:
        """Return a quantile over draws by site, shape `(sites,)`."""
        return self.samples[quantity].quantile(q, dim=0)


def propagate(
    draw: Draw,
    num_draws: int,
    *,
    quantities: Sequence[str] = ("log_sensitivity", "effective_rank", "delta", "nu2"),
    sites: str = "",
    ranks_at: str = "",
    norm_mode: str = "frozen",
    seed: int = 0,
    nets_at_once: int = 1,
) -> Propagation:
    """Return signal and noise by depth over random draws of network and inputs.

    Each draw has its own random state, so that its network and inputs are the same
    however many there are and however they share passes; the global state is left as
    it was.

    Source: Labatie (2019), arXiv 1811.03087, section 2.2: moments over initialisations
    and inputs, new ones every draw.

    Args:
        draw: Returns a network and its input, both drawn from torch's global
            generator. With `nets_at_once=1` it may fill one network with new weights
            each time, whose sites are then traced once.
        num_draws: How many.
        quantities: Names of attributes of `SiteMoments`; `effective_rank` costs most.
        sites: Pattern searched in the sites' names.
        ranks_at: The same for the sites where effective ranks are measured.
        norm_mode: What batch norm does: `frozen`, `eval` or `train`.
        seed: Of the first draw.
        nets_at_once: Networks that share a pass (see `side_by_side`): more of them save
            time where a layer is small, and need as much more memory.

    Raises:
        ValueError: If `num_draws` or `nets_at_once` is below 1, or an option of
            `signal_and_noise` can't be right.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}; it must be at least 1")
    if nets_at_once < 1:
        raise ValueError(f"nets_at_once is {nets_at_once}; it must be at least 1")
    chunks: dict[str, list[Tensor]] = {quantity: [] for quantity in quantities}
    profile = DepthProfile(())
    traced, flow = None, None
    for first in range(0, num_draws, nets_at_once):
        indices = range(first, min(first + nets_at_once, num_draws))
        with torch.random.fork_rng(devices=[]):
            net, x = _drawn_together(draw, seed, indices)
        if flow is None or net is not traced:
            traced, flow = net, flow_between_sites(net, x, sites=sites)
        profile = signal_and_noise(
            net,
            x,
            sites=flow,
            norm_mode=norm_mode,
            seed=_mixed(seed, first, 1),
            effective_rank=ranks_at if "effective_rank" in quantities else False,
            num_nets=len(indices),
        )
        for quantity, columns in chunks.items():
            columns.append(_samples(profile, quantity, len(indices)))
    return Propagation(
        sites=tuple(site.name for site in profile.sites),
        kinds=tuple(site.kind for site in profile.sites),
        samples={quantity: torch.cat(parts) for quantity, parts in chunks.items()},
    )


def _drawn_together(
    draw: Draw, seed: int, indices: Sequence[int]
) -> tuple[nn.Module, Tensor]:
    nets, inputs = [], []
    for index in indices:
        torch.manual_seed(_mixed(seed, index, 0))
        net, x = draw()
        nets.append(net)
        inputs.append(x)
    return side_by_side(nets), torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0]


def _samples(profile: DepthProfile, quantity: str, num_nets: int) -> Tensor:
    columns = []
    for site in profile.sites:
        value = getattr(site, quantity)
        if value is None:
            value = torch.tensor(torch.nan, dtype=torch.float64)
        columns.append(value.cpu().expand(num_nets))
    return torch.stack(columns, 1)


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1

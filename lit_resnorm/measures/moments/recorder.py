"""Measuring signal and noise at the sites of a pass, as it goes."""

from __future__ import annotations

import math
import re
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_resnorm.measures.moments.noise import noise_of, signal_of, with_noise
from lit_resnorm.measures.moments.sums import (
    BLOCK,
    ChannelMoments,
    ChannelSums,
    examples_channels_positions,
)
from lit_resnorm.measures.passes.flow import Flow
from lit_resnorm.measures.passes.sites import Site, Visitor, first_tensor
from lit_resnorm.measures.passes.untouched import Reduce, identity

# Noise is rescaled once its root mean square leaves 2**-8 ... 2**8: by a power of two,
# which changes no digit, and early enough for half precision.
_FAR = 8


class NoiseSums:
    """Sum of squares of a noise that is known up to a power of two.

    The noise of each chunk and rank may have been rescaled by another power: it is
    `dx * 2**exponent`.

    Args:
        num_nets: Networks side by side, each with its share of the channels.
    """

    def __init__(self, num_nets: int = 1) -> None:
        self.num_nets = num_nets
        self._sums_G: list[Tensor] = []
        self._exponents: list[int] = []
        self._count = 0

    def add(
        self,
        dx: Tensor,
        channel_dim: int = 1,
        exponent: int = 0,
        *,
        empty: bool = False,
    ) -> float:
        """Add a chunk; return the logarithm to base 2 of its own root mean square."""
        total_G = dx.new_zeros(self.num_nets, dtype=torch.float64)
        if empty:
            self._sums_G.append(total_G)
            self._exponents.append(0)
            return 0.0
        dx_BCP = examples_channels_positions(dx, channel_dim)
        dx_BGK = dx_BCP.reshape(len(dx_BCP), self.num_nets, -1)
        for block_BGK in dx_BGK.split(max(1, BLOCK // dx_BGK[0].numel())):
            total_G += block_BGK.double().square().sum((0, 2))
        self._count += dx.numel() // self.num_nets
        self._sums_G.append(total_G)
        self._exponents.append(exponent)
        mean = float(total_G.mean()) * self.num_nets / dx.numel()
        return 0.5 * math.log2(mean) if 0 < mean < math.inf else 0.0

    def finish(self, reduce: Reduce = identity) -> Tensor:
        """Return log of the mean square over all entries of all ranks.

        Returns:
            0-d float64 tensor, of shape `(G,)` for G networks side by side.
        """
        # Ranks agree on the mean exponent; theirs differ by little, so the powers of
        # two that are left fit float64.
        exponents = [sum(self._exponents), len(self._exponents), self._count]
        shared = reduce(self._sums_G[0].new_tensor(exponents))
        base = torch.round(shared[0] / shared[1])
        total_G = torch.zeros_like(self._sums_G[0])
        for part_G, exponent in zip(self._sums_G, self._exponents, strict=True):
            total_G += part_G * torch.exp2(2 * (exponent - base))
        mean_G = reduce(total_G) / shared[2]
        return (torch.log(mean_G) + 2 * math.log(2) * base).squeeze()


@dataclass(frozen=True)
class PointMoments:
    """Signal and noise of one tensor, over all chunks and ranks.

    Attributes:
        signal: Moments of the signal.
        log_noise: Log of the noise's mean square, 0-d float64.
    """

    signal: ChannelMoments
    log_noise: Tensor

    def log_sensitivity(self, log_unit: Tensor) -> Tensor:
        """Return log of the noise over the signal, in units of that at the input.

        Infinite where the signal is flat: whatever noise there is drowns it.
        """
        log_ratio = 0.5 * (self.log_noise - self.signal.mu2.log()) - log_unit
        return torch.where(self.signal.mu2 == 0, torch.inf, log_ratio)


class _Point:
    """The sums of one tensor of the pass."""

    def __init__(
        self, num_nets: int, *, fourth: bool = False, covariance: bool = False
    ) -> None:
        self.signal = ChannelSums(
            fourth=fourth, covariance=covariance, num_nets=num_nets
        )
        self.noise = NoiseSums(num_nets)
        self.moments: PointMoments | None = None

    def finish(self, reduce: Reduce) -> PointMoments:
        if self.moments is None:
            log_noise = self.noise.finish(reduce)
            self.moments = PointMoments(self.signal.finish(reduce), log_noise)
        return self.moments


class MomentRecorder(Visitor):
    """Sums up signal and noise at each site; rescales the noise at the flow's cuts.

    A tensor that several sites share, as one's output and another's input, is summed
    once. In the last chunk a point is finished at once: what a covariance needs is
    held for one site at a time.

    Args:
        flow: The sites, and where noise may be rescaled.
        reduce: Sums a tensor over ranks.
        effective_rank: Pattern of the sites whose effective rank is wanted, norms
            aside; None for none.
        num_nets: Networks side by side, each with its share of the channels.
    """

    def __init__(
        self,
        flow: Flow,
        reduce: Reduce,
        *,
        effective_rank: str | None,
        num_nets: int = 1,
    ) -> None:
        self.flow = flow
        self.reduce = reduce
        self.effective_rank = effective_rank
        self.num_nets = num_nets
        self._points: dict[str, _Point] = {}
        self._same: dict[str, str] = {}
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self._exponent = 0
        self._empty = False
        self._last = True

    def begin(self, *, empty: bool, last: bool) -> None:
        """Begin the pass of one chunk."""
        self._seen = {}
        self._exponent = 0
        self._empty = empty
        self._last = last

    def moments(self, key: str) -> PointMoments:
        """Return what was measured at a site's output, or one of its arguments.

        Keys are a site's name, and with `#in`, `#skip` or `#branch` its arguments.
        """
        return self._points[self._same.get(key, key)].finish(self.reduce)

    def enter_input(self, key: str, x: Tensor, channel_dim: int) -> None:
        """Measure one of the tensors where noise begins."""
        self._measure(key, x, channel_dim, _Point(self.num_nets))

    def before(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure the operands of an addition, the input of an activation."""
        if site.kind == "addition":
            for place, operand in enumerate(args[:2]):
                role = "skip" if place == site.skip else "branch"
                self._measure(f"{site.name}#{role}", operand, site.channel_dim)
        elif site.kind == "activation":
            u = first_tensor((args, kwargs))
            if u is not None:
                self._measure(f"{site.name}#in", u, site.channel_dim)

    def after(
        self,
        site: Site,
        args: tuple[Any, ...],  # noqa: ARG002
        kwargs: dict[str, Any],  # noqa: ARG002
        output: Any,
    ) -> Any:
        """Measure the output; return it with its noise rescaled where that is due."""
        x = first_tensor(output)
        if x is None:
            return None
        point = _Point(
            self.num_nets,
            fourth=site.kind in ("norm", "module"),
            covariance=self._wants_rank(site),
        )
        power = self._measure(site.name, x, site.channel_dim, point)
        if site.name not in self.flow.cuts or x is not output or abs(power) < _FAR:
            return None
        return self._rescaled(site, x, round(power))

    def _wants_rank(self, site: Site) -> bool:
        pattern = self.effective_rank
        if pattern is None or site.kind == "norm":
            return False
        return re.search(pattern, site.name) is not None

    def _measure(
        self, key: str, x: Tensor, channel_dim: int, new: _Point | None = None
    ) -> float:
        """Add a tensor to its point; return log2 of its noise as it is carried."""
        seen = self._seen.get(id(x))
        if new is None and seen and seen[0]() is x and seen[1] == x._version:
            self._same[key] = seen[2]
            return 0.0
        self._seen[id(x)] = weakref.ref(x), x._version, key
        point = self._points.setdefault(key, new or _Point(self.num_nets))
        signal, noise = signal_of(x), noise_of(x)
        if noise is None:
            noise = torch.full_like(signal, torch.nan)
        power = point.noise.add(noise, channel_dim, self._exponent, empty=self._empty)
        point.signal.add(signal, channel_dim, empty=self._empty)
        if self._last:
            point.finish(self.reduce)
        return power

    def _rescaled(self, site: Site, x: Tensor, power: int) -> Tensor:
        noise = noise_of(x)
        if noise is None:
            raise RuntimeError("only a noise that was measured is rescaled")
        # In two steps: one factor alone may be out of the type's range.
        half = power // 2
        noise = noise * math.ldexp(1.0, -half) * math.ldexp(1.0, half - power)
        rescaled = with_noise(signal_of(x), noise)
        self._exponent += power
        self._seen[id(rescaled)] = weakref.ref(rescaled), rescaled._version, site.name
        return rescaled

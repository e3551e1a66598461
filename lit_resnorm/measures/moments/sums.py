"""Sums from which the moments of a tensor follow, over chunks and over ranks.

B examples, P positions, n = B P entries a channel; C channels, which may be those of G
networks side by side, D each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_resnorm.measures.passes.untouched import Reduce, identity
from lit_resnorm.measures.spectra import largest_eigenvalue

# Entries converted to float64 at a time: what a core's cache holds.
BLOCK = 1 << 16


@dataclass(frozen=True)
class ChannelMoments:
    """Moments of a tensor over (example, position), averaged over channels.

    All but `num_channels` are float64 tensors, 0-d (of shape `(G,)` for G networks side
    by side, `count` aside); `mu4`, `nu1` and `effective_rank` are None where they were
    not summed.

    Attributes:
        count: Entries a channel, n.
        num_channels: Channels, C.
        mu2: Central second moment, each channel about its own mean.
        nu2: Raw second moment.
        mu4: Central fourth moment.
        nu1: Mean absolute value.
        effective_rank: Trace of the channel covariance over its largest eigenvalue.
    """

    count: Tensor
    num_channels: int
    mu2: Tensor
    nu2: Tensor
    mu4: Tensor | None = None
    nu1: Tensor | None = None
    effective_rank: Tensor | None = None


class ChannelSums:
    """Sums of powers and products of a tensor's channels, in float64.

    Chunks are added one by one. Powers are of the distance from a shift, the channel's
    mean over the first block, so that no digits cancel; a channel that is constant is
    its own shift exactly, and has variance 0.

    Args:
        fourth: Sum what `mu4` and `nu1` need.
        covariance: Sum what the effective rank needs: rows while there are no more of
            them than channels, products of channels beyond.
        num_nets: Networks side by side, each with its share of the channels.
    """

    def __init__(
        self, *, fourth: bool = False, covariance: bool = False, num_nets: int = 1
    ) -> None:
        self.fourth = fourth
        self.covariance = covariance
        self.num_nets = num_nets
        self.count = 0
        self._shift_C: Tensor | None = None
        self._powers_KC = torch.empty(0)
        self._absolute_C = torch.empty(0)
        self._rows_nC: list[Tensor] = []
        self._products_GDD: Tensor | None = None

    def add(self, x: Tensor, channel_dim: int = 1, *, empty: bool = False) -> None:
        """Add a chunk of examples.

        Args:
            x: Shape `(B, ...)`, any real dtype.
            channel_dim: The dimension that counts channels; others are positions.
            empty: `x` is a dummy that only tells the number of channels.
        """
        x_BCP = examples_channels_positions(x, channel_dim)
        if empty:
            if self._shift_C is None:
                self._start(x_BCP.new_zeros(x_BCP.shape[1], dtype=torch.float64))
            return
        num_channels = x_BCP.shape[1]
        size = max(BLOCK, 256 * num_channels if self.covariance else 0)
        num_rows = max(1, size // max(1, x_BCP[0].numel()))
        # One scratch for all blocks: new memory a block would cost more than the sums.
        scratch = x_BCP.new_empty(3, *x_BCP[:num_rows].shape, dtype=torch.float64)
        for block_BCP in x_BCP.split(num_rows):
            self._add_block(block_BCP, scratch)

    def finish(self, reduce: Reduce = identity) -> ChannelMoments:
        """Return the moments of all chunks of all ranks, and forget the sums.

        Every rank calls this, after an `add`.

        Raises:
            ValueError: If no rank has added an example.
        """
        if self._shift_C is None:
            raise RuntimeError("finish was called before add")
        powers_KC, shift_C = self._powers_KC, self._shift_C
        count = powers_KC.new_tensor([float(self.count)])
        sum_C = powers_KC[0] + self.count * shift_C
        totals = reduce(torch.cat([count, sum_C]))
        total, mean_C = totals[0], totals[1:] / totals[0]
        if not total > 0:
            raise ValueError("there is no example on any rank")
        away_C = mean_C - shift_C  # from the shift to the mean of all ranks
        sums = [_recentred_second(self.count, powers_KC, away_C)]
        if self.fourth:
            sums += [_recentred_fourth(self.count, powers_KC, away_C), self._absolute_C]
        reduced = reduce(torch.stack(sums)) / total
        mu2_C = reduced[0].clamp_min(0)
        mu2 = self._over_channels(mu2_C)
        rank = self._effective_rank(mu2 * total, away_C, reduce)
        self._rows_nC, self._products_GDD = [], None
        return ChannelMoments(
            count=total,
            num_channels=len(mean_C),
            mu2=mu2,
            nu2=self._over_channels(mu2_C + mean_C**2),
            mu4=self._over_channels(reduced[1]) if self.fourth else None,
            nu1=self._over_channels(reduced[2]) if self.fourth else None,
            effective_rank=rank,
        )

    def _over_channels(self, x_C: Tensor) -> Tensor:
        return x_C.view(self.num_nets, -1).mean(1).squeeze()

    def _start(self, shift_C: Tensor) -> None:
        self._shift_C = shift_C
        self._powers_KC = shift_C.new_zeros(4 if self.fourth else 2, len(shift_C))
        self._absolute_C = torch.zeros_like(shift_C)

    def _add_block(self, x_BCP: Tensor, scratch: Tensor) -> None:
        num_rows, num_channels, num_positions = x_BCP.shape
        d_BCP, square_BCP, power_BCP = scratch[:, :num_rows]
        d_BCP.copy_(x_BCP)
        shift_C = self._shift_C
        if shift_C is None or not self.count:  # what is empty has no mean
            first_C = d_BCP[0, :, 0]
            shift_C = first_C + (d_BCP - first_C[:, None]).mean((0, 2))
            self._start(shift_C)
        self.count += num_rows * num_positions
        if self.fourth:
            self._absolute_C += torch.abs(d_BCP, out=power_BCP).sum((0, 2))
        d_BCP -= shift_C[:, None]
        torch.mul(d_BCP, d_BCP, out=square_BCP)
        self._powers_KC[0] += d_BCP.sum((0, 2))
        self._powers_KC[1] += square_BCP.sum((0, 2))
        if self.fourth:
            torch.mul(square_BCP, d_BCP, out=power_BCP)
            self._powers_KC[2] += power_BCP.sum((0, 2))
            self._powers_KC[3] += square_BCP.mul_(square_BCP).sum((0, 2))
        if self.covariance:
            # Centred, so products in float32 are as good as the data; twice as fast.
            d_BCP = d_BCP if x_BCP.dtype == torch.float64 else d_BCP.float()
            self._add_rows(d_BCP.transpose(0, 1).reshape(num_channels, -1).T)

    def _add_rows(self, d_nC: Tensor) -> None:
        self._rows_nC.append(d_nC)
        few = self.count <= d_nC.shape[1] // self.num_nets
        if self._products_GDD is not None or not few:
            self._fold_rows()

    def _fold_rows(self) -> Tensor:
        products_GDD = self._products_GDD
        if products_GDD is None:
            size = len(self._powers_KC[0]) // self.num_nets
            products_GDD = self._powers_KC.new_zeros(self.num_nets, size, size)
        for d_nC in self._rows_nC:
            d_GnD = self._by_net(d_nC)
            products_GDD += d_GnD.mT @ d_GnD
        self._rows_nC = []
        self._products_GDD = products_GDD
        return products_GDD

    def _by_net(self, x_nC: Tensor) -> Tensor:
        return x_nC.unflatten(1, (self.num_nets, -1)).transpose(0, 1)

    def _effective_rank(
        self, mean_trace: Tensor, away_C: Tensor, reduce: Reduce
    ) -> Tensor | None:
        if not self.covariance:
            return None
        trace = mean_trace * (len(away_C) // self.num_nets)
        if reduce is identity and self._products_GDD is None:
            centred_GnD = self._by_net(torch.cat(self._rows_nC).double() - away_C)
            gram_Gnn = centred_GnD @ centred_GnD.mT
            return trace / largest_eigenvalue(gram_Gnn).squeeze()
        sum_G1D = self._by_net(self._powers_KC[:1])
        away_G1D = self._by_net(away_C[None])
        cross_GDD = sum_G1D.mT @ away_G1D
        products_GDD = self._fold_rows() - cross_GDD - cross_GDD.mT
        products_GDD += self.count * (away_G1D.mT @ away_G1D)
        return trace / largest_eigenvalue(reduce(products_GDD)).squeeze()


def examples_channels_positions(x: Tensor, channel_dim: int) -> Tensor:
    """Return a tensor as `(B, C, P)`, a view where its memory allows it."""
    if x.ndim < 2:
        return x.reshape(-1, 1, 1)
    if channel_dim in (-1, x.ndim - 1):
        # One long run of positions would put channels last: (n, C, 1) keeps memory
        # order, and its sums run over whole rows.
        return x.reshape(-1, x.shape[-1], 1)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.movedim(channel_dim, -1).reshape(-1, x.shape[channel_dim], 1)
    return x.movedim(channel_dim, 1).flatten(2) if x.ndim > 2 else x[..., None]


def _recentred_second(count: int, powers_KC: Tensor, away_C: Tensor) -> Tensor:
    first_C, second_C = powers_KC[:2]
    return second_C - 2 * away_C * first_C + count * away_C**2


def _recentred_fourth(count: int, powers_KC: Tensor, away_C: Tensor) -> Tensor:
    first_C, second_C, third_C, fourth_C = powers_KC
    return (
        fourth_C
        - 4 * away_C * third_C
        + 6 * away_C**2 * second_C
        - 4 * away_C**3 * first_C
        + count * away_C**4
    )

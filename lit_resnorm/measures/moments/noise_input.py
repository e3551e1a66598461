"""Where noise enters: the floating-point inputs of a network, and its embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor

from lit_resnorm.measures.moments.noise import example_noise, with_noise
from lit_resnorm.measures.moments.recorder import MomentRecorder
from lit_resnorm.measures.moments.sums import ChannelSums
from lit_resnorm.measures.passes.batches import (
    leaves,
    mapped,
    num_rows,
    occupied,
    take_rows,
)
from lit_resnorm.measures.passes.flow import Flow
from lit_resnorm.measures.passes.untouched import Reduce


class NoiseSource:
    """Deals out the examples in chunks, with noise as strong as the signal.

    Args:
        x: This rank's examples.
        flow: Which inputs and look-ups get noise.
        recorder: Measures what enters.
        copies: Noises an example.
        seed: Of the noise.
        dtype: What floating inputs are converted to; None: nothing.
        reduce: Sums a tensor over ranks.
    """

    def __init__(
        self,
        x: Any,
        flow: Flow,
        recorder: MomentRecorder,
        *,
        copies: int,
        seed: int,
        dtype: torch.dtype | None,
        reduce: Reduce,
    ) -> None:
        self.keys: list[str] = []
        self._x = x
        self._recorder = recorder
        self._copies = copies
        self._seed = seed
        self._dtype = dtype
        self._scales = self._input_scales(flow, reduce)
        self._rows: Tensor | None = None

    def signal(self) -> tuple[Any, bool]:
        """Return all examples without noise, and whether they are a dummy."""
        x, empty = occupied(self._x)
        return mapped(self._converted, x), empty

    def chunks(self, num_chunks: int) -> Iterator[tuple[Any, bool]]:
        """Yield chunks of examples with noise, and whether each is a dummy."""
        bounds = [num_rows(self._x) * i // num_chunks for i in range(num_chunks + 1)]
        for place, (start, end) in enumerate(pairwise(bounds)):
            chunk, empty = occupied(take_rows(self._x, slice(start, end)))
            if self._copies > 1:
                rows = torch.arange(num_rows(chunk)).repeat_interleave(self._copies)
                chunk = take_rows(chunk, rows)
            self._recorder.begin(empty=empty, last=place == num_chunks - 1)
            self._lookups = 0
            yield self._noisy(chunk), empty

    def look_up(self, output: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
        """Return an embedding's output with noise of the table's variance."""
        scale = table.double().var(0, correction=0).mean().sqrt()
        key = f"lookup {self._lookups}"
        self._lookups += 1
        return self._enter(key, output, tokens, scale, -1)

    def _input_scales(self, flow: Flow, reduce: Reduce) -> dict[int, Tensor]:
        x, empty = occupied(self._x)
        scales = {}
        for index, leaf in enumerate(leaves(x)):
            if index in flow.inputs and leaf.is_floating_point():
                sums = ChannelSums()
                sums.add(leaf, _channel_dim(leaf), empty=empty)
                scales[index] = sums.finish(reduce).mu2.sqrt()
        return scales

    def _noisy(self, chunk: Any) -> Any:
        places = count()

        def noisy(leaf: Any) -> Any:
            index, value = next(places), self._converted(leaf)
            if index not in self._scales:
                return value
            scale = self._scales[index]
            return self._enter(f"input {index}", value, leaf, scale, _channel_dim(leaf))

        return mapped(noisy, chunk)

    def _enter(
        self, key: str, x: Tensor, keys: Tensor, scale: Tensor, channel_dim: int
    ) -> Tensor:
        noise = example_noise(x, keys, seed=self._seed, copies=self._copies)
        dual = with_noise(x, noise * scale.to(noise))
        self._recorder.enter_input(key, dual, channel_dim)
        if key not in self.keys:
            self.keys.append(key)
        return dual

    def _converted(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        # A copy: an in-place operation must not reach the examples.
        return leaf.clone() if self._dtype is None else leaf.to(self._dtype, copy=True)


def _channel_dim(x: Tensor) -> int:
    return 1 if x.ndim >= 4 else -1

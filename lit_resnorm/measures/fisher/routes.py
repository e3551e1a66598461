"""Ways to a spectrum: the trace alone, the whole matrix, or products with it.

Shapes: D dual coefficients of all ranks, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_resnorm.measures.fisher.blocks import Block, Leavings
from lit_resnorm.measures.fisher.costs import free_memory, matrix_is_cheaper
from lit_resnorm.measures.fisher.decomposition import (
    all_pairs,
    stand_out,
    top_pairs,
)
from lit_resnorm.measures.fisher.gram import gram_matrix, parameter_matrix
from lit_resnorm.measures.fisher.measurement import Measurement
from lit_resnorm.measures.fisher.result import FisherSpectrum
from lit_resnorm.measures.fisher.start import cold_start
from lit_resnorm.measures.spectra import top_eigenpairs

Layers = Mapping[str, tuple[Block, ...]]


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        num_eigenvalues: None all non-zero ones, 0 none, else the largest.
        layer_eigenvalues: The same for each layer's block.
        tol: Bound on the relative error of each where iterations give them.
        trace: Whether the trace is wanted where eigenvalues do not give it.
        start: Dual start vectors, shape `(D, B)`, finite; None: a cold start.
    """

    num_eigenvalues: int | None
    layer_eigenvalues: int | None
    tol: float
    trace: bool
    start: Tensor | None

    def of_layer(self) -> Wanted:
        """Return what is asked for of a layer's block."""
        return replace(self, num_eigenvalues=self.layer_eigenvalues, start=None)


def spectrum(of: Measurement, wanted: Wanted, layers: Layers) -> FisherSpectrum:
    """Return the spectrum, and that of each given layer, by the cheapest route."""
    if wanted.num_eigenvalues == 0:
        return _traces(of, layers)
    if wanted.num_eigenvalues is None or matrix_is_cheaper(of, wanted.num_eigenvalues):
        return _from_matrix(of, wanted, layers)
    return _from_products(of, wanted, layers)


def _traces(of: Measurement, layers: Layers) -> FisherSpectrum:
    none = torch.zeros(0, dtype=torch.float64)
    by_block = block_traces(of, of.sweep.blocks)
    return FisherSpectrum(
        none,
        sum(by_block.values()),
        of.num_parameters,
        of.examples.num_examples,
        none,
        layers={
            name: FisherSpectrum(
                none,
                sum(by_block[block] for block in blocks),
                _size(blocks),
                of.examples.num_examples,
                none,
            )
            for name, blocks in layers.items()
        },
    )


def block_traces(of: Measurement, blocks: Sequence[Block]) -> dict[Block, float]:
    """Return the trace of each block, exactly, over all ranks."""
    sums = {
        block: torch.zeros((), dtype=torch.float64, device=of.sweep.network.device)
        for block in blocks
    }
    if of.coupled:
        for block in blocks:
            lengths = of.products(block.names)
            for unit_D in of.units().unbind(1):
                sums[block] += lengths.squared_length(unit_D)
    else:

        def add(block: Block, left: Leavings) -> None:
            sums[block] += block.trace(left)

        of.sweep(blocks, add)
    shards = of.examples.shards
    total = shards.reduce(torch.stack(list(sums.values())))
    return dict(zip(sums, total.tolist(), strict=True))


def _from_matrix(of: Measurement, wanted: Wanted, layers: Layers) -> FisherSpectrum:
    found: dict[str, FisherSpectrum] = {}
    dim = of.examples.dim
    if not of.coupled and of.num_parameters < dim:
        check_memory(of.num_parameters, of)
        matrix, places = parameter_matrix(of.sweep)
        for name, blocks in layers.items():
            at = torch.cat([places[block] for block in blocks])
            found[name] = _decomposed(
                of, matrix[at][:, at], wanted.of_layer(), _size(blocks)
            )
        return _decomposed(of, matrix, wanted, of.num_parameters, found)
    check_memory(dim, of)
    if of.coupled:
        eye_DD = of.units()
        for name, blocks in layers.items():
            own = of.products(_names(blocks))(eye_DD)
            found[name] = _decomposed(of, own, wanted.of_layer(), _size(blocks))
        whole = of.products()(eye_DD)
        return _decomposed(of, whole, wanted, of.num_parameters, found)
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    owner = {block: name for name, blocks in layers.items() for block in blocks}

    def each_block(block: Block, own_DD: Tensor) -> None:
        name = owner.get(block)
        if name is None:
            return
        parts[name].append(own_DD)
        if len(parts[name]) == len(layers[name]):
            layer_DD = torch.stack(parts.pop(name)).sum(dim=0)
            found[name] = _decomposed(
                of, layer_DD, wanted.of_layer(), _size(layers[name])
            )

    gram_DD = gram_matrix(of.sweep, of.memory, each_block if layers else None)
    ordered = {name: found[name] for name in layers}
    return _decomposed(of, gram_DD, wanted, of.num_parameters, ordered)


def _decomposed(
    of: Measurement,
    matrix: Tensor,
    wanted: Wanted,
    num_parameters: int,
    layers: dict[str, FisherSpectrum] | None = None,
) -> FisherSpectrum:
    trace = float(matrix.diagonal().sum(dtype=torch.float64))
    if wanted.num_eigenvalues is None:
        pairs = all_pairs(matrix)
    else:
        pairs = top_pairs(matrix, wanted.num_eigenvalues, wanted.tol)
    keep = stand_out(pairs.values, matrix.dtype)
    return FisherSpectrum(
        pairs.values[keep].cpu(),
        trace,
        num_parameters,
        of.examples.num_examples,
        pairs.residuals[keep].cpu(),
        layers=layers or {},
    )


def _from_products(of: Measurement, wanted: Wanted, layers: Layers) -> FisherSpectrum:
    blocks = of.sweep.blocks
    traces = block_traces(of, blocks) if wanted.trace else {}

    def measured(names: tuple[str, ...], own: Sequence[Block]) -> FisherSpectrum:
        whole = not names
        count = wanted.num_eigenvalues if whole else wanted.layer_eigenvalues
        k = of.examples.dim if count is None else min(count, of.examples.dim)
        start = wanted.start if whole else None
        if start is None:
            start = cold_start(of, k)
        trace = sum(traces[block] for block in own) if wanted.trace else None
        pairs = top_eigenpairs(
            of.products(names),
            start.to(of.sweep.network.device, torch.float64),
            k,
            tol=wanted.tol,
            precision=torch.finfo(of.sweep.network.dtype).eps,
            trace=trace,
        )
        keep = stand_out(pairs.values, of.sweep.network.dtype)
        return FisherSpectrum(
            pairs.values[keep].cpu(),
            float("nan") if trace is None else trace,
            of.num_parameters if whole else _size(own),
            of.examples.num_examples,
            pairs.residuals[keep].cpu(),
            vectors=pairs.vectors if whole else None,
            num_products=pairs.num_products,
            layers={} if not whole else found,
        )

    found: dict[str, FisherSpectrum] = {}
    for name, own in layers.items():
        found[name] = measured(_names(own), own)
    return measured((), blocks)


def check_memory(dim: int, of: Measurement) -> None:
    """Raise where a matrix of this dimension can't be formed and decomposed.

    Raises:
        ValueError: If four copies of the matrix exceed the free memory.
    """
    needed = 4 * dim**2 * of.sweep.network.dtype.itemsize
    free = free_memory(of.sweep.network.device)
    if needed > free:
        raise ValueError(
            f"num_eigenvalues is None, all of a {dim} x {dim} matrix, which takes"
            f" {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free; ask for the"
            " largest k, for example num_eigenvalues=10"
        )


def _names(blocks: Sequence[Block]) -> tuple[str, ...]:
    return tuple(name for block in blocks for name in block.names)


def _size(blocks: Sequence[Block]) -> int:
    return sum(block.num_parameters for block in blocks)

"""Ways to a spectrum: the trace alone, the whole matrix, or products with it.

Shapes: D dual coefficients of all ranks, P parameters, B start vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_resnorm.measures.fisher.blocks import Leavings, ParameterBlock
from lit_resnorm.measures.fisher.costs import least_free_memory, matrix_is_cheaper
from lit_resnorm.measures.fisher.gram import gram_matrix, parameter_matrix
from lit_resnorm.measures.fisher.measurement import Measurement
from lit_resnorm.measures.fisher.result import FisherSpectrum
from lit_resnorm.measures.fisher.stores import Store, block_product
from lit_resnorm.measures.spectra import all_pairs, top_eigenpairs, top_pairs

Layers = Mapping[str, tuple[ParameterBlock, ...]]


def spectrum_by_cheapest_route(measured: Measurement, layers: Layers) -> FisherSpectrum:
    """Return the spectrum, and that of each given layer."""
    count = measured.num_eigenvalues
    if count == 0:
        return _traces(measured, layers)
    if count is None or matrix_is_cheaper(measured, count):
        return _from_matrix(measured, layers)
    return _from_products(measured, count, layers)


def _traces(measured: Measurement, layers: Layers) -> FisherSpectrum:
    by_block = block_traces(measured, measured.sweep.blocks)
    found = {
        name: _trace_alone(measured, sum(by_block[b] for b in blocks), _size(blocks))
        for name, blocks in layers.items()
    }
    trace = sum(by_block.values())
    return _trace_alone(measured, trace, measured.num_parameters, found)


def _trace_alone(
    measured: Measurement,
    trace: float,
    num_parameters: int,
    layers: dict[str, FisherSpectrum] | None = None,
) -> FisherSpectrum:
    none = torch.zeros(0, dtype=torch.float64)
    num_examples = measured.examples.num_examples
    return FisherSpectrum(
        none, trace, num_parameters, num_examples, none, layers=layers or {}
    )


def block_traces(
    measured: Measurement, blocks: Sequence[ParameterBlock]
) -> dict[ParameterBlock, float]:
    """Return the trace of each block, exactly, over all ranks."""
    sums = {
        block: torch.zeros(
            (), dtype=torch.float64, device=measured.sweep.network.device
        )
        for block in blocks
    }
    if measured.coupled:
        lengths = measured.products(_names_of_blocks(blocks))
        for unit_D in measured.units().unbind(1):
            squares = lengths.squared_lengths(unit_D)
            for block in blocks:
                sums[block] += torch.stack([squares[n] for n in block.names]).sum()
    else:

        def add(block: ParameterBlock, left: Leavings) -> None:
            sums[block] += block.trace(left)

        measured.sweep(blocks, add)
    shards = measured.examples.shards
    total = shards.reduce(torch.stack(list(sums.values())))
    return dict(zip(sums, total.tolist(), strict=True))


def _from_matrix(measured: Measurement, layers: Layers) -> FisherSpectrum:
    found: dict[str, FisherSpectrum] = {}
    count, layer_count = measured.num_eigenvalues, measured.layer_eigenvalues
    dim = measured.examples.dim
    if not measured.coupled and measured.num_parameters < dim:
        check_memory(measured.num_parameters, measured)
        matrix, places = parameter_matrix(measured.sweep)
        for name, blocks in layers.items():
            at = torch.cat([places[block] for block in blocks])
            own = matrix[at][:, at]
            found[name] = _decomposed(measured, own, layer_count, _size(blocks))
        return _decomposed(measured, matrix, count, measured.num_parameters, found)
    check_memory(dim, measured)
    if measured.coupled:
        eye_DD = measured.units()
        for name, blocks in layers.items():
            own = measured.products(_names_of_blocks(blocks))(eye_DD)
            found[name] = _decomposed(measured, own, layer_count, _size(blocks))
        whole = measured.products()(eye_DD)
        return _decomposed(measured, whole, count, measured.num_parameters, found)
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    owner = {block: name for name, blocks in layers.items() for block in blocks}

    def each_block(block: ParameterBlock, own_DD: Tensor) -> None:
        name = owner.get(block)
        if name is None:
            return
        parts[name].append(own_DD)
        if len(parts[name]) == len(layers[name]):
            layer_DD = torch.stack(parts.pop(name)).sum(dim=0)
            found[name] = _decomposed(
                measured, layer_DD, layer_count, _size(layers[name])
            )

    gram_DD = gram_matrix(
        measured.sweep, measured.options.memory, each_block if layers else None
    )
    ordered = {name: found[name] for name in layers}
    return _decomposed(measured, gram_DD, count, measured.num_parameters, ordered)


def _decomposed(
    measured: Measurement,
    matrix: Tensor,
    count: int | None,
    num_parameters: int,
    layers: dict[str, FisherSpectrum] | None = None,
) -> FisherSpectrum:
    trace = float(matrix.diagonal().sum(dtype=torch.float64))
    if count == 0:
        return _trace_alone(measured, trace, num_parameters, layers)
    if count is None:
        pairs = all_pairs(matrix)
    else:
        pairs = top_pairs(matrix, count, measured.options.tol)
    keep = stand_out(pairs.values, measured.sweep.network.eps)
    return FisherSpectrum(
        pairs.values[keep].cpu(),
        trace,
        num_parameters,
        measured.examples.num_examples,
        pairs.residuals[keep].cpu(),
        layers=layers or {},
    )


def _from_products(measured: Measurement, count: int, layers: Layers) -> FisherSpectrum:
    blocks, options = measured.sweep.blocks, measured.options
    given = _usable_start(options.start, measured)
    traces = block_traces(measured, blocks) if options.trace else {}

    def by_iterations(
        names: tuple[str, ...], own: Sequence[ParameterBlock]
    ) -> FisherSpectrum:
        whole = not names
        wanted = count if whole else measured.layer_eigenvalues
        trace = sum(traces[block] for block in own) if options.trace else None
        if wanted == 0:
            missing = float("nan") if trace is None else trace
            return _trace_alone(measured, missing, _size(own))
        k = (
            measured.examples.dim
            if wanted is None
            else min(wanted, measured.examples.dim)
        )
        start = given if whole else None
        if start is None:
            start = _cold_start(measured, k)
        pairs = top_eigenpairs(
            measured.products(names),
            start.to(measured.sweep.network.device, torch.float64),
            k,
            tol=options.tol,
            precision=measured.sweep.network.eps,
            trace=trace,
        )
        keep = stand_out(pairs.values, measured.sweep.network.eps)
        return FisherSpectrum(
            pairs.values[keep].cpu(),
            float("nan") if trace is None else trace,
            measured.num_parameters if whole else _size(own),
            measured.examples.num_examples,
            pairs.residuals[keep].cpu(),
            vectors=pairs.vectors if whole else None,
            num_products=pairs.num_products,
            layers={} if not whole else found,
        )

    found: dict[str, FisherSpectrum] = {}
    for name, own in layers.items():
        found[name] = by_iterations(_names_of_blocks(own), own)
    return by_iterations((), blocks)


def _cold_start(measured: Measurement, num_vectors: int) -> Tensor:
    """Return start vectors for the largest eigenvalues, shape `(D, B)`, float64.

    They are the largest eigenvectors of the last layer's block, whose Gram matrix is
    nearly free and resembles that of the whole, with noise that keeps every eigenvector
    within reach.
    """
    noise = torch.Generator().manual_seed(0)
    mixed_DB = torch.randn(
        measured.examples.dim, num_vectors, generator=noise, dtype=torch.float64
    ).to(measured.sweep.network.device)
    mixed_DB /= mixed_DB.norm(dim=0)
    last = [block for block in measured.sweep.blocks if block.places][-1:]
    if measured.coupled or not last:
        return mixed_DB
    store = Store(last[0], measured.sweep)
    measured.sweep(last, lambda _, left: store.keep(left))
    kept = store.kept(measured.examples.shards)
    if kept.left is not None and not kept.left.is_floating_point():
        return mixed_DB
    pairs = top_eigenpairs(
        lambda dual_DB: block_product(kept, dual_DB),
        mixed_DB,
        num_vectors,
        tol=0.1,
        block=num_vectors,
        max_products=6 * num_vectors,
        precision=measured.sweep.network.eps,
    )
    return pairs.vectors + 0.1 * mixed_DB


def _usable_start(start: Tensor | None, measured: Measurement) -> Tensor | None:
    """Return the start vectors that are such of this measurement; None without any.

    Of another batch, or of a measurement that came to nothing, none are: columns must
    have the dual space's dimension, finite numbers, and not be zero.
    """
    if start is None or start.ndim != 2 or start.shape[0] != measured.examples.dim:
        return None
    lengths_B = start.double().norm(dim=0)
    start = start[:, lengths_B.isfinite() & (lengths_B > 0)]
    return start if start.shape[1] else None


def check_memory(dim: int, measured: Measurement) -> None:
    """Raise where a matrix of this dimension can't be formed and decomposed.

    Raises:
        ValueError: On all ranks, if four copies of the matrix exceed the free memory
            of one.
    """
    needed = 4 * dim**2 * measured.sweep.network.dtype.itemsize
    free = least_free_memory(measured)
    if needed > free:
        raise ValueError(
            f"num_eigenvalues is None, all of a {dim} x {dim} matrix, which takes"
            f" {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free; ask for the"
            " largest k, for example num_eigenvalues=10"
        )


def _names_of_blocks(blocks: Sequence[ParameterBlock]) -> tuple[str, ...]:
    return tuple(name for block in blocks for name in block.names)


def _size(blocks: Sequence[ParameterBlock]) -> int:
    return sum(block.num_parameters for block in blocks)


def stand_out(values: Tensor, eps: float) -> Tensor:
    """Return which descending values of a matrix of this precision are not zero.

    NaN stays.
    """
    if not values.numel() or bool(values.isnan().any()):
        return torch.ones_like(values, dtype=torch.bool)
    share = 1e-10 if eps <= torch.finfo(torch.float64).eps else 1e-6
    return values > max(0.0, float(values[0])) * share

"""Eigenvalues and moments of random operators, starts, chunks and shards."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_resnorm.measures.moments import ChannelSums
from lit_resnorm.measures.spectra import largest_eigenvalue, top_eigenpairs, top_pairs

EPS = torch.finfo(torch.float64).eps
bounded = settings(max_examples=100, derandomize=True, deadline=None, database=None)


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed):
    return torch.randn(*shape, generator=drawn(seed), dtype=torch.float64)


@st.composite
def operators(draw):
    """Return a symmetric matrix and its eigenvalues, descending."""
    dim, seed = draw(st.integers(1, 70)), draw(st.integers(0, 2**31))
    kind = draw(st.sampled_from(["uniform", "geometric", "multiple", "deficient"]))
    values = torch.rand(dim, generator=drawn(seed), dtype=torch.float64)
    if kind == "geometric":
        values = 10.0 ** (-8 * values)
    if kind == "multiple":
        values = (4 * values).round() / 4
    if kind == "deficient":
        values[dim // 3 :] = 0
    if draw(st.booleans()):
        values -= 0.5
    values = values * 10.0 ** draw(st.integers(-20, 20))
    vectors, _ = torch.linalg.qr(normal(dim, dim, seed=seed + 1))
    matrix = (vectors * values) @ vectors.T
    return (matrix + matrix.T) / 2, values.sort(descending=True).values


@st.composite
def starts(draw, dim):
    """Return start vectors, of which some are zero, not finite, huge or repeated."""
    num = draw(st.integers(0, 6))
    start_DB = normal(dim, num, seed=draw(st.integers(0, 2**31)))
    for column in range(num):
        kind = draw(st.sampled_from(["fine", "fine", "zero", "nan", "huge", "again"]))
        if kind == "again":
            start_DB[:, column] = -start_DB[:, 0]
        elif kind != "fine":
            start_DB[:, column] *= {"zero": 0, "nan": torch.nan, "huge": 1e150}[kind]
    return start_DB


@bounded
@given(st.data(), operators(), st.integers(1, 12), st.integers(1, 8))
def test_the_largest_eigenvalues_are_within_tolerance(data, operator, k, digits):
    matrix, values = operator
    tol = 10.0**-digits
    found = top_eigenpairs(
        lambda v: matrix @ v,
        data.draw(starts(len(values))),
        k,
        tol=tol,
        block=data.draw(st.integers(1, 4)),
    )
    expected = values[:k]
    # 32 roundings that the iterations allow, and those of the matrix as it was made.
    rounding = (32 + 8 * len(values)) * EPS * float(values.abs().max())
    assert found.converged
    error = (found.values - expected).abs()
    assert bool((error <= tol * expected.abs() + rounding).all()), error
    gram = found.vectors.T @ found.vectors
    assert float((gram - torch.eye(len(expected)).double()).abs().max()) < 1e-10


@bounded
@given(operators(), st.integers(1, 12))
def test_a_matrix_has_the_eigenvalues_of_its_products(operator, k):
    matrix, values = operator
    rounding = 16 * len(values) * EPS * float(values.abs().max())
    found = top_pairs(matrix, k, 1e-6).values
    assert bool(((found - values[:k]).abs() <= rounding).all())
    largest = largest_eigenvalue(matrix[None])[0]
    assert abs(float(largest - values[0])) <= rounding


@st.composite
def chunks(draw):
    """Return a tensor `(B, C, P)` with means of any size, and how it is cut."""
    num, channels = draw(st.integers(2, 40)), draw(st.integers(1, 12))
    shape = num, channels, draw(st.integers(1, 4))
    x = normal(*shape, seed=draw(st.integers(0, 2**31)))
    x = x * 10.0 ** draw(st.integers(-3, 3)) + 10.0 ** draw(st.integers(-3, 3))
    cuts = sorted(draw(st.lists(st.integers(0, num), max_size=5)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, num], strict=True)]
    return x, sizes, draw(st.integers(1, 3))


def moments(x, sizes, shards):
    """Return the moments of chunks that go round the shards, as of one process."""
    each = [ChannelSums(fourth=True, covariance=True) for _ in range(shards)]
    for at, part in enumerate(x.split(sizes)):
        each[at % shards].add(part if len(part) else x[:1], empty=not len(part))
    for sums in each:
        sums.add(x[:1], empty=True)
    if shards == 1:
        return each[0].finish()
    # Each rank's call answers the reduction that all of them have come to: what the
    # others hold there is found by running them with what was summed before.
    totals = []
    while True:
        held = [_held(sums, totals) for sums in each]
        if not isinstance(held[0], torch.Tensor):
            return held[-1]
        totals.append(sum(held))


class _HeldError(Exception):
    def __init__(self, tensor):
        super().__init__()
        self.tensor = tensor


def _held(sums, totals):
    """Return what a rank wants summed next, or its moments."""
    given = iter(totals)

    def reduce(tensor):
        total = next(given, None)
        if total is None:
            raise _HeldError(tensor.clone())
        return total

    try:
        return copy.deepcopy(sums).finish(reduce)
    except _HeldError as held:
        return held.tensor


@bounded
@given(chunks())
def test_moments_of_chunks_and_shards_are_those_of_one_pass(case):
    x, sizes, shards = case
    found = moments(x, sizes, shards)
    rows_nC = x.movedim(1, 2).reshape(-1, x.shape[1])
    centred_nC = rows_nC - rows_nC.mean(0)
    covariance = centred_nC.T @ centred_nC / len(rows_nC)
    largest = float(torch.linalg.eigvalsh(covariance)[-1])
    # Squares of entries carry the rounding of the mean: eps times its size.
    level = float(rows_nC.abs().max())
    spread = float(centred_nC.abs().max())
    second = 64 * EPS * spread * (spread + level)
    assert abs(float(found.mu2) - float(centred_nC.square().mean())) <= second
    assert abs(float(found.nu2) - float(rows_nC.square().mean())) <= 64 * EPS * level**2
    assert abs(float(found.nu1) - float(rows_nC.abs().mean())) <= 64 * EPS * level
    fourth = 64 * EPS * spread**3 * (spread + level)
    assert abs(float(found.mu4) - float((centred_nC**4).mean())) <= fourth
    trace = float(covariance.trace())
    allowed = x.shape[1] * 64 * second / largest * (1 + trace / largest)
    assert abs(float(found.effective_rank) - trace / largest) <= allowed

import pytest
import torch
from eigenvalue_cases import SPECTRA, measured
from torch.testing import assert_close

from lit_resnorm.measures.spectra import hutchinson_trace, top_eigenpairs


def symmetric(values, seed=0):
    """Return a matrix with these eigenvalues, and its eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(values, dtype=torch.float64)
    square = torch.randn(len(values), len(values), generator=generator).double()
    vectors, _ = torch.linalg.qr(square)
    return vectors @ torch.diag(values) @ vectors.T, vectors


def start(dim, num, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, num, generator=generator).double()


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("num_starts", [1, 4])
def test_largest_eigenpairs_are_found_to_the_tolerance(block, num_starts):
    values = torch.logspace(0, -4, 60, dtype=torch.float64)
    matrix, vectors = symmetric(values)
    found = top_eigenpairs(
        lambda v: matrix @ v, start(60, num_starts), 3, tol=1e-6, block=block
    )
    assert found.converged
    assert_close(found.values, values[:3], rtol=1e-6, atol=0.0)
    overlap = (found.vectors * vectors[:, :3]).sum(dim=0).abs()
    assert_close(overlap, torch.ones(3).double(), rtol=1e-3, atol=0.0)


def test_an_eigenvalue_lies_within_the_residual_of_each_value():
    matrix, _ = symmetric(torch.linspace(1, 0, 40))
    found = top_eigenpairs(
        lambda v: matrix @ v, start(40, 1), 4, tol=1e-9, max_products=8
    )
    assert not found.converged
    distance = (torch.linalg.eigvalsh(matrix)[:, None] - found.values).abs().amin(0)
    assert bool((distance <= found.residuals + 1e-12).all())


def test_a_start_near_the_eigenvectors_takes_fewer_products():
    matrix, vectors = symmetric(torch.logspace(0, -3, 80))
    nearby = vectors[:, :2] + 1e-3 * start(80, 2)
    cold = top_eigenpairs(lambda v: matrix @ v, start(80, 1), 2)
    warm = top_eigenpairs(lambda v: matrix @ v, nearby, 2)
    # Both make sure that nothing is left, which takes most of the products.
    assert warm.num_products < cold.num_products
    assert_close(warm.values, cold.values, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("k", [1, 10])
def test_a_warm_start_takes_no_more_products_among_outliers(k):
    # As of a Fisher matrix: nine eigenvalues, one less than classes, over a slope.
    values = torch.cat([torch.linspace(9, 2, 9), 2 / torch.arange(2.0, 400)]).double()
    matrix, vectors = symmetric(values)
    cold, warm = 0, 0
    for seed in range(4):
        nearby = vectors[:, :k] + 1e-3 * start(len(values), k, seed)
        for first in (start(len(values), k, seed + 9), nearby):
            found = top_eigenpairs(lambda v: matrix @ v, first, k, tol=1e-3)
            assert_close(found.values, values[:k], rtol=1e-3, atol=0.0)
            if first is nearby:
                warm += found.num_products
            else:
                cold += found.num_products
    assert warm <= cold


def test_multiple_eigenvalues_are_found_from_a_block_of_starts():
    matrix, _ = symmetric([2.0, 2.0, 2.0, *torch.linspace(1, 0, 30)])
    found = top_eigenpairs(lambda v: matrix @ v, start(33, 3), 4, tol=1e-8, block=3)
    assert_close(found.values[:3], torch.full((3,), 2.0).double(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_low_rank_operators_end_with_zeros(rank):
    values = torch.zeros(12)
    values[:rank] = torch.arange(rank, 0, -1)
    matrix, _ = symmetric(values)
    found = top_eigenpairs(lambda v: matrix @ v, start(12, 1), 6)
    assert_close(found.values, values[:6].double(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", SPECTRA)
def test_no_random_start_misses_an_eigenvalue(name):
    no_miss(name, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
def test_no_random_start_of_many_misses_an_eigenvalue(name):
    no_miss(name, 560)  # over all spectra, ten thousand


def no_miss(name, num_starts):
    values = SPECTRA[name]
    generator = torch.Generator().manual_seed(len(name))
    for i in range(num_starts):
        k = int(torch.randint(1, 11, (), generator=generator))
        tol = 10.0 ** -int(torch.randint(2, 7, (), generator=generator))
        trace = float(values.sum()) if i % 2 else None
        found, error = measured(values, k, tol, generator, trace=trace)
        assert found.converged
        assert error <= 1, (name, k, tol, found.values)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_operators_with_negative_eigenvalues_have_a_largest_and_a_smallest(shift):
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        values = torch.rand(50, generator=generator).double() - shift / 2
        first = start(50, 1, int(torch.randint(99, (), generator=generator)))
        largest = top_eigenpairs(lambda v, a=values: a[:, None] * v, first, 3)
        smallest = top_eigenpairs(lambda v, a=values: -a[:, None] * v, first, 1)
        assert_close(
            largest.values,
            values.sort(descending=True).values[:3],
            rtol=2e-5,
            atol=1e-14,
        )
        assert_close(-smallest.values[0], values.min(), rtol=2e-5, atol=1e-14)


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(40, 2),
        torch.full((40, 1), float("nan")),
        torch.full((40, 1), float("inf")),
        torch.zeros(40, 0),
        torch.cat([torch.zeros(40, 1), torch.full((40, 1), float("nan"))], dim=1),
    ],
    ids=["zero", "nan", "infinite", "none", "zero and nan"],
)
def test_a_start_that_is_none_is_a_cold_start(bad):
    matrix, _ = symmetric(torch.logspace(0, -3, 40))
    found = top_eigenpairs(lambda v: matrix @ v, bad.double(), 3)
    assert found.converged
    assert_close(
        found.values, torch.logspace(0, -3, 40)[:3].double(), rtol=2e-5, atol=0
    )


def test_starts_that_repeat_or_nearly_depend_count_once():
    matrix, vectors = symmetric(torch.logspace(0, -3, 40))
    one = vectors[:, 5:6]
    twins = torch.cat([one, one, one + 1e-13 * start(40, 1), -2e200 * one], dim=1)
    found = top_eigenpairs(lambda v: matrix @ v, twins, 3)
    assert found.converged
    assert_close(
        found.values, torch.logspace(0, -3, 40)[:3].double(), rtol=2e-5, atol=0
    )


def test_a_start_without_the_largest_eigenvector_finds_it_still():
    values = torch.tensor([2.0, 1.0, *torch.linspace(0.5, 0, 60)]).double()
    for first in (torch.eye(62)[:, 1:3], torch.eye(62)[:, 20:30]):
        found = top_eigenpairs(lambda v: values[:, None] * v, first.double(), 1)
        assert_close(found.values[0], values[0], rtol=1e-5, atol=0.0)


def test_a_trace_that_leaves_no_room_saves_the_search_for_more():
    values = torch.tensor([8.0, 4.0, *[0.01] * 60]).double()

    def found(trace):
        first = torch.eye(62)[:, :2].double()
        return top_eigenpairs(lambda v: values[:, None] * v, first, 2, trace=trace)

    assert found(float(values.sum())).num_products == 2
    assert found(None).num_products > 2
    assert found(float("nan")).num_products == found(None).num_products


def test_a_smaller_chance_of_failure_costs_products():
    values = 0.7 ** torch.arange(200).double()

    def products(failure):
        found = top_eigenpairs(
            lambda v: values[:, None] * v, start(200, 1), 1, failure=failure
        )
        return found.num_products

    few, some, many = (products(p) for p in (1e-3, 1e-6, 1e-12))
    assert few < some < many


def test_more_eigenvalues_than_dimensions_are_all_there_are():
    matrix, _ = symmetric([3.0, 2.0, 1.0])
    found = top_eigenpairs(lambda v: matrix @ v, start(3, 1), 10)
    assert_close(found.values, torch.tensor([3.0, 2.0, 1.0]).double())
    assert found.num_products == 3


def test_tolerances_below_the_rounding_of_the_products_end_at_the_rounding():
    matrix, _ = symmetric(torch.logspace(0, -3, 50))
    rough = matrix.float()
    found = top_eigenpairs(
        lambda v: (rough @ v.float()).double(),
        start(50, 1),
        1,
        tol=1e-14,
        precision=torch.finfo(torch.float32).eps,
    )
    assert found.num_products < 50
    assert_close(found.values, torch.ones(1).double(), rtol=1e-5, atol=0.0)


def test_products_that_are_not_finite_give_nan():
    found = top_eigenpairs(lambda v: v * float("nan"), start(5, 1), 2)
    assert not found.converged
    assert bool(found.values.isnan().all())


def test_a_zero_operator_has_zero_eigenvalues_whatever_the_start():
    for seed in (0, 1):
        found = top_eigenpairs(torch.zeros_like, start(20, 1, seed), 1)
        assert found.converged
        assert float(found.values) == 0.0


def test_hutchinsons_error_shrinks_as_its_standard_error_says():
    matrix, _ = symmetric(torch.linspace(2, 0, 30))
    exact = float(matrix.trace())
    generator = torch.Generator().manual_seed(0)
    errors = []
    for num_vectors in (50, 5000):
        mean, error = hutchinson_trace(lambda v: matrix @ v, 30, num_vectors, generator)
        assert abs(mean - exact) < 4 * error
        errors.append(error)
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.4)


def test_hutchinson_is_exact_for_a_diagonal_operator_and_needs_two_vectors():
    diagonal = torch.arange(5.0).double()
    generator = torch.Generator().manual_seed(0)
    mean, error = hutchinson_trace(lambda v: diagonal[:, None] * v, 5, 3, generator)
    assert (mean, error) == (10.0, 0.0)
    with pytest.raises(ValueError, match="num_vectors is 1"):
        hutchinson_trace(lambda v: v, 5, 1, generator)

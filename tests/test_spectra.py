import pytest
import torch
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
    assert warm.num_products < cold.num_products / 2
    assert_close(warm.values, cold.values, rtol=2e-5, atol=0.0)


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
        found = top_eigenpairs(torch.zeros_like, start(20, 1, seed), 1, min_products=4)
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

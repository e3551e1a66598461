"""Largest eigenvalues of explicit matrices, and what makes sure of them."""

import pytest
import torch
from torch.testing import assert_close

from lit_resnorm.measures.spectra import largest_eigenvalue
from lit_resnorm.measures.spectra.matrices import is_largest

NUM = 600
SPECTRA = {
    "geometric": torch.logspace(0, -6, NUM, dtype=torch.float64),
    "flat": torch.ones(NUM, dtype=torch.float64),
    "multiple": torch.tensor([3.0] * 5 + [1.0] * (NUM - 5), dtype=torch.float64),
    "rank 1": torch.tensor([1.0] + [0.0] * (NUM - 1), dtype=torch.float64),
    "close": torch.linspace(1, 1 - 1e-6, NUM, dtype=torch.float64),
    "indefinite": torch.linspace(1, -2, NUM, dtype=torch.float64),
    "negative": torch.linspace(-1, -2, NUM, dtype=torch.float64),
}
# Rounding of the products and of the reflections that make the matrix.
ROUNDING = {"rtol": NUM * torch.finfo(torch.float64).eps, "atol": 0.0}
every_spectrum = pytest.mark.parametrize("name", SPECTRA)


def matrix(values):
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(NUM, NUM, generator=generator, dtype=torch.float64)
    vectors, _ = torch.linalg.qr(square)
    product = (vectors * values) @ vectors.T
    return (product + product.T) / 2


@every_spectrum
def test_the_largest_eigenvalue_of_a_large_matrix_is_exact_to_rounding(name):
    found = largest_eigenvalue(matrix(SPECTRA[name])[None])
    assert_close(found, SPECTRA[name].max()[None], **ROUNDING)


@every_spectrum
def test_a_factorisation_tells_the_largest_eigenvalue_from_anything_below(name):
    explicit, largest = matrix(SPECTRA[name]), float(SPECTRA[name].max())
    assert is_largest(explicit, largest)
    # What rounding may hide at 600 rows is 2 * 601^2 roundings, some 2e-10.
    assert not is_largest(explicit, largest - 1e-9 * abs(largest))


def test_another_eigenvalue_is_no_largest_one():
    values = torch.linspace(1, 0, NUM, dtype=torch.float64)
    values[0] = 1 + 1e-6
    assert not is_largest(matrix(values), 1.0)


def test_matrices_side_by_side_have_a_value_each_and_nan_where_one_is_not_finite():
    values = [SPECTRA["geometric"], 2 * SPECTRA["rank 1"], SPECTRA["flat"]]
    matrices_Gnn = torch.stack([*map(matrix, values), torch.zeros(NUM, NUM).double()])
    matrices_Gnn[2, 5, 7] = float("nan")
    nan = float("nan")
    for size in (NUM, 40):
        found = largest_eigenvalue(matrices_Gnn[:, :size, :size])
        expected = torch.tensor([1.0, 2.0, nan, 0.0], dtype=torch.float64)
        if size != NUM:
            expected = torch.stack(
                [torch.linalg.eigvalsh(m[:size, :size])[-1] for m in matrices_Gnn[:2]]
                + [expected[2], expected[3]]
            )
        assert_close(found, expected, equal_nan=True, **ROUNDING)

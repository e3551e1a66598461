"""Shards of the probe batch on several ranks give what one process gives."""

import pytest
import torch
from explicit_fisher import explicit_fisher, nonzero_eigenvalues
from fisher_cases import case
from ranks import run_ranks, sum_over_ranks

from lit_resnorm.measures.fisher import fisher_spectrum

pytestmark = pytest.mark.ddp

# Rows of each rank: uneven, one empty, three ranks.
SHARES = [(3, 2), (5, 0), (2, 0, 3)]


def measure(rank, name, shares, options):
    model, x = case(name)
    if options.get("single"):
        model, x = model.float(), x.float()
    start = sum(shares[:rank])
    rows = x[start : start + shares[rank]]
    routes = "lit_resnorm.measures.fisher.routes.matrix_is_cheaper"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, lambda *_: False)
        kept = {k: v for k, v in options.items() if k != "single"}
        found = fisher_spectrum(model, rows, reduce=sum_over_ranks, **kept)
    layers = {name: layer.trace for name, layer in found.layers.items()}
    return found.eigenvalues, found.trace, found.num_examples, layers


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("name", ["residual", "one_dimensional", "transformer"])
@pytest.mark.parametrize("num_eigenvalues", [None, 2])
def test_uneven_and_empty_shards_give_the_spectrum_of_the_whole_batch(
    name, shares, num_eigenvalues
):
    model, x = case(name)
    expected = nonzero_eigenvalues(explicit_fisher(model, x[: sum(shares)]))
    options = {"num_eigenvalues": num_eigenvalues, "tol": 1e-8, "per_layer": True}
    results = run_ranks(measure, len(shares), name, shares, options)
    for values, trace, num_examples, layers in results:
        torch.testing.assert_close(
            values, expected[: len(values)], rtol=1e-8, atol=1e-12 * float(expected[0])
        )
        assert len(values) == (num_eigenvalues or len(expected))
        assert trace == pytest.approx(float(expected.sum()), rel=1e-9)
        assert num_examples == sum(shares)
        assert sum(layers.values()) == pytest.approx(trace, rel=1e-9)


def test_single_precision_agrees_between_numbers_of_ranks_to_a_millionth():
    options = {"num_eigenvalues": None, "single": True}
    ((one, trace, *_),) = run_ranks(measure, 1, "residual", (7,), options)
    for values, same_trace, *_ in run_ranks(measure, 2, "residual", (2, 5), options):
        torch.testing.assert_close(values, one, rtol=1e-6, atol=1e-6 * float(one[0]))
        assert same_trace == pytest.approx(trace, rel=1e-6)


def test_coupled_rows_are_measured_whole_on_every_rank():
    model, x = case("residual")
    expected = nonzero_eigenvalues(explicit_fisher(model, x, norm_mode="train"))
    results = run_ranks(measure_whole, 2)
    for values in results:
        torch.testing.assert_close(values, expected[:2], rtol=1e-8, atol=0.0)


def measure_whole(rank):
    model, x = case("residual")
    return fisher_spectrum(
        model, x, norm_mode="train", num_eigenvalues=2, tol=1e-9, reduce=sum_over_ranks
    ).eigenvalues


def measure_with_little_memory_on_one(rank):
    """Return what all eigenvalues are refused with, and how the largest was found."""
    model, x = case("residual")
    rows = x[:3] if rank == 0 else x[3:]
    with pytest.MonkeyPatch.context() as patch:
        free = "lit_resnorm.measures.fisher.costs.free_memory"
        patch.setattr(free, lambda _: 2**40 if rank else 1000)
        with pytest.raises(ValueError, match="GiB free") as refused:
            fisher_spectrum(model, rows, reduce=sum_over_ranks)
        found = fisher_spectrum(model, rows, num_eigenvalues=2, reduce=sum_over_ranks)
    return str(refused.value), found.num_products, found.eigenvalues


def test_ranks_with_more_or_less_free_memory_take_the_same_route():
    few, other = run_ranks(measure_with_little_memory_on_one, 2)
    assert few[:2] == other[:2]
    assert few[1] > 0
    assert torch.equal(few[2], other[2])

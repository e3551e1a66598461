"""Fisher matrices of networks whose weights are of several floating-point types."""

import pytest
import torch
from explicit_fisher import explicit_fisher, nonzero_eigenvalues
from ranks import run_ranks, sum_over_ranks
from torch import nn

from lit_resnorm.measures.fisher import fisher_spectrum

SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.bfloat16


class Mixed(nn.Module):
    def __init__(self, first, last, convolution=False):
        super().__init__()
        torch.manual_seed(0)
        front = nn.Conv1d(1, 2, 3) if convolution else nn.Linear(4, 2)
        self.first = front.to(first)
        self.last = nn.Linear(4 if convolution else 2, 3).to(last)

    def forward(self, x):
        x = x.to(self.first.weight.dtype)
        x = x[:, None] if isinstance(self.first, nn.Conv1d) else x
        h = self.first(x).tanh().flatten(1)
        return self.last(h.to(self.last.weight.dtype))


def spectra(first, last, convolution, num_rows, num_eigenvalues, norm_mode="frozen"):
    model = Mixed(first, last, convolution)
    same = Mixed(DOUBLE, DOUBLE, convolution)
    same.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    x = torch.randn(num_rows, 4).to(first)
    options = {"num_eigenvalues": num_eigenvalues, "tol": 1e-6, "per_layer": True}
    found = fisher_spectrum(model, x, norm_mode=norm_mode, **options)
    return found, explicit_fisher(same, x.double(), norm_mode=norm_mode)


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("num_rows", [2, 30], ids=["dual", "parameters"])
@pytest.mark.parametrize("num_eigenvalues", [None, 0, 1])
@pytest.mark.parametrize("cheaper", [True, False], ids=["matrix", "products"])
@pytest.mark.parametrize(
    ("first", "last"), [(SINGLE, DOUBLE), (DOUBLE, SINGLE), (HALF, DOUBLE)], ids=str
)
def test_weights_of_two_types_have_the_spectrum_of_the_widest(
    first, last, cheaper, num_eigenvalues, num_rows, convolution, monkeypatch
):
    monkeypatch.setattr(
        "lit_resnorm.measures.fisher.routes.matrix_is_cheaper", lambda *_: cheaper
    )
    found, expected = spectra(first, last, convolution, num_rows, num_eigenvalues)
    # Some tens of roundings to single precision, 6e-8 each.
    assert found.trace == pytest.approx(float(expected.trace()), rel=3e-6)
    if num_eigenvalues == 0:
        return
    values = nonzero_eigenvalues(expected)
    assert found.max == pytest.approx(float(values[0]), rel=3e-6)
    if num_eigenvalues is None:
        assert len(found.eigenvalues) == int((values > 1e-6 * values[0]).sum())


def measure(rank, first, last):
    torch.manual_seed(1)
    x = torch.randn(5, 4).to(first)[rank * 3 : 3 + rank * 3]
    with pytest.MonkeyPatch.context() as patch:
        cheaper = "lit_resnorm.measures.fisher.routes.matrix_is_cheaper"
        patch.setattr(cheaper, lambda *_: False)
        model = Mixed(first, last)
        return fisher_spectrum(model, x, num_eigenvalues=1, reduce=sum_over_ranks).max


@pytest.mark.ddp
@pytest.mark.parametrize(("first", "last"), [(SINGLE, DOUBLE), (DOUBLE, SINGLE)])
def test_weights_of_two_types_are_measured_on_two_ranks(first, last):
    _, expected = spectra(first, last, False, 5, 1)
    largest = float(nonzero_eigenvalues(expected)[0])
    assert run_ranks(measure, 2, first, last) == pytest.approx([largest] * 2, rel=3e-5)

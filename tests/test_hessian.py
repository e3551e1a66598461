"""Hessians of losses, against the explicit matrix and closed forms."""

import math
from contextlib import contextmanager

import pytest
import torch
from explicit_fisher import jacobian_row
from fisher_cases import CASES, case
from ranks import run_ranks, sum_over_ranks
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_resnorm.measures import hessian_spectrum, read_loss
from lit_resnorm.measures.hessian import (
    Growth,
    HessianOptions,
    check_second_derivative,
)
from lit_resnorm.measures.passes.untouched import untouched

QUICK = ("residual", "time_first", "weight_normed")
ALL = {"tol": 1e-11, "smallest_tol": 1e-11, "num_trace_vectors": 10**6}


@contextmanager
def plain_weight_norm():
    """Torch's weight norm, written out: its kernel's second derivative is wrong."""

    def forward(self, g, v):
        return g * v / v.norm(dim=1, keepdim=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils.parametrizations._WeightNorm, "forward", forward)
        yield


def explicit_hessian(loss, model):
    """Return the matrix (P, P): a backward pass for each entry of the gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(
        loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
    )
    entries = torch.cat([grad.flatten() for grad in grads])
    return torch.stack([jacobian_row(entry, parameters) for entry in entries])


def assert_ends(found, matrix):
    values = torch.linalg.eigvalsh(matrix).flip(0)
    scale = float(values.abs().max())
    num = len(found.eigenvalues)
    assert torch.allclose(found.eigenvalues, values[:num], rtol=0, atol=1e-9 * scale)
    assert found.smallest == pytest.approx(float(values[-1]), abs=1e-9 * scale)
    trace = float(matrix.trace())
    assert found.trace == pytest.approx(trace, abs=1e-9 * scale * len(values))
    assert found.trace_error == 0


def labelled(name):
    model, x = case(name)
    return model, (x, torch.arange(len(x)) % 3)


@pytest.mark.parametrize("norm_mode", ["frozen", "eval", "train"])
@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in CASES
            if name not in QUICK
        ),
    ],
)
def test_ends_and_trace_are_those_of_the_explicit_matrix(name, norm_mode):
    model, (x, y) = labelled(name)
    with sdpa_kernel(SDPBackend.MATH), untouched(model, norm_mode=norm_mode) as run:
        with plain_weight_norm():
            loss = F.cross_entropy(run(lambda: model(x)), y)
        matrix = explicit_hessian(loss, model)
    found = hessian_spectrum(model, (x, y), norm_mode=norm_mode, **ALL)
    assert_ends(found, matrix)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")
def test_ends_are_those_of_torch_func_hessian():
    model, (x, y) = labelled("residual")
    model.eval()

    def loss(parameters):
        return F.cross_entropy(functional_call(model, parameters, (x,)), y)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    blocks = torch.func.hessian(loss)(parameters)
    matrix = torch.cat(
        [
            torch.cat([blocks[a][b].reshape(p.numel(), -1) for b in parameters], dim=1)
            for a, p in parameters.items()
        ]
    )
    assert_ends(hessian_spectrum(model, (x, y), norm_mode="eval", **ALL), matrix)


def test_multiple_eigenvalues_of_linear_regression_count_as_often_as_they_occur():
    # half the squared distance, summed over two outputs: X^T X / N, twice
    torch.manual_seed(0)
    x = torch.randn(20, 4, dtype=torch.float64)
    net = nn.Linear(4, 2, bias=False).double()
    batch = (x, torch.randn(20, 2).double())
    once = torch.linalg.eigvalsh(x.T @ x / 20).flip(0)
    loss = read_loss(net, batch, output="gaussian")
    found = hessian_spectrum(net, batch, loss, num_eigenvalues=5, **ALL)
    expected = once.repeat_interleave(2)
    assert torch.allclose(found.eigenvalues, expected[:5], rtol=1e-9)
    assert found.smallest == pytest.approx(float(once[-1]), rel=1e-9)
    alone = hessian_spectrum(net, batch, loss, tol=1e-11)
    assert alone.max == pytest.approx(float(once[0]), rel=1e-9)


def test_a_start_from_the_last_eigenvectors_saves_products():
    model, batch = labelled("grouped")
    options = {"smallest_tol": None, "num_trace_vectors": 0, "num_eigenvalues": 3}
    first = hessian_spectrum(model, batch, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0001)
    cold = hessian_spectrum(model, batch, **options)
    warm = hessian_spectrum(model, batch, start=first.vectors, **options)
    assert warm.num_products < cold.num_products
    assert torch.allclose(warm.eigenvalues, cold.eigenvalues, rtol=2e-3)


def test_parts_of_the_rows_at_a_time_give_the_same():
    model, batch = labelled("frozen_backbone")
    whole = hessian_spectrum(model, batch, **ALL)
    parts = hessian_spectrum(model, batch, memory=2, **ALL)
    assert parts.max == pytest.approx(whole.max, rel=1e-9)
    assert parts.trace == pytest.approx(whole.trace, rel=1e-9)


class Held(nn.Module):
    """A net that holds a loss of torch's."""

    def __init__(self, loss, num_outputs=3):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, num_outputs))
        self.loss = loss

    def forward(self, x):
        return self.body(x)


class Flat(Held):
    def forward(self, x):
        return self.body(x).flatten()


def images():
    """A net of positions, some of which are ignored."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 3, 1))
    labels = torch.arange(3 * 2 * 2).view(3, 2, 2) % 3
    labels[0, 0] = -100
    return net, torch.randn(3, 2, 2, 2), labels


WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
CLASSES = torch.arange(6) % 3
NUMBERS = torch.linspace(-1, 1, 18).view(6, 3).double()
LOSSES = {
    "weighted": (Held, nn.CrossEntropyLoss(WEIGHTS, ignore_index=1), CLASSES),
    "smoothed": (Held, nn.CrossEntropyLoss(label_smoothing=0.2), CLASSES),
    "shares": (Held, nn.CrossEntropyLoss(), NUMBERS.softmax(1)),
    "squares": (Held, nn.MSELoss(), NUMBERS),
    "binary": (Held, nn.BCEWithLogitsLoss(), NUMBERS.sigmoid()),
    "huber": (Held, nn.HuberLoss(delta=0.3), NUMBERS),
    "outcomes": (Held, nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), NUMBERS.sigmoid()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_that_a_module_holds_is_measured(name):
    kind, loss, target = LOSSES[name]
    model, x = kind(loss).double(), torch.randn(6, 4).double()
    found = hessian_spectrum(model, (x, target), **ALL)
    assert_ends(found, explicit_hessian(loss(model(x), target), model))


def test_positions_that_are_ignored_count_for_nothing():
    model, x, labels = images()
    model, x = model.double(), x.double()
    found = hessian_spectrum(model, (x, labels), **ALL)
    assert_ends(found, explicit_hessian(F.cross_entropy(model(x), labels), model))


def test_a_loss_that_is_given_is_measured_on_the_output_as_it_is():
    model, x = Flat(None, num_outputs=1).double(), torch.randn(6, 4).double()
    target = NUMBERS[:, 0]

    def loss_fn(output, target):
        return (output - target).abs() ** 3  # of two shapes it would make a matrix

    loss = read_loss(model, (x, target), loss_fn=loss_fn)
    found = hessian_spectrum(model, (x, target), loss, **ALL)
    explicit = loss_fn(model(x), target).mean()
    assert_ends(found, explicit_hessian(explicit, model))
    assert torch.allclose(loss.mean(model(x), (x, target)), explicit)


def test_a_loss_that_is_linear_has_no_curvature():
    net, x = nn.Linear(4, 2), torch.randn(5, 4)
    batch = (x, torch.zeros(5, 2))
    loss = read_loss(net, batch, loss_fn=lambda output, target: output.sum(1))
    found = hessian_spectrum(net, batch, loss)
    assert found.max == found.smallest == found.trace == 0


def test_weights_that_are_nan_give_nan():
    model, batch = labelled("residual")
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    found = hessian_spectrum(model, batch, num_eigenvalues=2)
    assert found.eigenvalues.isnan().all()
    assert math.isnan(hessian_spectrum(model, batch).max)


def measured_on_a_rank(rank, counts):
    model, (x, y) = labelled("residual")
    begin = sum(counts[:rank])
    rows = slice(begin, begin + counts[rank])
    weighted = nn.CrossEntropyLoss(WEIGHTS, ignore_index=1)
    values = []
    for loss_fn, output in ((weighted, "auto"), (None, "softmax")):
        batch = (x[rows], y[rows])
        loss = read_loss(model, batch, loss_fn=loss_fn, output=output)
        for k in (1, 2):
            found = hessian_spectrum(
                model, batch, loss, num_eigenvalues=k, reduce=sum_over_ranks
            )
            values += [*found.eigenvalues.tolist(), found.smallest, found.trace]
    return values


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(4, 3), (3, 0, 4)])
def test_uneven_and_empty_shards_give_what_one_process_does(counts):
    (alone,) = run_ranks(measured_on_a_rank, 1, (sum(counts),))
    for values in run_ranks(measured_on_a_rank, len(counts), counts):
        assert values == pytest.approx(alone, rel=1e-6)


def test_the_estimated_trace_is_as_near_as_its_standard_error_says():
    model, batch = labelled("three_dimensional")
    exact = hessian_spectrum(model, batch, **ALL).trace
    few = hessian_spectrum(model, batch, num_trace_vectors=20)
    many = hessian_spectrum(model, batch, num_trace_vectors=180)
    for found in (few, many):
        assert abs(found.trace - exact) < 4 * found.trace_error
    assert many.trace_error < few.trace_error / 2


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Detached(Once):
    @staticmethod
    def backward(ctx, grad):
        return (2 * ctx.saved_tensors[0]).detach() * grad


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self.first(x)))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (Once.apply, "no second derivative: torch gives none for Once"),
        (F.hardsigmoid, "no second derivative: torch gives none for hardsigmoid"),
        (Detached.apply, "the backward of Detached leaves the graph"),
    ],
)
def test_an_operation_without_a_second_derivative_is_named(function, words):
    torch.manual_seed(0)
    model, batch = Applied(function), (torch.randn(2, 4), torch.tensor([0, 1]))
    loss = read_loss(model, batch)
    with pytest.raises(ValueError, match=words):
        check_second_derivative(model, batch, loss, HessianOptions())


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def test_a_function_of_ones_own_that_has_a_second_derivative_is_measured():
    torch.manual_seed(0)
    model, batch = Applied(Cube.apply), (torch.randn(2, 4), torch.tensor([0, 1]))
    loss = read_loss(model, batch)
    assert not check_second_derivative(model, batch, loss, HessianOptions())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_eigenvalues": 0}, "num_eigenvalues is 0"),
        ({"tol": 0.0}, "tol is 0"),
        ({"smallest_tol": 1.0}, "smallest_tol is 1"),
        ({"num_trace_vectors": 1}, "num_trace_vectors is 1"),
    ],
)
def test_options_that_cannot_be_right_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        HessianOptions(**options)


def test_a_summed_loss_is_refused():
    model = Held(nn.HuberLoss(reduction="sum"))
    with pytest.raises(ValueError, match="reduction='sum'"):
        read_loss(model, (torch.randn(2, 4), torch.randn(2, 3)))


@pytest.mark.parametrize(
    ("values", "patience", "ended_at"),
    [
        ([1, 2, 3, 2], 1, 2),
        ([1, 2, 3], 1, None),
        ([3, 2], 1, 0),
        ([1, 3, 2, 4, 3, 3.5], 2, 3),
        ([1, math.nan, 2, 1], 1, 2),
        ([1, 2, 2.0005], 1, 1),
        ([-2, -1, -3, 5], 1, 1),
    ],
)
def test_growth_ends_at_the_record_that_is_not_passed(values, patience, ended_at):
    growth = Growth(1e-3, patience)
    for step, value in enumerate(values):
        growth.add(step, value)
        growth.add(step, value + 10)  # a step that was there is left out
    assert growth.ended_at == ended_at

"""What was found of a network is used again, and only where it holds."""

from queue import SimpleQueue

import pytest
import torch
from explicit_fisher import explicit_fisher
from torch import nn

from lit_resnorm.measures.fisher import Examinations, fisher_spectrum


class Gated(nn.Module):
    """Rows depend on each other behind a gate, which may be closed."""

    def __init__(self, gate):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)
        self.gate = gate

    def forward(self, x):
        h = self.first(x)
        return self.last(h.tanh() + self.gate * (h - h.mean(0)))


class Tripled(torch.autograd.Function):
    """Takes its weight in unseen, as custom functions do."""

    @staticmethod
    def forward(ctx, h, weight):
        ctx.save_for_backward(h, weight)
        return 3 * h @ weight

    @staticmethod
    def backward(ctx, grad):
        h, weight = ctx.saved_tensors
        return 3 * grad @ weight.T, 3 * h.T @ grad


class Rezero(nn.Module):
    """A branch that is unseen while its factor is 0."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x + self.factor * Tripled.apply(x, self.weight))


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def assert_exact(net, x, examinations):
    expected = explicit_fisher(net, x, norm_mode=None)
    found = fisher_spectrum(net, x, num_eigenvalues=0, examinations=examinations)
    assert found.trace == pytest.approx(float(expected.trace()), rel=1e-9)


def examined(net, x, examinations):
    """Return how many forward passes a measurement of the trace makes."""
    passes = SimpleQueue()  # a list would be put back after each pass
    handle = net.register_forward_hook(lambda *_: passes.put(1))
    found = fisher_spectrum(net, x, num_eigenvalues=0, examinations=examinations)
    handle.remove()
    return passes.qsize(), found.trace


def test_a_network_that_was_examined_is_measured_in_fewer_passes_with_the_same_bits():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    x, known = torch.randn(6, 4), Examinations()
    first, trace = examined(net, x, known)
    again, same = examined(net, x, known)
    assert again < first
    assert same == trace
    with torch.no_grad():
        net[0].weight.mul_(1.1)
    later, other = examined(net, x, known)
    assert later == again
    assert other == examined(net, x, Examinations())[1] != trace


def test_measurements_without_examinations_examine_each_time():
    net, x = nn.Linear(4, 3), torch.randn(6, 4)
    assert examined(net, x, Examinations())[0] == examined(net, x, Examinations())[0]


def test_what_a_factor_of_0_hid_is_found_later():
    net, x, known = Rezero(), torch.randn(6, 4), Examinations()
    assert_exact(net, x, known)
    with torch.no_grad():
        net.factor.fill_(0.7)
    assert_exact(net, x, known)


GATES = {"a number": 0.0, "a buffer": torch.zeros(())}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_a_gate_that_opens_by_a_schedule_is_seen(gate):
    net, x, known = Gated(0.0), torch.randn(6, 4), Examinations()
    if isinstance(gate, torch.Tensor):
        del net.gate
        net.register_buffer("gate", gate.clone())
    assert_exact(net, x, known)
    net.gate = net.gate + 0.5
    assert_exact(net, x, known)


def test_weights_that_were_nan_are_examined_again():
    net, x, known = Gated(0.0), torch.randn(6, 4), Examinations()
    own = net.first.weight.detach().clone()
    with torch.no_grad():
        net.first.weight.fill_(torch.nan)
    fisher_spectrum(net, x, num_eigenvalues=0, examinations=known)
    nan_passes = examined(net, x, known)[0]
    with torch.no_grad():
        net.first.weight.copy_(own)
    assert examined(net, x, known)[0] == nan_passes
    assert_exact(net, x, known)


def test_hooks_and_layers_set_later_are_examined():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, known = torch.randn(6, 4), Examinations()
    assert_exact(net, x, known)
    handle = net[0].register_forward_hook(lambda m, a, out: out - out.mean(0))
    assert_exact(net, x, known)
    handle.remove()
    net[1] = nn.LayerNorm(4)
    assert_exact(net, x, known)

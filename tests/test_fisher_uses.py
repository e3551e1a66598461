"""Parameters that enter a network in ways that no table of calls foresees."""

import pytest
import torch
from explicit_fisher import explicit_fisher, nonzero_eigenvalues
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lit_resnorm.measures.fisher import fisher_spectrum


class Computed(nn.Module):
    """Computes with parameters of every shape, by a given function of (net, h)."""

    def __init__(self, function):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.vector = nn.Parameter(torch.randn(4))
        self.other = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(4, 4) / 2)
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.kernel = nn.Parameter(torch.randn(2, 2, 3) / 2)
        self.batch = nn.Parameter(torch.randn(1, 4, 4) / 2)
        self.function = function

    def forward(self, x):
        return self.function(self, self.first(x))


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.exp().T, (x.T @ grad) * weight.exp()


class Detaching(torch.autograd.Function):
    """Its backward function leaves the graph without a word."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.detach()
        return grad * weight, (grad * x).sum(0)


with pytest.warns(FutureWarning):

    @torch.jit.script
    def scripted(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.tanh(h @ weight)


def overwritten(net, h):
    copy = net.matrix.clone()
    copy[0] *= 2
    copy.view(-1)[5].add_(net.scalar)
    return h @ copy


USES = {
    "torch.add with alpha": lambda m, h: torch.add(h, m.vector, alpha=2),
    "add with alpha": lambda m, h: h.add(m.vector, alpha=0.5),
    "add of the output with alpha": lambda m, h: torch.add(m.vector, h, alpha=2),
    "mul by keyword": lambda m, h: torch.mul(h, other=m.vector),
    "mul into out": lambda m, h: h * m.vector.mul(2),
    "in-place mul": lambda m, h: h.clone().mul_(m.vector),
    "augmented add": lambda m, h: h.clone().__iadd__(m.vector),
    "sub, div, pow": lambda m, h: (h - m.vector) / m.other.exp() ** m.scalar,
    "addcmul": lambda m, h: torch.addcmul(h, m.vector, m.other, value=0.3),
    "lerp": lambda m, h: torch.lerp(h, m.vector, m.scalar),
    "torch.layer_norm": lambda m, h: torch.layer_norm(
        h, (4,), m.vector, m.other, 1e-5, False
    ),
    "layer_norm by keywords": lambda m, h: F.layer_norm(
        input=h, normalized_shape=(4,), bias=m.other, weight=m.vector
    ),
    "layer_norm of a parameter": lambda m, h: h * F.layer_norm(m.matrix, (4,))[0],
    "torch.group_norm": lambda m, h: torch.group_norm(
        h, 2, m.vector, m.other, 1e-5, False
    ),
    "torch.batch_norm": lambda m, h: torch.batch_norm(
        h,
        m.vector,
        m.other,
        torch.zeros(4).to(h),
        torch.ones(4).to(h),
        False,
        0.1,
        1e-5,
        False,
    ),
    "batch_norm of a parameter": lambda m, h: (
        h @ F.batch_norm(m.matrix, None, None, training=True)
    ),
    "batch_norm of a view": lambda m, h: F.linear(
        h, F.batch_norm(m.matrix[None], None, None, training=True)[0]
    ),
    "batch_norm along the inputs": lambda m, h: F.linear(
        h, F.batch_norm(m.matrix.t(), None, None, m.vector, None, True).t()
    ),
    "instance_norm by keywords": lambda m, h: F.instance_norm(
        h.view(-1, 2, 2), weight=m.vector[:2], bias=m.other[:2]
    ).flatten(1),
    "torch.embedding": lambda m, h: h + torch.embedding(m.matrix, (h[:, 0] > 0).long()),
    "embedding_bag": lambda m, h: F.embedding_bag((h > 0).long(), m.matrix),
    "indexed": lambda m, h: h + m.matrix[(h[:, 0] > 0).long()] + m.vector[[1, 0, 3, 2]],
    "linear by keywords": lambda m, h: F.linear(
        bias=m.vector, weight=m.matrix, input=h
    ),
    "linear of one bias for all": lambda m, h: F.linear(h, m.matrix, m.vector[:1]),
    "linear with a vector": lambda m, h: h * F.linear(h, m.vector)[:, None],
    "linear of a parameter": lambda m, h: F.linear(h, F.linear(m.matrix, m.matrix)),
    "linear of two parameters": lambda m, h: h @ F.linear(m.matrix, m.batch[0]),
    "linear of a one-row parameter": lambda m, h: h * F.linear(m.batch[:, 0], m.matrix),
    "a weight transposed": lambda m, h: F.linear(h, m.matrix.t(), m.vector),
    "a bias that is the weight": lambda m, h: F.linear(h, m.matrix, m.matrix[0]),
    "matmul from the left": lambda m, h: torch.matmul(m.matrix, h[..., None])[..., 0],
    "addmm": lambda m, h: torch.addmm(m.vector, h, m.matrix, beta=0.5, alpha=2),
    "baddbmm": lambda m, h: torch.baddbmm(
        m.batch.expand(len(h), 4, 4), h[:, :, None], h[:, None], alpha=0.1
    )[:, 0],
    "addmv": lambda m, h: h * torch.addmv(m.vector, m.matrix, m.other),
    "einsum": lambda m, h: torch.einsum("ni,io,o->no", h, m.matrix, m.vector),
    "bilinear": lambda m, h: F.bilinear(
        h, h, torch.stack([m.matrix.roll(k) for k in range(4)])
    ),
    "convolution with padding by name": lambda m, h: F.conv1d(
        h.view(-1, 2, 2), m.kernel, padding="same"
    ).flatten(1),
    "convolution by keywords": lambda m, h: F.conv1d(
        input=h.view(-1, 2, 2), weight=m.kernel, padding=[1], stride=[1]
    ).flatten(1),
    "convolution of a row without a batch": lambda m, h: torch.stack(
        [F.conv1d(row.view(2, 2), m.kernel, padding=1) for row in h]
    ).flatten(1),
    "transposed convolution": lambda m, h: F.conv_transpose1d(
        h.view(-1, 2, 2), m.kernel, bias=m.vector[:2], padding=1
    ).flatten(1),
    "exp of a scalar": lambda m, h: h * m.scalar.exp(),
    "a scalar as it is": lambda m, h: torch.tanh(m.scalar * h) + m.scalar,
    "a scalar times a parameter": lambda m, h: h * (m.scalar * m.vector),
    "prelu": lambda m, h: F.prelu(h, m.scalar[None]),
    "one parameter in two operands": lambda m, h: h * (m.vector * m.vector),
    "custom function": lambda m, h: Custom.apply(h, m.matrix),
    "function that leaves the graph": lambda m, h: Detaching.apply(h, m.vector),
    "scripted function": lambda m, h: scripted(h, m.matrix),
    "view made beforehand": lambda m, h: h[:, :2] @ m.half,
    "overwritten copy": overwritten,
    "vmap": lambda m, h: torch.func.vmap(lambda row: m.matrix @ row)(h),
    "checkpoint": lambda m, h: checkpoint(
        lambda h: torch.tanh(F.linear(h, m.matrix, m.vector)), h, use_reentrant=False
    ),
    "reentrant checkpoint": lambda m, h: checkpoint(
        lambda h: torch.tanh(F.linear(h, m.matrix, m.vector)), h, use_reentrant=True
    ),
    "checkpointed batch norm": lambda m, h: checkpoint(
        lambda h: F.batch_norm(
            h, torch.zeros(4).to(h), torch.ones(4).to(h), m.vector, m.other
        ),
        h,
        use_reentrant=False,
    ),
    "rows in another order": lambda m, h: F.linear(h.flip(0), m.matrix).flip(0),
    "rows by their size": lambda m, h: F.linear(h[h[:, 0].argsort()], m.matrix)[
        h[:, 0].argsort().argsort()
    ],
    "complex numbers": lambda m, h: (torch.fft.fft(h) * m.vector).abs(),
}


def computed(name):
    torch.manual_seed(0)
    model = Computed(USES[name]).double()
    model.half = model.matrix[:2]  # a view made beforehand
    return model, torch.randn(5, 4).double()


def plain_fisher(model, x, name, norm_mode):
    """The explicit matrix; statistics of weights are differentiated in any mode."""
    return explicit_fisher(
        model,
        x,
        norm_mode=None
        if "batch_norm of" in name or "batch_norm along" in name
        else norm_mode,
    )


def assert_same_spectrum(values, expected):
    assert len(values) == len(expected)
    assert_close(values, expected, rtol=1e-9, atol=1e-13 * float(expected[0]))


@pytest.mark.parametrize("norm_mode", ["frozen", "train"])
@pytest.mark.parametrize("name", USES)
def test_whatever_takes_a_parameter_in_is_measured_exactly(name, norm_mode):
    model, x = computed(name)
    expected = plain_fisher(model, x, name, norm_mode)
    found = fisher_spectrum(model, x, norm_mode=norm_mode)
    assert_same_spectrum(found.eigenvalues, nonzero_eigenvalues(expected))
    trace = fisher_spectrum(model, x, norm_mode=norm_mode, num_eigenvalues=0).trace
    assert trace == pytest.approx(float(expected.trace()), rel=1e-9)


@pytest.mark.parametrize("name", USES)
def test_products_are_exact_whatever_rules_for_derivatives_lack(name, monkeypatch):
    monkeypatch.setattr(
        "lit_resnorm.measures.fisher.routes.matrix_is_cheaper", lambda *_: False
    )
    model, x = computed(name)
    expected = nonzero_eigenvalues(plain_fisher(model, x, name, "frozen"))
    found = fisher_spectrum(model, x, num_eigenvalues=1, tol=1e-9)
    assert_close(found.eigenvalues, expected[:1], rtol=1e-9, atol=0.0)

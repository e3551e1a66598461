"""Random networks on random shards: spectra against explicit matrices in float64.

Hypothesis draws architecture, output, norm mode, memory and shards; it is seeded, so
every run draws the same cases.
"""

import pytest
import torch
from explicit_fisher import explicit_fisher, nonzero_eigenvalues
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from ranks import run_ranks, sum_over_ranks
from torch import nn
from torch.nn import functional as F

from lit_resnorm.measures.fisher import fisher_spectrum

CHANNELS = 4
LENGTH = 3
SHARDS = {
    1: [(5,), (1,)],
    2: [(3, 2), (4, 1), (5, 0), (1, 1)],
    3: [(0, 2, 3), (1, 3, 1)],
}


class Scaled(nn.Module):
    """A bare parameter, with or without dimensions."""

    def __init__(self, shape, add):
        super().__init__()
        self.factor = nn.Parameter(torch.rand(shape) + 0.5)
        self.add = add

    def forward(self, h):
        return h + self.factor if self.add else self.factor * h


class Branch(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, h):
        return h + self.layers(h)


class Positions(nn.Module):
    """Applies a layer to `(N, T, C)`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, h):
        out = self.layer(h.transpose(1, 2))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)

    def forward(self, h):
        return self.attention(h, h, h, need_weights=False)[0]


class Dead(nn.Module):
    """A channel that is the same for every example and position."""

    def forward(self, h):
        return h * torch.tensor([0.0, 1.0, 1.0, 1.0]).to(h)[None, :, None] + 1


class StandardisedConv(nn.Conv1d):
    by_hand = False

    def forward(self, h):
        flat = self.weight.flatten(1)
        if self.by_hand:
            variance, mean = torch.var_mean(flat, 1, correction=0, keepdim=True)
            weight = (flat - mean) / (variance + 1e-5).sqrt()
        else:
            weight = F.batch_norm(flat[None], None, None, training=True)
        return F.conv1d(h, weight.view_as(self.weight), self.bias, padding=1)


# Each takes and gives `(N, 4, 3)`.
LAYERS = {
    "conv": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "conv without bias": lambda: nn.Conv1d(4, 4, 1, bias=False),
    "depthwise": lambda: nn.Conv1d(4, 4, 3, padding="same", groups=4),
    "transposed": lambda: nn.ConvTranspose1d(4, 4, 3, padding=1),
    "circular": lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
    "standardised": lambda: StandardisedConv(4, 4, 3),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1)),
    "linear": lambda: Positions(nn.Linear(4, 4)),
    "along positions": lambda: nn.Linear(3, 3),
    "bilinear": lambda: Positions(Twice(nn.Bilinear(4, 4, 4))),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "bare batch norm": lambda: nn.BatchNorm1d(4, affine=False),
    "dead channel, batch norm": lambda: nn.Sequential(Dead(), nn.BatchNorm1d(4)),
    "instance norm": lambda: nn.InstanceNorm1d(4, affine=True),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "layer norm": lambda: Positions(nn.LayerNorm(4)),
    "RMS norm": lambda: Positions(nn.RMSNorm(4)),
    "factor": lambda: Scaled((4, 1), False),
    "scalar": lambda: Scaled((), False),
    "summand": lambda: Scaled((4, 3), True),
    "attention": lambda: Positions(Attention()),
    "recurrent": lambda: Positions(nn.GRU(4, 4, batch_first=True)),
    "PReLU": lambda: nn.PReLU(4),
    "branch": lambda: Branch(nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 1)),
    "frozen": lambda: nn.Conv1d(4, 4, 1).requires_grad_(False),
}


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, h):
        return self.layer(h, h.tanh())


class Tokens(nn.Module):
    """Embedded indices as `(N, 4, 3)`; `bag` pools them first."""

    def __init__(self, bag):
        super().__init__()
        self.bag = bag
        self.embed = nn.EmbeddingBag(6, 4) if bag else nn.Embedding(6, 4, padding_idx=0)

    def forward(self, tokens):
        embedded = self.embed(tokens)
        if self.bag:
            return embedded[:, :, None].expand(-1, -1, LENGTH)
        return embedded.transpose(1, 2)


OUTPUTS = {
    "softmax": ("softmax", 3, False),
    "bernoulli": ("bernoulli", 2, False),
    "gaussian": ("gaussian", 2, False),
    "sequence": ("softmax", 3, True),
}


@st.composite
def cases(draw, shards):
    """Return what a case consists of, in plain values."""
    names = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4))
    return {
        "entry": draw(st.sampled_from(["vectors", "tokens", "bag"])),
        "layers": names,
        "tied": draw(st.booleans()),
        "output": draw(st.sampled_from(sorted(OUTPUTS))),
        "norm_mode": draw(st.sampled_from(["frozen", "eval", "train"])),
        "shards": draw(st.sampled_from(shards)),
        "memory": draw(st.sampled_from([1, 3000, 2**28])),
        "num_eigenvalues": draw(st.sampled_from([None, None, 0, 1])),
        "ignored": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


def network(case):
    """Return the network of a case, its batch and the batch's weights."""
    torch.manual_seed(case["seed"])
    layers = [LAYERS[name]() for name in case["layers"]]
    if case["tied"]:
        layers.append(layers[0])
    _, size, sequence = OUTPUTS[case["output"]]
    entry = nn.Conv1d(4, 4, 1) if case["entry"] == "vectors" else None
    read = Read(size, sequence)
    net = nn.Sequential(
        entry or Tokens(case["entry"] == "bag"), *Smooth.between(layers), read
    ).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var.uniform_(0.5, 2.0)
    num = sum(case["shards"])
    x = torch.randn(num, 4, LENGTH).double()
    if entry is None:
        x = torch.randint(0, 6, (num, LENGTH))
    weights = torch.ones(num, LENGTH if sequence else 1).double()
    if case["ignored"] and num > 1:
        weights[num // 2] = 0
    return net, x, weights if sequence else weights[:, 0]


class Smooth(nn.Tanh):
    """An activation after each layer, so that curvature reaches all of them."""

    @classmethod
    def between(cls, layers):
        return [part for layer in layers for part in (layer, cls())]


class Read(nn.Module):
    def __init__(self, size, sequence):
        super().__init__()
        self.sequence = sequence
        self.read = nn.Linear(4 if sequence else 4 * LENGTH, size)

    def forward(self, h):
        return self.read(h.transpose(1, 2) if self.sequence else h.flatten(1))


def explicit(net, x, case, weights):
    for module in net.modules():
        if isinstance(module, StandardisedConv):
            module.by_hand = True
    expected = explicit_fisher(
        net,
        x,
        output=OUTPUTS[case["output"]][0],
        norm_mode=case["norm_mode"],
        weights=weights,
    )
    for module in net.modules():
        if isinstance(module, StandardisedConv):
            module.by_hand = False
    return expected


def errors(case, rank=0):
    """Return the errors of eigenvalues and trace, over the largest eigenvalue."""
    net, x, weights = network(case)
    expected = explicit(net, x, case, weights)
    values = nonzero_eigenvalues(expected)
    largest = float(values[0])
    shards = case["shards"]
    own, options = slice(None), {}
    if len(shards) > 1:
        options = {"reduce": sum_over_ranks}
        if case["norm_mode"] != "train":  # else every rank takes the whole batch
            own = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
    found = fisher_spectrum(
        net,
        x[own],
        output=OUTPUTS[case["output"]][0],
        norm_mode=case["norm_mode"],
        num_eigenvalues=case["num_eigenvalues"],
        tol=1e-10,
        weights=weights[own],
        memory=case["memory"],
        **options,
    )
    of_trace = abs(found.trace - float(expected.trace())) / largest
    if case["num_eigenvalues"] == 0:
        return of_trace, 0.0
    if case["num_eigenvalues"] == 1:
        values = values[:1]
    size = max(len(values), len(found.eigenvalues))
    both = [F.pad(v, (0, size - len(v))) for v in (found.eigenvalues, values)]
    return of_trace, float((both[0] - both[1]).abs().max()) / largest


def check_random_cases(rank, num_ranks, num_cases):
    """Check as many cases; return how many there were, and their largest error."""
    worst = []

    @settings(
        max_examples=num_cases,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(SHARDS[num_ranks]))
    def check(case):
        found = errors(case, rank)
        note = f"{case}: trace and eigenvalues off by {found}"
        # Rounding of 1e-16, which normalised constants multiply by 316 a layer.
        assert max(found) < 1e-9, note
        worst.append(max(found))

    check()
    return len(worst), max(worst)


@pytest.mark.parametrize(
    ("num_ranks", "num_cases"),
    [
        (1, 40),
        pytest.param(1, 1500, marks=pytest.mark.slow),
        pytest.param(2, 10, marks=pytest.mark.ddp),
        pytest.param(3, 10, marks=pytest.mark.ddp),
        pytest.param(2, 300, marks=[pytest.mark.ddp, pytest.mark.slow]),
        pytest.param(3, 300, marks=[pytest.mark.ddp, pytest.mark.slow]),
    ],
)
def test_random_networks_have_the_explicit_matrixs_spectrum(num_ranks, num_cases):
    if num_ranks == 1:
        checked = [check_random_cases(0, 1, num_cases)]
    else:
        checked = run_ranks(check_random_cases, num_ranks, num_ranks, num_cases)
    assert {num for num, _ in checked} == {num_cases}

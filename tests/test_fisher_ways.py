"""Networks that send rows different ways have the Fisher matrix of what they do."""

import lightning as L
import pytest
import torch
from explicit_fisher import explicit_fisher, nonzero_eigenvalues
from ranks import run_ranks, sum_over_ranks
from small import quiet_trainer
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from lit_resnorm.measures.copies.stability import losses_at
from lit_resnorm.measures.fisher import fisher_spectrum
from lit_resnorm_callbacks import FIMEigenvalueProbe

NUM_ROWS = 7


class Experts(nn.Module):
    """Sends each row to the expert whose number is its first feature."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.gate = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 3) for _ in range(4)])

    def forward(self, x):
        shares, h = self.gate(x).softmax(-1), self.first(x).tanh()
        out = h.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            mine = x[:, 0] == number
            if mine.any():
                out[mine] = expert(h[mine]) * shares[mine, number, None]
        return out


class EarlyExit(nn.Module):
    """Applies as many layers as a row's first feature says, or none."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x):
        h = x
        for depth, layer in enumerate(self.layers):
            going = x[:, 0] > depth
            if not going.any():
                break
            changed = layer(h[going]).tanh()
            h = h.clone()
            h[going] = changed
        return h[:, :3]


class Squaring(torch.autograd.Function):
    """Takes its weight in where no function mode sees it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.square()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return grad @ weight.square().T, (x.T @ grad) * 2 * weight


class Branching(nn.Module):
    """Computes with other functions of its weight in rows whose first feature is 1."""

    def __init__(self, function):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.matrix = nn.Parameter(torch.randn(4, 4) / 2)
        self.last = nn.Linear(4, 3)
        self.function = function

    def forward(self, x):
        rows = [
            self.function(self, h) if way == 1 else h
            for way, h in zip(x[:, 0], self.first(x).tanh().split(1), strict=True)
        ]
        return self.last(torch.cat(rows))


class RowByRow(nn.Module):
    """Runs each row through the layer that its first feature names."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        low = self.low(x.clamp_max(1.0))
        rows = [self.high(r) if r[0, 0] == 1 else r[:, :3] for r in x.split(1)]
        return low + torch.cat(rows)


class Widened(nn.Module):
    """Normalises all features but the first."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, x):
        return torch.cat([x[:, :1], self.norm(x[:, 1:])], dim=1)


NETS = {
    "experts": (Experts, [2, 0, 2, 0, 3, 2, 0]),  # none for 1, one row for 3
    "experts that part late": (Experts, [0, 0, 0, 0, 0, 0, 3]),
    "early exit": (EarlyExit, [0, 2, 1, 3, 0, 1, 2]),
    "early exit of the last row": (EarlyExit, [2, 2, 2, 2, 2, 2, 0]),
    "unseen function": (
        lambda: Branching(lambda net, h: Squaring.apply(h, net.matrix)),
        [0, 0, 0, 0, 0, 1, 0],
    ),
    "general use": (
        lambda: Branching(lambda net, h: h @ net.matrix),
        [0, 0, 0, 0, 0, 1, 0],
    ),
    "same weight otherwise": (
        lambda: Branching(lambda net, h: nn.functional.linear(h, net.first.weight)),
        [0, 0, 0, 0, 0, 1, 0],
    ),
    "one layer more": (RowByRow, [0, 1, 0, 1, 1, 0, 0]),
}


def net(name):
    torch.manual_seed(0)
    make, ways = NETS[name]
    model, x = make().double(), torch.randn(NUM_ROWS, 4, dtype=torch.float64)
    x[:, 0] = torch.tensor(ways)
    return model, x


def explicit_layer_traces(model, x):
    diagonal = iter(explicit_fisher(model, x).diagonal())
    traces = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0] or type(model).__name__.lower()
        share = sum(float(next(diagonal)) for _ in range(parameter.numel()))
        traces[owner] = traces.get(owner, 0.0) + share
    return traces


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("num_eigenvalues", [None, 0, 1, 3])
@pytest.mark.parametrize("cheaper", [True, False], ids=["matrix", "products"])
def test_rows_that_take_different_ways_are_measured_exactly(
    name, num_eigenvalues, cheaper, monkeypatch
):
    monkeypatch.setattr(
        "lit_resnorm.measures.fisher.routes.matrix_is_cheaper", lambda *_: cheaper
    )
    model, x = net(name)
    expected = nonzero_eigenvalues(explicit_fisher(model, x))
    found = fisher_spectrum(
        model, x, num_eigenvalues=num_eigenvalues, tol=1e-10, per_layer=True
    )
    wanted = expected if num_eigenvalues is None else expected[:num_eigenvalues]
    assert_close(found.eigenvalues, wanted, rtol=1e-9, atol=1e-9 * float(expected[0]))
    assert found.trace == pytest.approx(float(expected.sum()), rel=1e-9)
    traces = {key.split(".", 1)[1]: one.trace for key, one in found.layers.items()}
    expected_traces = explicit_layer_traces(model, x)
    assert traces == pytest.approx(expected_traces, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", ["experts", "experts that part late"])
def test_batch_norms_that_some_rows_pass_by_are_refused_or_take_the_batch(name):
    model, x = net(name)
    for place, expert in enumerate(model.experts):
        model.experts[place] = nn.Sequential(expert, nn.BatchNorm1d(3).double())
    with pytest.raises(ValueError, match=r"Experts, past batch norms .*norm_mode"):
        fisher_spectrum(model, x, num_eigenvalues=1)
    for norm_mode in ("eval", "train"):
        expected = nonzero_eigenvalues(explicit_fisher(model, x, norm_mode=norm_mode))
        found = fisher_spectrum(model, x, norm_mode=norm_mode)
        atol = 1e-9 * float(expected[0])
        assert_close(found.eigenvalues, expected, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("name", ["experts", "experts that part late", "early exit"])
def test_a_batch_norm_that_all_rows_pass_is_no_hindrance(name):
    model, x = net(name)
    model = nn.Sequential(Widened(), model)
    expected = nonzero_eigenvalues(explicit_fisher(model, x))
    found = fisher_spectrum(model, x)
    atol = 1e-9 * float(expected[0])
    assert_close(found.eigenvalues, expected, rtol=1e-9, atol=atol)


def measure(rank, name, shares, options):
    model, x = net(name)
    start = sum(shares[:rank])
    rows = x[start : start + shares[rank]]
    found = fisher_spectrum(model, rows, reduce=sum_over_ranks, **options)
    layers = {key: layer.trace for key, layer in found.layers.items()}
    return found.eigenvalues, found.trace, layers


@pytest.mark.ddp
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "shares", [(5, 2), pytest.param((1, 0, 6), marks=pytest.mark.slow)], ids=str
)
def test_all_ranks_take_rows_of_different_ways_alike(name, shares):
    model, x = net(name)
    expected = nonzero_eigenvalues(explicit_fisher(model, x))
    whole = fisher_spectrum(model, x, num_eigenvalues=0, per_layer=True)
    for num in (None, 0, 2):
        options = {"num_eigenvalues": num, "tol": 1e-10, "per_layer": True}
        for values, trace, layers in run_ranks(
            measure, len(shares), name, shares, options
        ):
            wanted = expected if num is None else expected[:num]
            assert_close(values, wanted, rtol=1e-9, atol=1e-9 * float(expected[0]))
            assert trace == pytest.approx(float(expected.sum()), rel=1e-9)
            assert layers == pytest.approx(
                {key: one.trace for key, one in whole.layers.items()},
                rel=1e-9,
                abs=1e-15,
            )


def with_norms(model, num_normed):
    """Norm the output of the first experts."""
    for place in range(num_normed):
        normed = nn.Sequential(model.experts[place], nn.BatchNorm1d(3).double())
        model.experts[place] = normed
    return model


def refused(rank, shares):
    """Return what each measurement of networks with norms in experts says."""
    said = []
    for name, num_normed in (
        ("experts", 4),
        ("experts that part late", 4),
        ("experts", 1),
        ("experts that part late", 1),
    ):
        model, x = net(name)
        model = with_norms(model, num_normed)
        rows = x[sum(shares[:rank]) :][: shares[rank]]
        for num_eigenvalues in (0, 1):
            try:
                fisher_spectrum(
                    model, rows, num_eigenvalues=num_eigenvalues, reduce=sum_over_ranks
                )
            except ValueError as error:
                said.append(str(error))
    # In step: a sum of all ranks comes out as the sum.
    total = float(sum_over_ranks(torch.tensor(float(rank))))
    return said, total


@pytest.mark.ddp
@pytest.mark.parametrize(
    "shares", [(5, 2), pytest.param((1, 0, 6), marks=pytest.mark.slow)], ids=str
)
def test_all_ranks_refuse_norms_that_some_rows_pass_by_and_none_waits(shares):
    found = run_ranks(refused, len(shares), shares)
    for said, total in found:
        assert total == sum(range(len(shares)))
        assert said == found[0][0]
        assert len(said) == 8
        assert all("past batch norms" in words for words in said)


def test_examples_that_pass_by_norms_of_the_batch_are_refused_by_losses_too():
    model, x = net("experts")
    model = with_norms(model, 4)
    with pytest.raises(ValueError, match="past batch norms"):
        losses_at(
            model, lambda module, x: module(x).square().sum(1), [{}], [{}], x, x[:2]
        )


class LitExperts(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.loss = Experts(), nn.CrossEntropyLoss()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        x, y = batch
        return self.loss(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("num_eigenvalues", ["auto", 0, 1])
def test_the_probe_measures_experts_from_the_start(num_eigenvalues):
    module = LitExperts().double()
    _, x = net("experts that part late")
    data = DataLoader(TensorDataset(x, torch.arange(NUM_ROWS) % 3), batch_size=NUM_ROWS)
    probe = FIMEigenvalueProbe(
        num_examples=NUM_ROWS, num_eigenvalues=num_eigenvalues, strict=True
    )
    trainer = quiet_trainer(max_steps=1, callbacks=[probe])
    trainer.fit(module, data, data)
    expected = explicit_fisher(module, x)
    logged = trainer.callback_metrics
    assert float(logged["fim/trace"]) == pytest.approx(float(expected.trace()))
    if num_eigenvalues != 0:
        largest = float(nonzero_eigenvalues(expected)[0])
        assert float(logged["fim/lambda_max"]) == pytest.approx(largest, rel=1e-5)

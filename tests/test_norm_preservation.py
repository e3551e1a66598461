"""Norms of hidden states and gradients against explicit ones."""

import math

import pytest
import torch
from ranks import run_ranks, sum_over_ranks
from small import FunctionalNet, loaders, quiet_trainer, vectors
from torch import nn
from torch.nn import functional as F

from lit_resnorm.measures.norm_preservation import norm_preservation, norm_sites
from lit_resnorm.measures.passes.batches import network_output
from lit_resnorm_callbacks import NormPreservationMonitor


class Mixed(nn.Module):
    """Convolutions, one in groups, a norm, a residual addition, a tied layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, padding=1)
        self.tied = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3, bias=False)

    def forward(self, x):
        h = F.relu(self.norm(self.first(x)))
        h = h + torch.tanh(self.grouped(h))
        h = h.mean(1).flatten(1)
        return self.head(F.relu(self.tied(F.relu(self.tied(h)))))


class Tokens(nn.Module):
    """An embedding, positions and a layer over them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.place = nn.Parameter(torch.randn(1, 4, 6))
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        h = self.embed(ids) + self.place
        return self.head((h + torch.relu(self.layer(h))).mean(1))


def case(name, num=7, seed=0):
    torch.manual_seed(seed)
    y = torch.randint(3, (num,))
    if name == "tokens":
        return Tokens().double(), (torch.randint(7, (num, 4)), y)
    net = Mixed().double()
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
    return net, (torch.randn(num, 2, 4, 4, dtype=torch.float64), y)


def states_by_hand(net, x, norm):
    """The hidden states, the input of the first layer, and the output, spelled out."""
    if isinstance(net, Tokens):
        embedded = net.embed(x)
        h = embedded + net.place
        relu = torch.relu(net.layer(h))
        states = [relu, h + relu]
        return embedded, states, net.head(states[1].mean(1))
    relu = F.relu(norm(net.first(x)))
    tanh = torch.tanh(net.grouped(relu))
    pooled = (relu + tanh).mean(1).flatten(1)
    once = F.relu(net.tied(pooled))
    twice = F.relu(net.tied(once))
    return x, [relu, tanh, relu + tanh, once, twice], net.head(twice)


def by_hand(net, batch, mode):
    """Ratios of every example, row by row."""
    x, y = batch
    norm = None
    if isinstance(net, Mixed):
        net.norm.eval()
        mean, var = net.norm.running_mean, net.norm.running_var
        if mode == "frozen":
            u = net.first(x).detach()
            mean, var = u.mean((0, 2, 3)), u.var((0, 2, 3), correction=0)

        def norm(u):
            own = net.norm
            return F.batch_norm(u, mean, var, own.weight, own.bias, eps=own.eps)

    layers = ["first", "grouped", "tied", "head"]
    layers = ["layer", "head"] if isinstance(net, Tokens) else layers
    hidden, gradient = [], []
    for row in range(len(y)):
        given, states, output = states_by_hand(net, x[row : row + 1], norm)
        loss = F.cross_entropy(output, y[row : row + 1])
        weights = [getattr(net, layer).weight for layer in layers]
        error, *grads = torch.autograd.grad(loss, [output, *weights])
        size = given.norm()
        hidden.append(torch.stack([state.norm() / size for state in states]))
        scaled = [grad.norm() / (size * error.norm()) for grad in grads]
        gradient.append(torch.stack(scaled))
    return torch.stack(hidden).detach(), torch.stack(gradient).detach()


def as_tables(found):
    return [
        torch.stack([torch.stack([r.mean, r.deviation]) for r in ratios.values()])
        for ratios in (found.hidden, found.gradient)
    ]


@pytest.mark.parametrize("mode", ["frozen", "eval"])
@pytest.mark.parametrize("name", ["mixed", "tokens"])
def test_ratios_are_those_of_explicit_gradients_of_every_example(name, mode):
    net, batch = case(name)
    expected = by_hand(net, batch, mode)
    for num_chunks in (1, 3):
        found = norm_preservation(
            net, batch, forward=network_output, norm_mode=mode, num_chunks=num_chunks
        )
        for table, ratios in zip(as_tables(found), expected, strict=True):
            largest = (ratios - 1).abs().amax(0)
            wanted = torch.stack([ratios.mean(0), largest], 1)
            torch.testing.assert_close(table, wanted, rtol=1e-9, atol=1e-9)
        assert found.excluded == 0


def of_shares(rank, net, batch, sizes, mode):
    start = sum(sizes[:rank])
    share = tuple(part[start : start + sizes[rank]] for part in batch)
    found = norm_preservation(
        net, share, forward=network_output, norm_mode=mode, reduce=sum_over_ranks
    )
    return as_tables(found)


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("sizes", "mode"),
    [
        ((7, 0), "frozen"),
        pytest.param((5, 2), "eval", marks=pytest.mark.slow),
        pytest.param((1, 6, 0), "frozen", marks=pytest.mark.slow),
    ],
)
def test_uneven_and_empty_shards_give_what_one_process_gives(sizes, mode):
    net, batch = case("mixed")
    whole = norm_preservation(net, batch, forward=network_output, norm_mode=mode)
    for tables in run_ranks(of_shares, len(sizes), net, batch, sizes, mode):
        for table, expected in zip(tables, as_tables(whole), strict=True):
            torch.testing.assert_close(table, expected, rtol=1e-9, atol=1e-9)


def test_many_positions_and_few_give_the_same_norm_of_a_gradient():
    torch.manual_seed(0)
    for side in (3, 40):  # by inner products, and by the gradients themselves
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
        )
        x = torch.randn(2, 3, side, side, dtype=torch.float64)
        net.double()(x)
        y = torch.tensor([0, 1])
        (conv, _) = norm_preservation(
            net, (x, y), forward=network_output
        ).gradient.values()
        ratios = []
        for row in range(2):
            output = net(x[row : row + 1])
            loss = F.cross_entropy(output, y[row : row + 1])
            error, grad = torch.autograd.grad(loss, [output, net[0].weight])
            ratios.append(grad.norm() / (error.norm() * x[row].norm()))
        torch.testing.assert_close(
            conv.mean, torch.stack(ratios).mean(), rtol=1e-9, atol=0
        )


def test_recurrent_weights_and_ranks_of_one_example_are_measured_row_by_row():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRU(3, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.relu(self.cell(x)[0].mean(1)))

    torch.manual_seed(0)
    net = Recurrent().double()
    x, y = torch.randn(3, 5, 3, dtype=torch.float64), torch.tensor([0, 1, 1])
    found = norm_preservation(net, (x, y), forward=network_output)
    (cell,) = (ratio for name, ratio in found.gradient.items() if "cell" in name)
    weights = [p for n, p in net.cell.named_parameters() if "weight" in n]
    ratios = []
    for row in range(3):
        output = net(x[row : row + 1])
        loss = F.cross_entropy(output, y[row : row + 1])
        error, *grads = torch.autograd.grad(loss, [output, *weights])
        total = sum(grad.square().sum() for grad in grads).sqrt()
        ratios.append(total / (error.norm() * x[row].norm()))
    torch.testing.assert_close(
        cell.mean, torch.stack(ratios).mean().detach(), rtol=1e-9, atol=0
    )


def test_he_weights_keep_norms_the_better_the_wider_the_net():
    def deviation(width):
        torch.manual_seed(0)
        layers = []
        for _ in range(4):
            layer = nn.Linear(width, width, bias=False)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            layers += [layer, nn.ReLU()]
        batch = torch.randn(40, width), torch.randint(width, (40,))
        found = norm_preservation(
            nn.Sequential(*layers[:-1]), batch, forward=network_output
        )
        return max(float(r.deviation) for r in found.hidden.values())

    # of the order of the root of depth over width, so half as much at four times
    narrow, wide = deviation(64), deviation(1024)
    assert wide < 0.5 * narrow


def test_examples_without_an_error_are_counted_and_those_without_input_too():
    net, (x, y) = case("mixed")
    x[1] = 0
    with torch.no_grad():
        net.head.weight[:] = 0
    found = norm_preservation(net, (x, y), forward=network_output)
    assert found.excluded == pytest.approx(1 / 7)  # the error of softmax is not 0
    given = norm_preservation(
        net, (x[2:], y[2:]), forward=network_output, norm_mode="eval"
    )
    assert given.excluded == 0
    assert found.hidden["002.relu"].mean.isfinite()


def test_frozen_layers_and_the_pattern_of_sites_leave_layers_out():
    net, batch = case("mixed")
    net.tied.requires_grad_(False)
    names = [*norm_sites(net, batch, forward=network_output).layers]
    assert [name.split(".")[1] for name in names] == ["first", "grouped", "head"]
    chosen = norm_sites(net, batch, forward=network_output, sites="grouped|add")
    assert [name.split(".")[1] for name in chosen.layers] == ["grouped"]
    assert [site.op for site in chosen.hidden] == ["add"]
    with pytest.raises(ValueError, match=r"sites is 'nope', which matches none of"):
        norm_sites(net, batch, forward=network_output, sites="nope")


def test_batch_norm_by_the_batch_is_refused():
    with pytest.raises(ValueError, match=r"norm_mode is 'train'.*use frozen or eval"):
        NormPreservationMonitor(norm_mode="train")
    net, batch = case("mixed")
    with pytest.raises(ValueError, match="norm_mode is 'train'"):
        norm_preservation(net, batch, forward=network_output, norm_mode="train")


def test_a_module_without_trainable_weights_is_told_in_one_line(caplog):
    module = FunctionalNet().requires_grad_(False)
    trainer = quiet_trainer(callbacks=[NormPreservationMonitor()])
    with caplog.at_level("INFO"):
        trainer.validate(module, loaders()[1], verbose=False)
    told = [r for r in caplog.records if "no trainable weight matrix" in r.message]
    assert len(told) == 1
    logged = {key.split("/")[1] for key in trainer.callback_metrics if "/" in key}
    assert "hidden" in logged
    assert "gradient" not in logged
    assert "failed" not in logged


@pytest.mark.parametrize("poison", ["nan", "zero"])
def test_an_example_that_is_nan_or_no_gradient_is_one_warning(poison):
    x, y = vectors(16).tensors
    x = x.clone()
    if poison == "nan":
        x[3, 2] = torch.nan
    else:
        x[:] = 0
    probe = NormPreservationMonitor(batch=(x, y), cadence=1, norm_mode="eval")
    trainer = quiet_trainer(max_steps=3, callbacks=[probe])
    word = "an example is not finite" if poison == "nan" else "all gradients are 0"
    with pytest.warns(UserWarning, match=word) as warned:
        trainer.fit(FunctionalNet(), *loaders())
    assert sum("are NaN" in str(each.message) for each in warned) == 1
    found = trainer.callback_metrics["norms/gradient/000.first"]
    assert math.isnan(found)
    assert trainer.global_step == 3

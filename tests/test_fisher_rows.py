"""Networks whose rows depend on each other, and some whose rows only seem to."""

import pytest
import torch
from explicit_fisher import explicit_fisher, nonzero_eigenvalues
from ranks import run_ranks, sum_over_ranks
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lit_resnorm.measures.fisher import fisher_spectrum


class Computed(nn.Module):
    """A function between two layers."""

    def __init__(self, function):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)
        self.weight = nn.Parameter(torch.rand(4) + 0.5)
        self.bias = nn.Parameter(torch.randn(4))
        self.function = function

    def forward(self, x):
        return self.last(torch.tanh(self.function(self, self.first(x))))


class LastModuleTrains(nn.BatchNorm1d):
    """A batch norm that asks for the batch's statistics in eval mode too."""

    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class Standardised(nn.Conv2d):
    """Weight standardisation as timm's ScaledStdConv2d has it."""

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True
        )
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


class StandardisedColumns(nn.Linear):
    """Weights standardised along another dimension, as many rows as the batch has."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.t(), None, None, training=True, eps=1e-3)
        return F.linear(x, weight.t(), self.bias)


def adaptive(net, h):
    """Instance norm by hand: the rows lie along the channels (MUNIT, AdaIN)."""
    images = h.view(-1, 2, 2)
    flat = images.reshape(1, 2 * len(images), 2)
    normed = F.batch_norm(flat, None, None, training=True, eps=0.1)
    return normed.reshape(h.shape) * net.weight + net.bias


def untracked():
    return nn.BatchNorm1d(4, track_running_stats=False)


COUPLED = {
    "untracked norm": lambda: nn.Sequential(
        nn.Linear(4, 4), untracked(), nn.ReLU(), nn.Linear(4, 3)
    ),
    "untracked norm of images": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 3, 2),
        nn.BatchNorm2d(3, track_running_stats=False, affine=False),
        nn.Flatten(),
        nn.Linear(3, 3),
    ),
    "training asked for": lambda: nn.Sequential(
        nn.Linear(4, 4), LastModuleTrains(4), nn.Linear(4, 3)
    ),
    "torch.batch_norm": lambda: Computed(
        lambda m, h: torch.batch_norm(
            h, m.weight, m.bias, None, None, True, 0.1, 1e-5, False
        )
    ),
    "a norm that tracks after one that does not": lambda: nn.Sequential(
        nn.Linear(4, 4), untracked(), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    ),
}
BY_HAND = {
    "centred by hand": lambda: Computed(lambda m, h: h - m.weight * h.mean(0)),
    "attention over rows": lambda: Computed(
        lambda m, h: (h @ (h * m.weight).T).softmax(1) @ h
    ),
    "rolled": lambda: Computed(lambda m, h: h + m.weight * h.roll(1, 0)),
    "rolled by two": lambda: Computed(lambda m, h: h + m.weight * h.roll(2, 0)),
    "summed over rows before": lambda: Computed(lambda m, h: (h * m.weight).cumsum(0)),
    "summed over rows after": lambda: Computed(
        lambda m, h: (h * m.weight).flip(0).cumsum(0).flip(0)
    ),
    "by their place": lambda: Computed(
        lambda m, h: h * m.weight * torch.arange(1.0, len(h) + 1)[:, None]
    ),
}
ONLY_SEEM = {
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)),
        nn.InstanceNorm1d(2, affine=True, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    "adaptive norm": lambda: Computed(adaptive),
    "standardised weights": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), Standardised(1, 3, 2), nn.Flatten(), nn.Linear(3, 3)
    ),
    "standardised columns": lambda: nn.Sequential(
        StandardisedColumns(4, 5), nn.Tanh(), nn.Linear(5, 3)
    ),
    "sorted columns": lambda: Computed(lambda m, h: h.sort(1).values * m.weight),
}


def made(make, num_rows=4):
    torch.manual_seed(0)
    net = make().double()
    for module in net.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_var.uniform_(0.5, 2.0)
    return net, torch.randn(num_rows, 4).double()


def assert_measured(net, x, expected, **options):
    values = nonzero_eigenvalues(expected)
    found = fisher_spectrum(net, x, **options)
    assert_close(found.eigenvalues, values, rtol=1e-9, atol=1e-13 * float(values[0]))
    for memory in (1, 2**28):
        few = fisher_spectrum(
            net, x, num_eigenvalues=1, tol=1e-9, memory=memory, **options
        )
        assert_close(few.eigenvalues, values[:1], rtol=1e-9, atol=0.0)
        assert few.trace == pytest.approx(float(expected.trace()), rel=1e-9)


@pytest.mark.parametrize("name", COUPLED)
def test_statistics_of_the_batch_in_mode_eval_are_differentiated_through(name):
    net, x = made(COUPLED[name])
    expected = explicit_fisher(net.eval(), x, norm_mode=None)
    assert_measured(net, x, expected, norm_mode="eval")


@pytest.mark.parametrize("name", COUPLED)
def test_statistics_of_the_batch_in_mode_frozen_are_constants(name):
    net, x = made(COUPLED[name])
    expected = explicit_fisher(net, x, norm_mode="frozen")
    assert_measured(net, x, expected, norm_mode="frozen")


@pytest.mark.parametrize("norm_mode", ["frozen", "eval", "train"])
@pytest.mark.parametrize("name", BY_HAND)
def test_rows_that_depend_on_each_other_by_hand_are_measured_together(name, norm_mode):
    net, x = made(BY_HAND[name])
    expected = explicit_fisher(net, x, norm_mode=None)
    assert_measured(net, x, expected, norm_mode=norm_mode)


@pytest.mark.parametrize("num_rows", [1, 4, 5])
@pytest.mark.parametrize("norm_mode", ["frozen", "eval", "train"])
@pytest.mark.parametrize("name", ONLY_SEEM)
def test_statistics_that_are_not_over_rows_are_those_of_the_call(
    name, norm_mode, num_rows
):
    net, x = made(ONLY_SEEM[name], num_rows)
    expected = explicit_fisher(net.eval(), x, norm_mode=None)
    assert_measured(net, x, expected, norm_mode=norm_mode)


def _on_ranks(rank, make, norm_mode):
    net, x = made(make)
    shard = x[:3] if rank == 0 else x[3:]
    try:
        found = fisher_spectrum(net, shard, norm_mode=norm_mode, reduce=sum_over_ranks)
    except ValueError as error:
        return str(error)
    return found.eigenvalues


@pytest.mark.ddp
@pytest.mark.parametrize("name", ONLY_SEEM)
def test_statistics_that_are_not_over_rows_are_each_ranks_own(name):
    net, x = made(ONLY_SEEM[name])
    expected = nonzero_eigenvalues(explicit_fisher(net.eval(), x, norm_mode=None))
    for found in run_ranks(_on_ranks, 2, ONLY_SEEM[name], "frozen"):
        assert_close(found, expected, rtol=1e-9, atol=1e-13 * float(expected[0]))


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("make", "norm_mode"),
    [(COUPLED["untracked norm"], "eval"), (BY_HAND["centred by hand"], "frozen")],
)
def test_coupled_rows_on_several_ranks_are_refused_by_all_of_them(make, norm_mode):
    for message in run_ranks(_on_ranks, 2, make, norm_mode):
        assert f"norm_mode {norm_mode!r}" in message
        assert "norm_mode 'train'" in message


def test_one_row_through_a_channels_last_norm_is_measured_as_in_a_batch():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.out = nn.Linear(32, 3)
            self.bias = nn.Parameter(torch.zeros(8))

        def forward(self, x):
            tokens = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
            return self.out((tokens + self.bias[torch.arange(8)]).flatten(1))

    torch.manual_seed(0)
    net, x = Tokens().double().eval(), torch.randn(4, 3, 4, 4).double()
    net.norm.running_var.uniform_(0.1, 2.0)
    expected = explicit_fisher(net, x, norm_mode=None)
    assert_measured(net, x, expected, norm_mode="eval")
    alone = explicit_fisher(net, x[[0, 0]], norm_mode=None)  # two rows: torch is right
    assert_measured(net, x[:1], alone, norm_mode="eval")


def test_a_constant_channel_before_a_norm_has_a_gradient_by_the_root_of_eps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        net[0].weight[0] = 0.0
    x = torch.randn(8, 3).double()
    hidden = net[0](x).detach()
    fixed = nn.BatchNorm1d(4).double().eval()
    fixed.load_state_dict(net[1].state_dict())
    fixed.running_mean.copy_(hidden.mean(0))
    fixed.running_var.copy_(hidden.var(0, correction=0))
    assert float(fixed.running_var[0]) < 1e-30
    expected = explicit_fisher(nn.Sequential(net[0], fixed, net[2]), x, norm_mode=None)
    assert_measured(net, x, expected, norm_mode="frozen")


def rounded_otherwise(h):
    """As kernels may do it for several rows: each number one rounding off."""
    return h * (1 + torch.finfo(h.dtype).eps) if len(h) > 1 else h


def multiplied(h):
    """Double what is small, twenty times (a logistic map): by a million."""
    h = h.sin()
    for _ in range(20):
        h = 1 - 2 * h.square()
    return h


DEEP = {
    "alone": lambda: Computed(
        lambda m, h: multiplied(rounded_otherwise(h) * m.weight) + m.bias
    ),
    "coupled": lambda: Computed(
        lambda m, h: multiplied(rounded_otherwise(h) * m.weight + 0.01 * h.mean(0))
    ),
    "coupled behind": lambda: Computed(
        lambda m, h: multiplied(rounded_otherwise(h) * m.weight) - 0.01 * h.mean(0)
    ),
}


def single(make, num_rows=6):
    net, x = made(make, num_rows)
    return net.float(), x.float()


@pytest.mark.parametrize("name", DEEP)
def test_rounding_that_a_network_multiplies_is_told_from_rows_that_are_coupled(name):
    found = fisher_spectrum(*single(DEEP[name]), num_eigenvalues=0)
    assert found.coupled == (name != "alone")


def test_what_rounds_otherwise_and_runs_in_single_precision_alone_is_measured():
    class Single(nn.Linear):
        def forward(self, x):
            assert x.dtype == torch.float32
            return super().forward(x * (1 + 4e-4 * (len(x) > 1)))

    torch.manual_seed(0)
    net, x = Single(4, 3), torch.randn(6, 4)
    assert not fisher_spectrum(net, x, num_eigenvalues=0).coupled


@pytest.mark.parametrize("name", [*COUPLED, *BY_HAND, *ONLY_SEEM])
def test_rows_are_coupled_in_single_precision_where_they_are_in_double(name):
    make = (COUPLED | BY_HAND | ONLY_SEEM)[name]
    found = fisher_spectrum(*single(make), norm_mode="eval", num_eigenvalues=0)
    assert found.coupled == (name not in ONLY_SEEM)


@pytest.mark.parametrize("share", [0.01, 1e-3])
def test_weakly_coupled_rows_are_measured_together(share):
    net, x = made(lambda: Computed(lambda m, h: h - share * m.weight * h.mean(0)), 5)
    expected = explicit_fisher(net, x, norm_mode=None)
    found = fisher_spectrum(net.float(), x.float(), num_eigenvalues=0)
    assert found.coupled
    assert found.trace == pytest.approx(float(expected.trace()), rel=1e-5)

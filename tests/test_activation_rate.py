"""Activation rates against counts by hand and theory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_resnorm.measures.activation import activation_rates
from lit_resnorm.measures.passes.untouched import identity


class Plain(nn.Module):
    """One hidden layer whose preactivation is its input."""

    def __init__(self, function=F.relu):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


PREACTIVATIONS = torch.tensor([[1.0, -1.0, 0.0, 2.0], [1.0, -2.0, 3.0, -1.0]])


@pytest.mark.parametrize(
    "function",
    [F.relu, torch.relu, torch.relu_, F.leaky_relu, F.gelu, F.silu, F.elu, nn.ReLU()],
)
def test_rates_are_shares_of_positive_preactivations_and_zero_is_off(function):
    (rates,) = activation_rates(Plain(function), PREACTIVATIONS.clone()).values()
    assert rates.unit_rates.tolist() == [1.0, 0.0, 0.5, 0.5]
    assert rates.rate == 0.5
    assert rates.dead == 0.25
    assert rates.always_on == 0.25
    assert rates.count == 2


def test_units_of_maps_are_channels_over_examples_and_positions():
    x = torch.randn(5, 3, 4, 4)
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    (rates,) = activation_rates(net, x).values()
    expected = (net[0](x) > 0).double().mean((0, 2, 3))
    torch.testing.assert_close(rates.unit_rates, expected, rtol=0, atol=1e-12)
    assert rates.count == 20


def test_saturating_activations_are_left_out():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Sigmoid(), nn.ReLU())
    assert [*activation_rates(net, torch.randn(4, 3))] == ["003.3"]
    assert activation_rates(nn.Tanh(), torch.randn(4, 3)) == {}


def test_a_unit_is_dead_only_if_it_is_off_on_all_ranks():
    here, there = PREACTIVATIONS[:1], PREACTIVATIONS[1:]
    sums = []
    activation_rates(Plain(), there, reduce=lambda t: sums.append(t) or t)
    reduce = lambda t: t + sums.pop(0)  # noqa: E731
    (rates,) = activation_rates(Plain(), here, reduce=reduce).values()
    (whole,) = activation_rates(Plain(), PREACTIVATIONS).values()
    assert torch.equal(rates.unit_rates, whole.unit_rates)


def test_rank_without_examples_adds_nothing():
    whole = torch.tensor([2.0, 0.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    nobody = PREACTIVATIONS[:0]
    # before the counts, ranks tell that their passes are over
    reduce = lambda t: t + whole if len(t) == 5 else t  # noqa: E731
    (rates,) = activation_rates(Plain(), nobody, reduce=reduce).values()
    assert rates.unit_rates.tolist() == [1.0, 0.0, 0.5, 0.5]
    with pytest.raises(ValueError, match="no example"):
        activation_rates(Plain(), PREACTIVATIONS[:0], reduce=identity)


def test_nan_preactivations_make_the_site_nan_and_no_other():
    net = nn.Sequential(nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    with torch.no_grad():
        net[1].weight[0] = torch.nan
    first, second = activation_rates(net, PREACTIVATIONS).values()
    assert first.rate == 0.5
    assert second.rate.isnan()
    assert second.dead.isnan()


def test_all_dead_layer_and_constant_input():
    (rates,) = activation_rates(Plain(), -torch.ones(3, 4)).values()
    assert (rates.rate, rates.dead, rates.always_on) == (0, 1, 0)
    (rates,) = activation_rates(Plain(), torch.ones(1, 4)).values()
    assert (rates.rate, rates.dead, rates.always_on) == (1, 0, 1)


@pytest.mark.parametrize("name", ["LitMLP", "LitResNet"])
def test_rate_at_initialisation_is_one_half_at_width_300(name):
    modules = pytest.importorskip("lit_resnorm.modules")
    torch.manual_seed(0)
    module = getattr(modules, name)(depth=5, width=300, in_shape=(300,))
    rates = activation_rates(module, torch.randn(200, 300))
    assert len(rates) == 5
    assert all(abs(r.rate - 0.5) < 0.06 for r in rates.values())

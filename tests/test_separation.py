"""How far apart a network keeps its examples."""

import math

import pytest
import torch
from torch import nn

from lit_resnorm.measures.moments import flow_between_sites
from lit_resnorm.measures.separation import separation, separations
from lit_resnorm.nets import Style, stacked_net


def test_examples_on_a_line_are_not_apart():
    steps = torch.randn(20, 1, dtype=torch.float64)
    line = torch.randn(7, dtype=torch.float64) + steps * torch.randn(7).double()
    assert separation(line) == pytest.approx(0, abs=1e-14)
    assert separation(torch.ones(5, 3)) == 0


def test_orthonormal_examples_are_apart_by_all_but_mean_and_line():
    # I - 11'/B has eigenvalue 1, B - 1 times; the power is B
    num = 10
    assert separation(torch.eye(num)) == pytest.approx((num - 2) / num, rel=1e-12)


def test_a_batch_that_is_not_finite_or_zero_has_no_separation():
    assert math.isnan(separation(torch.zeros(4, 3)))
    assert math.isnan(separation(torch.full((4, 3), math.nan)))


def test_blocks_of_features_are_summed():
    x = torch.randn(3, 2**21, generator=torch.Generator().manual_seed(0))
    centred = (x - x.mean(0)).double()
    values = torch.linalg.eigvalsh(centred @ centred.T)
    expected = float((values.sum() - values[-1]) / x.double().square().sum())
    assert separation(x) == pytest.approx(expected, rel=1e-5)


def test_a_pattern_that_all_examples_share_counts_as_nothing():
    pattern = torch.randn(1, 4, 6, 6) * 10
    examples = torch.randn(8, 4, 6, 6)
    total = float((examples + pattern).square().sum())
    own = separation(examples) * float(examples.square().sum())
    assert separation(examples + pattern) == pytest.approx(own / total, rel=1e-4)


@pytest.mark.parametrize("boundary", ["periodic", "zero_padding"])
def test_plain_nets_lose_it_with_depth_and_normalised_residual_nets_keep_it(boundary):
    x = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    ends = {}
    for name, norm, residual in [("vanilla", "none", False), ("bn_res", "batch", True)]:
        torch.manual_seed(0)
        style = Style(norm=norm, boundary=boundary)
        order = "pre" if residual else "post"
        net = stacked_net(
            x.shape[1:],
            10,
            depth=40,
            width=32,
            style=style,
            residual=residual,
            order=order,
            layers_per_block=2 if residual else 1,
            kernel_size=3,
        )
        kind = "addition" if residual else "activation"
        sites = [s for s in flow_between_sites(net, x).sites if s.kind == kind]
        found = [*separations(net, x, sites).values()]
        ends[name] = found[-1] / max(found)
    assert ends["vanilla"] < 0.2 < 0.5 < ends["bn_res"]


def test_nothing_of_the_model_changes():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    x = torch.randn(8, 4)
    separations(net, x, flow_between_sites(net, x).sites)
    assert net.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])

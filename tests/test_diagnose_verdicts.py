"""The eight settings of the theory, and networks that people use."""

import pytest
import torch
import torchvision
from torch import nn

from lit_resnorm.data import Digits
from lit_resnorm.diagnose import diagnose
from lit_resnorm.modules import LitBNFeedForward, LitBNResNet, LitVanillaNet

DEPTH = 50
NETS = {
    "vanilla": (LitVanillaNet, {}),
    "bn_ff": (LitBNFeedForward, {}),
    "res": (LitBNResNet, {"norm": "none"}),
    "bn_res": (LitBNResNet, {}),
}
# What Labatie (2019) found at these depths, and what follows for norms: batch norm
# multiplies gradients by 1.21 a layer, additions without it both norms by 1.19.
EXPECTED = {
    "vanilla": {"signal"},
    "bn_ff": {"noise", "exploding_gradients"},
    "res": {"signal", "exploding_activations", "exploding_gradients"},
    "bn_res": set(),
}


def net(name, **options):
    """Return the network itself: without an optimizer, so without a rate."""
    kind, own = NETS[name]
    torch.manual_seed(0)
    shape = {"in_shape": (1, 8, 8), "num_classes": 10}
    return kind(DEPTH, **shape, **own, **options).net


def judged(module, num_examples=64):
    data = Digits()
    return diagnose(module, data, num_examples=num_examples)


@pytest.mark.parametrize("name", NETS)
def test_fully_connected_nets_of_depth_50_have_the_pathology_of_the_theory(name):
    found = judged(net(name, width=128))
    assert set(found.pathologies) == EXPECTED[name]
    assert found.healthy == (name == "bn_res")
    for finding in found.findings[: len(EXPECTED[name])]:
        assert finding.suggestions
        assert finding.source


@pytest.mark.slow
@pytest.mark.parametrize("boundary", ["periodic", "zero_padding"])
@pytest.mark.parametrize("name", NETS)
def test_convolutional_nets_of_depth_50_have_the_pathology_of_the_theory(
    name, boundary
):
    module = net(name, width=32, kernel_size=3, boundary=boundary)
    found = judged(module, num_examples=32)
    expected = EXPECTED[name]
    if boundary == "zero_padding" and name == "bn_ff":
        # by 1.15 a layer: not a factor of 2896 yet
        expected = {"noise"}
    assert set(found.pathologies) == expected
    assert found.healthy == (name == "bn_res")


class OnDigits(nn.Module):
    """A network of torchvision on digits, enlarged and in three colours."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(nn.functional.interpolate(x, (32, 32)).expand(-1, 3, -1, -1))


@pytest.mark.slow
def test_torchvisions_resnet18_is_healthy():
    torch.manual_seed(0)
    found = judged(OnDigits(torchvision.models.resnet18(num_classes=10)), 32)
    assert found.healthy
    assert found.curvature.lambda_max > 0
    assert any(row.branch_share is not None for row in found.rows)


def test_thirty_layers_of_sigmoids_vanish():
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 128)]
    for _ in range(30):
        layers += [nn.Linear(128, 128), nn.Sigmoid()]
    found = judged(nn.Sequential(*layers, nn.Linear(128, 10)))
    assert "vanishing_gradients" in found.pathologies
    # a weight of variance 1/(3 n) and a slope of 1/4 at 0
    slope = found.trends["backward_log_slope"]
    assert torch.tensor(slope).exp() == pytest.approx(3**-0.5 / 4, rel=0.03)

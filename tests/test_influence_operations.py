"""Influence through operations that torch can't differentiate twice."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lit_resnorm.measures.copies.influence import influence_copies


class Composed(nn.Module):
    """What an activation computes, of operations that have every derivative."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def hard_sigmoid(x):
    return (x + 3).clamp(0, 6) / 6


ACTIVATIONS = {
    "hardsigmoid": (nn.Hardsigmoid(), hard_sigmoid),
    "a gate by hardsigmoid": (
        Composed(lambda x: x * F.hardsigmoid(x)),
        lambda x: x * hard_sigmoid(x),
    ),
    "hardsigmoid in place": (nn.Hardsigmoid(inplace=True), hard_sigmoid),
    "hardswish": (nn.Hardswish(), lambda x: x * hard_sigmoid(x)),
    "hardswish in place": (nn.Hardswish(inplace=True), lambda x: x * hard_sigmoid(x)),
}


def moved(activation):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), activation, nn.Linear(6, 3)
    ).double()
    x, y = 3 * torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    copies = influence_copies(
        model,
        lambda module, batch: module(batch[0]),
        lambda output, batch: F.cross_entropy(output, batch[1], reduction="none"),
        [name for name, _ in model.named_parameters()],
        (x, y),
        (x[:2], y[:2]),
        [0, 2],
        3,
        num_train=12,
        damping=0.1,
        tol=1e-12,
    )
    return [copies.weights(k) for k in range(3)]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_influence_is_that_through_the_same_function_with_all_derivatives(name):
    activation, function = ACTIVATIONS[name]
    found = moved(activation)
    for one, expected in zip(found, moved(Composed(function)), strict=True):
        # torch's slope of hardsigmoid is 1 / 6 in single precision: 3e-8 off.
        assert_close(one, expected, rtol=3e-7, atol=3e-8)
    assert not torch.equal(found[0]["0.weight"], found[1]["0.weight"])

"""Influence through operations that torch can't differentiate twice."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.testing import assert_close
from twin_runs import REMOVED, Net, batches, fit, made

from lit_resnorm.measures.copies.influence import influence_copies
from lit_resnorm_callbacks import StabilityProbe


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


class Doubled(torch.autograd.Function):
    """Has no derivative of its backward function, and none in forward mode."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * grad


class LeavesGraph(torch.autograd.Function):
    """Says nothing, and passes on a gradient that torch takes for a constant."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.from_numpy(2 * grad.detach().numpy())


class Bagged(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16))

    def forward(self, x):
        bags = F.embedding_bag(torch.arange(4).expand(len(x), 4), self.weight)
        return x + bags


FAULTS = {
    "Doubled": lambda: Composed(Doubled.apply),
    "LeavesGraph": lambda: Composed(LeavesGraph.apply),
    "_embedding_bag": Bagged,
}


@pytest.mark.parametrize("name", FAULTS)
def test_operations_without_the_derivatives_are_refused_by_name_at_set_up(name):
    class Faulty(Net):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(
                nn.Linear(16, 16), FAULTS[name](), nn.Linear(16, 12)
            )

    probe = StabilityProbe(removed=REMOVED, method="influence")
    with pytest.raises(ValueError, match=rf"stability: method 'influence' .*{name}"):
        fit(made(Faulty)(), batches(8), [probe])


def test_a_loss_without_second_derivative_is_refused_at_set_up():
    class Squared(Net):
        def training_step(self, batch, batch_idx):
            return doubled(self(batch[0]), batch[1]).mean()

    def doubled(output, target):
        apart = output - F.one_hot(target, output.shape[1])
        return Doubled.apply(apart).square().sum(1)

    probe = StabilityProbe(removed=REMOVED, method="influence", loss_fn=doubled)
    with pytest.raises(ValueError, match="stability: method 'influence' needs a loss"):
        fit(made(Squared)(), batches(8), [probe])

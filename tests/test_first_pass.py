"""What one forward pass shows of how copies of a model can run."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_resnorm.measures.copies.first_pass import run_first_pass


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.layer(x)


class Module(Net):
    def forward(self, x):
        return self.norm(super().forward(x))


class Evaluated(Module):
    def forward(self, x):
        return self.norm.eval()(self.layer(x))


class Functional(Net):
    def forward(self, x):
        return F.batch_norm(super().forward(x), None, None, training=True)


class Torchs(Net):
    """The function beneath."""

    def forward(self, x):
        h = super().forward(x)
        return torch.batch_norm(h, None, None, None, None, True, 0.0, 1e-5, False)


class OfWeights(Net):
    """Standardised weights, as in weight standardisation by batch norm."""

    def forward(self, x):
        weight = F.batch_norm(self.layer.weight, None, None, training=True)
        return F.linear(x, weight, self.layer.bias)


class OfTransposedWeights(Net):
    def forward(self, x):
        weight = F.batch_norm(self.layer.weight.T, None, None, training=True).T
        return F.linear(x, weight, self.layer.bias)


class OfEachExample(Net):
    """Instance norm by hand: rows lie along the channels."""

    def forward(self, x):
        h = super().forward(x)
        return F.batch_norm(h[None], None, None, training=True)[0]


APART = [Net, Evaluated, OfWeights, OfTransposedWeights, OfEachExample]
COUPLED = [Module, Functional, Torchs]


@pytest.mark.parametrize(
    ("kind", "coupled", "num"),
    [
        *((kind, False, num) for kind in APART for num in (1, 2, 6, 9)),
        # torch refuses statistics of one row
        *((kind, True, num) for kind in COUPLED for num in (2, 6, 9)),
    ],
)
def test_rows_are_coupled_by_statistics_over_rows_however_they_are_spelled(
    kind, coupled, num
):
    model = kind().double()
    x = torch.randn(num, 6, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = run_first_pass(model, lambda model, x: model(x).square().mean(1), x)
    assert seen.coupled is coupled
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())

"""The headroom of a step against closed forms and a fine search."""

import math

import pytest
import torch
from small import FunctionalNet, loaders, quiet_trainer
from test_gradient_monitor import Double, double_data, rows_by_step
from test_probe_contract import Recorder, TwoOptimizers, fit, values
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_resnorm.measures.headroom import LARGEST, SMALLEST, headroom
from lit_resnorm_callbacks import Cadence, HeadroomProbe

CURVES = {
    "quadratic": lambda s: 1 - s + 0.2 * s * s,
    "steep": lambda s: 1 - 0.01 * s + 0.9 * s * s,
    "quartic": lambda s: 1 - 0.1 * s + 1e-4 * s**4,
    "logistic": lambda s: math.log1p(math.exp(-3 * s)) + 0.01 * s * s,
    "cliff": lambda s: 1 - 0.01 * s if s < 37 else math.inf,
    "far": lambda s: 1 - s + 0.01 * s * s,
}


def searched(curve, factor):
    """The first distance, to a thousandth, at which a curve is above its start."""
    bound, distance = factor * curve(0.0), SMALLEST
    while curve(distance) <= bound:
        distance *= 1.001
    return distance


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_headroom_is_where_a_fine_search_finds_it_to_a_sixteenth(curve):
    found = headroom(curve)
    for factor, measured in ((1.0, found.step), (1.2, found.alpha_star)):
        assert measured == pytest.approx(searched(curve, factor), rel=1 / 16 + 1e-3)
    assert found.num_losses <= 16


def test_a_quadratic_takes_eight_losses_and_is_met_exactly():
    found = headroom(CURVES["quadratic"])
    assert found.step == pytest.approx(5, rel=1e-12)
    assert found.alpha_star == pytest.approx(2.5 + math.sqrt(7.25), rel=1e-12)
    assert found.num_losses <= 8


def test_edges_are_infinite_zero_and_nan():
    assert headroom(lambda s: math.exp(-s)).step == math.inf
    assert headroom(lambda s: 1 + s).step == 0
    assert headroom(lambda s: math.nan if s else 1.0).step == 0
    assert math.isnan(headroom(lambda s: math.nan).step)
    # a loss that isn't positive has no fifth of itself to rise by
    below = headroom(lambda s: -1 - s + s * s)
    assert below.step == pytest.approx(1)
    assert math.isnan(below.alpha_star)
    assert LARGEST * SMALLEST == 1


class Regression(Double):
    """Linear regression on the whole data, by gradient descent."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first, self.loss = nn.Identity(), nn.MSELoss()
        self.last = nn.Linear(8, 1).double()
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        return self.last(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0])[:, 0], batch[1].double())


def test_critical_rate_of_a_quadratic_is_that_along_its_gradient():
    recorder = Recorder()
    probe = HeadroomProbe(cadence=1, num_examples=24)
    trainer = quiet_trainer(max_steps=3, callbacks=[probe], logger=recorder)
    loader = DataLoader(double_data(), 24)
    module = Regression(lr=0.01)
    start = nn.utils.parameters_to_vector(module.last.parameters()).detach().clone()
    trainer.fit(module, loader, loader)
    rows = rows_by_step(recorder, "headroom")
    assert [*rows] == [0, 1, 2]
    x, y = double_data().tensors
    design = torch.cat([x, torch.ones(24, 1).double()], 1)
    hessian, weights = 2 * design.T @ design / 24, start
    for row in rows.values():
        g = 2 * design.T @ (design @ weights - y.double()) / 24
        critical = float(2 * g @ g / (g @ hessian @ g))
        assert row["critical_rate"] == pytest.approx(critical, rel=1e-9)
        assert row["step"] == pytest.approx(critical / 0.01, rel=1e-9)
        assert row["critical_sharpness"] == pytest.approx(2 / critical, rel=1e-9)
        weights = weights - 0.01 * g


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Rprop])
def test_headroom_is_of_the_update_that_was_made_whatever_made_it(optimizer):
    recorder = Recorder()
    probe = HeadroomProbe(cadence=Cadence(1, at_start=False), num_examples=24)
    module = Double(optimizer, lr=0.05)
    trainer = quiet_trainer(
        max_steps=2, callbacks=[probe], logger=recorder, gradient_clip_val=0.1
    )
    data = double_data()
    trainer.fit(module, DataLoader(data, 24), DataLoader(data, 24))
    fresh = Double(optimizer, lr=0.05)
    made = fresh.configure_optimizers()
    x, y = data.tensors
    for _ in range(2):
        before = nn.utils.parameters_to_vector(fresh.parameters()).detach().clone()
        made.zero_grad()
        F.cross_entropy(fresh(x), y).backward()
        nn.utils.clip_grad_norm_(fresh.parameters(), 0.1)
        made.step()
    update = nn.utils.parameters_to_vector(fresh.parameters()).detach() - before

    @torch.no_grad()
    def curve(distance):
        at = before + distance * update
        nn.utils.vector_to_parameters(at, fresh.parameters())
        return float(F.cross_entropy(fresh(x), y))

    row = rows_by_step(recorder, "headroom")[1]
    found = headroom(curve)
    assert row["step"] == pytest.approx(found.step, rel=1e-9)
    assert row["alpha_star"] == pytest.approx(found.alpha_star, rel=1e-9)
    assert row["step"] == pytest.approx(searched(curve, 1.0), rel=1 / 16 + 1e-3)


class Autoencoder(FunctionalNet):
    """Trains on what `forward` doesn't return."""

    def training_step(self, batch, batch_idx):
        self.log("loss", 0.0)
        return (self(batch[0]) @ self.head.weight - 1).square().mean()


class Manual(TwoOptimizers):
    """Neither an output that is compared with a target nor a training loss."""

    def forward(self, x):
        return super().forward(x).sum()

    def validation_step(self, batch, batch_idx):
        pass


def test_a_loss_that_forward_does_not_tell_is_that_of_the_training_step():
    trainer, _ = fit([HeadroomProbe(cadence=1)], steps=2, module=Autoencoder())
    found = values(trainer, "headroom")
    assert "headroom/failed" not in found
    assert found["headroom/step"] > 0


def test_a_module_without_any_loss_is_refused_with_reason_and_option():
    message = r"^headroom: there is no loss of the probe batch.*manual.*loss_fn"
    with pytest.raises(ValueError, match=message):
        fit([HeadroomProbe()], module=Manual())
    with pytest.raises(ValueError, match=r"^headroom: the training loss.*loss_fn"):
        fit([HeadroomProbe(loss_fn=F.cross_entropy)], module=Autoencoder())
    with pytest.raises(ValueError, match="sites is 'x'"):
        HeadroomProbe(sites="x")


def test_nothing_is_measured_without_a_step():
    trainer = quiet_trainer(callbacks=[HeadroomProbe()])
    trainer.validate(FunctionalNet(), loaders()[1], verbose=False)
    assert values(trainer, "headroom") == {}


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("devices", "num_examples"),
    [(2, 1), pytest.param(3, 7, marks=pytest.mark.slow)],
)
def test_headroom_on_several_ranks_is_that_of_one(devices, num_examples):
    def found(devices):
        loader = DataLoader(double_data(), 24 // devices)
        trainer = quiet_trainer(
            max_steps=1,
            callbacks=[HeadroomProbe(num_examples=num_examples)],
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
        )
        trainer.fit(Double(), loader, loader)
        return values(trainer, "headroom")

    one, several = found(1), found(devices)
    assert one.keys() == several.keys()
    for key, value in one.items():
        assert float(several[key]) == pytest.approx(float(value), rel=1e-6), key

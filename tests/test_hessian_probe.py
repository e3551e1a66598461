"""What a Hessian probe logs of a training, keeps, and refuses."""

import lightning as L
import pytest
import torch
from small import FunctionalNet, loaders, quiet_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_resnorm.measures import hessian_spectrum, read_loss
from lit_resnorm_callbacks import HessianProbe


class Regression(L.LightningModule):
    """A linear net of two weights, trained by gradient descent on all data."""

    def __init__(self, optimizer=torch.optim.SGD, **options):
        super().__init__()
        self.net = nn.Linear(2, 1, bias=False)
        self.loss = nn.MSELoss()
        self.optimizer, self.options = optimizer, {"lr": 0.1, **options}

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.options)


def plane():
    """Inputs whose second moments are 3 and 1."""
    x = torch.tensor([[6.0**0.5, 0], [0, 2.0**0.5]])
    return DataLoader(TensorDataset(x, torch.zeros(2, 1)), 2)


def fitted(probe, module, steps=2, **options):
    L.seed_everything(0, verbose=False)
    trainer = quiet_trainer(max_steps=steps, callbacks=[probe], **options)
    trainer.fit(module, plane(), plane())
    name = probe.prefix
    return {
        key.removeprefix(f"{name}/"): float(value)
        for key, value in trainer.callback_metrics.items()
        if key.startswith(name)
    }


def test_values_of_a_regression_are_those_of_its_second_moments():
    # the mean of squares has twice the curvature: 6 and 2
    values = fitted(HessianProbe(cadence=1, tol=1e-6, smallest_tol=1e-6), Regression())
    assert values["lambda_max"] == pytest.approx(6, rel=1e-5)
    assert values["lambda_min"] == pytest.approx(2, rel=1e-5)
    assert values["trace"] == pytest.approx(8, rel=1e-5)
    assert values["trace/stderr"] == 0
    assert values["rate_bound"] == pytest.approx(1 / 3, rel=1e-5)
    assert values["break_even"] == 0


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"momentum": 0.9}, 2 * 1.9 / 6),
        ({"weight_decay": 2.0}, 2 / 8),
        ({"optimizer": torch.optim.Adam}, None),
    ],
)
def test_the_rate_bound_is_that_of_the_optimizer(options, bound):
    values = fitted(HessianProbe(tol=1e-6, num_trace_vectors=0), Regression(**options))
    assert values.get("rate_bound") == (bound and pytest.approx(bound, rel=1e-5))
    assert "trace" not in values


class Sharpening(Regression):
    """A net whose curvature is its one weight, which follows a series."""

    SERIES = (1.0, 2.0, 4.0, 3.0, 5.0, 6.0)

    def __init__(self):
        super().__init__(lr=0.0)
        self.net = nn.Linear(1, 1, bias=False)
        self.factor = 1.0

    def forward(self, x):
        scale = self.factor * self.SERIES[self.trainer.global_step]
        return scale * self.net(x[:, :1])


def break_even(**options):
    return fitted(HessianProbe(**options), Sharpening(), steps=5)["break_even"]


def test_the_break_even_point_is_the_step_of_the_record():
    assert break_even(cadence=1) == 2
    assert break_even(cadence=1, patience=2) == -1
    assert break_even(cadence=2) == -1


def test_a_resumed_run_and_an_evaluation_keep_the_break_even_point(tmp_path):
    trainer = quiet_trainer(max_steps=3, callbacks=[HessianProbe(cadence=1)])
    trainer.fit(Sharpening(), plane(), plane())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    probe, module = HessianProbe(cadence=1), Sharpening()
    trainer = quiet_trainer(max_steps=5, callbacks=[probe])
    trainer.fit(module, plane(), plane(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.callback_metrics["hessian/break_even"] == 2
    module.factor = 100.0
    torch.nn.init.ones_(module.net.weight)  # what was measured isn't measured again
    trainer.validate(module, plane(), verbose=False)
    assert trainer.callback_metrics["hessian/break_even"] == 2
    # a training from the start has a point of its own
    trainer = quiet_trainer(max_steps=1, callbacks=[probe])
    trainer.fit(Sharpening(), plane(), plane())
    assert trainer.callback_metrics["hessian/break_even"] == -1


def test_several_eigenvalues_are_logged_and_their_vectors_kept():
    values = fitted(probe := HessianProbe(num_eigenvalues=2, tol=1e-6), Regression())
    assert values["top/01"] == values["lambda_max"]
    assert values["top/02"] == pytest.approx(2, rel=1e-5)
    assert probe.state_dict()["vectors"].shape == (2, 2)
    assert HessianProbe().state_dict()["vectors"] is None


def test_statistics_that_are_differentiated_through_have_a_name_of_their_own():
    L.seed_everything(0, verbose=False)
    probe = HessianProbe(norm_mode="train", num_trace_vectors=0, smallest_tol=None)
    trainer = quiet_trainer(max_steps=1, callbacks=[probe])
    trainer.fit(FunctionalNet(), *loaders())
    assert trainer.callback_metrics["hessian_batch/lambda_max"] > 0


class Smoothed(FunctionalNet):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.3)


class Penalised(FunctionalNet):
    def training_step(self, batch, batch_idx):
        penalty = self.head.weight.square().sum()
        return F.cross_entropy(self(batch[0]), batch[1]) + penalty


class Untrained(FunctionalNet):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)


class Hard(FunctionalNet):
    def forward(self, x):
        return self.head(F.hardsigmoid(self.first(x)))


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (Smoothed, {}, "smooths its labels: give loss_fn"),
        (Penalised, {}, "not the loss that training_step returns"),
        (Untrained, {}, "no trainable parameter"),
        (Hard, {}, "no second derivative: torch gives none for hardsigmoid"),
        (FunctionalNet, {"target_fn": lambda batch: None}, "give target_fn"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(module, options, words):
    trainer = quiet_trainer(max_steps=1, callbacks=[HessianProbe(**options)])
    with pytest.raises(ValueError, match=f"^hessian: .*{words}") as refused:
        trainer.fit(module(), *loaders())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_eigenvalues": 0}, "num_eigenvalues is 0"),
        ({"tol": 2.0}, "tol is 2"),
        ({"num_trace_vectors": 1}, "num_trace_vectors is 1"),
        ({"patience": 0}, "patience is 0"),
        ({"memory": 0}, "memory is 0"),
        ({"output": "softmax", "loss_fn": F.cross_entropy}, "loss_fn is given"),
    ],
)
def test_options_that_cannot_be_right_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        HessianProbe(**options)


def test_the_smoothed_loss_is_measured_where_it_is_given():
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.3)
    L.seed_everything(0, verbose=False)
    probe = HessianProbe(loss_fn=loss_fn, num_trace_vectors=0, tol=1e-5)
    trainer, module = quiet_trainer(max_steps=1, callbacks=[probe]), Smoothed()
    train, val = loaders()
    trainer.fit(module, train, val)
    x, y = (torch.cat(part) for part in zip(*val, strict=True))
    found = hessian_spectrum(
        module, (x, y), read_loss(module, (x, y), loss_fn=loss_fn), tol=1e-5
    )
    measured = float(trainer.callback_metrics["hessian/lambda_max"])
    assert measured == pytest.approx(found.max, rel=1e-4)


def test_training_is_bit_identical_with_and_without_the_probe():
    def trained(probes):
        L.seed_everything(7, verbose=False)
        module = FunctionalNet()
        quiet_trainer(max_steps=4, callbacks=probes).fit(module, *loaders())
        return [*module.state_dict().values(), torch.get_rng_state()]

    options = {"tol": 0.1, "num_trace_vectors": 2, "num_examples": 24}
    probed = trained([HessianProbe(cadence=2, **options)])
    assert all(map(torch.equal, probed, trained([])))

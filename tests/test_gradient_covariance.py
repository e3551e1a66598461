"""Covariances of gradients, against explicit gradients of single examples."""

import math

import lightning as L
import pytest
import torch
from explicit_fisher import jacobian_row
from fisher_cases import CASES, case
from ranks import run_ranks, sum_over_ranks
from small import FunctionalNet, loaders, quiet_trainer
from torch import nn
from torch.nn import functional as F

from lit_resnorm.measures import (
    batch_covariance_spectrum,
    covariance_spectrum,
    read_loss,
)
from lit_resnorm.measures.passes.untouched import untouched
from lit_resnorm.modules import LitMLP
from lit_resnorm_callbacks import GradientCovarianceProbe


def labelled(name):
    model, x = case(name)
    return model, (x, torch.arange(len(x)) % 3)


def explicit_spectrum(grads_DP, weights_D=None):
    """Return the eigenvalues of the covariance matrix itself, (P, P), descending."""
    if weights_D is None:
        weights_D = torch.ones(len(grads_DP), dtype=torch.float64)
    shares_D = weights_D / weights_D.sum()
    left_DP = grads_DP - shares_D @ grads_DP
    return torch.linalg.eigvalsh(left_DP.T @ (shares_D[:, None] * left_DP)).flip(0)


def assert_spectrum(found, expected, num):
    scale = float(expected[0])
    kept = expected[: min(num - 1, len(expected))].clamp_min(0)
    assert torch.allclose(found.eigenvalues, kept, rtol=0, atol=1e-9 * scale)
    assert found.max == pytest.approx(scale, rel=1e-9)
    assert found.min == pytest.approx(float(kept[-1]), abs=1e-9 * scale)
    assert found.trace == pytest.approx(float(expected.sum()), rel=1e-9)
    assert found.trace_over_max == pytest.approx(found.trace / found.max)
    assert found.conditioning == pytest.approx(found.min / found.max)
    assert found.num_gradients == num


def gradients(losses, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.stack([jacobian_row(loss, parameters) for loss in losses])


@pytest.mark.parametrize("norm_mode", ["frozen", "eval", "train"])
@pytest.mark.parametrize(
    "name",
    [
        "residual",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in CASES
            if name != "residual"
        ),
    ],
)
def test_the_spectrum_is_that_of_explicit_gradients(name, norm_mode):
    model, (x, y) = labelled(name)
    with untouched(model, norm_mode=norm_mode) as run:
        losses = F.cross_entropy(run(lambda: model(x)), y, reduction="none")
        expected = explicit_spectrum(gradients(losses, model))
    loss = read_loss(model, (x, y))
    found = covariance_spectrum(model, (x, y), loss, y, norm_mode=norm_mode)
    assert_spectrum(found, expected, len(x))
    assert found.batch_size == 1


@pytest.mark.parametrize("norm_mode", ["frozen", "eval", "train"])
def test_mini_batches_are_averaged_over_in_order(norm_mode):
    model, (x, y) = labelled("residual")
    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    with untouched(model, norm_mode=norm_mode) as run:
        run(lambda: model(x))
        losses = [
            F.cross_entropy(run(lambda rows=rows: model(x[rows])), y[rows])
            for rows in parts
        ]
        expected = explicit_spectrum(gradients(losses, model))
    options = {"num_batches": 3, "batch_size": 2, "norm_mode": norm_mode}
    loss = read_loss(model, (x, y))
    for memory in (2**28, 2):  # all parameters at once, and one after another
        found = batch_covariance_spectrum(model, (x, y), loss, memory=memory, **options)
        assert_spectrum(found, expected, 3)
        assert found.batch_size == 2


def test_weights_and_ignored_labels_weigh_gradients():
    model, (x, y) = labelled("grouped")
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    each = F.cross_entropy(model.eval()(x), y, reduction="none")
    of_label = weights[y] * (y != 1)
    expected = explicit_spectrum(gradients(each, model), of_label)
    options = {"class_weights": weights.tolist(), "ignore_index": 1}
    loss = read_loss(model, (x, y), **options)
    found = covariance_spectrum(model, (x, y), loss, y, norm_mode="eval")
    assert_spectrum(found, expected, int((of_label > 0).sum()))


def test_a_scaled_squared_error_has_its_own_gradients():
    net = nn.Linear(3, 2).double()
    x, y = torch.randn(2, 5, 3).double().unbind()
    batch = (x, y[:, :2])
    net.loss = nn.MSELoss()
    each = (net(x) - y[:, :2]).square().mean(1)
    loss = read_loss(net, batch)
    found = covariance_spectrum(net, batch, loss, batch[1])
    assert_spectrum(found, explicit_spectrum(gradients(each, net)), 5)
    flat = read_loss(net, batch, loss_fn=nn.HuberLoss(delta=0.1))
    huber = [
        F.huber_loss(net(x[i : i + 1]), y[i : i + 1, :2], delta=0.1) for i in (0, 1)
    ]
    pair = batch_covariance_spectrum(net, batch, flat, num_batches=2, batch_size=1)
    assert_spectrum(pair, explicit_spectrum(gradients(huber, net)), 2)


def test_a_squared_distance_from_classes_is_that_from_unit_vectors():
    torch.manual_seed(0)
    module = LitMLP(1, 6, in_shape=(4,), num_classes=3, loss="mse").double()
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 3
    loss = read_loss(module, (x, y))
    assert torch.allclose(
        loss.mean(module(x), (x, y)), module.losses(module(x), y).mean()
    )
    found = covariance_spectrum(module, (x, y), loss, y)
    grads = gradients(module.losses(module(x), y), module)
    assert_spectrum(found, explicit_spectrum(grads), 5)


def measured_on_a_rank(rank, counts):
    model, (x, y) = labelled("residual")
    begin = sum(counts[:rank])
    rows = slice(begin, begin + counts[rank])
    batch = (x[rows], y[rows])
    loss = read_loss(model, batch, output="softmax", ignore_index=1)
    options = {"reduce": sum_over_ranks}
    single = covariance_spectrum(model, batch, loss, batch[1], **options)
    pairs = batch_covariance_spectrum(
        model, batch, loss, num_batches=3, batch_size=2, **options
    )
    # dealt out in turn, as probes do
    dealt = slice(rank, None, len(counts))
    batch = (x[dealt], y[dealt])
    in_turn = batch_covariance_spectrum(
        model,
        batch,
        read_loss(model, batch, output="softmax", ignore_index=1),
        num_batches=3,
        batch_size=2,
        places=torch.arange(len(x))[dealt],
        **options,
    )
    return [[f.max, f.min, f.trace] for f in (single, pairs, in_turn)]


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(4, 3), (3, 0, 4)])
def test_uneven_and_empty_shards_give_what_one_process_does(counts):
    (alone,) = run_ranks(measured_on_a_rank, 1, (sum(counts),))
    assert alone[1] == alone[2]
    for values in run_ranks(measured_on_a_rank, len(counts), counts):
        for one, expected in zip(values, alone, strict=True):
            assert one == pytest.approx(expected, rel=1e-6)


def test_gradients_that_are_alike_have_no_covariance():
    net = nn.Linear(3, 3)
    x, y = torch.ones(4, 3), torch.zeros(4, dtype=torch.long)
    found = covariance_spectrum(net, (x, y), read_loss(net, (x, y)), y)
    assert found.max < 1e-6
    zero = (torch.zeros(4, 3), torch.zeros(4, 1))
    flat = nn.Linear(3, 1, bias=False)
    loss = read_loss(flat, zero, output="gaussian")
    found = covariance_spectrum(flat, zero, loss, zero[1])
    assert found.max == found.trace == 0
    assert math.isnan(found.conditioning)
    assert math.isnan(found.trace_over_max)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_batches": 3}, "give both"),
        ({"num_batches": 1, "batch_size": 8}, "num_batches is 1"),
        ({"num_batches": 40, "batch_size": 8}, "give 320"),
        ({"num_examples": 1}, "num_examples is 1"),
    ],
)
def test_options_that_cannot_be_right_are_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        GradientCovarianceProbe(**options)


def one_example(batch):
    return [part[:1] for part in batch]


class Huber(FunctionalNet):
    def __init__(self):
        super().__init__()
        self.loss = nn.HuberLoss()

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), F.one_hot(batch[1], 3).float())


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (
            FunctionalNet,
            {"num_batches": 5, "batch_size": 10},
            "50 in all, and the probe",
        ),
        (FunctionalNet, {"batch": next(iter(loaders()[1]))}, ""),
        (
            Huber,
            {"target_fn": lambda b: F.one_hot(b[1], 3).float()},
            "likelihoods alone",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(module, options, words):
    if "batch" in options:
        options = {"batch": one_example(options["batch"])}
        words = "2 gradients of 1 examples"
    probe = GradientCovarianceProbe(**options)
    trainer = quiet_trainer(max_steps=1, callbacks=[probe])
    with pytest.raises(ValueError, match=f"^gradcov: .*{words}") as refused:
        trainer.fit(module(), *loaders())
    assert "\n" not in str(refused.value)


def test_values_are_those_of_the_probe_batch_and_training_is_untouched():
    def trained(probes):
        L.seed_everything(7, verbose=False)
        module = FunctionalNet()
        trainer = quiet_trainer(max_steps=4, callbacks=probes)
        trainer.fit(module, *loaders())
        return module, trainer, [*module.state_dict().values(), torch.get_rng_state()]

    single = GradientCovarianceProbe(cadence=2)
    several = GradientCovarianceProbe("of_batches", 2, num_batches=4, batch_size=9)
    module, trainer, state = trained([single, several])
    assert all(map(torch.equal, state, trained([])[2]))
    x, y = (torch.cat(part) for part in zip(*loaders()[1], strict=True))
    found = covariance_spectrum(module, (x, y), read_loss(module, (x, y)), y)
    values = trainer.callback_metrics
    assert float(values["gradcov/lambda_max"]) == pytest.approx(found.max, rel=1e-4)
    assert float(values["gradcov/trace"]) == pytest.approx(found.trace, rel=1e-4)
    assert values["of_batches/batch_size"] == 9
    assert 0 < values["of_batches/trace"] < values["gradcov/trace"]


def test_gradients_that_are_alike_are_logged_with_one_warning():
    batch = (torch.zeros(4, 8), torch.zeros(4, dtype=torch.long))
    probe = GradientCovarianceProbe(cadence=1, batch=batch)
    trainer = quiet_trainer(max_steps=2, callbacks=[probe])
    with pytest.warns(UserWarning, match="all gradients are alike") as warned:
        trainer.fit(SameForAll(), *loaders())
    assert sum("alike" in str(one.message) for one in warned) == 1
    assert trainer.callback_metrics["gradcov/trace"] == 0
    assert trainer.callback_metrics["gradcov/conditioning"].isnan()


class SameForAll(FunctionalNet):
    """Multiplies its inputs alone, which are zero on the probe batch."""

    def forward(self, x):
        return x[:, :3] * self.first.weight[0, :3]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

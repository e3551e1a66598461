"""The likelihood that is read is the loss that is trained, or is refused by name."""

import lightning as L
import pytest
import torch
from small import quiet_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lit_resnorm.measures.fisher import fisher_spectrum
from lit_resnorm_callbacks import FIMEigenvalueProbe, StabilityProbe

NUM = 12
generator = torch.Generator().manual_seed(1)
X = torch.randn(NUM, 12, generator=generator)
CLASSES = torch.arange(NUM) % 3
NUMBERS = torch.randn(NUM, 1, generator=generator)
TAGS = torch.randint(2, (NUM, 1), generator=generator).float()
SHARES = torch.linspace(0, 1, NUM)


class Net(L.LightningModule):
    """Its loss stands in `training_step`."""

    def __init__(self, width, loss, head=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, width))
        self.head = head or (lambda z: z)
        self.loss_of_batch = loss

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, batch_idx):
        self.log("loss", loss := self.loss_of_batch(self(batch[0]), *batch))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(module, targets=CLASSES, x=X, **options):
    loader = DataLoader(TensorDataset(x, targets), NUM)
    probe = FIMEigenvalueProbe(
        dataloader=loader, cadence={"at_end": False}, strict=True, **options
    )
    trainer = quiet_trainer(max_steps=1, callbacks=[probe])
    trainer.fit(module, loader)
    return {
        key: float(trainer.callback_metrics[f"fim/{key}"])
        for key in ("lambda_max", "trace")
    }


def cross_entropy(z, x, y):
    return F.cross_entropy(z, y)


AGREED = {
    "cross entropy": (3, cross_entropy, {}, CLASSES),
    "log-probabilities": (
        3,
        lambda z, x, y: F.nll_loss(z, y),
        {"head": nn.LogSoftmax(1)},
        CLASSES,
    ),
    "smoothed": (
        3,
        lambda z, x, y: F.cross_entropy(z, y, label_smoothing=0.2),
        {},
        CLASSES,
    ),
    "a dict": (3, lambda z, x, y: {"loss": F.cross_entropy(z, y)}, {}, CLASSES),
    "one logit": (
        1,
        lambda z, x, y: F.binary_cross_entropy_with_logits(z, y),
        {},
        TAGS,
    ),
    "soft targets": (
        3,
        lambda z, x, y: F.cross_entropy(z, y),
        {},
        torch.rand(NUM, 3, generator=generator).softmax(1),
    ),
}


@pytest.mark.parametrize("name", AGREED)
def test_a_likelihood_that_agrees_with_the_training_loss_is_measured(name):
    width, loss, options, targets = AGREED[name]

    class Logging(Net):
        def training_step(self, batch, batch_idx):
            return self.loss_of_batch(self(batch[0]), *batch)

    module = Logging(width, loss, **options)
    found = fitted(module, targets)
    output = "bernoulli" if width == 1 else "softmax"
    right = fisher_spectrum(Net(width, loss, **options), X, output=output)
    assert found["lambda_max"] == pytest.approx(right.max, rel=1e-4)  # float32
    assert found["trace"] == pytest.approx(right.trace, rel=1e-4)


def mse(z, x, y):
    return F.mse_loss(z, y)


REFUSED = {
    "autoencoder": (
        (12, lambda z, x, y: F.mse_loss(z, x)),
        CLASSES,
        {"output": "gaussian", "loss_scale": 2 / 12},
        "give output 'gaussian' and loss_scale 0.166667",
    ),
    "targets in [0, 1]": (
        (1, lambda z, x, y: F.mse_loss(z[:, 0], y)),
        SHARES,
        {"output": "gaussian", "loss_scale": 2.0},
        "give output 'gaussian' and loss_scale 2",
    ),
    "whole-number targets": (
        (1, lambda z, x, y: F.mse_loss(z[:, 0], y.float())),
        CLASSES,
        {"output": "gaussian", "loss_scale": 2.0},
        "give output 'gaussian' and loss_scale 2",
    ),
    "squares of classes": (
        (3, lambda z, x, y: F.mse_loss(z, F.one_hot(y, 3).float())),
        CLASSES,
        {"output": "gaussian", "loss_scale": 2 / 3},
        "give output 'gaussian' and loss_scale 0.666667",
    ),
    "tags": (
        (3, lambda z, x, y: F.binary_cross_entropy_with_logits(z, y)),
        torch.randn(NUM, 3, generator=generator).sigmoid(),
        {"output": "bernoulli", "loss_scale": 1 / 3},
        "targets are numbers: give output .*'bernoulli'",
    ),
    "summed": (
        (3, lambda z, x, y: F.cross_entropy(z, y, reduction="sum")),
        CLASSES,
        {"loss_scale": 12.0},
        "loss_scale the size of the training batch",
    ),
    "weighed": (
        (3, lambda z, x, y: 0.5 * F.cross_entropy(z, y)),
        CLASSES,
        {"loss_scale": 0.5},
        "output 'softmax' and loss_scale 0.5",
    ),
    "classes weighted": (
        (3, lambda z, x, y: F.cross_entropy(z, y, torch.tensor([1.0, 2.0, 5.0]))),
        CLASSES,
        {"class_weights": [1.0, 2.0, 5.0]},
        "agrees with no likelihood.*class_weights",
    ),
    "probabilities": (
        (3, lambda z, x, y: F.nll_loss(z.log(), y), nn.Softmax(1)),
        CLASSES,
        {"forward_fn": lambda module, batch: module(batch[0]).log()},
        "output holds probabilities: give forward_fn, to return their logarithms",
    ),
    "a probability": (
        (1, lambda z, x, y: F.binary_cross_entropy(z, y), nn.Sigmoid()),
        TAGS,
        {"forward_fn": lambda module, batch: module(batch[0]).logit()},
        "output holds probabilities: give forward_fn, to return logits",
    ),
    "contrasted": (
        (
            3,
            lambda z, x, y: F.cross_entropy(
                F.normalize(z) @ F.normalize(z).T, torch.arange(len(z))
            ),
        ),
        CLASSES,
        {"output": "softmax"},
        "agrees with no likelihood",
    ),
    "with another loss": (
        (3, lambda z, x, y: F.cross_entropy(z, y) + 0.4 * z.square().mean()),
        CLASSES,
        {"output": "softmax"},
        "agrees with no likelihood.* to measure one all the same, give output 'softmax",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_likelihood_that_is_not_the_training_loss_is_refused(name):
    made, targets, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^fim: output is 'auto', .*{message}"):
        fitted(Net(*made), targets)
    # what the message names is taken
    found = fitted(Net(*made), targets, **options)
    scale = options.get("loss_scale", 1.0)
    assert found["trace"] > 0
    if "class_weights" in options or "forward_fn" in options:
        return
    right = fisher_spectrum(
        Net(*made), X, output=options.get("output", "softmax"), loss_scale=scale
    )
    assert found["lambda_max"] == pytest.approx(right.max, rel=1e-4)


@pytest.mark.parametrize("name", ["probabilities", "a probability"])
def test_forward_fn_makes_logits_of_probabilities(name):
    made, targets, options, _ = REFUSED[name]
    found = fitted(Net(*made), targets, **options)
    output = "softmax" if made[0] == 3 else "bernoulli"
    right = fisher_spectrum(Net(*made[:2]), X, output=output)
    assert found["lambda_max"] == pytest.approx(right.max, rel=1e-4)
    assert found["trace"] == pytest.approx(right.trace, rel=1e-4)


class Speaker(L.LightningModule):
    """A causal model, whose labels are shifted against its logits, or not."""

    def __init__(self, shifts):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.shifts = shifts

    def forward(self, input_ids):
        return self.out(self.table(input_ids).cumsum(1).tanh())

    def training_step(self, batch, batch_idx):
        logits, labels = self(batch["input_ids"]), batch["labels"]
        if self.shifts:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


IDS = torch.randint(9, (8, 6), generator=torch.Generator().manual_seed(0))
LAST = torch.where(torch.arange(6) < 5, -100, IDS)


def shifted(batch):
    return F.pad(batch["labels"][:, 1:], (0, 1), value=-100)


def speaking(shifts, labels, **options):
    rows = [{"input_ids": i, "labels": j} for i, j in zip(IDS, labels, strict=True)]
    loader = DataLoader(rows, 8)
    probe = FIMEigenvalueProbe(
        dataloader=loader, cadence={"at_end": False}, strict=True, **options
    )
    trainer = quiet_trainer(max_steps=1, callbacks=[probe])
    trainer.fit(Speaker(shifts), loader)
    return float(trainer.callback_metrics["fim/lambda_max"])


@pytest.mark.parametrize("labels", [LAST, IDS], ids=["answer", "all"])
def test_labels_that_the_training_shifts_are_refused_without_target_fn(labels):
    with pytest.raises(ValueError, match="one position late: give target_fn, to shift"):
        speaking(True, labels)
    found = speaking(True, labels, target_fn=shifted)
    weights = (shifted({"labels": labels}) != -100).double()
    right = fisher_spectrum(
        Speaker(True),
        {"input_ids": IDS},
        weights=weights,
        forward=lambda m, x: m(x["input_ids"]),
    )
    assert found == pytest.approx(right.max, rel=1e-4)
    assert speaking(False, labels) > 0


def test_labels_under_another_name_need_no_target_fn():
    class Named(Speaker):
        def training_step(self, batch, batch_idx):
            out = self(batch["input_ids"]).flatten(0, 1)
            return F.cross_entropy(out, batch["wanted"].flatten())

    rows = [{"input_ids": i, "wanted": i} for i in IDS]
    loader = DataLoader(rows, 8)
    probe = FIMEigenvalueProbe(dataloader=loader, strict=True)
    trainer = quiet_trainer(max_steps=1, callbacks=[probe])
    trainer.fit(Named(False), loader)
    assert trainer.callback_metrics["fim/lambda_max"] > 0


class Twinned(L.LightningModule):
    """Holds one of torch's losses, and its target where no tuple has it."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
        self.criterion = loss

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.criterion(self(batch["x"]), batch["wanted"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def wanted(batch):
    return batch["wanted"]


THREE = torch.randn(NUM, 3, generator=generator)


@pytest.mark.parametrize("method", ["twins", "influence"])
@pytest.mark.parametrize(
    ("loss", "targets", "loss_fn"),
    [
        (nn.MSELoss(), THREE, lambda z, y: F.mse_loss(z, y, reduction="none")),
        (
            nn.BCEWithLogitsLoss(),
            THREE.sigmoid().round(),
            lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none"),
        ),
        (
            nn.CrossEntropyLoss(label_smoothing=0.2),
            CLASSES,
            lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2, reduction="none"),
        ),
        (
            nn.CrossEntropyLoss(),
            CLASSES,
            lambda z, y: F.cross_entropy(z, y, reduction="none"),
        ),
    ],
    ids=["squares", "tags", "smoothed", "classes"],
)
def test_twins_read_torchs_losses_and_target_fn(loss, targets, loss_fn, method):
    rows = [{"x": x, "wanted": y} for x, y in zip(X, targets, strict=True)]
    found = []
    for given in (None, loss_fn):
        probe = StabilityProbe(
            2, method=method, loss_fn=given, target_fn=wanted, strict=True
        )
        loader = DataLoader(rows, 4)
        trainer = quiet_trainer(max_epochs=2, callbacks=[probe])
        trainer.fit(Twinned(loss), loader, loader)
        found.append(float(trainer.callback_metrics["stability/distance"]))
    assert found[0] > 0
    assert found[0] == pytest.approx(found[1], rel=1e-4)  # float32


def test_twins_without_a_target_are_refused_with_target_fn():
    rows = [{"x": x, "wanted": y} for x, y in zip(X, CLASSES, strict=True)]
    loader = DataLoader(rows, 4)
    trainer = quiet_trainer(max_epochs=1, callbacks=[StabilityProbe(2)])
    with pytest.raises(ValueError, match=r"^stability: .*has no target.*target_fn"):
        trainer.fit(Twinned(nn.CrossEntropyLoss()), loader, loader)


class Manual(Net):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Noisy(Net):
    def training_step(self, batch, batch_idx):
        x = batch[0] + 0.1 * torch.randn_like(batch[0])
        return super().training_step((x, batch[1]), batch_idx)


class Pairs(Net):
    """Its training batches are other than the probe's."""

    def training_step(self, batch, batch_idx):
        first, second, labels = batch
        return F.cross_entropy(self(first + second), labels)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Manual, "optimization is manual"),
        (Noisy, "training_step draws random numbers"),
        (
            Pairs,
            "training_step can't be run on the probe batch .ValueError: not enough",
        ),
    ],
)
def test_a_loss_that_can_not_be_asked_is_told_and_must_fit(kind, reason, caplog):
    x = TensorDataset(X, CLASSES), TensorDataset(X, X, CLASSES)
    loader = DataLoader(x[kind is Pairs], NUM)

    def fit(width, loss):
        caplog.clear()
        options = {"dataloader": DataLoader(x[0], NUM), "strict": True}
        probe = FIMEigenvalueProbe(num_examples=NUM, **options)
        trainer = quiet_trainer(max_steps=1, callbacks=[probe])
        trainer.fit(kind(width, loss), loader)

    with caplog.at_level("INFO"):
        fit(3, cross_entropy)
    told = [r.getMessage() for r in caplog.records if "compared" in r.getMessage()]
    assert len(told) == 1
    assert reason.replace(" .V", " (V") in told[0]
    with pytest.raises(ValueError, match=r"^fim: output is 'auto'.* give output"):
        fit(2, mse)  # the third class has no output


class Counting(Net):
    """Notes in buffers, metrics, lists and numbers what happens to it."""

    def __init__(self):
        super().__init__(3, cross_entropy)
        self.mean = MeanMetric()
        self.seen, self.steps = [], 0
        self.register_buffer("calls", torch.zeros(()))
        self.norm = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        self.calls += 1
        return self.net(self.drop(self.norm(x)))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.seen.append(float(loss.detach()))
        self.steps += 1
        return loss


def test_asking_for_the_training_loss_leaves_the_training_as_it_was():
    found = []
    for probes in ([], [FIMEigenvalueProbe(num_eigenvalues=0, strict=True)]):
        L.seed_everything(3, verbose=False)
        module = Counting()
        loader = DataLoader(TensorDataset(X, CLASSES), 4, shuffle=True)
        trainer = quiet_trainer(max_epochs=2, callbacks=probes)
        trainer.fit(module, loader, DataLoader(TensorDataset(X, CLASSES), NUM))
        logged = [trainer.callback_metrics[name] for name in ("loss", "mean")]
        found.append((module.state_dict(), [*logged, module.seen, module.steps]))
    for name, value in found[0][0].items():
        assert torch.equal(value, found[1][0][name]), name
    assert found[0][1] == found[1][1]

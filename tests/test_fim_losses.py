"""The Fisher probe on modules with torch's losses: its matrix is that of the loss."""

from copy import deepcopy

import pytest
import torch
from small import FunctionalNet, quiet_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_resnorm_callbacks import FIMEigenvalueProbe

NUM = 24
generator = torch.Generator().manual_seed(3)
X = torch.randn(NUM, 8, generator=generator)
CLASSES = torch.randint(4, (NUM,), generator=generator)
TAGS = torch.randint(2, (NUM, 4), generator=generator).float()


class Net(FunctionalNet):
    """A smooth net without batch norm; its loss is a child of the given name."""

    def __init__(self, loss, width=4, name="loss"):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, width))
        self.first = self.norm = self.second = self.drop = self.head = None
        setattr(self, name, loss)
        self.criterion_name = name

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        out, targets = self(batch[0]), batch[1]
        loss = getattr(self, self.criterion_name)
        if loss is None and out.shape[1] == 1:
            loss = F.binary_cross_entropy_with_logits
        return (loss or F.cross_entropy)(out, targets)

    def validation_step(self, batch, batch_idx):
        pass


def measured(module, targets, **options):
    loader = DataLoader(TensorDataset(X, targets), NUM)
    probe = FIMEigenvalueProbe(num_examples=NUM, **options)
    trainer = quiet_trainer(max_steps=1, callbacks=[probe])
    trainer.fit(module, loader, loader)
    return float(trainer.callback_metrics["fim/lambda_max"])


def gauss_newton_max(module, loss, targets):
    """Return the largest eigenvalue of J^T H J, H the loss's Hessian at the outputs."""
    module, loss = deepcopy(module).double(), deepcopy(loss).double()
    weights = {k: v.detach() for k, v in module.named_parameters()}

    def outputs(weights):
        return torch.func.functional_call(module, weights, (X.double(),)).flatten()

    jacobians = torch.func.jacrev(outputs)(weights)
    jac_CP = torch.cat([j.flatten(1) for j in jacobians.values()], 1)
    at = outputs(weights)
    shape = (NUM, len(at) // NUM)
    if targets.is_floating_point():
        targets = targets.double()
    hessian_CC = torch.autograd.functional.hessian(
        lambda out: loss(out.view(shape), targets), at
    )
    return float(torch.linalg.eigvalsh(jac_CP.T @ hessian_CC @ jac_CP)[-1])


@pytest.mark.parametrize(
    ("loss", "width", "targets"),
    [
        (nn.CrossEntropyLoss(), 4, CLASSES),
        (nn.CrossEntropyLoss(ignore_index=3), 4, CLASSES),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 2.0, 9.0])), 4, CLASSES),
        (nn.CrossEntropyLoss(label_smoothing=0.1), 4, CLASSES),
        (nn.BCEWithLogitsLoss(), 4, TAGS),
        (nn.BCEWithLogitsLoss(), 1, TAGS[:, :1]),
        (nn.MSELoss(), 4, TAGS),
    ],
    ids=["plain", "ignored", "weighted", "smoothed", "tags", "one logit", "squares"],
)
@pytest.mark.parametrize("name", ["loss", "criterion"])
def test_auto_measures_the_curvature_of_the_modules_own_loss(
    loss, width, targets, name
):
    torch.manual_seed(0)
    module = Net(loss, width, name)
    found = measured(module, targets)
    expected = gauss_newton_max(module, loss, targets)
    assert found == pytest.approx(expected, rel=1e-4)  # float32


def test_options_that_are_given_come_before_what_the_loss_tells():
    torch.manual_seed(0)
    weight = torch.tensor([1.0, 0.5, 2.0, 9.0])
    module = Net(nn.CrossEntropyLoss(weight=weight))
    plain = [1.0, 1.0, 1.0, 1.0]
    found = measured(module, CLASSES, class_weights=plain, loss_scale=3.0)
    expected = gauss_newton_max(module, nn.CrossEntropyLoss(), CLASSES)
    assert found == pytest.approx(3 * expected, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), "reduction='sum'.*loss_scale"),
        (nn.MSELoss(reduction="sum"), "reduction='sum'.*loss_scale, twice the size"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), "with pos_weight"),
        (nn.BCEWithLogitsLoss(weight=torch.tensor(2.0)), "with weight"),
    ],
)
def test_losses_whose_scale_can_not_be_read_are_refused(loss, message):
    with pytest.raises(ValueError, match=f"^fim: output is 'auto' .*{message}"):
        measured(Net(loss), TAGS)


def test_weighted_classes_with_smoothed_labels_are_refused():
    loss = nn.CrossEntropyLoss(torch.ones(4), label_smoothing=0.1)
    with pytest.raises(
        ValueError, match=r"^fim: output is 'auto' .*label_smoothing 0.1"
    ):
        measured(Net(loss), CLASSES)


@pytest.mark.parametrize(
    ("weights", "targets", "message"),
    [
        ([1.0, 2.0], CLASSES, "class_weights has 2 weights, and labels go from 0 to 3"),
        ([1.0] * 5, CLASSES, "class_weights has 5 weights, and the output 4 classes"),
        ([1.0] * 4, TAGS, "class_weights needs labels that are class indices"),
    ],
)
def test_class_weights_that_do_not_fit_are_refused(weights, targets, message):
    with pytest.raises(ValueError, match=f"^fim: {message}"):
        measured(Net(None), targets, class_weights=weights)


def test_a_dimension_of_classes_that_the_output_lacks_is_refused():
    with pytest.raises(
        ValueError, match=r"^fim: class_dim is 5; the output's shape is"
    ):
        measured(Net(None), CLASSES, class_dim=5)


NUMBERS = torch.randn(NUM, 4, generator=generator)
SHARES = NUMBERS.softmax(1)


@pytest.mark.parametrize(("targets", "width"), [(NUMBERS, 4), (NUMBERS[:, :1], 1)])
def test_numbers_are_not_taken_for_the_targets_of_logits(targets, width):
    with pytest.raises(
        ValueError, match=r"^fim: output is 'auto'.* targets are numbers"
    ):
        measured(Net(None, width), targets)
    assert measured(Net(None, width), targets, output="gaussian") > 0


@pytest.mark.parametrize(("targets", "width"), [(SHARES, 4), (TAGS[:, :1], 1)])
def test_probabilities_of_classes_are(targets, width):
    assert measured(Net(None, width), targets) > 0

"""`diagnose` on modules with torch's losses: it judges by the loss that is trained."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_resnorm.diagnose import diagnose

NUM = 24
generator = torch.Generator().manual_seed(3)
X = torch.randn(NUM, 8, generator=generator)
CLASSES = torch.randint(4, (NUM,), generator=generator)
TAGS = torch.randint(2, (NUM, 5), generator=generator).float()
NUMBERS = torch.randn(NUM, 3, generator=generator)
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 9.0])


class Net(L.LightningModule):
    """A smooth net; its loss is a child of the given name."""

    def __init__(self, loss, width, name="loss"):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, width))
        setattr(self, name, loss)

    def forward(self, x):
        return self.net(x)


def measured(module, targets, **options):
    return diagnose(module, [(X, targets)], rate=1e3, **options)


def gauss_newton_max(net, loss, targets):
    """Return the largest eigenvalue of J^T H J, H the loss's Hessian at the outputs."""
    weights = {k: v.detach() for k, v in net.net.named_parameters()}

    def outputs(weights):
        return torch.func.functional_call(net.net, weights, (X,)).flatten()

    jacobians = torch.func.jacrev(outputs)(weights)
    jac_CP = torch.cat([j.flatten(1) for j in jacobians.values()], 1).double()
    at = outputs(weights)
    hessian_CC = torch.autograd.functional.hessian(
        lambda out: loss(out.view(NUM, -1), targets), at
    ).double()
    return float(torch.linalg.eigvalsh(jac_CP.T @ hessian_CC @ jac_CP)[-1])


LOSSES = {
    "plain": (nn.CrossEntropyLoss(), CLASSES, "cross entropy"),
    "ignored": (nn.CrossEntropyLoss(ignore_index=3), CLASSES, "cross entropy"),
    "weighted": (
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=0),
        CLASSES,
        "cross entropy, classes weighted",
    ),
    "smoothed": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
        CLASSES,
        "cross entropy, classes weighted, labels smoothed by 0.1",
    ),
    "tags": (
        nn.BCEWithLogitsLoss(),
        TAGS,
        "binary cross entropy, averaged over 5 outputs",
    ),
    "one logit": (nn.BCEWithLogitsLoss(), TAGS[:, :1], "binary cross entropy"),
    "numbers": (nn.MSELoss(), NUMBERS, "squared error, averaged over 3 outputs"),
    "one number": (nn.MSELoss(), NUMBERS[:, :1], "squared error"),
}


def width(targets):
    return targets.shape[1] if targets.ndim > 1 else 4


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("name", ["loss", "criterion"])
def test_curvature_and_trials_are_of_the_modules_own_loss(case, name):
    loss, targets, words = LOSSES[case]
    module = Net(loss, width(targets), name)
    found = measured(module, targets)
    expected = gauss_newton_max(module, loss, targets)
    assert found.curvature.lambda_max == pytest.approx(expected, rel=2e-3)  # tol
    (rate,) = (f for f in found.findings if f.name.startswith("rate_"))
    own = float(loss(module(X), targets).detach())
    assert rate.evidence["first_loss"] == pytest.approx(own, rel=1e-5)
    assert found.settings["loss"] == found.curvature.loss == words


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        (F.cross_entropy, CLASSES),
        (nn.CrossEntropyLoss(weight=WEIGHT), CLASSES),
        (F.binary_cross_entropy_with_logits, TAGS),
        (F.mse_loss, NUMBERS),
        (nn.MSELoss(), NUMBERS),
    ],
)
def test_a_loss_of_torchs_that_is_given_is_read_too(given, targets):
    module = Net(None, width(targets))
    found = measured(module, targets, loss_fn=given)
    expected = gauss_newton_max(module, given, targets)
    assert found.curvature.lambda_max == pytest.approx(expected, rel=2e-3)  # tol


def test_gradients_are_of_the_same_loss_as_the_curvature():
    half, mean = (
        diagnose(Net(loss, 3), [(X, NUMBERS)]) for loss in (None, nn.MSELoss())
    )
    for one, other in zip(half.rows, mean.rows, strict=True):
        assert other.backward == pytest.approx(2 / 3 * one.backward, rel=1e-5)
    assert half.settings["loss"] == "half the squared distance"


def test_the_rate_bound_of_a_mean_squared_error_is_where_it_diverges():
    torch.manual_seed(0)
    net = nn.Linear(8, 3, bias=False)
    found = diagnose(
        net, [(X, NUMBERS)], rate=1e-3, loss_fn=F.mse_loss, check_rate=True
    )
    # at the bound itself the loss neither grows nor shrinks
    unstable = found.stable_rates.smallest_unstable.in_bounds
    assert unstable in (pytest.approx(1), pytest.approx(2**0.5))


def test_a_loss_scale_that_is_given_comes_before_what_the_loss_tells():
    plain = measured(Net(None, 3), NUMBERS).curvature.lambda_max
    scaled = measured(Net(nn.MSELoss(), 3), NUMBERS, loss_scale=5.0)
    assert scaled.curvature.lambda_max == pytest.approx(5 * plain, rel=2e-3)  # tol
    assert scaled.curvature.loss == "5 times half the squared distance"
    (rate,) = (f for f in scaled.findings if f.name.startswith("rate_"))
    expected = 2.5 * (Net(None, 3)(X) - NUMBERS).square().sum(1).mean()
    assert rate.evidence["first_loss"] == pytest.approx(
        float(expected.detach()), rel=1e-5
    )


def test_the_output_that_is_given_measures_without_what_is_no_likelihood():
    module = Net(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), 5)
    found = measured(module, TAGS, output="bernoulli", loss_scale=0.2)
    expected = gauss_newton_max(module, nn.BCEWithLogitsLoss(), TAGS)
    assert found.curvature.lambda_max == pytest.approx(expected, rel=2e-3)  # tol


def test_a_loss_fn_of_a_user_is_told_from_what_the_curvature_is_of():
    found = measured(
        Net(None, 4), CLASSES, loss_fn=lambda out, y: F.cross_entropy(out, y) * 2
    )
    assert found.settings["loss"] == "the given loss_fn"
    assert found.curvature.loss == "cross entropy"


@pytest.mark.parametrize(
    ("loss", "targets", "message"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), CLASSES, "reduction='sum'.*loss_scale"),
        (nn.MSELoss(reduction="sum"), NUMBERS, "MSELoss.*reduction='sum'.*loss_scale"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), TAGS, "with pos_weight"),
        (nn.HuberLoss(), NUMBERS, "HuberLoss, which tells no distribution"),
        (nn.CrossEntropyLoss(ignore_index=1), CLASSES * 0 + 1, "no label counts"),
        (nn.CrossEntropyLoss(weight=WEIGHT[:3]), CLASSES, "weights of 3 classes"),
        (
            nn.CrossEntropyLoss(weight=WEIGHT),
            F.one_hot(CLASSES).float(),
            "labels that are class indices",
        ),
    ],
)
def test_losses_whose_curvature_can_not_be_read_are_refused(loss, targets, message):
    with pytest.raises(ValueError, match=message) as refused:
        measured(Net(loss, width(targets)), targets)
    assert "target_fn" not in str(refused.value)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_loss_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match=r"loss_scale is .*; it must be positive"):
        measured(Net(None, 4), CLASSES, loss_scale=scale)


def test_numbers_beyond_0_and_1_are_no_outcomes_of_one_logit():
    found = measured(Net(None, 1), NUMBERS[:, 0])
    assert found.settings["distribution"] == "gaussian"


@pytest.mark.parametrize("shape", [(NUM,), (NUM, 1)])
def test_labels_of_any_shape_that_are_ignored_count_nowhere(shape):
    labels = CLASSES.where(CLASSES != 3, -100).view(shape)
    found = measured(Net(None, 4), labels)
    expected = gauss_newton_max(Net(None, 4), nn.CrossEntropyLoss(), labels.flatten())
    assert found.curvature.lambda_max == pytest.approx(expected, rel=2e-3)  # tol


def test_one_logit_without_a_dimension_of_its_own_is_binary():
    class Flat(Net):
        def forward(self, x):
            return super().forward(x).squeeze(1)

    labels = TAGS[:, 0].long()
    flat, net = Flat(None, 1), Net(None, 1)
    found = [measured(one, labels).curvature for one in (flat, net)]
    assert found[0].lambda_max == pytest.approx(found[1].lambda_max, rel=1e-5)
    assert found[0].loss == found[1].loss == "binary cross entropy"

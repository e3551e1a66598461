"""Twins of modules whose loss weighs classes, ignores labels, or is a sum."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from twin_runs import (
    EXACT,
    REMOVED,
    Net,
    batches,
    data,
    fit,
    largest_difference,
    made,
    twins_and_separate_runs,
)

from lit_resnorm.measures.losses.reduction import ExampleLosses
from lit_resnorm_callbacks import StabilityProbe

WEIGHTS = torch.tensor([0.3, 2.0, 1.1])


class Held(Net):
    """A module that holds its loss."""

    optimizer = staticmethod(partial(torch.optim.SGD, lr=0.01, momentum=0.9))

    def __init__(self, loss):
        super().__init__()
        self.criterion = loss

    def training_step(self, batch, batch_idx):
        return self.criterion(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass


class LogProbabilities(Held):
    def forward(self, x):
        return super().forward(x).log_softmax(-1)


class Divergence(LogProbabilities):
    pass


class Probabilities(Held):
    def forward(self, x):
        return super().forward(x).sigmoid()


class ByHand(Held):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx).mean()


class Functional(Net):
    """The loss is torch's function, whose labels of -100 don't count."""

    def validation_step(self, batch, batch_idx):
        pass


class Positions(Held):
    """Three classes at each of four positions."""

    def __init__(self, loss):
        super().__init__(loss)
        self.head = nn.Linear(12, 12)

    def forward(self, x):
        return super().forward(x).unflatten(1, (4, 3))

    def training_step(self, batch, batch_idx):
        return self.criterion(self(batch[0]).flatten(0, 1), batch[1].flatten())


class Reals(Held):
    """The three outputs are compared with three numbers."""

    def training_step(self, batch, batch_idx):
        return self.criterion(self(batch[0]), batch[1])


def ignoring(label):
    x, y = data().tensors
    return TensorDataset(x, y.where(torch.arange(48) % 5 != 0, label))


def positions(label=-100):
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(3, (48, 4), generator=generator)
    gone = torch.rand(48, 4, generator=generator) < 0.4
    gone[:, 0] = False
    return TensorDataset(data().tensors[0], y.where(~gone, label))


def reals():
    generator = torch.Generator().manual_seed(1)
    y = torch.rand(48, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(data().tensors[0], y)


CASES = {
    "class weights": (Held, partial(nn.CrossEntropyLoss, WEIGHTS), data),
    "class weights, smoothed": (
        Held,
        partial(nn.CrossEntropyLoss, WEIGHTS, label_smoothing=0.2),
        data,
    ),
    "ignored label": (
        Held,
        partial(nn.CrossEntropyLoss, ignore_index=7),
        partial(ignoring, 7),
    ),
    "class weights and an ignored label": (
        Held,
        partial(nn.CrossEntropyLoss, WEIGHTS, ignore_index=-1),
        partial(ignoring, -1),
    ),
    "negative log-likelihood": (LogProbabilities, nn.NLLLoss, data),
    "weighted negative log-likelihood": (
        LogProbabilities,
        partial(nn.NLLLoss, WEIGHTS, ignore_index=2),
        data,
    ),
    "sum": (Held, partial(nn.CrossEntropyLoss, reduction="sum"), data),
    "weighted sum": (
        Held,
        partial(nn.CrossEntropyLoss, WEIGHTS, reduction="sum"),
        data,
    ),
    "ignored positions": (Positions, nn.CrossEntropyLoss, positions),
    "weighted and ignored positions": (
        Positions,
        partial(nn.CrossEntropyLoss, WEIGHTS, ignore_index=9, label_smoothing=0.1),
        partial(positions, 9),
    ),
    "summed positions": (
        Positions,
        partial(nn.CrossEntropyLoss, reduction="sum"),
        positions,
    ),
    "squared error": (Reals, nn.MSELoss, reals),
    "summed squared error": (Reals, partial(nn.MSELoss, reduction="sum"), reals),
    "absolute error": (Reals, nn.L1Loss, reals),
    "Huber": (Reals, partial(nn.HuberLoss, delta=0.3), reals),
    "binary with positive weights": (
        Reals,
        partial(nn.BCEWithLogitsLoss, pos_weight=WEIGHTS),
        reals,
    ),
    "binary with weights": (Reals, partial(nn.BCEWithLogitsLoss, WEIGHTS), reals),
    "binary of probabilities": (Probabilities, nn.BCELoss, reals),
    "each example's, averaged by hand": (
        ByHand,
        partial(nn.CrossEntropyLoss, WEIGHTS, reduction="none"),
        data,
    ),
    "divergence over the batch's size": (
        Divergence,
        partial(nn.KLDivLoss, reduction="batchmean"),
        reals,
    ),
}


def assert_equal_to_separate_runs(make, train, probe=None, **options):
    probe = probe or StabilityProbe(removed=REMOVED, strict=True, batch=train[:8])
    found = twins_and_separate_runs(
        make, batches(16), probe, train=train, limit_val_batches=0, **options
    )
    for twin, alone in zip(*found, strict=True):
        assert largest_difference(twin, alone) < EXACT
    assert largest_difference(found[0][0], found[0][1]) > 1e-6
    return probe


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_twins_equal_separate_runs_with_the_loss_that_a_module_holds(case, accumulate):
    kind, loss, train = CASES[case]
    probe = assert_equal_to_separate_runs(
        made(lambda: kind(loss())), train(), accumulate_grad_batches=accumulate
    )
    if kind is not Divergence:  # torch has no rule to vectorise it
        assert probe._copies.vectorised


def test_labels_that_the_function_ignores_leave_twins_as_separate_runs():
    assert_equal_to_separate_runs(made(Functional), ignoring(-100))


class Weighing(Functional):
    """The weights stand in the training step alone."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], WEIGHTS.double())


def test_a_loss_of_torchs_that_is_given_is_read_as_if_the_module_held_it():
    probe = StabilityProbe(
        removed=REMOVED,
        strict=True,
        batch=data()[:8],
        loss_fn=nn.CrossEntropyLoss(WEIGHTS),
    )
    assert_equal_to_separate_runs(made(Weighing), data(), probe)


def test_a_replaced_example_counts_with_the_weight_of_its_own_label():
    x, y = data().tensors
    probe = StabilityProbe(removed=[3], replace=True, strict=True, num_examples=1)
    kind = made(lambda: Held(nn.CrossEntropyLoss(WEIGHTS)))
    module = kind()
    fit(module, batches(16), [probe])
    candidates = []
    for new in range(1, 20):
        other_x, other_y = x.clone(), y.clone()
        other_x[3], other_y[3] = (t[new] for t in data(20).tensors)
        alone = kind()
        fit(alone, batches(16), train=TensorDataset(other_x, other_y))
        candidates.append(
            largest_difference(probe.twin_state_dict(0), alone.state_dict())
        )
    assert min(candidates) < EXACT


class Dropped(Held):
    """Dropout, so that the example stays in the batch, with no weight."""

    def forward(self, x):
        return super().forward(F.dropout(x, 0.3, self.training))


def test_under_dropout_an_example_without_weight_is_in_no_normaliser():
    class Alone(Dropped):
        def training_step(self, batch, batch_idx):
            x, y, index = batch
            weights = WEIGHTS.double()[y] * (index != 3)
            losses = F.cross_entropy(self(x), y, reduction="none")
            return (weights * losses).sum() / weights.sum()

    def make(kind):
        return made(lambda: kind(nn.CrossEntropyLoss(WEIGHTS)))()

    probe = StabilityProbe(removed=[3], strict=True)
    fit(make(Dropped), batches(16), [probe])
    alone = make(Alone)
    train = TensorDataset(*data().tensors, torch.arange(48))
    fit(alone, batches(16), train=train)
    assert largest_difference(probe.twin_state_dict(0), alone.state_dict()) < EXACT


def test_losses_of_examples_are_those_that_the_loss_gives_each_alone():
    torch.manual_seed(0)
    output = torch.randn(6, 4, 3, dtype=torch.float64)
    target = torch.randint(3, (6, 4))
    target[1] = target[2, 1:] = -100
    weights = WEIGHTS.double()
    loss = nn.CrossEntropyLoss(weights, label_smoothing=0.1)
    found = ExampleLosses(loss)(output, target)
    alone = [loss(o, t) for o, t in zip(output, target, strict=True)]
    alone[1] = torch.zeros_like(alone[0])  # torch gives NaN where nothing counts
    torch.testing.assert_close(found, torch.stack(alone))


def influenced(loss):
    probe = StabilityProbe(removed=REMOVED, method="influence", strict=True)
    trainer = fit(made(lambda: Held(loss))(), batches(8), [probe])
    return {k: float(v) for k, v in trainer.callback_metrics.items() if "eps" in k}


def test_influence_of_weighted_losses_and_of_sums_is_estimated():
    mean = influenced(nn.CrossEntropyLoss())
    even = influenced(nn.CrossEntropyLoss(torch.full((3,), 2.0)))
    assert even == pytest.approx(mean, rel=1e-4)
    for loss in (nn.CrossEntropyLoss(WEIGHTS), nn.CrossEntropyLoss(reduction="sum")):
        found = influenced(loss)
        assert 0 < found["stability/eps_hyp"] < 1
        assert found != pytest.approx(mean, rel=1e-2)

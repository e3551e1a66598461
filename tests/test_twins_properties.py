"""Twins against separate training over random nets, optimizers, batches, removals."""

import warnings
from functools import partial

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from twin_runs import data, fit, largest_difference

from lit_resnorm_callbacks import StabilityProbe

NUM = 24
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "dampened": partial(torch.optim.SGD, lr=0.05, momentum=0.8, dampening=0.4),
    "nesterov": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
    "radam": partial(torch.optim.RAdam, lr=1e-2),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "adadelta": partial(torch.optim.Adadelta, lr=0.5),
    "adamax": partial(torch.optim.Adamax, lr=1e-2),
}
NORMS = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Routed(nn.Module):
    """Rows go to one of two layers: a branch, and gradients that may be missing."""

    def __init__(self, width):
        super().__init__()
        self.each = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])

    def forward(self, h):
        output = h.clone()
        for k, layer in enumerate(self.each):
            own = (h[:, 0] > 0) == bool(k)
            if own.any():
                output[own] = h[own] + layer(h[own])
        return output


class Random(L.LightningModule):
    def __init__(self, case):
        super().__init__()
        torch.manual_seed(case["seed"])
        norm, width, layers = NORMS[case["norm"]], case["width"], []
        for at in range(case["depth"]):
            # Without a bias, whose gradient a norm cancels: of rounding alone,
            # adaptive optimizers make steps.
            bias = case["norm"] == "none"
            first = nn.Linear(width if at else 16, width, bias=bias)
            activation = ACTIVATIONS[case["activation"]]()
            layers += [first, norm() if bias else norm(width), activation]
        if case["routed"]:
            layers.append(Routed(width))
        self.net = nn.Sequential(*layers, nn.Linear(width, 3))
        self.make = OPTIMIZERS[case["optimizer"]]

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.make(self.parameters())


@st.composite
def cases(draw):
    """A net, an optimizer, lists of examples, and which of them are left out."""
    norm = draw(st.sampled_from([*NORMS]))
    # Batch norm needs two rows, with one left out.
    size = draw(st.integers(5 if norm == "batch" else 1, 8))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    num_steps = draw(st.integers(2, 10))
    if norm != "batch" and draw(st.booleans()):  # with repeated examples
        lists = torch.randint(NUM, (num_steps, size), generator=generator).tolist()
    else:
        lists = [
            torch.randperm(NUM, generator=generator)[:size].tolist()
            for _ in range(num_steps)
        ]
    most = 3 if norm == "batch" else 6
    return {
        "norm": norm,
        "seed": seed,
        "lists": lists,
        "removed": draw(
            st.lists(st.integers(0, NUM - 1), min_size=1, max_size=most, unique=True)
        ),
        "depth": draw(st.integers(1, 3)),
        # A layer norm of few units gives signs, and gradients of rounding alone.
        "width": draw(st.integers(4 if norm == "layer" else 1, 9)),
        "routed": draw(st.booleans()),
        "activation": draw(st.sampled_from([*ACTIVATIONS])),
        "optimizer": draw(st.sampled_from([*OPTIMIZERS])),
        "accumulate": draw(st.integers(1, 3)),
        "clip": draw(st.sampled_from([None, ("norm", 0.1), ("value", 0.02)])),
        "memory": draw(st.sampled_from([1, 1 << 30])),
    }


def trained_without(index, case):
    """Weights after training without an example, in a loop of torch alone."""
    module = Random(case).double()
    optimizer = module.configure_optimizers()
    x, y = data().tensors
    lists, every = case["lists"], case["accumulate"]
    optimizer.zero_grad()
    has_rows = False
    for place, indices in enumerate(lists, 1):
        rows = [i for i in indices if i != index]
        if rows:
            (F.cross_entropy(module(x[rows]), y[rows]) / every).backward()
            has_rows = True
        if place % every and place < len(lists):
            continue
        if case["clip"] and has_rows:
            kind, limit = case["clip"]
            if kind == "norm":
                nn.utils.clip_grad_norm_(module.parameters(), limit)
            else:
                nn.utils.clip_grad_value_(module.parameters(), limit)
        if has_rows:
            optimizer.step()
        optimizer.zero_grad()
        has_rows = False
    return module.state_dict()


def worst_difference(case):
    """Largest difference of any twin's weight from separate training."""
    probe = StabilityProbe(
        removed=case["removed"],
        cadence={"every_n_steps": 10**6, "at_start": False, "at_end": False},
        memory=case["memory"],
        strict=True,
    )
    options = {"accumulate_grad_batches": case["accumulate"]}
    if case["clip"]:
        kind, limit = case["clip"]
        options |= {"gradient_clip_algorithm": kind, "gradient_clip_val": limit}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*lr_scheduler.*|.*num_training_batches.*")
        fit(Random(case).double(), case["lists"], [probe], **options)
    return max(
        largest_difference(probe.twin_state_dict(k), trained_without(index, case))
        for k, index in enumerate(case["removed"])
    )


bounded = partial(
    settings,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


# Both take the same sums in another order: 1e-16 of numbers of about 1, which ten
# steps multiply by less than 1e6.
@bounded(max_examples=15)
@given(cases())
def test_twins_of_random_runs_equal_separate_training(case):
    assert worst_difference(case) < 1e-10


@pytest.mark.slow
@bounded(max_examples=400)
@given(cases())
def test_twins_of_many_random_runs_equal_separate_training(case):
    assert worst_difference(case) < 1e-10

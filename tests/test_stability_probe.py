"""Twins equal separate runs on the data without their example."""

import copy
import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import FunctionalNet, quiet_trainer, vectors
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_resnorm.modules import LitMLP, LitResNet, LitResNetBN
from lit_resnorm_callbacks import Cadence, StabilityProbe

NETS = {"mlp": LitMLP, "res2": LitResNet, "res2_bn": LitResNetBN}
REMOVED = [3, 17, 40]


def batches(num_steps, num=48, size=12, seed=0):
    """Batches of indices, in another order each epoch, as one list."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-num_steps * size // num)
    order = torch.cat([torch.randperm(num, generator=generator) for _ in range(epochs)])
    return [rows.tolist() for rows in order.split(size)[:num_steps]]


def without(index, lists):
    return [[i for i in rows if i != index] for rows in lists]


def data(num=48, dtype=torch.float64):
    x, y = vectors(num, dim=16).tensors
    return TensorDataset(x.to(dtype), y)


def fit(module, lists, callbacks=(), *, train=None, **options):
    train = train or data(dtype=next(module.parameters()).dtype)
    val = data(20, next(module.parameters()).dtype)
    trainer = quiet_trainer(max_epochs=1, callbacks=[*callbacks], **options)
    trainer.fit(
        module, DataLoader(train, batch_sampler=lists), DataLoader(val, batch_size=20)
    )
    return trainer


def net(kind="mlp", optimizer=None, dtype=torch.float64, **options):
    L.seed_everything(5, verbose=False)
    choice = {} if optimizer is None else {"optimizer": optimizer}
    module = NETS[kind](4, 16, (16,), 3, **choice, **options)
    return module.to(dtype)


def largest_difference(state, other):
    return max(
        (state[name].double() - value.double()).abs().max().item()
        for name, value in other.items()
    )


def sgd(params):
    return torch.optim.SGD(params, 0.01, momentum=0.9, weight_decay=1e-3)


def nesterov(params):
    return torch.optim.SGD(params, 0.01, momentum=0.9, nesterov=True)


def dampened(params):
    return torch.optim.SGD(params, 0.02, momentum=0.8, dampening=0.3)


def adam(params):
    return torch.optim.Adam(params, 1e-3, weight_decay=1e-3)


def adamw(params):
    return torch.optim.AdamW(params, 1e-3, amsgrad=True)


def twins_and_separate_runs(make, lists, probe=None, removed=REMOVED, **options):
    """Twins' weights, and those of runs on the batches without their examples."""
    probe = probe or StabilityProbe(removed=removed, cadence=10**6, strict=True)
    fit(make(), lists, [probe], **options)
    separate = []
    for index in removed:
        alone = make()
        fit(alone, without(index, lists), **options)
        separate.append(alone.state_dict())
    return [probe.twin_state_dict(k) for k in range(len(removed))], separate


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_twins_over_200_steps_equal_separate_runs(kind, optimizer):
    twins, separate = twins_and_separate_runs(
        lambda: net(kind, optimizer), batches(200), gradient_clip_val=1.0
    )
    for twin, alone in zip(twins, separate, strict=True):
        assert largest_difference(twin, alone) < 1e-10
    assert largest_difference(*twins[:2]) > 1e-4

"""Runs beside which twins are trained, and the separate runs that they must equal."""

from functools import partial

import lightning as L
import torch
from small import quiet_trainer, vectors
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_resnorm.modules import LitMLP, LitResNet, LitResNetBN
from lit_resnorm_callbacks import StabilityProbe

NETS = {"mlp": LitMLP, "res2": LitResNet, "res2_bn": LitResNetBN}
REMOVED = [3, 17, 40]
# Losses and gradients are the same sums in another order: rounding of float64, which
# some dozens of steps multiply by less than 1e4.
EXACT = 1e-11


class Net(L.LightningModule):
    """Two layers and a loss, to be made odd by subclasses."""

    optimizer = staticmethod(partial(torch.optim.SGD, lr=0.1, momentum=0.9))

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 12), nn.Tanh())
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


class Experts(Net):
    """Rows go to one of several experts; one without rows has no gradient."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList([nn.Linear(16, 3) for _ in range(4)])
        self.head = self.backbone = nn.Identity()

    def forward(self, x):
        value, index = self.router(x).softmax(-1).max(-1)
        output = x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            own = index == k
            if own.any():
                output[own] = expert(x[own]) * value[own, None]
        return output


def made(kind):
    def make():
        L.seed_everything(5, verbose=False)
        return kind().double()

    return make


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
    options = {"max_epochs": 1, **options}
    trainer = quiet_trainer(callbacks=[*callbacks], **options)
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


def twins_and_separate_runs(
    make, lists, probe=None, removed=REMOVED, *, beside=list, **options
):
    """Twins' weights, and those of runs on the batches without their examples.

    `beside` makes the other callbacks of a run.
    """
    probe = probe or StabilityProbe(removed=removed, cadence=10**6, strict=True)
    fit(make(), lists, [*beside(), probe], **options)
    separate = []
    for index in removed:
        alone = make()
        fit(alone, without(index, lists), beside(), **options)
        separate.append(alone.state_dict())
    return [probe.twin_state_dict(k) for k in range(len(removed))], separate

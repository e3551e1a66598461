"""A module with every kind of state that a forward pass can change."""

import random
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
import torchmetrics
from small import FunctionalNet
from torch import nn
from torch.nn import functional as F

VOCABULARY = 12


@dataclass
class Ledger:
    """An object of the project's own, which a module holds."""

    passes: int = 0
    sizes: list[int] = field(default_factory=list)
    last: torch.Tensor | None = None


@dataclass(slots=True)
class Slotted:
    """Another, without a dict of attributes."""

    passes: int = 0


class Stateful(FunctionalNet):
    """Keeps state in every place there is; none of it feeds the output.

    Args:
        feeds: Have a running mean outside of the buffers feed the output.
        moves_weights: Write into weights in `forward`, beside the optimizer's steps.
    """

    passes_of_class: ClassVar[int] = 0
    shapes_of_class: ClassVar[list[torch.Size]] = []

    def __init__(self, *, feeds=False, moves_weights=True):
        super().__init__()
        self.feeds, self.moves_weights = feeds, moves_weights
        self.embedding = nn.Embedding(
            VOCABULARY, 8, max_norm=1.0 if moves_weights else None
        )
        self.teacher = nn.Linear(8, 8).requires_grad_(False)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.accuracy = torchmetrics.MeanMetric()
        self.hidden_metrics = {"mean": torchmetrics.MeanMetric()}
        self.register_buffer("assigned", torch.zeros(8))
        self.register_buffer("written", torch.zeros(8))
        self.mean = torch.zeros(8)
        self.in_place = torch.zeros(8)
        self.hidden = (torch.zeros(1), [torch.zeros(1)])
        self.num_passes = 0
        self.seen, self.recent = [], deque(maxlen=2)
        self.by_size, self.order = Counter(), OrderedDict(first=0, second=1)
        self.sizes, self.raw = set(), bytearray(b"0")
        self.array = np.zeros(3)
        self.ledger, self.slotted = Ledger(), Slotted()
        self.space = SimpleNamespace(scale=1.0)
        self.generators = [
            torch.Generator().manual_seed(1),
            np.random.default_rng(1),
            np.random.RandomState(1),
            random.Random(1),
        ]

    def forward(self, x):
        rows = (x[:, :2] * 3).round().long().clamp(-4, 4) + 5
        h = x + self.embedding(rows).sum(1) + self.gru(x[:, None])[0][:, 0]
        m = h.detach().mean(0)
        self.remember(h, m)
        if self.feeds:
            h = h - self.mean - self.in_place
        return super().forward(h)

    def remember(self, h, m):
        self.log("forward/mean", m.mean(), on_step=True, on_epoch=True)
        self.logger_calls()
        self.mean = 0.9 * self.mean + 0.1 * m
        self.in_place.mul_(0.9).add_(m, alpha=0.1)
        self.assigned = 0.9 * self.assigned + 0.1 * m
        self.written.data.add_(m)
        self.hidden = (m, [h])
        self.num_passes += 1
        type(self).passes_of_class += 1
        self.shapes_of_class.append(h.shape)
        self.seen.append(h)
        self.recent.append(len(h))
        self.by_size[len(h)] += 1
        self.order.move_to_end("first")
        self.sizes.add(len(h))
        self.raw += b"1"
        self.array += 1
        self.ledger.passes += 1
        self.ledger.sizes.append(len(h))
        self.ledger.last = h
        self.slotted.passes += 1
        self.space.scale *= 0.5
        self.late = h
        self.accuracy(m.mean())
        self.hidden_metrics["mean"].update(m.mean())
        torch_g, numpy_g, old_numpy_g, python_g = self.generators
        torch.rand(1, generator=torch_g)
        numpy_g.random(), old_numpy_g.rand(), python_g.random()
        if not self.moves_weights:
            return
        with torch.no_grad():
            self.teacher.weight.mul_(0.9).add_(self.second.weight[:8, :8], alpha=0.1)
            self.teacher.bias.data = self.teacher.bias.data * 0.9

    def logger_calls(self):
        if self._trainer is not None and self.logger is not None:
            self.logger.log_metrics({"forward/direct": 1.0}, step=0)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def state(self):
        """Everything of the above, as numbers and tensors that compare."""
        metrics = [self.accuracy, *self.hidden_metrics.values()]
        torch_g, numpy_g, old_numpy_g, python_g = self.generators
        return {
            "tensors": [self.mean, self.in_place, self.assigned, self.written],
            "parameters": [*self.parameters()],
            "hidden": self.hidden,
            "late": getattr(self, "late", None),
            "counts": [
                *(self.num_passes, type(self).passes_of_class, self.slotted.passes),
                *(self.space.scale, self.array.tolist(), bytes(self.raw)),
            ],
            "seen": [*self.seen],
            "containers": [
                *([*self.recent], dict(self.by_size), [*self.order]),
                *(sorted(self.sizes), [*map(tuple, self.shapes_of_class)]),
            ],
            "ledger": [self.ledger.passes, [*self.ledger.sizes], self.ledger.last],
            "metrics": [[m.mean_value, m.weight, m._update_count] for m in metrics],
            "generators": [
                torch_g.get_state(),
                str(numpy_g.bit_generator.state),
                str(old_numpy_g.get_state()),
                python_g.getstate(),
            ],
        }

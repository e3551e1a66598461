"""Which dimension of which tensor counts examples, in batches of any layout."""

from collections import OrderedDict, UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import lightning as L
import pytest
import torch
from small import quiet_trainer, vectors
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

from lit_resnorm.diagnose import diagnose
from lit_resnorm.measures.passes.batches import (
    joined,
    leaves,
    mapped,
    num_rows,
    target_of,
)
from lit_resnorm_callbacks import (
    ActivationRateMonitor,
    FIMEigenvalueProbe,
    MomentTracer,
    StabilityProbe,
)

EVERY = (ActivationRateMonitor, FIMEigenvalueProbe, MomentTracer)


@dataclass
class Record:
    """As a project has it."""

    x: torch.Tensor
    y: torch.Tensor


class Named(NamedTuple):
    y: torch.Tensor
    x: torch.Tensor


class Encoding(UserDict):
    """A mapping that is no dict and allows its parts as attributes."""

    def __getattr__(self, name):
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class Fixed(Mapping):
    """A mapping that can't be written to."""

    def __init__(self, parts):
        self.parts = dict(parts)

    def __getitem__(self, name):
        return self.parts[name]

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        return len(self.parts)


LAYOUTS = {
    "dataclass": Record,
    "UserDict": lambda x, y: UserDict(x=x, y=y),
    "encoding": lambda x, y: Encoding(x=x, y=y),
    "ordered": lambda x, y: OrderedDict(y=y, x=x),
    "read-only": lambda x, y: Fixed({"x": x, "y": y}),
    "named tuple": lambda x, y: Named(y, x),
    "numbers beside": lambda x, y: {"x": x, "y": y, "scale": torch.tensor(2.0), "n": 3},
}


class Net(L.LightningModule):
    """Takes `x`, in batches of any layout."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        named = batch if isinstance(batch, Mapping) else None
        x, y = (named["x"], named["y"]) if named else (batch.x, batch.y)
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Nested(Net):
    """Takes its input from within."""

    def probe_forward(self, batch):
        return self(batch[0]["views"][0].x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.probe_forward(batch), batch[1])


def collating(layout):
    return lambda rows: layout(
        torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])
    )


def measured(module, collate, *probes, data=None, **options):
    """Return what the probes log before the first step."""
    made = [
        probe(num_examples=20, cadence={"at_end": False}, strict=True, **options)
        for probe in probes
    ]
    loader = DataLoader(data or vectors(20), 8, collate_fn=collate)
    trainer = quiet_trainer(max_steps=1, callbacks=made)
    torch.manual_seed(0)
    trainer.fit(module, loader, loader)
    return {
        key: float(value)
        for key, value in trainer.callback_metrics.items()
        if not key.endswith("/seconds")
    }


def fresh(kind, *args):
    torch.manual_seed(1)
    return kind(*args)


class Pairs(Net):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_batches_of_every_layout_give_the_same_values():
    right = measured(fresh(Pairs), None, *EVERY)
    for name, layout in LAYOUTS.items():
        assert measured(fresh(Net), collating(layout), *EVERY) == right, name
    nested = collating(lambda x, y: ({"views": [Record(x, y)], "names": ["a"]}, y))
    assert measured(fresh(Nested), nested, *EVERY) == right


def test_twins_train_on_batches_of_every_layout():
    options = {"num_twins": 2, "num_examples": 20, "strict": True}
    found = []
    for name in ("dataclass", "UserDict", "named tuple"):
        probe = StabilityProbe(**options)
        loader = DataLoader(vectors(20), 8, collate_fn=collating(LAYOUTS[name]))
        trainer = quiet_trainer(max_epochs=2, callbacks=[probe])
        trainer.fit(fresh(Net), loader, loader)
        found.append(float(trainer.callback_metrics["stability/distance"]))
    assert found[0] > 0
    assert found == [found[0]] * 3


def test_a_nest_is_rebuilt_of_the_same_kinds():
    x, y = torch.ones(2, 3), torch.zeros(2)
    for layout in LAYOUTS.values():
        batch = layout(x, y)
        doubled = mapped(lambda leaf: 2 * leaf, batch)
        assert type(doubled) is type(batch)
        assert num_rows(joined([batch, doubled])) == 4
        assert type(joined([batch, doubled])) is type(batch)
        assert torch.equal(target_of(batch), y)
        # the batch itself is left alone
        assert any(leaf is x for leaf in leaves(batch))


WEIGHTS = torch.tensor([1.0, 2.0, 3.0])


class Graph:
    """As PyTorch Geometric's: no mapping, and its tensors count nodes and edges."""

    def __init__(self, x, y):
        self.x, self.y = x, y
        self.edges = torch.zeros(2, 30, dtype=torch.long)

    def to(self, *args, **kwargs):
        return self


def packed(x, y):
    sequences = pack_padded_sequence(
        x[:, :, None], torch.full((len(x),), 8), batch_first=True
    )
    return {"x": sequences, "y": y}


REFUSED = {
    "class weights first": (
        lambda x, y: {"class_weights": WEIGHTS, "x": x, "y": y},
        r"shapes \(3,\) and \(8, 8\).*batch_dim.*forward_fn",
    ),
    "class weights last": (
        lambda x, y: {"x": x, "y": y, "class_weights": WEIGHTS},
        r"shapes \(8, 8\) and \(3,\).*batch_dim.*forward_fn",
    ),
    "graph": (Graph, "a Graph, holds no tensor.*give batch,.*forward_fn"),
    "boxes": (
        lambda x, y: Record(
            x, [{"boxes": torch.ones(i % 3, 4), "label": y[i]} for i in range(len(y))]
        ),
        "a Record with a dict an example,.*batch .*forward_fn",
    ),
    "packed": (packed, "PackedSequence.*batch,.*forward_fn"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("probe", EVERY)
def test_batches_that_do_not_tell_their_examples_are_refused(probe, name):
    layout, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^{probe().name}: .*{message}"):
        measured(
            Net(), collating(layout), probe, forward_fn=lambda net, batch: net(batch.x)
        )


def test_sequences_padded_to_other_lengths_are_refused_by_name():
    def padded(rows):
        x = torch.stack([x for x, _ in rows])
        return x[:, : int(rows[0][1]) + 4], torch.zeros(len(rows)).long()

    data = TensorDataset(vectors(20).tensors[0], torch.arange(20))
    with pytest.raises(ValueError, match=r"^activation: .*num_examples.*or batch"):
        measured(Pairs(), padded, ActivationRateMonitor, data=data)


class Recurrent(L.LightningModule):
    """An LSTM over batches `(T, B, F)`, or `(B, T, F)`, judged at the end or always."""

    def __init__(self, time_major, always):
        super().__init__()
        self.lstm = nn.LSTM(5, 6, batch_first=not time_major)
        self.head = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
        self.time_major, self.always = time_major, always

    def forward(self, x):
        out = self.lstm(x)[0]
        if self.always:
            return self.head(out)
        return self.head(out[-1] if self.time_major else out[:, -1])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]).flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def sequences(steps, always):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(20, steps, 5, generator=generator)
    shape = (20, steps) if always else (20,)
    y = torch.randint(3, shape, generator=generator)
    if always:
        y[:4, 0] = -100  # no example
    return TensorDataset(x, y)


def time_major(rows):
    x, y = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return x.transpose(0, 1), y.transpose(0, 1) if y.ndim > 1 else y


@pytest.mark.parametrize("always", [False, True], ids=["at the end", "always"])
@pytest.mark.parametrize("steps", [7, 20, 3, 2, 1])
def test_time_major_batches_are_measured_as_their_examples(steps, always):
    data = sequences(steps, always)
    right = measured(fresh(Recurrent, False, always), None, *EVERY, data=data)
    found = measured(
        fresh(Recurrent, True, always), time_major, *EVERY, data=data, batch_dim=1
    )
    assert found == pytest.approx(right, rel=1e-4)  # float32, other orders of sums


@pytest.mark.parametrize("always", [False, True], ids=["at the end", "always"])
def test_twins_train_on_time_major_batches(always):
    found = []
    data = TensorDataset(*(part[4:] for part in sequences(8, always).tensors))
    for major in (False, True):
        probe = StabilityProbe(2, num_examples=16, batch_dim=int(major), strict=True)
        collate = time_major if major else None
        loader = DataLoader(data, 8, collate_fn=collate)
        trainer = quiet_trainer(max_epochs=2, callbacks=[probe])
        trainer.fit(fresh(Recurrent, major, always), loader, loader)
        found.append(float(trainer.callback_metrics["stability/distance"]))
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-3)  # of float32 weights


def sorting(layout):
    return lambda rows: collating(layout)(
        sorted(rows, key=lambda row: float(row[0][0]))
    )


def test_rows_that_are_reordered_are_seen_in_batches_of_any_layout():
    for name in ("dataclass", "UserDict"):
        loader = DataLoader(vectors(20), 8, collate_fn=sorting(LAYOUTS[name]))
        trainer = quiet_trainer(max_epochs=1, callbacks=[StabilityProbe(2)])
        with pytest.raises(ValueError, match="reorders, mixes or changes rows"):
            trainer.fit(Net(), loader, loader)


def test_time_major_batches_without_batch_dim_are_refused():
    with pytest.raises(ValueError, match=r"\(7, 8, 5\) and \(8,\)\. Give batch_dim"):
        measured(Recurrent(True, False), time_major, *EVERY, data=sequences(7, False))


def test_diagnose_reads_time_major_batches_too():
    data, found = sequences(7, False), []
    for major in (False, True):
        loader = DataLoader(data, 20, collate_fn=time_major if major else None)
        module = fresh(Recurrent, major, False)
        found.append(diagnose(module, loader, batch_dim=int(major)).curvature)
    assert found[1].lambda_max == pytest.approx(found[0].lambda_max, rel=1e-4)


@pytest.mark.parametrize(
    ("batch_dim", "message"),
    [(-1, "batch_dim is -1; it must be at least 0"), (1.5, "batch_dim is 1.5")],
)
def test_a_batch_dim_that_can_not_be_right_is_refused(batch_dim, message):
    with pytest.raises(ValueError, match=message):
        ActivationRateMonitor(batch_dim=batch_dim)


def test_a_batch_dim_that_no_tensor_has_is_refused():
    with pytest.raises(ValueError, match=r"^activation: batch_dim is 2, and.*lack"):
        measured(Pairs(), None, ActivationRateMonitor, batch_dim=2)


def test_an_output_that_counts_no_examples_is_refused_with_a_batch_dim():
    with pytest.raises(
        ValueError, match=r"counts examples in no dimension.*forward_fn"
    ):
        measured(
            Recurrent(True, False),
            time_major,
            ActivationRateMonitor,
            data=sequences(7, False),
            batch_dim=1,
            forward_fn=lambda net, batch: net(batch[0]).sum(0),
        )

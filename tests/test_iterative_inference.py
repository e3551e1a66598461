"""Iterative inference against cosines, read-outs and dropped blocks by hand."""

import math

import pytest
import torch
from ranks import run_ranks, sum_over_ranks
from small import FunctionalNet, loaders, quiet_trainer, vectors
from torch import nn
from torch.nn import functional as F

from lit_resnorm.measures.iterative_inference import iterative_inference
from lit_resnorm.measures.losses.outcomes import OutputJudge
from lit_resnorm.measures.passes.batches import network_output
from lit_resnorm.measures.residual_blocks import residual_blocks
from lit_resnorm_callbacks import IterativeInferenceMonitor

STEM, BRANCHES, HEAD = 5, 3, 4


class TwoBlocks(nn.Module):
    """A stem, two residual blocks with batch norm, and a head with one."""

    def __init__(self, width=6, num_classes=HEAD):
        super().__init__()
        self.stem = nn.Linear(STEM, width)
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width)
        self.last_norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, num_classes)

    def branch(self, place, h):
        if place == 0:
            return F.elu(self.norm(self.first(h)))
        return torch.tanh(self.second(h))

    def read(self, h):
        return self.head(self.last_norm(h))

    def forward(self, x):
        h = self.stem(x)
        h = h + self.branch(0, h)
        h = torch.add(h, self.branch(1, h), alpha=0.5)
        return self.read(h)


def net_and_batch(num=9, seed=0):
    torch.manual_seed(seed)
    net = TwoBlocks().double()
    with torch.no_grad():
        for norm in (net.norm, net.last_norm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_(1)
    x = torch.randn(num, STEM, dtype=torch.float64)
    return net, (x, torch.randint(HEAD, (num,)))


def norm_by_hand(norm, h, mode, statistics):
    """Batch norm as the mode says; `statistics` holds those of the first pass."""
    if mode == "eval":
        mean, var = norm.running_mean, norm.running_var
    elif mode == "train":
        mean, var = h.mean(0), h.var(0, correction=0)
    else:
        mean, var = statistics.setdefault(
            norm, (h.detach().mean(0), h.detach().var(0, correction=0))
        )
    return (h - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


def by_hand(net, batch, mode):
    """Cosines, ratios, read-outs and dropped blocks, spelled out."""
    x, y = batch
    statistics = {}

    def branch(place, h):
        if place == 0:
            return F.elu(norm_by_hand(net.norm, net.first(h), mode, statistics))
        return 0.5 * torch.tanh(net.second(h))

    def read(h):
        return net.head(norm_by_hand(net.last_norm, h, mode, statistics))

    states, branches = [net.stem(x)], []
    for place in range(2):
        branches.append(branch(place, states[-1]))
        states.append(states[-1] + branches[-1])
    loss = F.cross_entropy(read(states[-1]), y, reduction="sum")
    gradients = torch.autograd.grad(loss, states[:2])
    cosines = [
        F.cosine_similarity(f, g, dim=1, eps=0).mean()
        for f, g in zip(branches, gradients, strict=True)
    ]
    ratios = [
        (f.norm(dim=1) / h.norm(dim=1)).mean()
        for f, h in zip(branches, states[:2], strict=True)
    ]
    h0 = states[0]
    dropped = [h0 + branch(1, h0), states[1]]
    outputs = [read(states[1]), read(states[2]), *(read(h) for h in dropped)]
    losses = [F.cross_entropy(out, y) for out in outputs]
    right = [(out.argmax(1) == y).double().mean() for out in outputs]
    p = read(states[2]).softmax(1)
    own = p.gather(1, y[:, None])[:, 0]
    others = p.clone().scatter(1, y[:, None], 0).amax(1)
    near = (own - others).abs() <= 0.1
    near_p = read(states[1]).softmax(1)[near]
    return {
        "cosine": torch.stack(cosines),
        "ratio": torch.stack(ratios),
        "loss": torch.stack(losses),
        "accuracy": torch.stack(right),
        "borderline": near.double().mean(),
        "entropy": -(near_p * near_p.log()).sum(1).mean(),
        "nll": -near_p.gather(1, y[near][:, None]).log().mean(),
    }


def as_table(found):
    reads = [b.readout for b in found.blocks] + [b.drop for b in found.blocks]
    first = found.blocks[0].readout
    return {
        "cosine": torch.stack([b.cosine for b in found.blocks]),
        "ratio": torch.stack([b.ratio for b in found.blocks]),
        "loss": torch.stack([r.loss for r in reads]),
        "accuracy": torch.stack([r.accuracy for r in reads]),
        "borderline": found.borderline,
        "entropy": first.borderline_entropy,
        "nll": first.borderline_loss,
    }


def assert_same(found, expected, rtol=1e-9):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name],
            value.detach(),
            rtol=rtol,
            atol=rtol,
            msg=lambda m, n=name: n + m,
        )


@pytest.mark.parametrize("mode", ["frozen", "eval", "train"])
def test_two_blocks_are_what_they_are_by_hand_in_every_norm_mode(mode):
    net, batch = net_and_batch()
    found = iterative_inference(net, batch, forward=network_output, norm_mode=mode)
    assert [block.name.split(".")[1] for block in found.blocks] == ["add", "add"]
    assert_same(as_table(found), by_hand(net, batch, mode))
    assert found.whole.loss == found.blocks[-1].readout.loss
    if mode != "train":
        chunked = iterative_inference(
            net, batch, forward=network_output, norm_mode=mode, num_chunks=4
        )
        assert_same(as_table(chunked), as_table(found))


def of_shares(rank, net, batch, sizes, mode):
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    rows = slice(ends[rank] - sizes[rank], ends[rank])
    share = tuple(part if mode == "train" else part[rows] for part in batch)
    found = iterative_inference(
        net, share, forward=network_output, norm_mode=mode, reduce=sum_over_ranks
    )
    return as_table(found)


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("sizes", "mode"),
    [
        ((6, 3), "frozen"),
        pytest.param((9, 0), "eval", marks=pytest.mark.slow),
        pytest.param((0, 8, 1), "frozen", marks=pytest.mark.slow),
        pytest.param((5, 4), "train", marks=pytest.mark.slow),
    ],
)
def test_uneven_and_empty_shards_give_what_one_process_gives(sizes, mode):
    net, batch = net_and_batch()
    whole = iterative_inference(net, batch, forward=network_output, norm_mode=mode)
    for found in run_ranks(of_shares, len(sizes), net, batch, sizes, mode):
        assert_same(found, as_table(whole), 1e-9)


def test_examples_without_gradient_or_branch_are_counted_and_no_zeros_enter():
    class Gated(TwoBlocks):
        def forward(self, x):
            h = self.stem(x)
            h = h + self.branch(1, h) * (x[:, :1] > 0)
            return self.read(h)

    net, (x, y) = net_and_batch()
    open_N = x[:, 0] > 0
    assert 0 < open_N.sum() < len(x)

    def losses(output, target):
        each = F.cross_entropy(output, target, reduction="none")
        return torch.where(torch.arange(len(each)) == kept[0], each, each.detach())

    net.__class__ = Gated
    judge = OutputJudge()
    (block,) = iterative_inference(
        net, (x, y), forward=network_output, judge=judge, norm_mode="eval"
    ).blocks
    assert block.excluded == (~open_N).double().mean()
    only = iterative_inference(
        net, (x[open_N], y[open_N]), forward=network_output, norm_mode="eval"
    ).blocks[0]
    torch.testing.assert_close(block.cosine, only.cosine, rtol=1e-12, atol=0)
    kept = open_N.nonzero()[:1, 0].tolist()
    (block,) = iterative_inference(
        net,
        (x, y),
        forward=network_output,
        judge=OutputJudge(losses),
        norm_mode="eval",
    ).blocks
    assert block.excluded == pytest.approx(1 - 1 / len(x))


def test_a_block_that_adds_nothing_has_no_cosine_and_gradients_of_zero_have_nan():
    net, batch = net_and_batch()
    with torch.no_grad():
        net.second.weight.zero_()
        net.second.bias.zero_()
    first, second = iterative_inference(net, batch, forward=network_output).blocks
    assert second.cosine is None
    assert second.ratio == 0
    assert second.excluded == 1
    assert first.cosine.isfinite()
    with torch.no_grad():
        net.head.weight.zero_()
    first, _ = iterative_inference(net, batch, forward=network_output).blocks
    assert first.cosine.isnan()
    assert first.excluded == 1


def test_one_example_that_is_nan_makes_the_means_nan():
    net, (x, y) = net_and_batch()
    x[2] = torch.nan
    found = iterative_inference(net, (x, y), forward=network_output, norm_mode="eval")
    assert all(block.cosine.isnan() for block in found.blocks)
    assert found.whole.accuracy.isnan()


class Tokens(nn.Module):
    """Frozen embeddings and positions, additions in place, a norm and a pooled head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.place = nn.Parameter(torch.randn(1, 4, 6))
        self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        h = self.embed(ids) + self.place
        for branch in self.branches:
            out = branch(h)
            out += h
            h = F.relu_(out)
        return self.head(self.norm(h).mean(1))


@pytest.mark.parametrize("num", [1, 5])
def test_frozen_tokens_with_additions_in_place_are_measured(num):
    torch.manual_seed(0)
    net = Tokens().double().requires_grad_(False)
    batch = torch.randint(7, (num, 4)), torch.randint(3, (num,))
    found = iterative_inference(net, batch, forward=network_output)
    h = (net.embed(batch[0]) + net.place).requires_grad_()
    states, branches = [h], []
    for branch in net.branches:
        branches.append(branch(states[-1]))
        states.append(F.relu(branches[-1] + states[-1]))
    outputs = [net.head(net.norm(state).mean(1)) for state in states]
    loss = F.cross_entropy(outputs[-1], batch[1], reduction="sum")
    for block, f, g, out in zip(
        found.blocks,
        branches,
        torch.autograd.grad(loss, states[:3]),
        outputs[1:],
        strict=True,
    ):
        cosine = F.cosine_similarity(f.flatten(1), g.flatten(1), eps=0).mean()
        torch.testing.assert_close(block.cosine, cosine, rtol=1e-9, atol=1e-9)
        own = F.cross_entropy(out, batch[1])
        torch.testing.assert_close(block.readout.loss, own, rtol=1e-9, atol=0)
    dropped = states[0].relu()
    for branch in list(net.branches)[1:]:
        dropped = F.relu(branch(dropped) + dropped)
    own = F.cross_entropy(net.head(net.norm(dropped).mean(1)), batch[1])
    torch.testing.assert_close(found.blocks[0].drop.loss, own, rtol=1e-9, atol=0)


def test_additions_done_as_statements_and_heads_bound_to_the_batch_are_read_out():
    class Statement(TwoBlocks):
        def forward(self, x):
            num, h = x.shape[0], self.stem(x)
            for place in range(2):
                f = 1.0 * self.branch(place, h)
                f.add_(h)
                h = f
            return self.read(h.view(num, -1))

    net, batch = net_and_batch()
    plain = iterative_inference(net, batch, forward=network_output, norm_mode="eval")
    net.__class__ = Statement
    blocks = residual_blocks(net, batch, forward=network_output)
    assert blocks.last is not None
    assert not blocks.together
    found = iterative_inference(
        net, batch, sites=blocks, forward=network_output, norm_mode="eval"
    )
    first = found.blocks[0].readout
    torch.testing.assert_close(
        first.loss, plain.blocks[0].readout.loss, rtol=1e-9, atol=0
    )
    expected = F.cross_entropy(
        net.eval().read(net.stem(batch[0]) + net.branch(0, net.stem(batch[0]))),
        batch[1],
    )
    torch.testing.assert_close(
        found.blocks[1].drop.loss, expected, rtol=1e-9, atol=1e-9
    )


def test_numbers_as_targets_have_losses_and_no_accuracy():
    net, (x, _) = net_and_batch()
    y = torch.randn(len(x), HEAD, dtype=torch.float64)
    judge = OutputJudge(nn.MSELoss())
    found = iterative_inference(net, (x, y), forward=network_output, judge=judge)
    assert found.whole.accuracy is None
    assert found.borderline is None
    assert found.blocks[0].drop.accuracy is None
    assert found.blocks[0].readout.loss.isfinite()


def test_labels_at_positions_and_ignored_ones_are_counted_one_by_one():
    logits = torch.randn(2, 5, 3, dtype=torch.float64)
    labels = logits.argmax(2)
    labels[0, :2] = (labels[0, :2] + 1) % 3
    labels[1, 4] = -100
    found = OutputJudge().classified(nn.Identity(), logits, (logits, labels))
    assert found.counts.sum() == 9
    assert (found.right * found.counts).sum() == 7
    single = torch.tensor([[2.0], [-1.0], [0.3]])
    binary = OutputJudge().classified(
        nn.Identity(), single, (single, torch.tensor([1.0, 1.0, 1.0]))
    )
    assert binary.right.flatten().tolist() == [1, 0, 1]
    torch.testing.assert_close(binary.own[0], single[0].double().sigmoid())


class Plain(FunctionalNet):
    def forward(self, x):
        return self.head(F.relu(self.first(x)))


class Around(FunctionalNet):
    """The output depends on the stem beside the last addition."""

    def forward(self, x):
        h = self.first(x)
        state = h + self.second(h)
        return self.head(state) * self.head(h)


class Wider(FunctionalNet):
    """Two stages of different widths."""

    def __init__(self):
        super().__init__()
        self.wide, self.third = nn.Linear(16, 20), nn.Linear(20, 20)
        self.last = nn.Linear(20, 3)

    def forward(self, x):
        h = self.first(x)
        h = self.wide(h + torch.relu(self.second(h)))
        return self.last(h + torch.tanh(self.third(h)))


@pytest.mark.parametrize(
    ("module", "message", "keys"),
    [
        (Plain, "has no residual addition", set()),
        (Around, "no head of Around fits", {"cosine", "drop"}),
        (Wider, "fits 1 of 2 hidden states, from 007.add on", {"cosine", "readout"}),
    ],
)
def test_what_has_no_meaning_is_said_in_one_line_at_set_up(
    module, message, keys, caplog
):
    trainer = quiet_trainer(max_steps=1, callbacks=[IterativeInferenceMonitor()])
    with caplog.at_level("INFO"):
        trainer.fit(module(), *loaders())
    assert sum(message in record.message for record in caplog.records) == 1
    logged = {key.split("/")[1] for key in trainer.callback_metrics if "/" in key}
    assert keys <= logged
    assert ("readout" in logged) == ("readout" in keys)
    assert "failed" not in logged


def test_another_loss_than_the_trained_one_is_refused_with_the_option():
    class Squared(FunctionalNet):
        def training_step(self, batch, batch_idx):
            wanted = F.one_hot(batch[1], 3).float()
            return F.mse_loss(self(batch[0]), wanted)

    def squares(output, target):
        return (output - F.one_hot(target, 3)).square().mean(1)

    trainer = quiet_trainer(max_steps=1, callbacks=[IterativeInferenceMonitor()])
    with pytest.raises(ValueError, match=r"^inference: .*give loss_fn"):
        trainer.fit(Squared(), *loaders())
    given = IterativeInferenceMonitor(loss_fn=squares)
    trainer = quiet_trainer(max_steps=1, callbacks=[given])
    trainer.fit(Squared(), *loaders())
    assert "inference/failed" not in trainer.callback_metrics
    summed = IterativeInferenceMonitor()
    trainer = quiet_trainer(max_steps=1, callbacks=[summed])

    class Summed(FunctionalNet):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")

    trainer.fit(Summed(), *loaders())
    assert "inference/failed" not in trainer.callback_metrics


def test_no_target_is_refused_at_set_up():
    x = vectors().tensors[0]
    probe = IterativeInferenceMonitor(batch=x[:8])
    trainer = quiet_trainer(max_steps=1, callbacks=[probe])
    with pytest.raises(ValueError, match=r"^inference: .*no target"):
        trainer.fit(FunctionalNet(), *loaders())


def test_one_example_that_is_nan_is_one_warning_and_the_run_goes_on():
    x, y = vectors(16).tensors
    x = x.clone()
    x[3, 2] = torch.nan
    probe = IterativeInferenceMonitor(batch=(x, y), cadence=1, norm_mode="eval")
    trainer = quiet_trainer(max_steps=3, callbacks=[probe])
    with pytest.warns(UserWarning, match="an example is not finite") as warned:
        trainer.fit(FunctionalNet(), *loaders())
    assert sum("the cosine at" in str(w.message) for w in warned) == 1
    cosines = [v for k, v in trainer.callback_metrics.items() if "/cosine/" in k]
    assert all(math.isnan(value) for value in cosines)
    assert trainer.global_step == 3

"""Findings on small networks of every kind, and what they rest on."""

import json
import math
from io import StringIO
from itertools import pairwise

import lightning as L
import pytest
import torch
from rich.console import Console
from small import FunctionalNet, vectors
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_resnorm.diagnose import diagnose
from lit_resnorm.diagnose.gradients import gradient_norms
from lit_resnorm.diagnose.printing import show
from lit_resnorm.diagnose.report import DepthRow, Diagnosis, Finding, Suggestion
from lit_resnorm.diagnose.subject import Subject
from lit_resnorm.diagnose.trends import FAR, trend
from lit_resnorm.measures.losses import loss_of
from lit_resnorm.measures.moments import flow_between_sites
from lit_resnorm.measures.passes.batches import network_output


def loader(num=48, dim=8, num_classes=3):
    return DataLoader(vectors(num, dim, num_classes), batch_size=16, shuffle=True)


def deep(layer, activation, depth=12, width=24, num_outputs=3):
    """A plain net whose weight layers are `layer(in, out)`."""
    sizes = [8] + [width] * depth
    parts = []
    for before, after in pairwise(sizes):
        parts += [layer(before, after), activation()]
    return nn.Sequential(*parts, nn.Linear(width, num_outputs))


def scaled_linear(gain):
    def layer(before, after):
        made = nn.Linear(before, after, bias=False)
        nn.init.normal_(made.weight, std=gain * (2 / before) ** 0.5)
        return made

    return layer


def names(diagnosis, severity=None):
    return [f.name for f in diagnosis.findings if severity in (None, f.severity)]


def test_rows_hold_every_quantity_where_it_has_a_meaning():
    found = diagnose(FunctionalNet(), loader())
    kinds = [row.kind for row in found.rows]
    assert kinds == ["activation", "activation", "addition"]
    for row in found.rows:
        assert (row.activation_rate is None) == (row.kind == "addition")
        assert (row.branch_share is None) == (row.kind == "activation")
        assert 0 <= row.separation <= 1
        assert row.forward > 0
        assert row.backward > 0
    assert [row.depth for row in found.rows] == [1, 2, 2]


def test_gradient_norms_are_those_of_autograd_at_each_site():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU())
    x, y = torch.randn(70, 8), torch.randn(70, 5)
    loss = loss_of(net, net(x), (x, y))
    assert loss.distribution == "gaussian"
    sites = flow_between_sites(net, x).sites
    found = gradient_norms(Subject(net, (x, y), loss, network_output), sites)
    hidden = net[1](net[0](x)).detach().requires_grad_()
    output = net[3](net[2](hidden))
    (grad,) = torch.autograd.grad((output - y).square().sum() / 2, hidden)
    expected = [grad.square().mean().sqrt(), (output - y).square().mean().sqrt()]
    assert [*found.values()] == pytest.approx([e.item() for e in expected], rel=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_pass_in_place_functions_and_frozen_layers(frozen):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = F.relu(self.first(x), inplace=True)
            h = F.relu_(h + x)
            return self.second(h)

    torch.manual_seed(0)
    net = InPlace().requires_grad_(not frozen)
    x, y = torch.randn(10, 8), torch.randint(3, (10,))
    loss = loss_of(net, net(x), (x, y))
    sites = flow_between_sites(net, x).sites
    found = gradient_norms(Subject(net, (x, y), loss, network_output), sites)
    first = net.first(x).detach().relu().requires_grad_()
    added = first + x
    added.retain_grad()
    last = added.relu()
    last.retain_grad()
    F.cross_entropy(net.second(last), y, reduction="sum").backward()
    grads = (first.grad, added.grad, last.grad)
    expected = [float(grad.square().mean().sqrt()) for grad in grads]
    assert [*found.values()] == pytest.approx(expected, rel=1e-5)


def test_gradients_below_float32_are_measured_in_float64():
    net = deep(scaled_linear(1e-5), nn.ReLU, depth=12)
    found = diagnose(net, loader())
    assert 0 < found.rows[0].backward < 1e-40
    assert {"vanishing_activations", "vanishing_gradients"} <= set(names(found))


@pytest.mark.parametrize(("gain", "how"), [(3.0, "exploding"), (0.3, "vanishing")])
def test_weights_of_another_scale_explode_or_vanish_both_ways(gain, how):
    torch.manual_seed(0)
    found = diagnose(deep(scaled_linear(gain), nn.ReLU, depth=14), loader())
    assert {f"{how}_activations", f"{how}_gradients"} <= set(found.pathologies)
    assert found.trends["forward_log_slope"] == pytest.approx(math.log(gain), abs=0.15)
    assert not found.healthy


def test_a_trend_needs_a_line_and_a_far_end():
    far = [math.exp(FAR * 1.01 * place / 9) for place in range(10)]
    near = [math.exp(FAR * 0.99 * place / 9) for place in range(10)]
    depths = range(1, 11)
    assert trend(depths, far).explodes
    assert trend(depths, far[::-1]).vanishes
    assert not trend(depths, near).explodes
    assert not trend(depths, [1.0] * 9 + [1e6]).explodes
    assert trend(depths, [0.0, *far[1:]]).explodes
    assert trend(depths, [*far[:-1], 0.0]).vanishes
    for nothing in ([1.0, 2.0], [0.0] * 10, [math.nan] * 10):
        found = trend(range(len(nothing)), nothing)
        assert not found.explodes
        assert not found.vanishes


def test_dead_layers_are_named():
    net = deep(nn.Linear, nn.ReLU, depth=9)
    nn.init.constant_(net[6].bias, -100.0)
    found = diagnose(net, loader())
    dead = next(f for f in found.findings if f.name == "dead_layers")
    assert dead.severity == "pathology"
    assert dead.evidence["sites"][0] == found.rows[3].site


def test_weights_that_are_not_finite_are_the_whole_verdict():
    net = deep(nn.Linear, nn.ReLU)
    with torch.no_grad():
        net[4].weight[0, 0] = math.nan
    found = diagnose(net, loader())
    assert found.pathologies == ("not_finite",)
    assert "4.weight" in found.findings[0].words
    assert found.curvature is None
    read = json.loads(found.to_json())
    assert read["rows"][-1]["forward"] == "NaN"


def test_activations_that_overflow_are_found():
    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = deep(nn.Linear, nn.ReLU)

        def forward(self, x):
            return self.net(x.exp().exp().exp().exp())

    found = diagnose(Overflowing(), loader())
    assert found.pathologies == ("not_finite",)
    assert "activations" in found.findings[0].words


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_the_terminal_and_has_a_legend(width):
    numbers = (0.5, 0.01, 3.456, 1.0, 0.25, 0.3, 1.234e-05, 23456.0)
    rows = [
        DepthRow(f"{k:03d}.net.encoder.layers.layer_{k}.add", "addition", k, *numbers)
        for k in range(1, 5)
    ]
    advice = (Suggestion("less", "a paper", "P"),)
    findings = [
        Finding(name, "pathology", f"it has {name}", suggestions=advice)
        for name in ("signal", "noise")
    ]
    report = Diagnosis(
        *("Net", "pathological", tuple(findings), tuple(rows), None, None, {}),
        {"num_examples": 8},
    )
    console = Console(width=width, file=StringIO())
    show(report, console)
    lines = console.file.getvalue().splitlines()
    head = next(line for line in lines if "depth" in line)
    assert head.split() == [
        *("depth", "site", "rate", "dead", "rank", "separation", "chi", "share"),
        *("forward", "backward"),
    ]
    table = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [len(cells) for cells in table] == [10] * 4
    assert [cells[1][:4] for cells in table] == ["001.", "002.", "003.", "004."]
    assert all(cells[1].endswith("add") for cells in table)
    assert max(map(len, lines)) <= width
    words = " ".join(console.file.getvalue().split())
    assert "rank effective rank of the channels" in words
    assert "it has noise (see docs/values.md#noise)" in words
    assert words.count("try: less") == 1
    assert "try: what is advised above" in words


def test_a_shallow_network_is_neither_healthy_nor_ill():
    found = diagnose(deep(nn.Linear, nn.ReLU, depth=1), loader())
    assert found.status == "undetermined"
    assert found.verdict == "undetermined (signal and noise, rate not judged)"
    assert not found.healthy
    assert found.pathologies == ()
    assert "fewer than 8" in found.findings[0].words
    assert found.curvature.lambda_max > 0


def test_a_batch_of_one_is_undetermined():
    torch.manual_seed(0)
    net = deep(scaled_linear(1.0), nn.ReLU)
    found = diagnose(net, loader(), num_examples=1)
    assert found.status == "undetermined"
    assert any("one example" in f.words for f in found.findings)


def test_a_linear_net_gets_a_table_of_its_modules():
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(10)])
    found = diagnose(net, loader(num_classes=8))
    assert len(found.rows) == 10
    assert found.status in ("undetermined", "pathological")


def test_a_network_without_trainable_parameters_has_a_table_and_no_bound():
    net = deep(nn.Linear, nn.ReLU).requires_grad_(False)
    found = diagnose(net, loader(), check_rate=True)
    assert found.curvature is None
    assert "no trainable parameter" in " ".join(f.words for f in found.findings)
    assert all(row.backward > 0 for row in found.rows)


def test_a_frozen_backbone_is_measured_and_only_the_head_has_curvature():
    torch.manual_seed(0)
    net = deep(nn.Linear, nn.ReLU)
    net[:-1].requires_grad_(False)
    found = diagnose(net, loader())
    assert found.curvature.lambda_max > 0
    assert found.rows[0].backward > 0


def test_an_output_that_is_no_logits_still_gets_the_table():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = deep(nn.Linear, nn.ReLU)

        def forward(self, x):
            h = self.net(x)
            return {"mean": h, "log_scale": h.square()}

    found = diagnose(Pair(), loader(), rate=0.1, check_rate=True)
    assert {"no_loss", "no_curvature"} <= set(names(found, "note"))
    assert all(row.backward > 0 for row in found.rows)


def test_tokens_are_judged_at_every_position():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(11, 16)
            self.layers = nn.Sequential(
                *[part for _ in range(9) for part in (nn.Linear(16, 16), nn.GELU())]
            )
            self.head = nn.Linear(16, 5)

        def forward(self, tokens):
            return self.head(self.layers(self.table(tokens)))

    tokens = torch.randint(11, (32, 7))
    labels = torch.randint(5, (32, 7))
    labels[:, 5:] = -100
    data = DataLoader(TensorDataset(tokens, labels), batch_size=8)
    found = diagnose(Tagger(), data, rate=0.01)
    assert found.curvature.lambda_max > 0
    assert found.settings["loss"] == "cross entropy"
    assert len(found.rows) == 9


@pytest.mark.parametrize(
    ("num_outputs", "target", "expected"),
    [
        (1, lambda n: torch.randint(2, (n, 1)).float(), "gaussian"),
        (1, lambda n: torch.randint(2, (n,)), "bernoulli"),
        (4, lambda n: torch.randn(n, 4), "gaussian"),
        (4, lambda n: torch.randn(n, 4).softmax(1), "softmax"),
        (4, lambda n: torch.randint(4, (n,)), "softmax"),
    ],
)
def test_output_and_target_tell_the_loss(num_outputs, target, expected):
    net = nn.Linear(8, num_outputs)
    x = torch.randn(6, 8)
    batch = x, target(6)
    loss = loss_of(net, net(x), batch)
    assert loss.distribution == expected
    assert loss.of_examples(net, net(x), batch).shape == (6,)


def test_a_given_loss_and_dict_batches_are_taken():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = deep(nn.Linear, nn.ReLU)

        def forward(self, features):
            return self.net(features)

    rows = [
        {"features": torch.randn(16, 8), "labels": torch.randint(3, (16,))}
        for _ in range(2)
    ]
    plain = diagnose(Named(), rows, num_examples=32)
    assert plain.settings["num_examples"] == 32
    given = diagnose(Named(), rows, loss_fn=lambda out, y: F.cross_entropy(out, y) * 2)
    assert given.settings["loss"] == "the given loss_fn"


@pytest.mark.parametrize("kind", [FunctionalNet, lambda: deep(nn.Linear, nn.ReLU)])
def test_nothing_of_module_and_random_state_changes(kind):
    torch.manual_seed(0)
    module = kind().train()
    module[0].eval() if isinstance(module, nn.Sequential) else module.norm.eval()
    parameters = [*module.parameters()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    modes = [m.training for m in module.modules()]
    state = {key: value.clone() for key, value in module.state_dict().items()}
    before = torch.get_rng_state()
    diagnose(module, loader(), rate=0.1, check_rate=True)
    assert torch.equal(before, torch.get_rng_state())
    assert [m.training for m in module.modules()] == modes
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key])
    assert all(bool((p.grad == 1).all()) for p in module.parameters())


def test_equal_calls_give_equal_reports():
    torch.manual_seed(0)
    module = FunctionalNet()
    assert diagnose(module, loader()).to_json() == diagnose(module, loader()).to_json()


def test_a_data_module_gives_its_probe_examples():
    class Data(L.LightningDataModule):
        def setup(self, stage):
            self.ready = stage

        def val_dataloader(self):
            assert self.ready == "fit"
            return loader()

    assert diagnose(FunctionalNet(), Data()).settings["num_examples"] == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 0}, "num_examples is 0"),
        ({"rate": -1.0}, "rate is -1"),
        ({"output": "poisson"}, "poisson"),
        ({"norm_mode": "test"}, "norm_mode is 'test'"),
    ],
)
def test_options_that_cannot_be_right_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        diagnose(FunctionalNet(), loader(), **options)


@pytest.mark.parametrize(
    "net", [nn.Identity(), nn.Sequential(nn.Identity()), nn.Sequential()]
)
@pytest.mark.parametrize("rate", [None, 0.1])
def test_a_network_that_does_nothing_is_refused(net, rate):
    with pytest.raises(ValueError, match=r"does nothing with its input.*network"):
        diagnose(net, loader(), rate=rate)


class Owner(FunctionalNet):
    """Gives the losses of the examples itself."""

    def losses(self, output, target):
        return F.cross_entropy(output, target, reduction="none")


@pytest.mark.parametrize("options", [{}, {"rate": 0.1}, {"check_rate": True}])
@pytest.mark.parametrize(
    ("kind", "first", "told"),
    [
        (FunctionalNet, 5, "from 5 to 7"),
        (FunctionalNet, -1, "from -1 to 1"),
        (Owner, 5, "from 5 to 7"),
    ],
)
def test_labels_that_are_no_classes_of_the_output_are_refused(
    options, kind, first, told
):
    labels = torch.tensor([first, first + 1, -100, first + 2]).repeat(8)
    data = DataLoader(TensorDataset(torch.randn(32, 8), labels), 8)
    message = f"labels go {told}, and the output has 3 classes: give"
    with pytest.raises(ValueError, match=message):
        diagnose(kind(), data, **options)


def test_labels_of_one_logit_are_0_and_1():
    labels = torch.arange(32) % 3
    data = DataLoader(TensorDataset(torch.randn(32, 8), labels), 8)
    with pytest.raises(ValueError, match="labels go from 0 to 2, and the output has"):
        diagnose(deep(nn.Linear, nn.ReLU, num_outputs=1), data)


def test_an_output_of_one_number_is_refused():
    class Summed(nn.Linear):
        def forward(self, x):
            return super().forward(x).sum()

    with pytest.raises(ValueError, match="output of Summed is a single number"):
        diagnose(Summed(8, 3), loader())


def test_an_argument_that_is_missing_in_a_batch_names_the_option_forward():
    class Named(nn.Module):
        def forward(self, features):
            return features

    rows = [{"x": torch.randn(4, 8), "labels": torch.randint(3, (4,))}]
    with pytest.raises(ValueError, match=r"needs features.*: give forward or"):
        diagnose(Named(), rows)


def test_a_loader_without_examples_is_refused():
    with pytest.raises(ValueError, match="holds no example"):
        diagnose(FunctionalNet(), [])

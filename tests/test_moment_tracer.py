"""MomentTracer: what it logs, and on which networks."""

import math

import lightning as L
import pytest
import torch
from small import FunctionalNet, loaders, quiet_trainer, vectors
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_resnorm.measures.moments import signal_and_noise
from lit_resnorm.modules import LitBNResNet
from lit_resnorm.nets import Style, stacked_net
from lit_resnorm.quantities import PLACES
from lit_resnorm_callbacks import MomentTracer

BN_FF = {
    "style": Style(norm="batch"),
    "residual": False,
    "layers_per_block": 1,
}


class Deep(FunctionalNet):
    """A net deep enough for a verdict."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


class Notebook(L.pytorch.loggers.Logger):
    """A logger that keeps rows, tables, figures and verdicts."""

    name = version = "notebook"

    def __init__(self):
        super().__init__()
        self.rows, self.tables, self.images, self.verdicts = [], {}, {}, {}

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_table(self, key, *, columns, data, step):
        self.tables[key, step] = columns, data

    def log_image(self, key, images, step):
        self.images[key] = images

    def log_verdict(self, key, word):
        self.verdicts[key] = word


def validated(module, **options):
    L.seed_everything(0, verbose=False)
    notebook = Notebook()
    tracer = MomentTracer(**options)
    trainer = quiet_trainer(callbacks=[tracer], logger=notebook)
    trainer.validate(module, loaders()[1], verbose=False)
    return {k: float(v) for k, v in trainer.callback_metrics.items()}, notebook


def test_every_documented_key_is_logged_and_no_other():
    torch.manual_seed(0)
    style = Style(norm="batch")
    module = Deep(stacked_net((8,), 3, depth=6, width=16, order="pre", style=style))
    values, _ = validated(module)
    values.pop("val")
    quantities = {key.split("/")[1] for key in values}
    documented = {
        word.strip(":,").split("/")[1]
        for word in MomentTracer.__doc__.split()
        if word.startswith("moments/")
    }
    assert quantities == documented - {"failed"}
    assert {key.count("/") for key in values} == {1, 2}


def test_logged_values_are_the_measures_over_the_probe_batch():
    module = FunctionalNet()
    values, _ = validated(module, num_examples=20)
    x = next(iter(DataLoader(vectors(40, seed=1), 20)))[0]
    profile = signal_and_noise(module, x)
    for site in profile.sites[1:]:
        logged = values[f"moments/sensitivity/{site.name}"]
        assert logged == pytest.approx(site.sensitivity.item(), rel=1e-6)
    assert values["moments/pathology"] == -1
    assert "moments/log_slope" not in values


def test_a_deep_batch_norm_net_is_told_to_explode():
    torch.manual_seed(0)
    values, notebook = validated(
        Deep(stacked_net((8,), 3, depth=16, width=64, **BN_FF))
    )
    assert values["moments/pathology"] == 2
    assert notebook.verdicts == {"moments/pathology": "snr"}
    assert values["moments/log_slope"] == pytest.approx(0.2, abs=0.05)
    assert values["moments/log_goodness"] > 0.98


def test_a_deep_plain_net_is_told_to_collapse():
    torch.manual_seed(0)
    options = {**BN_FF, "style": Style()}
    values, notebook = validated(
        Deep(stacked_net((8,), 3, depth=60, width=32, **options))
    )
    assert values["moments/pathology"] == 1
    assert notebook.verdicts == {"moments/pathology": "signal"}


def test_tables_and_figures_are_by_depth():
    torch.manual_seed(0)
    module = Deep(stacked_net((8,), 3, depth=9, width=16, **BN_FF))
    notebook = Notebook()
    tracer = MomentTracer(cadence=4)
    trainer = quiet_trainer(max_steps=8, callbacks=[tracer], logger=notebook)
    trainer.fit(module, *loaders())
    columns, rows = notebook.tables["moments/by_depth", 4]
    assert columns[:4] == ["site", "kind", "effective_rank", "sensitivity"]
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert len(rows) == 18
    logged = {key.removeprefix("moments/") for _, row in notebook.rows for key in row}
    scalars = {"epoch", "seconds", "pathology", "log_slope", "log_goodness"}
    scalars |= {"power_exponent", "power_goodness"}
    places = ("first", "middle", "last", "worst")
    scalars |= {f"{q}/{p}" for q in ("effective_rank", "sensitivity") for p in places}
    assert logged - {"loss", "val"} == scalars
    names = ("sensitivity", "effective_rank", "growth")
    assert {*notebook.images} == {f"moments/{name}" for name in names}


def test_a_pattern_chooses_sites_and_one_that_matches_none_names_them():
    values, _ = validated(FunctionalNet(), sites="norm")
    sites = {key.split("/")[2] for key in values if key.count("/") == 2}
    assert sites - {*PLACES} == {"001.norm"}
    with pytest.raises(ValueError, match=r"'nowhere'.*001\.norm"):
        validated(FunctionalNet(), sites="nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_directions": 0}, "num_directions is 0"), ({"num_examples": 0}, "num_exam")],
)
def test_options_that_cannot_be_right_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MomentTracer(**options)


class WithDistances(FunctionalNet):
    def forward(self, x):
        h = F.relu(self.norm(self.first(x)))
        return self.head(F.relu(torch.cdist(h, torch.eye(16))))


def test_an_operation_without_a_rule_is_named_once_and_the_rest_is_logged():
    tracer = MomentTracer(cadence=1)
    trainer = quiet_trainer(max_steps=3, callbacks=[tracer])
    with pytest.warns(UserWarning, match="cdist can't be differentiated") as warned:
        trainer.fit(WithDistances(), *loaders())
    assert sum("cdist" in str(w.message) for w in warned) == 1
    values = trainer.callback_metrics
    assert "moments/failed" not in values
    first, last = (
        k for k in values if k.startswith("moments/sensitivity") and "relu" in k
    )
    assert math.isfinite(values[first])
    assert math.isnan(values[last])


def test_out_of_memory_spreads_the_batch_over_more_passes():
    tracer = MomentTracer(num_examples=4)
    assert [tracer.smaller() for _ in range(3)] == [True, True, False]
    assert not MomentTracer(norm_mode="train").smaller()


def test_a_net_with_nothing_to_measure_logs_nothing_and_fails_nothing():
    class Linear(FunctionalNet):
        def forward(self, x):
            return self.head(self.second(self.first(x)))

    values, _ = validated(Linear())
    assert set(values) == {"moments/seconds", "val"}


class Tokens(FunctionalNet):
    """A small language model on integers."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(9, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, ids):
        return self.head(self.block(self.tokens(ids)).mean(1))


def test_tokens_and_attention_are_measured():
    torch.manual_seed(0)
    batch = torch.randint(9, (12, 5)), torch.zeros(12, dtype=torch.long)
    trainer = quiet_trainer(callbacks=[MomentTracer(batch=batch)])
    rows = DataLoader([*zip(*batch, strict=True)], 12)
    trainer.validate(Tokens(), rows, verbose=False)
    chi = [v for k, v in trainer.callback_metrics.items() if "/sensitivity/" in k]
    assert len(chi) > 3
    assert all(math.isfinite(v) for v in chi)


def theory_and_measured(figure, panel=0):
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[panel].lines}
    theory = lines.pop("theory, random weights")
    (measured,) = lines.values()
    return torch.as_tensor(theory), torch.as_tensor(measured)


def test_figures_show_the_theory_of_a_variant_that_has_one():
    L.seed_everything(0, verbose=False)
    probe = MomentTracer(num_examples=64, batch=(torch.randn(64, 256),), log="all")
    module = LitBNResNet(20, 256, (256,), 3)
    quiet_trainer(callbacks=[probe]).validate(
        module, DataLoader([(torch.randn(256), 0)], 1), verbose=False
    )
    figures = probe.figures()
    # Both are asymptotic in depth: the first units are left out.
    theory, measured = theory_and_measured(figures["moments/branch_share"])
    torch.testing.assert_close(theory[5:], measured[5:], rtol=0.25, atol=0.0)
    theory, measured = theory_and_measured(figures["moments/growth"])
    assert theory.log()[-1] == pytest.approx(float(measured.log()[-1]), rel=0.25)
    theory, measured = theory_and_measured(figures["moments/delta_phi"])
    torch.testing.assert_close(theory, measured, rtol=0.05, atol=0.0)


def test_figures_of_other_networks_show_no_theory():
    probe = MomentTracer(num_examples=16)
    quiet_trainer(callbacks=[probe]).validate(
        FunctionalNet(), loaders()[1], verbose=False
    )
    labels = [
        line.get_label() for f in probe.figures().values() for line in f.axes[0].lines
    ]
    assert labels
    assert "theory, random weights" not in labels

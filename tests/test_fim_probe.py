"""The Fisher probe in a Trainer."""

import math
import re
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers.logger import DummyLogger
from small import FunctionalNet, loaders, quiet_trainer, vectors
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_resnorm import modules
from lit_resnorm.measures.fisher import fisher_spectrum
from lit_resnorm.measures.passes.batches import network_output
from lit_resnorm.measures.passes.untouched import identity
from lit_resnorm.measures.rates import largest_rate
from lit_resnorm.quantities.explanations import reference
from lit_resnorm_callbacks import Cadence, FIMEigenvalueProbe
from lit_resnorm_callbacks.fim_eigenvalues import targets_of

X, Y = vectors(40, seed=1).tensors


def fit(probe, module=None, steps=4, **options):
    L.seed_everything(7, verbose=False)
    module = module or FunctionalNet()
    trainer = quiet_trainer(max_steps=steps, callbacks=[probe], **options)
    trainer.fit(module, *loaders())
    return {k: float(v) for k, v in trainer.callback_metrics.items()}, module


def test_logged_values_are_those_of_the_function_on_the_probe_batch():
    values, module = fit(FIMEigenvalueProbe(num_examples=24))
    found = fisher_spectrum(module, X[:24], per_layer=True)
    assert values["fim/lambda_max"] == pytest.approx(found.max, rel=1e-5)
    assert values["fim/trace"] == pytest.approx(found.trace, rel=1e-5)
    assert values["fim/lambda_mean"] == pytest.approx(found.mean, rel=1e-5)
    assert values["fim/saturated"] == 0
    assert values["fim/rate"] == pytest.approx(1e-2)
    for rank in range(1, 11):
        expected = float(found.eigenvalues[rank - 1])
        assert values[f"fim/top/{rank:02d}"] == pytest.approx(expected, rel=1e-5)
    for site, layer in found.layers.items():
        assert values[f"fim/trace/{site}"] == pytest.approx(layer.trace, rel=1e-5)
        assert values[f"fim/lambda_max/{site}"] == pytest.approx(layer.max, rel=1e-4)


class Untracked(FunctionalNet):
    """Its batch norm takes the batch's statistics in eval mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16, track_running_stats=False)


def test_coupled_rows_are_measured_together_on_one_rank():
    probe = FIMEigenvalueProbe(num_examples=16, norm_mode="eval")
    values, module = fit(probe, Untracked())
    found = fisher_spectrum(module, X[:16], norm_mode="eval")
    assert values["fim/lambda_max"] == pytest.approx(found.max, rel=1e-4)


class Noting(FIMEigenvalueProbe):
    """Writes down why it refuses: of two processes that fail, one is ended early."""

    def _prepare(self, trainer, module):
        try:
            super()._prepare(trainer, module)
        except ValueError as error:
            path = Path(trainer.default_root_dir, f"{trainer.global_rank}.txt")
            path.write_text(str(error))
            raise


@pytest.mark.ddp
def test_coupled_rows_on_several_ranks_are_refused_before_the_first_step(tmp_path):
    options = {"default_root_dir": tmp_path, "devices": 2, "strategy": "ddp_fork"}
    with pytest.raises(Exception):  # noqa: B017, PT011 - torch's, of either process
        fit(Noting(num_examples=16, norm_mode="eval"), Untracked(), **options)
    reasons = {path.read_text() for path in tmp_path.glob("*.txt")}
    assert len(reasons) == 1
    assert "fim: the examples of Untracked depend on each other" in reasons.pop()


class LogitScale(FunctionalNet):
    """Computes with a parameter without dimensions, as CLIP does."""

    def __init__(self, shape=()):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full(shape, 0.7))

    def forward(self, x):
        return super().forward(x) * self.logit_scale.exp()


def test_a_parameter_without_dimensions_is_measured_as_one_with_a_single_number():
    found = []
    for shape in ((), (1,)):
        torch.manual_seed(0)
        found.append(fit(FIMEigenvalueProbe(num_examples=16), LogitScale(shape))[0])
    values, expected = found
    assert values["fim/lambda_max"] == pytest.approx(expected["fim/lambda_max"])
    assert values["fim/trace"] == pytest.approx(expected["fim/trace"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("phase", "parameter 'phase' is of"), ("scripted", "'scripted' is TorchScript's")],
)
def test_what_no_fisher_matrix_reads_is_refused_before_the_first_step(name, reason):
    module = FunctionalNet()
    if name == "phase":
        module.phase = nn.Parameter(torch.randn(2, dtype=torch.complex64))
    else:
        with pytest.warns(FutureWarning):
            module.scripted = torch.jit.script(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=f"^fim: .*{reason}"):
        fit(FIMEigenvalueProbe(), module)


def test_sites_select_layers_and_a_pattern_that_matches_none_is_refused():
    values, _ = fit(FIMEigenvalueProbe(sites="first|head", num_examples=16))
    sites = [key for key in values if re.fullmatch(r"fim/trace/\d+\..+", key)]
    assert [site.rpartition(".")[2] for site in sites] == ["first", "head"]
    with pytest.raises(
        ValueError, match=r"^fim: no layer matches 'attention'.* 000.first"
    ):
        fit(FIMEigenvalueProbe(sites="attention"))


def test_coupled_examples_are_logged_under_another_name():
    values, module = fit(
        FIMEigenvalueProbe(norm_mode="train", num_examples=8, num_eigenvalues=1)
    )
    found = fisher_spectrum(module, X[:8], norm_mode="train", num_eigenvalues=1)
    assert values["fim_batch/lambda_max"] == pytest.approx(found.max, rel=1e-4)
    assert not [key for key in values if key.startswith("fim/")]


def test_eigenvectors_are_kept_and_the_next_measurement_takes_fewer_products(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(
        "lit_resnorm.measures.fisher.routes.matrix_is_cheaper", lambda *_: False
    )

    def probe():
        return FIMEigenvalueProbe(num_eigenvalues=2, per_layer=False, cadence=2)

    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=4)
    L.seed_everything(7, verbose=False)
    trainer = quiet_trainer(
        max_steps=4, callbacks=[probe(), checkpoint], enable_checkpointing=True
    )
    trainer.fit(FunctionalNet(lr=1e-5), *loaders())
    trainer = quiet_trainer(max_steps=6, callbacks=[probe()])
    module = FunctionalNet(lr=1e-5)
    trainer.fit(module, *loaders(), ckpt_path=tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt")["callbacks"]
    start = saved[probe().state_key]["vectors"]
    assert start.shape[1] == 2
    cold = fisher_spectrum(module, X, num_eigenvalues=2)
    warm = fisher_spectrum(module, X, num_eigenvalues=2, start=start)
    assert warm.num_products < cold.num_products
    torch.testing.assert_close(warm.eigenvalues, cold.eigenvalues, rtol=2e-5, atol=0.0)
    logged = float(trainer.callback_metrics["fim/lambda_max"])
    assert logged == pytest.approx(cold.max, rel=2e-5)


class Other(FunctionalNet):
    """Another head and loss."""

    def __init__(self, loss, width):
        super().__init__()
        self.loss = loss
        self.head = nn.Linear(16, width)

    def training_step(self, batch, batch_idx):
        out, labels = self(batch[0]), batch[1]
        if self.loss == "mse":
            return (out - F.one_hot(labels, 3)).square().sum(1).mean() / 2
        if isinstance(self.loss, nn.HuberLoss):
            return self.loss(out, F.one_hot(labels, 3).float())
        if out.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(out[:, 0], labels.float())
        return F.cross_entropy(out, labels)

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize(
    ("loss", "width", "output"),
    [
        (None, 3, "softmax"),
        (None, 1, "bernoulli"),
        ("mse", 3, "gaussian"),
        ("cross_entropy", 3, "softmax"),
        (nn.CrossEntropyLoss(), 3, "softmax"),
    ],
    ids=str,
)
def test_the_output_is_read_off_the_modules_loss_or_its_logits(loss, width, output):
    values, module = fit(FIMEigenvalueProbe(num_examples=12), Other(loss, width))
    found = fisher_spectrum(module, X[:12], output=output)
    assert values["fim/lambda_max"] == pytest.approx(found.max, rel=1e-4)


def test_a_loss_that_tells_no_distribution_is_refused_before_training():
    with pytest.raises(ValueError, match="'auto' and the module's loss is HuberLoss"):
        fit(FIMEigenvalueProbe(), Other(nn.HuberLoss(), 3))
    values, module = fit(
        FIMEigenvalueProbe(output="gaussian", loss_scale=2 / 3, num_examples=12),
        Other(nn.HuberLoss(), 3),
    )
    found = fisher_spectrum(module, X[:12], output="gaussian")
    assert values["fim/lambda_max"] == pytest.approx(found.max * 2 / 3, rel=1e-4)


class Heads(FunctionalNet):
    def forward(self, x):
        return {"logits": super().forward(x)}

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])["logits"], batch[1])

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Heads(), "is a dict; a Fisher matrix needs a tensor"),
        (FunctionalNet().requires_grad_(False), "no trainable parameter"),
    ],
)
def test_a_module_that_can_not_be_read_is_refused_before_training(module, message):
    with pytest.raises(ValueError, match=message):
        fit(FIMEigenvalueProbe(), module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "poisson"}, "output is 'poisson'"),
        ({"num_eigenvalues": -2}, "num_eigenvalues is -2"),
        ({"num_eigenvalues": "all"}, "num_eigenvalues is 'all'"),
        ({"tol": 2.0}, "tol is 2.0"),
        ({"loss_scale": 0}, "loss_scale is 0"),
        ({"loss_scale": math.nan}, "loss_scale is nan"),
        ({"class_weights": [1.0, -2.0]}, "class_weights is .* may be negative"),
        ({"class_weights": [0.0, 0.0]}, "class_weights is .* must be positive"),
        ({"num_eigenvalues": 2.5}, "num_eigenvalues is 2.5; it must be a whole"),
        ({"memory": 0}, "memory is 0"),
    ],
)
def test_options_that_can_not_be_right_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FIMEigenvalueProbe(**options)


class Tokens(L.LightningModule):
    """Predicts a label at each position; position labels of -1 are ignored."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        h = self.embed(tokens)
        return self.head(h + self.attend(h, h, h)[0])

    def training_step(self, batch, batch_idx):
        logits = self(batch["tokens"])
        return F.cross_entropy(logits.mT, batch["labels"], ignore_index=-1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_dict_batches_with_ignored_positions_and_class_weights():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 6, (12, 5), generator=generator)
    labels = torch.randint(-1, 3, (12, 5), generator=generator)
    data = [{"tokens": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
    probe = FIMEigenvalueProbe(
        ignore_index=-1, class_weights=[1.0, 2.0, 0.5], num_examples=12
    )
    module = Tokens()
    trainer = quiet_trainer(max_steps=2, callbacks=[probe])
    loader = DataLoader(data, batch_size=4)
    trainer.fit(module, loader, loader)
    weights = torch.tensor([1.0, 2.0, 0.5])[labels.clamp_min(0)] * (labels >= 0)
    found = fisher_spectrum(module, tokens, weights=weights)
    logged = float(trainer.callback_metrics["fim/lambda_max"])
    assert logged == pytest.approx(found.max, rel=1e-4)


def test_weights_that_diverge_are_logged_as_nan_and_training_goes_on():
    class Diverging(FunctionalNet):
        def on_train_batch_end(self, *_):
            with torch.no_grad():
                self.first.weight.fill_(float("nan"))

    values, module = fit(FIMEigenvalueProbe(cadence=2), Diverging())
    assert math.isnan(values["fim/lambda_max"])
    assert math.isnan(values["fim/trace"])
    assert module.trainer.global_step == 4


def test_out_of_memory_is_tried_again_with_a_quarter(monkeypatch):
    tried = []

    def scarce(model, x, *, memory, **options):
        tried.append(memory)
        if memory > 2**26:
            raise torch.OutOfMemoryError("no memory")
        return fisher_spectrum(model, x, memory=memory, **options)

    probe = FIMEigenvalueProbe(cadence=Cadence(100, at_end=False), num_examples=8)
    base = super(FIMEigenvalueProbe, probe)
    monkeypatch.setattr(probe, "affordable", base.affordable)
    monkeypatch.setattr("lit_resnorm_callbacks.fim_eigenvalues.fisher_spectrum", scarce)
    values, _ = fit(probe)
    assert tried == [2**28, 2**26]
    assert values["fim/lambda_max"] > 0


def test_zero_eigenvalues_mean_trace_and_mean_alone():
    values, _ = fit(FIMEigenvalueProbe(num_eigenvalues=0, num_examples=8))
    assert values["fim/trace"] > 0
    assert not [key for key in values if "lambda_max" in key or "rate" in key]


@pytest.mark.parametrize("sgd", [True, False])
def test_one_warning_comes_when_the_rate_passes_its_bound(sgd):
    class Fast(FunctionalNet):
        def configure_optimizers(self):
            if sgd:
                return torch.optim.SGD(self.parameters(), 1e3)
            return torch.optim.Adam(self.parameters(), 1e3)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(FIMEigenvalueProbe(cadence=Cadence(1, at_end=False)), Fast(), steps=1)
    warned = [w for w in caught if "times its bound" in str(w.message)]
    assert len(warned) == int(sgd)
    if sgd:
        assert "more than any net here held out" in str(warned[0].message)
        assert reference("rate_above_bound") in str(warned[0].message)


def test_the_optimizers_kind_is_logged_and_only_gradient_descent_has_a_bound():
    values, _ = fit(FIMEigenvalueProbe(), FunctionalNet())
    assert values["fim/optimizer_kind"] == 0
    assert values["fim/rate"] == pytest.approx(1e-2)
    assert not {"fim/rate_bound", "fim/rate_ratio"} & values.keys()
    net = FunctionalNet()
    net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), 1e-2)
    values, _ = fit(FIMEigenvalueProbe(), net)
    assert values["fim/optimizer_kind"] == 1
    assert values["fim/saturated"] == 0
    ratio = values["fim/rate"] / values["fim/rate_bound"]
    assert values["fim/rate_ratio"] == pytest.approx(float(ratio))


def test_a_saturated_output_is_flagged_and_has_no_bound():
    net = FunctionalNet()
    net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), 1e-2)
    with torch.no_grad():
        net.head.bias[0] = 1e3
    values, _ = fit(FIMEigenvalueProbe(cadence=Cadence(100, at_end=False)), net)
    assert values["fim/lambda_max"] == 0
    assert values["fim/saturated"] == 1
    assert not {"fim/rate_bound", "fim/rate_ratio"} & values.keys()


def test_the_probe_works_with_compiled_autocast_accumulated_and_frozen_modules():
    module = FunctionalNet()
    module.first.requires_grad_(False)
    module.compile(backend="eager")
    values, module = fit(
        FIMEigenvalueProbe(num_examples=16),
        module,
        precision="bf16-mixed",
        accumulate_grad_batches=3,
    )
    found = fisher_spectrum(module, X[:16])
    assert found.num_parameters == sum(
        p.numel() for p in module.parameters() if p.requires_grad
    )
    assert values["fim/lambda_max"] == pytest.approx(found.max, rel=1e-4)


REGRESSION = torch.Generator().manual_seed(0)
INPUTS = torch.randn(30, 4, generator=REGRESSION).double()
TARGETS = torch.randn(30, 1, generator=REGRESSION).double()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.3},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_descent_on_linear_regression_diverges_just_above_the_bound(options):
    net = nn.Linear(4, 1, bias=False).double()
    curvature = fisher_spectrum(net, INPUTS, output="gaussian").max

    def distance(factor):
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0, **options)
        rate = largest_rate([optimizer], curvature)
        optimizer.param_groups[0]["lr"] = factor * rate.bound
        nn.init.ones_(net.weight)
        for _ in range(3000):
            optimizer.zero_grad()
            loss = (net(INPUTS) - TARGETS).square().sum() / (2 * len(INPUTS))
            loss.backward()
            optimizer.step()
        return float(net.weight.detach().norm())

    assert distance(1.02) > 1e6
    assert distance(0.98) < 10


def test_of_several_groups_the_largest_rate_counts():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [
        {"params": first.parameters(), "lr": 0.1},
        {"params": second.parameters(), "lr": 0.3, "momentum": 0.5},
    ]
    rate = largest_rate([torch.optim.SGD(groups, lr=1.0)], 4.0)
    assert rate == (0.3, 2 * 1.5 / 4.0, True)
    assert rate.ratio == pytest.approx(0.3 / 0.75)
    adam = largest_rate([torch.optim.Adam(first.parameters(), lr=0.2)], 4.0)
    assert adam == (0.2, None, False)
    assert adam.ratio is None
    assert largest_rate([], 4.0) is None


def test_measure_needs_no_trainer():
    module = FunctionalNet()
    values = FIMEigenvalueProbe().measure(module, (X[:8], Y[:8]), identity)
    assert float(values["rate_bound"]) == 2 / float(values["lambda_max"])


@pytest.mark.parametrize("kind", ["LitMLP", "LitResNet", "LitResNetBN"])
def test_no_descent_of_small_nets_below_the_bound_diverges(kind):
    torch.manual_seed(0)
    net = getattr(modules, kind)(3, 16, in_shape=(16,), num_classes=2, loss="mse").net
    x = torch.randn(24, 16)
    targets = torch.randn(24, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    bound = fisher_spectrum(net, x, output="gaussian", num_eigenvalues=1).rate_bound
    optimizer.param_groups[0]["lr"] = 0.98 * bound
    net.train()
    losses = []
    for _ in range(300):
        loss = (net(x) - targets).square().sum() / (2 * len(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(math.isfinite(value) for value in losses)


def test_a_config_file_gives_functions_and_not_their_names():
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.Callback, "probe")
    path = "lit_resnorm_callbacks.FIMEigenvalueProbe"
    probe = parser.instantiate(parser.parse_args([f"--probe={path}"]))["probe"]
    assert probe.likelihood.target_fn is targets_of
    assert probe.forward_fn is network_output


class Histograms:
    """What TensorBoard's writer offers of histograms, kept."""

    def __init__(self):
        self.kept = {}

    def add_histogram(self, key, values, global_step):
        self.kept.setdefault(key, {})[global_step] = values


class HistogramLogger(DummyLogger):
    def __init__(self):
        super().__init__()
        self.histograms = Histograms()

    @property
    def experiment(self):
        return self.histograms


def test_the_spectrum_is_a_histogram_where_a_logger_takes_one():
    logger = HistogramLogger()
    fit(FIMEigenvalueProbe(cadence=2, spectrum="always"), logger=logger)
    kept = logger.histograms.kept["histograms/fim/spectrum_log10"]
    values, _ = fit(FIMEigenvalueProbe(cadence=2, spectrum="always"))
    assert sorted(kept) == [0, 2, 4]
    # Lightning keeps logged values in single precision.
    logged = values["fim/lambda_max"]
    assert 10 ** kept[4].max() == pytest.approx(logged, rel=2**-23)
    assert np.isfinite(kept[0]).all()

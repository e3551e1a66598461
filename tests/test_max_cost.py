"""What a measurement costs is counted before it is paid, and less done if too much."""

import logging
import math
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small import FunctionalNet, loaders, quiet_trainer, vectors
from test_probe_contract import Recorder, every_probe, fit, validated
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lit_resnorm.measures.fisher import (
    FisherForm,
    FisherOptions,
    affordable_form,
    fisher_spectrum,
)
from lit_resnorm_callbacks import (
    ActivationRateMonitor,
    FIMEigenvalueProbe,
    MomentTracer,
)


def net(width=32, depth=4, classes=10):
    torch.manual_seed(0)
    layers = [nn.Linear(8, width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def forms(max_cost, num_rows=256, num=None, layers=1, model=None, **options):
    return affordable_form(
        net() if model is None else model,
        torch.zeros(2, 8),
        FisherForm(num, layers, num_rows),
        max_cost,
        FisherOptions(**options),
    )


def test_forms_leave_out_more_and_more_as_less_may_be_paid():
    wanted, chosen = forms(math.inf)
    assert chosen == wanted
    assert (chosen.num_eigenvalues, chosen.layer_eigenvalues) == (None, 1)
    found = [chosen]
    while found[-1].num_rows > 2:
        least = forms(found[-1].cost * 0.999)[1]
        assert least.cost < found[-1].cost
        found.append(least)
    kinds = [(form.num_eigenvalues, form.layer_eigenvalues) for form in found]
    order = [(None, 1), (10, 1), (10, 0), (1, 0)]
    assert [*dict.fromkeys(kinds)] == [kind for kind in order if kind in kinds]
    assert {form.num_rows for form in found if form.num_eigenvalues != 1} == {256}
    assert found[-1].num_rows == 2
    # less than the cheapest form is not to be had
    assert forms(1e-9)[1] == found[-1]


def test_traces_alone_have_no_cheaper_form_than_fewer_examples():
    wanted, chosen = forms(0.1, num=0, layers=0)
    assert wanted.num_eigenvalues == chosen.num_eigenvalues == 0
    assert chosen.num_rows < wanted.num_rows


def test_auto_takes_all_eigenvalues_of_small_matrices_alone():
    assert forms(math.inf, num_rows=16, num="auto")[0].num_eigenvalues is None
    huge = forms(math.inf, num_rows=1000, num="auto", model=net(width=300))
    assert huge[0].num_eigenvalues == 10


def test_coupled_rows_cost_a_pass_for_each_of_them():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
    apart, _ = forms(math.inf, 64, 0, 0, model)
    together, fewer = forms(5, 64, 0, 0, model, norm_mode="train")
    assert together.cost > 5 > apart.cost
    assert together.cost > 10 * apart.cost
    assert fewer.num_rows < 64


@pytest.mark.parametrize("num_eigenvalues", [0, None])
def test_counted_work_follows_the_multiplications_that_torch_counts(num_eigenvalues):
    """Elementwise work and calls count too, so that the bound has two sides."""
    # wide enough that multiplications are most of the work, and all are matrices'
    model, x = net(width=512), torch.randn(12, 8)
    with FlopCounterMode(display=False) as step:
        F.cross_entropy(model(x), torch.zeros(12, dtype=torch.long)).backward()
    with FlopCounterMode(display=False) as measured:
        fisher_spectrum(model, x, num_eigenvalues=num_eigenvalues)
    form, _ = forms(math.inf, 12, num_eigenvalues, 0, model)
    multiplications = 3 * 12 * sum(p.numel() for p in model.parameters())
    # the loop and the calls of a step, which torch doesn't count, in multiplications
    counted = form.cost * (multiplications + 4e7 + 6 * 3e6)
    found = measured.get_total_flops() / step.get_total_flops() * multiplications
    assert found < counted < 8 * found + 30 * 6e6


def many(max_cost, cadence=100):
    """A probe whose whole spectrum costs about 12 steps, and lambda_max 3.6."""
    batch = tuple(vectors(256).tensors)
    return FIMEigenvalueProbe(
        batch=batch, max_cost=max_cost, cadence=cadence, spectrum="always"
    )


def told(caplog):
    return [r.getMessage() for r in caplog.records if "max_cost" in r.getMessage()]


@every_probe
def test_what_is_left_out_is_told_with_the_cost_that_has_it_measured(probe, caplog):
    caplog.set_level(logging.INFO)
    options = {"num_examples": 24, "cadence": 2}
    trainer, _ = fit([probe(max_cost=0.01, **options)], steps=2)
    (line,) = told(caplog)
    assert f"{probe().name}: " in line
    assert "max_cost 0.01" in line
    assert [key for key in trainer.callback_metrics if f"{probe().name}/" in key]
    assert f"{probe().name}/failed" not in trainer.callback_metrics
    caplog.clear()
    enough = re.search(r"max_cost: ([\d.e+-]+)$", line).group(1)
    fit([probe(max_cost=float(enough), **options)], steps=2)
    assert not told(caplog)


def test_a_long_measurement_says_how_long_it_takes_and_will_take(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("lit_resnorm_callbacks.probe.progress.FIRST", 0.0)
    fit([FIMEigenvalueProbe(num_examples=24, cadence=100)], steps=1)
    said = [r.getMessage() for r in caplog.records if "measuring" in r.getMessage()]
    # at the start and at the end; the next line of each would come ten seconds later
    assert len(said) == 2
    for line in said:
        assert re.fullmatch(r"fim: measuring for \d+ s, of about \d+ s", line)


@every_probe
@pytest.mark.parametrize("max_cost", [0, -1.0, math.nan])
def test_costs_that_nothing_can_have_are_refused_by_value(probe, max_cost):
    with pytest.raises(ValueError, match=f"max_cost is {max_cost}"):
        probe(max_cost=max_cost)


def test_cheaper_forms_measure_what_they_keep_as_the_whole_does():
    def measured(max_cost):
        trainer, _ = fit([many(max_cost)], steps=1)
        return {k: float(v) for k, v in trainer.callback_metrics.items()}

    whole, least = measured(math.inf), measured(4.0)
    assert "fim/top/10" in whole
    assert "fim/top/10" not in least
    assert [key for key in whole if key.startswith("fim/lambda_max/0")]
    assert not [key for key in least if key.startswith("fim/lambda_max/0")]
    sites = [k for k in least if k.startswith("fim/trace/0")]
    kept = ["fim/lambda_max", "fim/trace", *sites]
    assert len(kept) == 6
    for key in kept:
        assert least[key] == pytest.approx(whole[key], rel=1e-4), key


@pytest.mark.ddp
def test_ranks_agree_on_what_is_affordable_and_measure_the_same_examples():
    def measured(devices):
        kinds = (FIMEigenvalueProbe, MomentTracer, ActivationRateMonitor)
        # 2 of 9 examples, too few for statistics of their own
        options = {"num_examples": 9, "max_cost": 0.1, "norm_mode": "eval"}
        probes = [kind(**options) for kind in kinds]
        found = validated(probes, devices)
        return {k: v for k, v in found.items() if "/" in k and "seconds" not in k}

    one, two = measured(1), measured(2)
    assert {key.split("/")[0] for key in one} == {"fim", "moments", "activation"}
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), key


def test_a_resumed_run_decides_as_the_unbroken_one(tmp_path):
    def keys(recorder):
        return {
            step: sorted(k for k in row if k.startswith("fim/"))
            for step, row in recorder.rows
            if "fim/trace" in row
        }

    def probe():
        return many(4.0, {"every_n_steps": 2, "at_end": False})

    whole, part, rest = Recorder(), Recorder(), Recorder()
    fit([probe()], steps=4, logger=whole)
    kept = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
    fit([probe(), kept], steps=2, logger=part, enable_checkpointing=True)
    L.seed_everything(1, verbose=False)
    trainer = quiet_trainer(max_steps=4, callbacks=[probe()], logger=rest)
    trainer.fit(FunctionalNet(), *loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert {**keys(part), **keys(rest)} == keys(whole)

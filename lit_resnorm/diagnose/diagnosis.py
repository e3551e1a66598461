"""`diagnose`: a report on a network before it is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_resnorm.diagnose import advice
from lit_resnorm.diagnose.curvature import curvature_and_rates
from lit_resnorm.diagnose.descent import Descent, descent_of
from lit_resnorm.diagnose.rate_verdicts import RateMeasurement, rate_findings
from lit_resnorm.diagnose.report import Diagnosis, Finding, Status
from lit_resnorm.diagnose.rows import depth_rows, profile_of_network
from lit_resnorm.diagnose.subject import Progress, Subject, silent
from lit_resnorm.diagnose.verdicts import DepthMeasurement, depth_findings
from lit_resnorm.measures.losses import Loss, LossFn, loss_of
from lit_resnorm.measures.moments import pathology
from lit_resnorm.measures.passes.batch_dim import ExamplesFirst
from lit_resnorm.measures.passes.batches import (
    Forward,
    mapped,
    network_output,
    num_rows,
    take_rows,
)
from lit_resnorm.measures.passes.lazy_layers import initialise
from lit_resnorm.measures.passes.untouched import untouched
from lit_resnorm_callbacks.probe.batch import first_examples

_ORDER = {"pathology": 0, "warning": 1, "note": 2}


def diagnose(
    module: nn.Module,
    dataloader: Iterable[Any] | LightningDataModule,
    *,
    num_examples: int = 128,
    output: str = "auto",
    loss_fn: LossFn | None = None,
    loss_scale: float | None = None,
    rate: float | None = None,
    optimizer: Optimizer | None = None,
    check_rate: bool = False,
    norm_mode: str = "frozen",
    forward: Forward = network_output,
    batch_dim: int = 0,
    seed: int = 0,
    progress: Progress = silent,
) -> Diagnosis:
    """Return what is to be expected of a network, with verdicts in words.

    Measured on a fixed batch, where nothing is trained: activation rates, effective
    ranks, sensitivity, branch shares and norms by depth, forwards and backwards; the
    largest eigenvalue of the Fisher matrix and the learning rate that it bounds. Where
    the configured rate passes its bound, or has none, copies of the network take steps
    at it, with the configured optimizer. The module itself is untouched, to the bit.

    Args:
        module: Any module; a LightningModule's optimizer is asked for its rate.
        dataloader: Yields batches; the first examples are taken. Or a data module.
        num_examples: How many.
        output: Distribution of the output that the loss belongs to: `softmax`,
            `bernoulli`, `gaussian`; `auto` by the module's loss, or output and target.
        loss_fn: Takes output and target and returns the losses of the examples, or
            their mean; default: as `output` says. The options of torch's
            `CrossEntropyLoss`, `BCEWithLogitsLoss` and `MSELoss` are read, given or the
            module's own.
        loss_scale: Factor between the loss and the mean log-likelihood; 2 / C for
            torch's mean over C squared errors. None: what is read, else 1.
        rate: Learning rate, instead of the configured one.
        optimizer: Instead of the module's; without either, plain gradient descent.
        check_rate: Whether to train copies at many rates, for the largest stable one.
        norm_mode: What batch norm does: `frozen`, `eval` or `train`.
        forward: Runs the module on a batch; default: on a tuple's first element, or a
            dict by the names of its `forward`.
        batch_dim: Dimension that counts examples in a batch, as in the probes.
        seed: Of the noise.
        progress: Told the stage, how much of it is done, and of how much.

    Returns:
        The diagnosis; `healthy`, `findings`, `rows`, `to_json()`.

    Raises:
        ValueError: If an option can't be right, the loader holds no example, the
            output has no class for a label, or the network does nothing.
    """
    if num_examples < 1:
        raise ValueError(f"num_examples is {num_examples}; it must be at least 1")
    batch = _probe_batch(module, dataloader, num_examples, batch_dim)
    if batch_dim:
        forward = ExamplesFirst(forward, batch_dim)
        forward.look(module, batch)
    few = take_rows(batch, slice(2))
    initialise(module, lambda: forward(module, few))
    descent, no_rate = descent_of(module, rate=rate, optimizer=optimizer)
    loss = loss_of(
        module,
        _few_outputs(module, few, forward, norm_mode),
        batch,
        distribution=output,
        loss_fn=loss_fn,
        loss_scale=loss_scale,
    )
    subject = Subject(module, batch, loss, forward, norm_mode, progress)
    return _diagnosis_of(subject, descent, no_rate, check_rate=check_rate, seed=seed)


def _diagnosis_of(
    subject: Subject, descent: Descent, no_rate: str, *, check_rate: bool, seed: int
) -> Diagnosis:
    """Return what is measured of a subject, and what follows from it."""
    loss, notes = subject.loss, _notes(subject.loss, descent, no_rate)
    measured = _depth_measurement(subject, seed)
    findings = _broken_weights(subject.module) or depth_findings(measured)
    rates = RateMeasurement(descent)
    if not any(finding.name == "not_finite" for finding in findings):
        curvature, tried, why_not = curvature_and_rates(
            subject, descent, check_rate=check_rate
        )
        notes += why_not
        against = advice.against_explosion(
            residual=measured.residual, normalised=measured.normalised
        )
        rates = RateMeasurement(descent, curvature, tried, against)
        findings += rate_findings(rates)
    findings = sorted(findings + notes, key=lambda found: _ORDER[found.severity])
    return Diagnosis(
        network=type(subject.module).__name__,
        status=_status(findings, measured),
        not_judged=_not_judged(findings, measured, rates),
        findings=tuple(findings),
        rows=tuple(measured.rows),
        curvature=rates.curvature,
        stable_rates=rates.tried.stable,
        trends=_trend_numbers(measured),
        settings={
            "num_examples": num_rows(subject.batch),
            "norm_mode": subject.norm_mode,
            "loss": loss.words,
            "distribution": loss.distribution,
            "loss_scale": loss.likelihood.loss_scale if loss.likelihood else None,
            "seed": seed,
        },
    )


def _depth_measurement(subject: Subject, seed: int) -> DepthMeasurement:
    """Return what the verdicts on depth rest on."""
    flow, profile = profile_of_network(subject, seed)
    return DepthMeasurement(
        rows=depth_rows(subject, flow, profile),
        verdict=pathology(profile),
        num_examples=num_rows(subject.batch),
        normalised=any(site.kind == "norm" for site in flow.sites),
        without_rule=profile.without_rule,
    )


def _probe_batch(
    module: nn.Module, data: Any, num_examples: int, batch_dim: int
) -> Any:
    if isinstance(data, LightningDataModule):
        with untouched(module):
            data.prepare_data()
            data.setup("fit")
            own = getattr(data, "probe_dataloader", data.val_dataloader)
            loader = own()
    else:
        loader = data
    with untouched(module), torch.no_grad():
        batch = first_examples(loader, num_examples, "diagnose", batch_dim)
    first = next(module.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    return mapped(
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf,
        take_rows(batch, slice(num_examples)),
    )


def _few_outputs(module: nn.Module, few: Any, forward: Forward, norm_mode: str) -> Any:
    """Return what the module gives for a few examples."""
    try:
        with untouched(module, norm_mode=norm_mode) as run, torch.no_grad():
            return run(lambda: forward(module, few))
    except ValueError as error:
        if forward is not network_output:
            raise
        # a probe calls the option by another name
        raise ValueError(str(error).replace("forward_fn", "forward")) from error


def _notes(loss: Loss, descent: Descent, no_rate: str) -> list[Finding]:
    notes = []
    if loss.function is None:
        words = f"no loss ({loss.words}): gradients are of a random projection of it"
        notes.append(Finding("no_loss", "note", words))
    if descent.rate is None and no_rate:
        notes.append(Finding("no_rate", "note", f"no configured rate: {no_rate}"))
    return notes


def _broken_weights(module: nn.Module) -> list[Finding]:
    broken = [
        name
        for name, value in [*module.named_parameters(), *module.named_buffers()]
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if not broken:
        return []
    names = ", ".join(broken[:3]) + (", ..." if broken[3:] else "")
    words = f"weights are not finite: {names}"
    return [Finding("not_finite", "pathology", words, {"weights": broken})]


def _status(findings: list[Finding], measured: DepthMeasurement) -> Status:
    if any(finding.severity == "pathology" for finding in findings):
        return "pathological"
    return "undetermined" if measured.undetermined else "healthy"


def _not_judged(
    findings: list[Finding], measured: DepthMeasurement, rates: RateMeasurement
) -> tuple[str, ...]:
    """Return what no verdict covers."""
    names = {finding.name for finding in findings}
    open_questions = {
        "signal and noise": measured.undetermined,
        "gradients": bool(names & {"no_gradient", "no_loss"}),
        "rate": not rates.is_judged,
    }
    return tuple(what for what, is_open in open_questions.items() if is_open)


def _trend_numbers(measured: DepthMeasurement) -> dict[str, float]:
    verdict, forward, backward = measured.verdict, measured.forward, measured.backward
    return {
        "layers": verdict.num_layers,
        "effective_rank": verdict.effective_rank,
        "log_chi_slope": verdict.exponential.slope,
        "log_chi_goodness": verdict.exponential.goodness,
        "chi_exponent": verdict.power.slope,
        "chi_exponent_goodness": verdict.power.goodness,
        "forward_log_change": forward.change,
        "forward_log_slope": forward.slope,
        "forward_goodness": forward.goodness,
        "backward_log_change": backward.change,
        "backward_log_slope": backward.slope,
        "backward_goodness": backward.goodness,
    }

"""The table by depth of a diagnosis, from the measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lit_resnorm.diagnose.gradients import gradient_norms, widened
from lit_resnorm.diagnose.report import DepthRow
from lit_resnorm.diagnose.subject import Subject
from lit_resnorm.measures.activation import activation_rates
from lit_resnorm.measures.moments import (
    DepthProfile,
    SiteMoments,
    flow_between_sites,
    signal_and_noise,
)
from lit_resnorm.measures.moments.noise import in_float64
from lit_resnorm.measures.moments.pathology import layer_depths
from lit_resnorm.measures.passes.flow import Flow
from lit_resnorm.measures.passes.sites import Site
from lit_resnorm.measures.separation import separations

_SHOWN = ("activation", "addition")


def profile_of_network(subject: Subject, seed: int) -> tuple[Flow, DepthProfile]:
    """Return the network's sites and the moments of signal and noise at them.

    Activations, norms and residual additions; all modules where there is no activation
    and no addition.

    Raises:
        ValueError: If nothing is computed with the input.
    """
    module, batch, forward = subject.module, subject.batch, subject.forward
    subject.told("signal and noise", 0, 1)
    flow = flow_between_sites(module, batch, forward=forward)
    if not any(site.kind in _SHOWN for site in flow.sites):
        flow = flow_between_sites(module, batch, sites=".", forward=forward)
    if not flow.inputs and not flow.embeddings:
        raise ValueError(
            f"{type(module).__name__} does nothing with its input that can be measured:"
            " give a network with layers, or forward, a function of module and batch"
        )
    profile = signal_and_noise(
        module,
        batch,
        sites=flow,
        forward=forward,
        norm_mode=subject.norm_mode,
        seed=seed,
    )
    subject.told("signal and noise", 1, 1)
    return flow, profile


def depth_rows(subject: Subject, flow: Flow, profile: DepthProfile) -> list[DepthRow]:
    """Return the table by depth: activations and additions, or all where none is."""
    subject.told("activation rates", 0, 1)
    rates = activation_rates(
        subject.module,
        subject.batch,
        forward=subject.forward,
        norm_mode=subject.norm_mode,
    )
    subject.told("activation rates", 1, 1)
    kinds = {site.kind for site in flow.sites} & set(_SHOWN)
    shown = [site for site in flow.sites if not kinds or site.kind in kinds]
    subject.told("separation", 0, 1)
    apart = _separations(subject, shown)
    subject.told("separation", 1, 1)
    subject.told("gradients", 0, 1)
    backward = gradient_norms(subject, shown)
    subject.told("gradients", 1, 1)
    depths = (
        layer_depths([site.kind for site in shown])
        if kinds
        else range(1, len(shown) + 1)
    )
    rows = []
    for site, depth in zip(shown, depths, strict=True):
        moments, own = profile[site.name], rates.get(site.name)
        rows.append(
            DepthRow(
                site=site.name,
                kind=site.kind,
                depth=depth,
                activation_rate=None if own is None else float(own.rate),
                dead=None if own is None else float(own.dead),
                effective_rank=_optional(moments.effective_rank),
                log_sensitivity=float(moments.log_sensitivity),
                branch_share=_optional(moments.branch_share),
                separation=apart[site.name],
                forward=_root(moments),
                backward=backward[site.name],
            )
        )
    return rows


def _separations(subject: Subject, sites: Sequence[Site]) -> dict[str, float]:
    def measured(batch: Any) -> dict[str, float]:
        return separations(
            subject.module,
            batch,
            sites,
            forward=subject.forward,
            norm_mode=subject.norm_mode,
        )

    found = measured(subject.batch)
    if any(math.isnan(value) for value in found.values()):
        # float32 may have overflowed
        with in_float64(subject.module):
            found = measured(widened(subject.batch))
    return found


def _optional(value: Tensor | None) -> float | None:
    return None if value is None else float(value)


def _root(moments: SiteMoments) -> float:
    return float(moments.nu2.sqrt())

"""The measurements of a diagnosis, from those of `lit_resnorm.measures`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lit_resnorm.diagnose.configured import Descent
from lit_resnorm.diagnose.gradients import gradient_norms, widened
from lit_resnorm.diagnose.progress import Progress, silent
from lit_resnorm.diagnose.result import Curvature, DepthRow, Finding
from lit_resnorm.measures.activation import activation_rates
from lit_resnorm.measures.fisher import fisher_spectrum
from lit_resnorm.measures.losses import Loss
from lit_resnorm.measures.moments import (
    DepthProfile,
    Flow,
    SiteMoments,
    flow_between_sites,
    signal_and_noise,
)
from lit_resnorm.measures.moments.noise import in_float64
from lit_resnorm.measures.passes.batches import target_of
from lit_resnorm.measures.separation import separations
from lit_resnorm.measures.sites import Site

Forward = Callable[[nn.Module, Any], Any]

_SHOWN = ("activation", "addition")


def profile_of_network(
    module: nn.Module,
    batch: Any,
    *,
    forward: Forward,
    norm_mode: str,
    seed: int,
    told: Progress,
) -> tuple[Flow, DepthProfile]:
    """Return the network's sites and the moments of signal and noise at them.

    Activations, norms and residual additions; all modules where there is no activation
    and no addition.

    Raises:
        ValueError: If nothing is computed with the input.
    """
    told("signal and noise", 0, 1)
    flow = flow_between_sites(module, batch, forward=forward)
    if not any(site.kind in _SHOWN for site in flow.sites):
        flow = flow_between_sites(module, batch, sites=".", forward=forward)
    if not flow.inputs and not flow.embeddings:
        raise ValueError(
            f"{type(module).__name__} does nothing with its input that can be measured:"
            " give a network with layers, or forward, a function of module and batch"
        )
    profile = signal_and_noise(
        module, batch, sites=flow, forward=forward, norm_mode=norm_mode, seed=seed
    )
    told("signal and noise", 1, 1)
    return flow, profile


def depth_rows(
    module: nn.Module,
    batch: Any,
    flow: Flow,
    profile: DepthProfile,
    loss: Loss,
    *,
    forward: Forward,
    norm_mode: str,
    told: Progress,
) -> list[DepthRow]:
    """Return the table by depth: activations and additions, or all where none is."""
    told("activation rates", 0, 1)
    rates = activation_rates(module, batch, forward=forward, norm_mode=norm_mode)
    told("activation rates", 1, 1)
    kinds = {site.kind for site in flow.sites} & set(_SHOWN)
    shown = [site for site in flow.sites if not kinds or site.kind in kinds]
    told("separation", 0, 1)
    apart = _separations(module, batch, shown, forward, norm_mode)
    told("separation", 1, 1)
    told("gradients", 0, 1)
    backward = gradient_norms(
        module, batch, shown, loss, forward=forward, norm_mode=norm_mode
    )
    told("gradients", 1, 1)
    rows, depth = [], 0
    for site in shown:
        depth += site.kind == "activation" or not kinds
        moments, own = profile[site.name], rates.get(site.name)
        rows.append(
            DepthRow(
                site=site.name,
                kind=site.kind,
                depth=max(depth, 1),
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


def _separations(
    module: nn.Module,
    batch: Any,
    sites: Sequence[Site],
    forward: Forward,
    norm_mode: str,
) -> dict[str, float]:
    found = separations(module, batch, sites, forward=forward, norm_mode=norm_mode)
    if any(math.isnan(value) for value in found.values()):
        # float32 may have overflowed
        with in_float64(module):
            wide = widened(batch)
            found = separations(
                module, wide, sites, forward=forward, norm_mode=norm_mode
            )
    return found


def _optional(value: Tensor | None) -> float | None:
    return None if value is None else float(value)


def _root(moments: SiteMoments) -> float:
    return float(moments.nu2.sqrt())


def curvature_of(
    module: nn.Module,
    batch: Any,
    loss: Loss,
    descent: Descent,
    *,
    forward: Forward,
    norm_mode: str = "frozen",
    told: Progress = silent,
) -> tuple[Curvature | None, list[Finding]]:
    """Return the Fisher matrix's spectrum with the rate bound; why not, in a note."""
    if loss.likelihood is None:
        return None, [_no_curvature(loss.words)]
    weights, scale = loss.likelihood.curvature(target_of(batch))
    told("curvature", 0, 1)
    try:
        found = fisher_spectrum(
            module,
            batch,
            output=loss.likelihood.output,
            norm_mode=norm_mode,
            num_eigenvalues=1,
            tol=1e-3,
            forward=forward,
            weights=weights,
            loss_scale=scale,
            trace=norm_mode != "train",
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return None, [_no_curvature(" ".join(str(error).split()))]
    finally:
        told("curvature", 1, 1)
    return (
        Curvature(
            lambda_max=found.max,
            lambda_mean=found.mean,
            bound=descent.bound(found.max),
            optimizer=descent.words,
            rate=descent.rate,
            binding=descent.binding,
            loss=loss.likelihood.words,
        ),
        [],
    )


def _no_curvature(reason: str) -> Finding:
    return Finding("no_curvature", "note", f"no lambda_max and no rate bound: {reason}")

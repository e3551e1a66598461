"""What a profile holds, and how it follows from measured points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lit_resnorm.measures.moments.recorder import MomentRecorder, PointMoments
from lit_resnorm.measures.passes.flow import INPUT, Flow
from lit_resnorm.measures.passes.sites import Site


@dataclass(frozen=True)
class SiteMoments:
    """Signal and noise at the output of one site; 0-d float64 tensors.

    What has no meaning at a site of this kind is None.

    Attributes:
        name: The site's name, `input` for the network's input.
        kind: `input`, or the site's kind.
        mu2: Variance of the signal, about each channel's mean.
        nu2: Mean square of the signal.
        log_noise_power: Log of the noise's mean square; the noise at the input is as
            strong as the signal there.
        log_sensitivity: Log of chi, the noise over the signal, 0 at the input.
        mu4: Fourth central moment (norms).
        nu1: Mean absolute value (norms).
        effective_rank: Of the channels (all but norms).
        delta: Growth of chi from the nearest site upstream (from the skip's operand at
            an addition); None where there are several.
        delta_bn: The same at a norm: from before the weights to after the norm.
        delta_phi: Growth of chi over an activation.
        branch_share: Share of the branch in the variance of an addition.
        identity_deviation: Norm of the branch over that of the skip.
    """

    name: str
    kind: str
    mu2: Tensor
    nu2: Tensor
    log_noise_power: Tensor
    log_sensitivity: Tensor
    mu4: Tensor | None = None
    nu1: Tensor | None = None
    effective_rank: Tensor | None = None
    delta: Tensor | None = None
    delta_bn: Tensor | None = None
    delta_phi: Tensor | None = None
    branch_share: Tensor | None = None
    identity_deviation: Tensor | None = None

    @property
    def sensitivity(self) -> Tensor:
        """Normalised sensitivity chi, `1 / sqrt(signal-to-noise ratio)`."""
        return self.log_sensitivity.exp()

    @property
    def noise_power(self) -> Tensor:
        """Mean square of the noise."""
        return self.log_noise_power.exp()


@dataclass(frozen=True)
class DepthProfile:
    """Signal and noise of a network by depth.

    Attributes:
        sites: The input, then the sites in the order of execution.
        without_rule: Operations and modules without a forward-mode rule; noise that
            depends on them is NaN.
    """

    sites: tuple[SiteMoments, ...]
    without_rule: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> SiteMoments:
        """Return a site's moments by its name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, SiteMoments]:
        return {site.name: site for site in self.sites}

    def of_kind(self, *kinds: str) -> tuple[SiteMoments, ...]:
        """Return the sites of these kinds."""
        return tuple(site for site in self.sites if site.kind in kinds)


def profile_of(
    flow: Flow, recorder: MomentRecorder, entries: Sequence[str], lacking: Sequence[str]
) -> DepthProfile:
    """Return the profile that a recorder's passes give.

    Args:
        flow: The sites and their sources.
        recorder: What was measured.
        entries: Its keys for the tensors where noise began.
        lacking: Operations and modules without a forward-mode rule.
    """
    first = _input_moments([recorder.moments(key) for key in entries])
    # At the input chi is 1 by definition; all others are in its units.
    unit = 0.5 * (first.log_noise_power - first.mu2.log())
    log_chi = {INPUT: torch.zeros_like(unit)}
    sites = [first]
    for site in flow.sites:
        log_chi[site.name] = recorder.moments(site.name).log_sensitivity(unit)
        sites.append(_site_moments(site, flow, recorder, log_chi, unit))
    return DepthProfile(tuple(sites), tuple(dict.fromkeys(lacking)))


def _input_moments(points: Sequence[PointMoments]) -> SiteMoments:
    """Return the moments of all inputs together, each weighted by its size."""
    sizes = torch.stack([p.signal.count * p.signal.num_channels for p in points])
    weights = sizes / sizes.sum()
    log_noise = torch.stack([p.log_noise for p in points])
    columns = weights.view(-1, *[1] * (log_noise.ndim - 1))
    return SiteMoments(
        name=INPUT,
        kind=INPUT,
        mu2=(columns * torch.stack([p.signal.mu2 for p in points])).sum(0),
        nu2=(columns * torch.stack([p.signal.nu2 for p in points])).sum(0),
        log_noise_power=(columns.log() + log_noise).logsumexp(0),
        log_sensitivity=torch.zeros_like(log_noise[0]),
    )


def _site_moments(
    site: Site,
    flow: Flow,
    recorder: MomentRecorder,
    log_chi: dict[str, Tensor],
    unit: Tensor,
) -> SiteMoments:
    own = recorder.moments(site.name)
    signal, here = own.signal, log_chi[site.name]
    before: dict[str, Tensor] = {}
    delta = None
    if site.kind == "addition":
        skip = recorder.moments(f"{site.name}#skip")
        branch = recorder.moments(f"{site.name}#branch")
        delta = (here - skip.log_sensitivity(unit)).exp()
        added, kept = branch.signal, skip.signal
        before["branch_share"] = added.mu2 / (added.mu2 + kept.mu2)
        before["identity_deviation"] = (added.nu2 / kept.nu2).sqrt()
    elif len(flow.sources[site.name]) == 1:
        (source,) = flow.sources[site.name]
        delta = (here - log_chi[source]).exp()
    if site.kind == "activation":
        entering = recorder.moments(f"{site.name}#in")
        before["delta_phi"] = (here - entering.log_sensitivity(unit)).exp()
    elif site.kind == "norm" and delta is not None:
        before["delta_bn"] = delta
    return SiteMoments(
        name=site.name,
        kind=site.kind,
        mu2=signal.mu2,
        nu2=signal.nu2,
        log_noise_power=own.log_noise,
        log_sensitivity=here,
        mu4=signal.mu4,
        nu1=signal.nu1,
        effective_rank=signal.effective_rank,
        delta=delta,
        **before,
    )

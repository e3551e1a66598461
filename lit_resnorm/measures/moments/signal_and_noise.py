"""Signal and noise by depth: one pass of both through any network."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from lit_resnorm.measures.moments.noise import (
    NoiseRules,
    in_float64,
    module_without_rule,
    without_noise_in,
)
from lit_resnorm.measures.moments.noise_input import NoiseSource
from lit_resnorm.measures.moments.profile import DepthProfile, profile_of
from lit_resnorm.measures.moments.recorder import MomentRecorder
from lit_resnorm.measures.passes.batches import Forward, occupied, take_rows
from lit_resnorm.measures.passes.flow import Flow, follow
from lit_resnorm.measures.passes.sites import Site, select, visiting
from lit_resnorm.measures.passes.tracing import trace
from lit_resnorm.measures.passes.untouched import Reduce, identity, untouched

# Powers beyond which float32 is near its end: the pass is made again in float64.
_LEAST_POWER, _LARGEST_POWER = 1e-60, 1e60


def measured_sites(sites: Sequence[Site], pattern: str = "") -> tuple[Site, ...]:
    """Return the sites that are measured: activations, norms, residual additions.

    A pattern chooses among all sites, those of other modules too.

    Raises:
        ValueError: If the pattern matches none.
    """
    if pattern:
        return select(sites, pattern)
    return select(sites, kinds=("activation", "norm", "addition"))


def flow_between_sites(
    model: nn.Module,
    x: Any,
    *,
    sites: str | Sequence[Site] = "",
    forward: Forward = nn.Module.__call__,
) -> Flow:
    """Return how a network's sites hang together, from a pass of two examples.

    Raises:
        ValueError: If a pattern matches no site.
    """
    few = take_rows(occupied(x)[0], slice(2))
    with untouched(model, norm_mode="eval") as run, torch.no_grad():
        if isinstance(sites, str):
            traced = run(lambda: trace(model, lambda: forward(model, few)))
            sites = measured_sites(traced, sites)
        chosen = sites
        return run(lambda: follow(model, few, lambda: forward(model, few), chosen))


def signal_and_noise(
    model: nn.Module,
    x: Any,
    *,
    sites: str | Sequence[Site] | Flow = "",
    forward: Forward = nn.Module.__call__,
    norm_mode: str = "frozen",
    num_directions: int = 1,
    num_chunks: int = 1,
    seed: int = 0,
    effective_rank: bool | str = True,
    num_nets: int = 1,
    reduce: Reduce = identity,
) -> DepthProfile:
    r"""Return the moments of signal and noise at every site of a network.

    Noise :math:`dx^0`, independent of the signal and as strong, is added to the input
    and propagated by the network linearised about each example. The normalised
    sensitivity is

    .. math:: \chi^l = \sqrt{\mu_2(dx^l) / \mu_2(x^l)}
              \Big/ \sqrt{\mu_2(dx^0) / \mu_2(x^0)}

    Both travel in one pass, by forward-mode differentiation; nothing is approximated
    beyond the draw of the noise, of which each example has its own. Batch norm's
    statistics are constants in modes `frozen` and `eval`. The noise of integer inputs
    begins at their embeddings. Memory: activations of one site.

    Source: Labatie (2019), arXiv 1811.03087, sections 3 and 4.

    Args:
        model: Any module; it is left as it was.
        x: This rank's examples, as `forward` takes them; may be empty on some ranks.
        sites: A pattern searched in the sites' names (default: activations, norms and
            residual additions), sites of this model, or their `flow_between_sites`.
        forward: Runs the model on the examples.
        norm_mode: What batch norm does: `frozen`, `eval` or `train`.
        num_directions: Independent noises an example; they travel as one larger batch.
        num_chunks: Passes that the examples are spread over.
        seed: Of the noise; the noise of an example is the same on any rank.
        effective_rank: Whether to measure effective ranks, whose covariances cost most
            in wide networks; a pattern where only at some sites.
        num_nets: More than 1 where the model is several networks side by side (see
            `side_by_side`): every moment is then one a network, of shape `(num_nets,)`.
        reduce: Sums a tensor over ranks.

    Returns:
        The profile; powers and sensitivities as logs, so that depth overflows nothing.

    Raises:
        ValueError: If an option can't be right, a pattern matches nothing, or all
            ranks together hold no example.
    """
    _check_counts(norm_mode, num_directions, num_chunks)
    flow = sites
    if not isinstance(flow, Flow):
        flow = flow_between_sites(model, x, sites=flow, forward=forward)
    passes = _MomentPasses(
        model=model,
        flow=flow,
        forward=forward,
        norm_mode=norm_mode,
        copies=num_directions,
        num_chunks=num_chunks,
        seed=seed,
        effective_rank=_rank_pattern(effective_rank),
        num_nets=num_nets,
        reduce=reduce,
    )
    profile = passes.measure(x)
    if _leaves_float32(profile):
        with in_float64(model):
            profile = passes.measure(x, torch.float64)
    return profile


def _check_counts(norm_mode: str, num_directions: int, num_chunks: int) -> None:
    if num_directions < 1:
        raise ValueError(f"num_directions is {num_directions}; it must be at least 1")
    if num_chunks < 1:
        raise ValueError(f"num_chunks is {num_chunks}; it must be at least 1")
    if num_chunks > 1 and norm_mode == "train":
        raise ValueError(
            f"num_chunks is {num_chunks}, but norm_mode train couples all examples"
        )


def _rank_pattern(effective_rank: bool | str) -> str | None:
    if isinstance(effective_rank, str):
        return effective_rank
    return "" if effective_rank else None


def _leaves_float32(profile: DepthProfile) -> bool:
    powers = torch.stack([site.nu2 for site in profile.sites])
    noises = torch.stack([site.log_noise_power for site in profile.sites])
    lost = noises.isnan() | (noises == torch.inf)
    far = ~((powers > _LEAST_POWER) & (powers < _LARGEST_POWER)) & (powers != 0)
    return bool(far.any() or (lost.any() and not profile.without_rule))


@dataclass(frozen=True, kw_only=True)
class _MomentPasses:
    """The passes of one measurement and what they are made with."""

    model: nn.Module
    flow: Flow
    forward: Forward
    norm_mode: str
    copies: int
    num_chunks: int
    seed: int
    effective_rank: str | None
    num_nets: int
    reduce: Reduce

    def measure(self, x: Any, dtype: torch.dtype | None = None) -> DepthProfile:
        """Return the profile; a `dtype` is what floating inputs are converted to."""
        skipped: list[nn.Module] = []
        while True:
            try:
                with without_noise_in(skipped):
                    return self._measure(x, dtype, skipped)
            except NotImplementedError as error:
                module = module_without_rule(error)
                if module is None or module in skipped or "AD" not in str(error):
                    raise
                skipped.append(module)

    def _measure(
        self, x: Any, dtype: torch.dtype | None, skipped: list[nn.Module]
    ) -> DepthProfile:
        recorder = MomentRecorder(
            self.flow,
            self.reduce,
            effective_rank=self.effective_rank,
            num_nets=self.num_nets,
        )
        source = NoiseSource(
            x,
            self.flow,
            recorder,
            copies=self.copies,
            seed=self.seed,
            dtype=dtype,
            reduce=self.reduce,
        )
        rules = NoiseRules(self.flow.embeddings, source.look_up)
        model, forward = self.model, self.forward
        with (
            warnings.catch_warnings(),
            untouched(model, norm_mode=self.norm_mode, reduce=self.reduce) as run,
            torch.no_grad(),
            forward_ad.dual_level(),
        ):
            # Of torch's own doing, in its forward-mode rules and backend flags.
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
            warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")
            if self.num_chunks > 1:  # statistics of the batch are those of all chunks
                whole, empty = source.signal()
                run(lambda: forward(model, whole), empty=empty)
            for chunk, empty in source.chunks(self.num_chunks):

                def visited(chunk: Any = chunk) -> None:
                    with visiting(model, self.flow.sites, recorder):
                        forward(model, chunk)

                with rules:
                    run(visited, empty=empty)
            names = {module: name for name, module in model.named_modules()}
            lacking = [*rules.without_rule, *(names[m] for m in skipped)]
            return profile_of(self.flow, recorder, source.keys, lacking)

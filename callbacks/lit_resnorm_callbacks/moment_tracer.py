"""Signal and noise by depth, through training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lit_resnorm.figures import growth
from lit_resnorm.measures.moments import (
    DepthProfile,
    SiteMoments,
    Verdict,
    flow_between_sites,
    measured_sites,
    pathology,
    signal_and_noise,
    spine,
)
from lit_resnorm.measures.moments.pathology import MIN_LAYERS
from lit_resnorm.measures.passes.flow import Flow
from lit_resnorm.measures.passes.sites import Site
from lit_resnorm.measures.passes.untouched import Reduce
from lit_resnorm.quantities import PATHOLOGIES, Quantity
from lit_resnorm_callbacks.probe.loggers import loggers_of
from lit_resnorm_callbacks.probe.probe import Batch, Cadence, Probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABATIE = "Labatie 2019, arXiv 1811.03087"


@runtime_checkable
class TakesVerdicts(Protocol):
    """A logger that keeps verdicts in words, as `RunHistory` does."""

    def log_verdict(self, key: str, word: str) -> None:
        """Keep a verdict."""


class MomentTracer(Probe):
    """Log by depth whether the signal collapses, and whether noise drowns it.

    Signal and the noise of the linearised network travel through one forward pass of
    any network. Measured are the outputs of activations, norms and residual additions;
    `sites` selects among them and all other modules. An operation that can't be
    linearised is named in a warning, and the noise that depends on it is NaN.

    Args:
        name: Prefix of the logged names.
        cadence: Optimizer steps between measurements.
        num_examples: Size of the probe batch, over all ranks.
        num_directions: Noises an example.
        effective_rank: Whether to measure effective ranks, which cost most.
        seed: Of the noise.
        **options: See :class:`~lit_resnorm_callbacks.probe.probe.Probe`.

    Raises:
        ValueError: If an option can't be right.
    """

    section = "Signal and noise"
    quantities: ClassVar[tuple[Quantity, ...]] = (
        Quantity(
            "effective_rank/<site>",
            "effective rank",
            better="high",
            scale="log",
            headline=True,
            heading="effective rank, last layer",
            panel="effective rank",
            source=_LABATIE,
            meaning="Effective rank of the channels; 1 where examples lie on a line.",
            advice="Falls to 1 with depth: see signal.",
        ),
        Quantity(
            "sensitivity/<site>",
            "normalised sensitivity",
            better="low",
            scale="log",
            panel="normalised sensitivity",
            source=_LABATIE,
            meaning="Chi, noise over signal, 1 at the input.",
            advice="Grows exponentially with depth: see noise.",
        ),
        Quantity(
            "mu2/<site>",
            "variance",
            detail=True,
            scale="log",
            meaning="Variance about each channel's mean.",
            advice="Falls against nu2: the examples collapse, see signal.",
        ),
        Quantity(
            "nu2/<site>",
            "mean square",
            detail=True,
            scale="log",
            meaning="Mean square.",
            advice="Grows or shrinks exponentially: see exploding_activations,"
            " vanishing_activations.",
        ),
        Quantity(
            "mu4/<site>",
            "fourth central moment",
            detail=True,
            meaning="Fourth central moment, at norms.",
            advice="3 times mu2 squared for a Gaussian; far above, few values carry"
            " the power.",
        ),
        Quantity(
            "nu1/<site>",
            "mean absolute value",
            detail=True,
            meaning="Mean absolute value, at norms.",
        ),
        Quantity(
            "delta_bn/<site>",
            "growth of chi over a norm",
            detail=True,
            meaning="Growth of chi from before the weights to after a norm.",
            advice="Above 1 at every norm: noise grows exponentially, see noise.",
        ),
        Quantity(
            "delta_phi/<site>",
            "growth of chi over an activation",
            detail=True,
            meaning="Growth of chi over an activation.",
            advice="Likewise.",
        ),
        Quantity(
            "noise_power/<site>",
            "mean square of the noise",
            detail=True,
            scale="log",
            meaning="Mean square of a noise that enters as strong as the signal.",
            advice="Its ratio to mu2 is the square of the sensitivity.",
        ),
        Quantity(
            "identity_deviation/<site>",
            "branch over skip",
            detail=True,
            meaning="Norm of the branch over that of the skip.",
            advice="Far below 1 a block hardly acts; far above, the skip is lost.",
        ),
        Quantity(
            "branch_share/<site>",
            "share of the branch",
            scale="linear",
            panel="share of the branch",
            meaning="Share of a branch in the variance of an addition.",
            advice="1/2 at every block doubles the power with each: normalise or"
            " scale the branch. 1/(l+1) is what batch norm gives block l.",
        ),
        Quantity(
            "pathology",
            "pathology",
            scale="linear",
            headline=True,
            codes=PATHOLOGIES,
            source=_LABATIE,
            meaning="0 none, 1 signal collapsed, 2 noise explodes, -1 undetermined,"
            " as with fewer than 8 layers; in words in summary.json.",
            advice="See signal, noise, undetermined.",
        ),
        Quantity(
            "log_slope",
            "growth of log chi a layer",
            scale="linear",
            panel="growth of the sensitivity",
            meaning="Growth of log chi a layer (from 8 layers on, as the next three).",
            advice="0.12 and more is an explosion where the fit is good: see noise.",
        ),
        Quantity(
            "log_goodness",
            "fit of exponential growth",
            scale="linear",
            meaning="Share of the variance of log chi that a straight line explains.",
            advice="Below 0.8 the growth is no exponential.",
        ),
        Quantity(
            "power_exponent",
            "sensitivity exponent",
            scale="linear",
            headline=True,
            panel="growth of the sensitivity",
            meaning="Growth of log chi against log depth.",
            advice="About 0.65 in residual nets with batch norm; the larger, the"
            " faster noise grows.",
        ),
        Quantity(
            "power_goodness",
            "fit of growth as a power",
            scale="linear",
            meaning="Share of the variance that this line explains.",
            advice="Below 0.8 the growth is no power of depth.",
        ),
    )

    def __init__(
        self,
        name: str = "moments",
        cadence: Cadence | int = 100,
        num_examples: int = 256,
        *,
        num_directions: int = 1,
        effective_rank: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(name, cadence, num_examples, **options)
        if num_directions < 1:
            raise ValueError(
                f"num_directions is {num_directions}; it must be at least 1"
            )
        self.num_directions = num_directions
        self.effective_rank = effective_rank
        self.seed = seed
        self._num_chunks = 1
        self._chosen: tuple[Site, ...] = ()
        self._flow: Flow | None = None
        self._verdict: Verdict | None = None
        self._depths: dict[str, int] = {}
        self._theory: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state and the depths at which chi was measured."""
        return {**super().state_dict(), "depths": self._depths}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self._depths = state_dict.get("depths", {})

    def prepare(self, module: LightningModule, sites: tuple[Site, ...]) -> None:
        """Choose the sites; say so where there are none."""
        self._chosen = measured_sites(sites, self.sites)
        self._flow = None
        self._theory = getattr(module, "depth_theory", {})
        if not self._chosen:
            rank_zero_info(
                f"{self.name}: {type(module).__name__} has no activation, norm or"
                " residual addition to measure; `sites` can name other modules"
            )

    def cost(self) -> float:
        """Return that of passes with and without noise, and of effective ranks.

        A pass in forward mode counts as two; an effective rank, the largest eigenvalue
        of a site, as 0.3 of one.
        """
        ranks = 0.3 * len(self._chosen) * self.effective_rank
        return (2 + 2 * self.num_directions + ranks) / 3

    def smaller(self) -> bool:
        """Spread the probe batch over twice as many passes."""
        if self.norm_mode == "train" or self._num_chunks >= self.num_examples:
            return False
        self._num_chunks *= 2
        return True

    def measure(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> dict[str, Tensor]:
        """Return the moments by site, the trends and the verdict."""
        if not self._chosen:
            return {}
        if self._flow is None:
            self._flow = flow_between_sites(
                module, batch, sites=self._chosen, forward=self.forward_fn
            )
        profile = signal_and_noise(
            module,
            batch,
            sites=self._flow,
            forward=self.forward_fn,
            norm_mode=self.norm_mode,
            num_directions=self.num_directions,
            num_chunks=self._num_chunks,
            seed=self.seed,
            effective_rank=self.effective_rank,
            reduce=reduce,
        )
        self._tell_without_rule(profile)
        self._verdict = pathology(profile)
        self._depths = spine(profile)
        return {**_by_site(profile.sites[1:]), **_trend_values(self._verdict)}

    def run(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Measure and log; keep the verdict in words."""
        self._verdict = None
        super().run(trainer, module, step)
        word = "undetermined" if self._verdict is None else self._verdict.pathology
        for logger in loggers_of(trainer):
            if isinstance(logger, TakesVerdicts):
                with self._surviving(f"{type(logger).__name__}.log_verdict"):
                    logger.log_verdict(f"{self.prefix}/pathology", word)

    def figures(self) -> dict[str, Figure]:
        """Return one figure a quantity, and one of the growth of chi.

        Theory is drawn where the module has `depth_theory` for the quantity.
        """
        figures = self._records.figures(
            self.prefix, self.declared(), self._theory, detail=self.logs == "all"
        )
        chi = self._records.by_site("sensitivity")
        curves = {
            step: [(depth, chi[site][step]) for site, depth in self._depths.items()]
            for step in sorted({step for curve in chi.values() for step in curve})
            if all(step in chi.get(site, {}) for site in self._depths)
        }
        if len(self._depths) > 1 and curves:
            key = f"{self.prefix}/growth"
            expected = self._theory.get("growth", [])
            depths = [*self._depths.values()]
            figures[key] = growth(
                curves,
                quantity="normalised sensitivity",
                title=f"growth of the normalised sensitivity ({key})",
                theory=[*zip(depths, expected, strict=True)]
                if len(expected) == len(depths)
                else (),
            )
        return figures

    def _tell_without_rule(self, profile: DepthProfile) -> None:
        reason = ", ".join(profile.without_rule)
        if reason:
            self._warn_once(
                reason,
                f"{reason} can't be differentiated forward; noise that"
                " depends on it is NaN, the rest is measured",
                "noise_without_rule",
            )


def _by_site(sites: tuple[SiteMoments, ...]) -> dict[str, Tensor]:
    values = {}
    by_site = [one.stem for one in MomentTracer.quantities if one.by_site]
    for quantity in by_site:
        for site in sites:
            value = getattr(site, quantity)
            if value is not None:
                values[f"{quantity}/{site.name}"] = value
    return values


def _trend_values(verdict: Verdict) -> dict[str, Tensor]:
    numbers: dict[str, float] = {"pathology": verdict.code}
    if verdict.num_layers >= MIN_LAYERS:
        numbers |= {
            "log_slope": verdict.exponential.slope,
            "log_goodness": verdict.exponential.goodness,
            "power_exponent": verdict.power.slope,
            "power_goodness": verdict.power.goodness,
        }
    return {
        key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()
    }

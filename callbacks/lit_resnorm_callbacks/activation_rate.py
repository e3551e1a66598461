"""Activation rates through training."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lit_resnorm.measures.activation import activation_rates, rectifier_sites
from lit_resnorm.measures.passes.sites import Site
from lit_resnorm.measures.passes.untouched import Reduce
from lit_resnorm.quantities import Quantity
from lit_resnorm_callbacks.probe.probe import Batch, Cadence, Probe


class ActivationRateMonitor(Probe):
    """Log how often the units of each layer are on, and which never or always are.

    Sees modules and functions (`F.relu`, `torch.relu`, in place or not) alike: ReLU
    and its kin, of any network. Other activations are left out, and named at set-up.

    Args:
        name: Prefix of the logged names.
        cadence: Optimizer steps between measurements.
        num_examples: Size of the probe batch, over all ranks.
        **options: See :class:`~lit_resnorm_callbacks.probe.probe.Probe`.
    """

    section = "Activations"
    quantities: ClassVar[tuple[Quantity, ...]] = (
        Quantity(
            "rate_mean",
            "mean activation rate",
            scale="linear",
            panel="mean activation rate",
            meaning="Mean of the rates over sites.",
            advice="Near 0.5 at a usual initialisation; training moves it to 0.1 to"
            " 0.5.",
        ),
        Quantity(
            "rate/<site>",
            "activation rate",
            better=0.5,
            scale="linear",
            meaning="Share of (example, position, unit) with a positive preactivation,"
            " in [0, 1]; 0.5 at a usual initialisation.",
            advice="Near 0: most units are off, see dead_units; near 1: the layer is"
            " nearly linear, so lower its bias.",
        ),
        Quantity(
            "dead/<site>",
            "dead units",
            better="low",
            unit="share",
            scale="linear",
            headline=True,
            over_sites="mean",
            panel="dead units",
            meaning="Share of units that are on for no example of any rank.",
            advice="Half and more in training: see dead_units; nine tenths at the"
            " start: see dead_layers.",
        ),
        Quantity(
            "always_on/<site>",
            "units that are always on",
            better="low",
            unit="share",
            scale="linear",
            meaning="Share of units that are on for every example.",
            advice="Near 1: the layer is linear on these examples; normalise before"
            " it, or lower its bias.",
        ),
    )

    def __init__(
        self,
        name: str = "activation",
        cadence: Cadence | int = 100,
        num_examples: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(name, cadence, num_examples, **options)
        self._rectifiers: tuple[Site, ...] = ()

    def prepare(self, module: LightningModule, sites: tuple[Site, ...]) -> None:
        """Choose the sites; say which activations have no rate."""
        self._rectifiers = rectifier_sites(sites, self.sites)
        others = {s.op for s in sites if s.kind == "activation"}
        others -= {s.op for s in rectifier_sites(sites)}
        if others:
            rank_zero_info(f"{self.name}: {', '.join(sorted(others))} have no rate")
        if not self._rectifiers:
            rank_zero_info(
                f"{self.name}: {type(module).__name__} has no ReLU or kin, so no rate"
            )

    def cost(self) -> float:
        """Return that of a forward pass, and the counting at each site."""
        return 1.3 / 3

    def measure(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> dict[str, Tensor]:
        """Return rate, dead and always_on by site, and the mean rate."""
        if not self._rectifiers:
            return {}
        rates = activation_rates(
            module,
            batch,
            sites=self._rectifiers,
            forward=self.forward_fn,
            norm_mode=self.norm_mode,
            reduce=reduce,
        )
        values = {f"rate/{site}": r.rate for site, r in rates.items()}
        values |= {f"dead/{site}": r.dead for site, r in rates.items()}
        values |= {f"always_on/{site}": r.always_on for site, r in rates.items()}
        mean = torch.stack([r.rate for r in rates.values()]).mean()
        return {**values, "rate_mean": mean}

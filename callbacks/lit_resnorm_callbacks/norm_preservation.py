"""Whether norms of hidden states and gradients are kept, through training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lit_resnorm.measures.losses import LossFn
from lit_resnorm.measures.losses.outcomes import OutputJudge
from lit_resnorm.measures.norm_preservation import (
    NormPreservation,
    NormSites,
    norm_preservation,
    norm_sites,
)
from lit_resnorm.measures.passes.batch_dim import targets_first
from lit_resnorm.measures.passes.batches import occupied, take_rows, target_of
from lit_resnorm.measures.passes.sites import Site
from lit_resnorm.measures.passes.untouched import Reduce, identity
from lit_resnorm.quantities import Quantity
from lit_resnorm_callbacks.probe.judging import compare_losses
from lit_resnorm_callbacks.probe.probe import Batch, Cadence, Probe

_ARPIT = "Arpit & Bengio 2019, arXiv 1901.03611"


class NormPreservationMonitor(Probe):
    """Log whether the norm of the input reaches each layer, and that of the error.

    Hidden states are the outputs of activations and residual additions, of any network;
    layers are modules with a trainable weight matrix, kernels among them, embeddings
    aside. With He's weights and a constant width both ratios are near 1 before
    training.

    Args:
        name: Prefix of the logged names.
        cadence: Optimizer steps between measurements.
        num_examples: Size of the probe batch, over all ranks.
        loss_fn: Takes output and target and returns the loss of each example; or one of
            torch's losses. None: the module's own `losses`, else torch's loss that it
            holds, else cross entropy, which is compared with the training loss.
        target_fn: Takes a batch, returns its target; default: a tuple's second element,
            or by a usual name.
        **options: See :class:`~lit_resnorm_callbacks.probe.probe.Probe`.

    Raises:
        ValueError: If an option can't be right; at the start of the fit, if there is no
            input with a norm, or no loss of examples, or another one than is trained.
    """

    section = "Norms"
    quantities: ClassVar[tuple[Quantity, ...]] = (
        Quantity(
            "hidden/<site>",
            "state over input, norms",
            scale="log",
            headline=True,
            heading="norm of the last state over the input's",
            panel="norms of states by site",
            source=_ARPIT,
            better=1.0,
            meaning="Mean over examples of the norm of the hidden state over that of"
            " the input.",
            advice="Far from 1 and growing or shrinking with depth: see"
            " exploding_activations, vanishing_activations.",
        ),
        Quantity(
            "gradient/<site>",
            "gradient over input times error, norms",
            scale="log",
            panel="norms of gradients by layer",
            source=_ARPIT,
            better=1.0,
            meaning="Mean over examples of the norm of the gradient of the layer's"
            " weight over the norm of the input times that of the loss's gradient at"
            " the output.",
            advice="Growing or shrinking with depth: see exploding_gradients,"
            " vanishing_gradients.",
        ),
        Quantity(
            "hidden_deviation/<site>",
            "largest distance of the state's ratio from 1",
            scale="log",
            better="low",
            detail=True,
            meaning="Largest distance of that ratio from 1, over examples.",
        ),
        Quantity(
            "gradient_deviation/<site>",
            "largest distance of the gradient's ratio from 1",
            scale="log",
            better="low",
            detail=True,
            meaning="Largest distance of that ratio from 1, over examples.",
        ),
        Quantity(
            "hidden_deviation",
            "largest distance of states' ratios from 1",
            scale="log",
            better="low",
            meaning="The largest of all sites.",
        ),
        Quantity(
            "gradient_deviation",
            "largest distance of gradients' ratios from 1",
            scale="log",
            better="low",
            meaning="The largest of all layers.",
        ),
        Quantity(
            "excluded",
            "examples without an error",
            unit="share",
            scale="linear",
            meaning="Share of the examples that the gradients leave out: inputs of 0,"
            " errors below 1e-12.",
        ),
    )

    def __init__(
        self,
        name: str = "norms",
        cadence: Cadence | int = 100,
        num_examples: int = 256,
        *,
        loss_fn: LossFn | None = None,
        target_fn: Callable[..., Any] = target_of,
        **options: Any,
    ) -> None:
        super().__init__(name, cadence, num_examples, **options)
        if self.norm_mode == "train":
            raise ValueError(
                f"norm_mode is {self.norm_mode!r}; a gradient of one example alone has"
                " no batch statistics: use frozen or eval"
            )
        self.judge = OutputJudge(loss_fn, targets_first(target_fn, self.batch_dim))
        self._num_chunks = 1
        self._norm_sites: NormSites | None = None

    def prepare(self, module: LightningModule, sites: tuple[Site, ...]) -> None:
        """Forget the sites of another network."""
        del module, sites
        self._norm_sites = None

    def smaller(self) -> bool:
        """Spread the probe batch over twice as many passes."""
        if self._num_chunks >= self.num_examples:
            return False
        self._num_chunks *= 2
        return True

    def measure(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> dict[str, Tensor]:
        """Return the ratios by site and layer, and their largest distances from 1."""
        found = self._norms(module, batch, reduce, self._num_chunks)
        values: dict[str, Tensor] = {}
        for kind, ratios in (("hidden", found.hidden), ("gradient", found.gradient)):
            for name, ratio in ratios.items():
                values[f"{kind}/{name}"] = ratio.mean
                values[f"{kind}_deviation/{name}"] = ratio.deviation
            if ratios:
                each = torch.stack([ratio.deviation for ratio in ratios.values()])
                values[f"{kind}_deviation"] = each.amax()
        values["excluded"] = found.excluded
        lost = [key for key, value in values.items() if bool(value.isnan())]
        if lost:
            still = float(found.excluded) == 1
            why = "all gradients are 0" if still else "an example is not finite"
            self._warn_once(
                "norms",
                f"{len(lost)} values, {lost[0]} among them, are NaN: {why}",
                "mean_not_finite",
            )
        return values

    def _norms(
        self, module: LightningModule, batch: Batch, reduce: Reduce, num_chunks: int
    ) -> NormPreservation:
        if self._norm_sites is None:
            self._norm_sites = norm_sites(
                module, batch, sites=self.sites, forward=self.forward_fn
            )
        return norm_preservation(
            module,
            batch,
            sites=self._norm_sites,
            forward=self.forward_fn,
            judge=self.judge,
            norm_mode=self.norm_mode,
            num_chunks=num_chunks,
            reduce=reduce,
        )

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        super()._prepare(trainer, module)
        whole = occupied(self._batch)[0]
        try:
            self._norm_sites = norm_sites(
                module, whole, sites=self.sites, forward=self.forward_fn
            )
            # what can't be measured on two examples can't on more
            self._norms(module, take_rows(whole, slice(2)), identity, 1)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        name = type(module).__name__
        if not self._norm_sites.layers:
            rank_zero_info(
                f"{self.name}: {name} has no trainable weight matrix, so that there are"
                " no gradients to measure"
            )
        if not self._norm_sites.hidden:
            rank_zero_info(
                f"{self.name}: {name} has no activation or residual addition, so that"
                " there are no hidden states to measure"
            )
        if trainer.training:
            compare_losses(
                self.name,
                module,
                whole,
                self.judge,
                self.forward_fn,
                norm_mode=self.norm_mode,
                batch_dim=self.batch_dim,
            )

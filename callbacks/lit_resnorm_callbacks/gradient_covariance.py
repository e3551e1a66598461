"""The covariance of gradients through training: how noisy steps are, and how."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_resnorm.measures.gradient_covariance import (
    GradientCovariance,
    batch_covariance_spectrum,
    covariance_spectrum,
)
from lit_resnorm.measures.losses.labels import are_labels
from lit_resnorm.measures.passes.batches import num_rows
from lit_resnorm.measures.passes.untouched import Reduce
from lit_resnorm.quantities import Quantity
from lit_resnorm_callbacks.probe.counts import check_count
from lit_resnorm_callbacks.probe.loss_probe import LossProbe
from lit_resnorm_callbacks.probe.probe import Batch, Cadence

_COVARIANCE = "Jastrzebski et al. 2020, arXiv 2002.09572"


class GradientCovarianceProbe(LossProbe):
    """Follow the spectrum of the covariance of gradients.

    Of single examples, exactly: the Gram matrix of the empirical Fisher matrix,
    centred, layer by layer. With `num_batches` of mini-batches, as in the paper: M
    gradients of B examples each, whose covariance is smaller by about 1 / B.

    With `norm_mode="train"` each mini-batch has its own statistics, and names begin
    with `gradcov_batch`.

    Args:
        name: Prefix of the logged names.
        cadence: Optimizer steps between measurements.
        num_examples: Size of the probe batch, over all ranks.
        num_batches: M; None: gradients of single examples.
        batch_size: B; the probe batch must hold M B examples.
        **options: See :class:`~lit_resnorm_callbacks.probe.loss_probe.LossProbe`: the
            loss, and how it is read. Single examples need a likelihood (`output`).

    Raises:
        ValueError: If an option can't be right; at the start of the fit, if there are
            fewer than two gradients, or fewer than M B examples.
    """

    section = "Gradient covariance"
    quantities: ClassVar[tuple[Quantity, ...]] = (
        Quantity(
            "lambda_max",
            "largest eigenvalue of the gradients' covariance",
            scale="log",
            headline=True,
            heading="gradient noise lambda_max",
            source=_COVARIANCE,
            meaning="Largest eigenvalue: variance of gradients along their noisiest"
            " direction.",
            advice="Larger rates and smaller batches hold it lower, from before the"
            " break-even point on. Compare runs at equal training loss, M and B.",
        ),
        Quantity(
            "lambda_min",
            "smallest eigenvalue of the gradients' covariance",
            scale="log",
            source=_COVARIANCE,
            meaning="Smallest of those that centring leaves: N - 1, or M - 1.",
        ),
        Quantity(
            "trace",
            "variance of the gradients",
            scale="log",
            source=_COVARIANCE,
            meaning="Sum of the eigenvalues: variance over all parameters.",
        ),
        Quantity(
            "conditioning",
            "smallest over largest eigenvalue of the gradients' covariance",
            scale="log",
            better="high",
            source=_COVARIANCE,
            meaning="lambda_min / lambda_max; it falls with the number of gradients.",
        ),
        Quantity(
            "trace_over_max",
            "directions of the gradients' noise",
            source=_COVARIANCE,
            meaning="trace / lambda_max: in how many directions gradients scatter.",
        ),
        Quantity(
            "batch_size",
            "examples of a gradient",
            scale="linear",
            meaning="Examples of each gradient: 1, or B.",
        ),
    )

    def __init__(
        self,
        name: str = "gradcov",
        cadence: Cadence | int = 500,
        num_examples: int = 256,
        *,
        num_batches: int | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(name, cadence, num_examples, **options)
        if (num_batches is None) != (batch_size is None):
            raise ValueError(
                f"num_batches is {num_batches} and batch_size {batch_size}; give both,"
                " or none for single examples"
            )
        self.batches: tuple[int, int] | None = None
        if num_batches is None or batch_size is None:
            if self.num_examples < 2:
                raise ValueError(
                    f"num_examples is {self.num_examples}; a covariance takes 2 or more"
                )
            return
        num = check_count("num_batches", num_batches, least=2)
        size = check_count("batch_size", batch_size)
        if num * size > self.num_examples:
            raise ValueError(
                f"num_batches is {num} and batch_size {size}, which takes {num * size}"
                f" examples; num_examples is {self.num_examples}: give {num * size}"
            )
        self.batches = num, size

    def measure(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> dict[str, Tensor]:
        """Return the spectrum's ends, its sum, and its shape."""
        found = self._covariance(module, batch, reduce)
        if found.max == 0:
            self._warn_once(
                "zero",
                "all gradients are alike: their covariance is zero",
                "gradients_alike",
            )
        values = {
            "lambda_max": found.max,
            "lambda_min": found.min,
            "trace": found.trace,
            "conditioning": found.conditioning,
            "trace_over_max": found.trace_over_max,
            "batch_size": found.batch_size,
        }
        return {
            key: torch.tensor(value, dtype=torch.float64)
            for key, value in values.items()
        }

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        super()._prepare(trainer, module)
        num, size = self.batches or (2, 1)
        alone = self.norm_mode == "train"
        rank, world = (0, 1) if alone else (trainer.global_rank, trainer.world_size)
        # examples are dealt out in turn, so that a rank sees what the whole lacks
        if num_rows(self._batch) < len(range(rank, num * size, world)):
            raise ValueError(
                f"{self.name}: the covariance takes {num} gradients of {size} examples,"
                f" {num * size} in all, and the probe data hold fewer: give batch or"
                " dataloader, or other num_batches and batch_size"
            )

    def check(self, trainer: Trainer, module: LightningModule, few: Batch) -> None:
        """Refuse losses whose gradients of single examples aren't measured."""
        if self.batches is not None:
            return
        if not self.read_loss(module, few).is_likelihood:
            raise ValueError(
                "gradients of single examples are measured of likelihoods alone: give"
                " output, or num_batches and batch_size, which take any loss"
            )
        told = self.likelihood.for_module(module)
        target = self.likelihood.target_fn(few)
        shares = told.output == "softmax" and not are_labels(target)
        if told.smoothing or shares:
            raise ValueError(
                "gradients of single examples are measured of labels that are classes,"
                " unsmoothed: give num_batches and batch_size, which take any loss"
            )

    def _covariance(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> GradientCovariance:
        loss = self.read_loss(module, batch)
        options: dict[str, Any] = {
            "norm_mode": self.norm_mode,
            "reduce": reduce,
            "forward": self.forward_fn,
            "memory": self.memory,
            "examinations": self._examinations,
        }
        if self.batches is None:
            targets = self.likelihood.target_fn(batch)
            return covariance_spectrum(module, batch, loss, targets, **options)
        num, size = self.batches
        return batch_covariance_spectrum(
            module,
            batch,
            loss,
            num_batches=num,
            batch_size=size,
            places=self._places(module, batch),
            **options,
        )

    def _places(self, module: LightningModule, batch: Batch) -> Tensor:
        """Return where in the whole batch this rank's examples are."""
        trainer = module._trainer
        if trainer is None:
            return torch.arange(num_rows(batch))
        return trainer.global_rank + trainer.world_size * torch.arange(num_rows(batch))

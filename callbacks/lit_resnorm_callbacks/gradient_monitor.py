"""Gradients and updates of the run, by layer, and the gradient noise scale."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lit_resnorm.measures.fisher import Examinations
from lit_resnorm.measures.gradients import gradient_noise
from lit_resnorm.measures.losses import LossFn
from lit_resnorm.measures.passes.batch_dim import targets_first
from lit_resnorm.measures.passes.batches import take_rows, target_of
from lit_resnorm.measures.passes.functional_calls import with_weights
from lit_resnorm.measures.passes.sharded import is_sharded
from lit_resnorm.measures.passes.sites import Site, owner_name, owner_site
from lit_resnorm.measures.passes.untouched import Reduce
from lit_resnorm.measures.taken_step import TakenStep, sizes_of_step
from lit_resnorm.quantities import Quantity
from lit_resnorm_callbacks.probe.counts import check_count
from lit_resnorm_callbacks.probe.example_losses import ExampleLossOptions
from lit_resnorm_callbacks.probe.loggers import send_quantities
from lit_resnorm_callbacks.probe.probe import Batch, Cadence
from lit_resnorm_callbacks.probe.step_probe import StepProbe
from lit_resnorm_callbacks.probe.training_loss import ByTrainingStep

_NOISE = "McCandlish et al. 2018, arXiv 1812.06162"


class GradientMonitor(StepProbe):
    """Log the gradients that the run trains on, its updates, and the gradient noise.

    Gradients are those of the optimizer step that begins at the logged step: summed
    over ranks, accumulated, unscaled under AMP and before clipping. Right as well where
    weights are sharded (FSDP2), there without the noise scale and with layers numbered
    as they are registered. Several optimizers and
    manual optimization are followed; of an optimizer that steps several times a batch
    the first step counts.

    The noise scale is that of the probe batch, from the gradients of single examples.
    Where the losses of examples can't be read off the module it is left out, and said
    so; a `loss_fn` that doesn't make the training loss is refused.

    Args:
        name: Prefix of the logged names.
        cadence: Optimizer steps between measurements.
        num_examples: Size of the probe batch, over all ranks.
        noise_cadence: Optimizer steps between measurements of the noise scale; it is
            taken at the first measurement in each such stretch, and at the end. None:
            never.
        loss_fn: Takes output and target and returns the loss of each example, of which
            the run's is the mean; or one of torch's losses. None: the module's own
            `losses`, else torch's loss that it holds, else cross entropy.
        target_fn: Takes a batch, returns its target; default: a tuple's second element,
            or by a usual name.
        memory: Bytes that gradients of examples may take; a quarter is tried when
            memory runs out.
        **options: See :class:`~lit_resnorm_callbacks.probe.probe.Probe`.

    Raises:
        ValueError: If an option can't be right; at the start of the fit, if `sites`
            matches no layer with parameters, or a given `loss_fn` isn't the run's.
    """

    section = "Gradients"
    reads_gradients: ClassVar[bool] = True
    takes_shards: ClassVar[bool] = True
    quantities: ClassVar[tuple[Quantity, ...]] = (
        Quantity(
            "norm",
            "gradient norm",
            scale="log",
            headline=True,
            meaning="Euclidean norm of the whole gradient, before clipping.",
            advice="Compare it between runs and through training; sudden peaks go"
            " with peaks of the loss.",
        ),
        Quantity(
            "clip_factor",
            "factor of gradient clipping",
            scale="linear",
            better="high",
            panel="clip factor",
            meaning="Norm after clipping over norm before; 1 where nothing is clipped.",
            advice="Below 1 at nearly every step the clipping sets the step, and the"
            " rate hardly does: clip later, or take a lower rate.",
        ),
        Quantity(
            "noise_scale",
            "gradient noise scale",
            unit="examples",
            scale="log",
            headline=True,
            source=_NOISE,
            meaning="Batch size at which noise and signal of the gradient are equal,"
            " noise_trace / signal_square; infinite where no signal shows.",
            advice="Batches well below it gain from growing, those well above it"
            " waste examples.",
        ),
        Quantity(
            "noise_scale/stderr",
            "standard error of the noise scale",
            unit="examples",
            scale="log",
            meaning="Its standard error, by the jackknife over examples.",
            advice="As large as noise_scale itself: give more num_examples.",
        ),
        Quantity(
            "noise_trace",
            "variance of an example's gradient",
            scale="log",
            source=_NOISE,
            meaning="Variance of an example's gradient, summed over parameters.",
            advice="Compare it with the batch size times signal_square.",
        ),
        Quantity(
            "signal_square",
            "squared norm of the true gradient",
            scale="auto",
            source=_NOISE,
            meaning="Unbiased estimate of the true gradient's squared norm, which noise"
            " may make negative.",
            advice="Negative: the probe batch shows no signal; give more num_examples.",
        ),
        Quantity(
            "norm/<site>",
            "gradient norm of a layer",
            scale="log",
            meaning="Norm of the gradient of a layer's parameters, before clipping.",
            advice="Layers far below the others hardly learn; growing or falling by"
            " depth, see the pathologies of depth.",
        ),
        Quantity(
            "update_ratio/<site>",
            "update over weights",
            scale="log",
            better=1e-3,
            panel="update over weights",
            meaning="Norm of what the step added to a layer's parameters over their"
            " norm before it; about 1e-3 is usual. NaN where all are zero.",
            advice="Far above 0.01 a layer is rewritten in a few steps: lower its"
            " rate, or warm it up; far below 0.0001 it hardly moves.",
        ),
        Quantity(
            "zero/<site>",
            "zeros in the gradient",
            unit="share",
            scale="linear",
            better="low",
            over_sites="mean",
            meaning="Share of exact zeros in the gradient of a layer.",
            advice="Near 1 the layer's units are dead, or its inputs are never used.",
        ),
        Quantity(
            "nonfinite/<site>",
            "non-finite gradients",
            unit="share",
            scale="linear",
            better="low",
            over_sites="mean",
            meaning="Share of infinities and NaN in the gradient of a layer.",
            advice="Above 0 the first such layer, going back from the output, is"
            " where it overflows: lower the rate, or look at the loss scale.",
        ),
    )

    def __init__(
        self,
        name: str = "gradients",
        cadence: Cadence | int = 100,
        num_examples: int = 256,
        *,
        noise_cadence: int | None = 1000,
        loss_fn: LossFn | None = None,
        target_fn: Callable[..., Any] = target_of,
        memory: int = 2**28,
        **options: Any,
    ) -> None:
        super().__init__(name, cadence, num_examples, **options)
        if noise_cadence is not None:
            check_count("noise_cadence", noise_cadence)
        check_count("memory", memory)
        self.noise_cadence = noise_cadence
        self.memory = memory
        self._losses = ExampleLossOptions(
            loss_fn,
            targets_first(target_fn, self.batch_dim),
            self.forward_fn,
            self.norm_mode,
            self.batch_dim,
        )
        self._has_noise = noise_cadence is not None
        self._owned: dict[str, list[Tensor]] = {}
        self._names: dict[int, str] = {}
        self._examinations = Examinations()
        self._told: set[str] = set()

    @property
    def needs_step(self) -> bool:
        """Whether nothing is measured without a step: where there is no noise scale."""
        return not self._has_noise

    def smaller(self) -> bool:
        """Take a quarter of the memory, down to a mebibyte."""
        self.memory //= 4
        return self.memory >= 2**20

    def prepare(self, module: LightningModule, sites: tuple[Site, ...]) -> None:
        """Find the layers; say what is frozen, and whether there is a noise scale."""
        self._find_layers(module, sites)
        self._examinations = Examinations()
        self._has_noise = self.noise_cadence is not None and self._can_read(module)

    def _find_layers(self, module: LightningModule, sites: tuple[Site, ...]) -> None:
        named = dict(module.named_parameters())
        frozen = [name for name, p in named.items() if not p.requires_grad]
        if frozen:
            rank_zero_info(f"{self.name}: {', '.join(frozen)} are frozen: no gradients")
        trained = {name: p for name, p in named.items() if p.requires_grad}
        if not trained:
            raise ValueError(
                f"{self.name}: {type(module).__name__} has no trainable parameter"
            )
        self._names = {id(p): name for name, p in trained.items()}
        self._owned = self._by_site(module, trained, sites)

    def measure(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> dict[str, Tensor]:
        """Return sizes of gradients and updates by site, and the gradient noise."""
        step = self.taken_step()
        values: dict[str, float | Tensor] = {}
        if step is not None:
            values |= self._of_step(module, step, reduce)
        if self._has_noise and (step is None or self._noise_is_due()):
            with with_weights(module, {} if step is None else step.weights(module)):
                values |= self._noise(module, batch, reduce)
        return {
            key: torch.as_tensor(value, dtype=torch.float64)
            for key, value in values.items()
        }

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Prepare as every probe, without a pass where weights are sharded."""
        if not any(map(is_sharded, module.parameters())):
            super()._prepare(trainer, module)
            return
        self._has_noise = False
        if self.noise_cadence is not None:
            self._tell_once("there is no gradient noise scale of sharded weights")
            if self._losses.loss_fn is not None:
                raise ValueError(
                    f"{self.name}: loss_fn is given, and there is no gradient noise"
                    " scale of sharded weights"
                )
        self._find_layers(module, ())
        send_quantities(trainer, self.declared(), self._surviving)

    def _by_site(
        self,
        module: LightningModule,
        parameters: Mapping[str, Tensor],
        sites: tuple[Site, ...],
    ) -> dict[str, list[Tensor]]:
        root = type(module).__name__.lower()
        owned: dict[str, list[Tensor]] = {}
        for name, parameter in parameters.items():
            owned.setdefault(owner_name(name), []).append(parameter)
        found = {
            owner_site(o, root, sites) if sites else f"{i:03d}.{o or root}": owned[o]
            for i, o in enumerate(owned)
        }
        chosen = {s: found[s] for s in sorted(found) if re.search(self.sites, s)}
        if not chosen:
            raise ValueError(
                f"{self.name}: sites is {self.sites!r}, which matches none of the"
                f" layers with parameters: {', '.join(sorted(found))}"
            )
        return chosen

    def _of_step(
        self, module: LightningModule, step: TakenStep, reduce: Reduce
    ) -> dict[str, float]:
        parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self._name_unused(parameters, step)
        sharded = any(map(is_sharded, parameters))
        world_size = module.trainer.world_size if sharded else 1
        sizes = sizes_of_step(step, parameters, world_size)
        if sharded:
            sizes = reduce(sizes.to(module.device))
        by_parameter = dict(zip(map(id, parameters), sizes.tolist(), strict=True))
        square, _, _, _, clipped, _, _ = _summed(by_parameter.values())
        values = {
            "norm": square**0.5,
            "clip_factor": (clipped / square) ** 0.5 if square else 1.0,
        }
        for site, owned in self._owned.items():
            square, zeros, nonfinite, count, _, weights, update = _summed(
                by_parameter[id(parameter)] for parameter in owned
            )
            if count:
                values[f"norm/{site}"] = square**0.5
                values[f"zero/{site}"] = zeros / count
                values[f"nonfinite/{site}"] = nonfinite / count
            ratio = (update / weights) ** 0.5 if weights else float("nan")
            values[f"update_ratio/{site}"] = ratio
        return values

    def _name_unused(self, parameters: list[Tensor], step: TakenStep) -> None:
        lost = [self._names[id(p)] for p in parameters if id(p) not in step.gradients]
        if lost:
            self._tell_once(f"{', '.join(lost)} got no gradient in a step")

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            rank_zero_info(f"{self.name}: {message}")

    def _noise_is_due(self) -> bool:
        assert self.noise_cadence is not None
        step, every = self._measured_step, self.cadence.every_n_steps
        return Cadence(self.noise_cadence).due(step, step - every)

    def _noise(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> dict[str, Tensor]:
        found = gradient_noise(
            module,
            batch,
            partial(self._losses.of_output, module),
            weights=self._losses.weights(module, batch),
            norm_mode=self.norm_mode,
            reduce=reduce,
            forward=self.forward_fn,
            memory=self.memory,
            examinations=self._examinations,
        )
        return {
            "noise_scale": found.scale,
            "noise_scale/stderr": found.stderr,
            "noise_trace": found.trace,
            "signal_square": found.signal_square,
        }

    def _can_read(self, module: LightningModule) -> bool:
        """Say whether examples have losses that make the training loss."""
        few = self._few
        if few is None:
            return True
        trainer: Trainer | None = module._trainer
        try:
            if isinstance(self.forward_fn, ByTrainingStep):
                raise ValueError(f"{type(module).__name__}.forward takes no batch")
            self._noise(module, take_rows(few, slice(2)), lambda tensor: tensor)
            if trainer is not None and trainer.training:
                why = self._losses.compare(module, few)
                if why:
                    self._tell_once(f"the losses of examples were not compared: {why}")
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self._losses.loss_fn is not None:
                raise ValueError(f"{self.name}: {str(error).lstrip(': ')}") from error
            why = str(error).lstrip(": ")
            self._tell_once(f"there is no gradient noise scale: {why}")
            return False
        return True


def _summed(rows: Iterable[Sequence[float]]) -> list[float]:
    """Return the sums of the columns of some rows."""
    return [sum(column) for column in zip(*rows, strict=True)]

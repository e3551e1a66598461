"""Eigenvalues of the Fisher information matrix through training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lit_resnorm.measures.fisher import (
    Examinations,
    FisherForm,
    FisherOptions,
    FisherSpectrum,
    affordable_form,
    apart,
    check_readable,
    fisher_spectrum,
)
from lit_resnorm.measures.losses import LikelihoodOptions
from lit_resnorm.measures.passes.batch_dim import as_given, targets_first
from lit_resnorm.measures.passes.batches import num_rows, take_rows, targets_of
from lit_resnorm.measures.passes.untouched import Reduce, identity, untouched
from lit_resnorm.measures.rates import largest_rate
from lit_resnorm.quantities import OPTIMIZER_KINDS, Quantity
from lit_resnorm.quantities.explanations import SATURATED, ratio_in_words
from lit_resnorm_callbacks.probe.probe import Batch, Cadence, Probe
from lit_resnorm_callbacks.probe.training_loss import NotComparableError, trained_loss

SPECTRA = ("ends", "always", "never")

_COMPARED = 8
"""Examples on which the likelihood is compared with the training loss."""

_RATE = "Furusho & Ikeda 2020, doi 10.1017/ATSIP.2020.7"


class FIMEigenvalueProbe(Probe):
    """Follow the Fisher matrix's spectrum, and the rate bound that it sets.

    Exact on any number of ranks: the expectation over the output's distribution is
    taken in full, on a fixed batch, and eigenvalues are within `tol`. Where iterations
    give them, the eigenvectors of one measurement start the next.

    One warning comes when the largest learning rate in use passes its bound (SGD in
    all its forms; other optimizers rescale their gradients, and have none).

    With `norm_mode="train"` examples are coupled, and names begin with `fim_batch`.

    Args:
        name: Prefix of the logged names.
        cadence: Optimizer steps between measurements.
        num_examples: Size of the probe batch, over all ranks.
        spectrum: When `num_eigenvalues` and the layers' largest are measured: at the
            first and the last measurement of a training, and outside of one (`ends`),
            `always`, or `never`. Else it is traces and lambda_max, which is followed.
        output: `softmax`, `bernoulli` or `gaussian`. `auto` reads the module's loss,
            ours or torch's `CrossEntropyLoss`, `BCEWithLogitsLoss` and `MSELoss` with
            their options; without one, softmax for two or more logits, bernoulli for
            one. What it reads is compared with the loss that `training_step` returns
            for a few examples, and refused with the option that mends it.
        num_eigenvalues: The largest k; None all non-zero ones, 0 none; `auto` all where
            the matrix has at most 4096 rows, else 10. All or many of them may be more
            than `max_cost` allows: then ten, without the layers', or one, or that of
            fewer examples, and a line says so.
        tol: Relative error of eigenvalues that iterations give.
        per_layer: Whether each layer's block is measured too; `sites` selects layers.
        loss_scale: Factor between the loss and the mean log-likelihood; 2 / C for
            torch's mean over C squared errors. None: what `auto` reads, else 1.
        class_dim: Dimension of the output that counts an example's outputs.
        ignore_index: Label of positions that are no examples. None: what `auto` reads,
            else -100.
        class_weights: Weights of the classes in the loss. None: what `auto` reads.
        target_fn: Takes a batch, returns its labels; default: a tuple's second element,
            a dict's `labels`, `label`, `targets`, `target` or `y`.
        memory: Bytes that gradients may take; a quarter is tried when memory runs out.
        **options: See :class:`~lit_resnorm_callbacks.probe.probe.Probe`.

    Raises:
        ValueError: If an option can't be right; at the start of the fit, if the module
            has no trainable parameter or its output can't be read.
    """

    section = "Fisher information"
    quantities: ClassVar[tuple[Quantity, ...]] = (
        Quantity(
            "rate_ratio",
            "learning rate over its bound",
            scale="log",
            panel="learning rate over its bound",
            source=_RATE,
            meaning="Largest learning rate in use over its bound; where no bound"
            " applies it is left out.",
            advice="Above 1 see rate_above_bound; below 0.001 the rate hardly moves the"
            " weights.",
        ),
        Quantity(
            "lambda_max",
            "largest eigenvalue",
            unit="loss",
            scale="log",
            headline=True,
            heading="lambda_max",
            meaning="Largest eigenvalue, in units of the loss.",
            advice="Grows to 2 / rate and stays there: training is at the edge of"
            " stability. 0: see saturated.",
        ),
        Quantity(
            "rate_bound",
            "bound of the learning rate",
            scale="log",
            headline=True,
            heading="rate bound",
            panel="rate and its bound",
            source=_RATE,
            meaning="Rate above which gradient descent diverges on a quadratic of this"
            " curvature: 2 / lambda_max, and by momentum, dampening and decay. Left out"
            " where the output is saturated, and of other optimizers.",
            advice="A rate to begin with, for gradient descent.",
        ),
        Quantity(
            "rate",
            "largest learning rate",
            scale="log",
            panel="rate and its bound",
            meaning="Largest learning rate in use.",
        ),
        Quantity(
            "optimizer_kind",
            "kind of the optimizer",
            scale="linear",
            codes=OPTIMIZER_KINDS,
            meaning="What the rate is judged by: 1 gradient descent, with or without"
            " momentum, by its bound; 0 any other, whose rate is not judged.",
            advice="Where it is 0 see rate_not_judged.",
        ),
        Quantity(
            "saturated",
            "saturated output",
            scale="linear",
            meaning="1 where lambda_max is below 1e-8: the output doesn't change with"
            " the weights, and there is no bound; else 0.",
            advice="See saturated.",
        ),
        Quantity(
            "lambda_mean",
            "mean eigenvalue",
            unit="loss",
            scale="log",
            meaning="Mean over all P eigenvalues, trace / P.",
            advice="Compare it between initialisations and depths.",
        ),
        Quantity(
            "trace",
            "sum of the eigenvalues",
            unit="loss",
            scale="log",
            meaning="Sum of the eigenvalues.",
            advice="Compare it between initialisations and depths.",
        ),
        Quantity(
            "top/<rank>",
            "largest eigenvalues",
            unit="loss",
            scale="log",
            meaning="Largest, second, ... eigenvalue, 01 up to 10.",
            advice="C - 1 of them far above the rest are usual with C classes.",
        ),
        Quantity(
            "lambda_max/residual",
            "error of the largest eigenvalue",
            unit="loss",
            scale="log",
            meaning="Norm of F v - lambda_max v, where iterations gave it.",
            advice="Above 0.01 of lambda_max: lower tol.",
        ),
        Quantity(
            "lambda_max/<site>",
            "largest eigenvalue of a layer",
            better="low",
            unit="loss",
            scale="log",
            meaning="Largest eigenvalue of a layer's own block.",
            advice="The layer with the largest sets the bound: scale it, or give it a"
            " rate of its own.",
        ),
        Quantity(
            "trace/<site>",
            "trace of a layer",
            unit="loss",
            scale="log",
            meaning="Trace of a layer's own block.",
            advice="Likewise.",
        ),
        Quantity(
            "spectrum",
            "eigenvalue",
            unit="loss",
            scale="log",
            form="spectrum",
            meaning="All measured eigenvalues: a table, and a figure at the end.",
        ),
    )

    def __init__(
        self,
        name: str = "fim",
        cadence: Cadence | int = 500,
        num_examples: int = 256,
        *,
        spectrum: Literal["ends", "always", "never"] = "ends",
        output: Literal["auto", "softmax", "bernoulli", "gaussian"] = "auto",
        num_eigenvalues: int | Literal["auto"] | None = "auto",
        tol: float = 1e-5,
        per_layer: bool = True,
        loss_scale: float | None = None,
        class_dim: int | None = None,
        ignore_index: int | None = None,
        class_weights: Sequence[float] | None = None,
        # jsonargparse takes a callable that returns a class for a maker of instances
        target_fn: Callable[..., Any] = targets_of,
        memory: int = 2**28,
        **options: Any,
    ) -> None:
        super().__init__(name, cadence, num_examples, **options)
        if memory < 1:
            raise ValueError(f"memory is {memory}; it must be at least 1 byte")
        self.likelihood = LikelihoodOptions(
            output,
            loss_scale,
            class_dim,
            ignore_index,
            class_weights,
            targets_first(target_fn, self.batch_dim),
            self.forward_fn,
        )
        if spectrum not in SPECTRA:
            raise ValueError(
                f"spectrum is {spectrum!r}; it must be one of {', '.join(SPECTRA)}"
            )
        self.spectrum = spectrum
        self.num_eigenvalues = num_eigenvalues
        self.tol = tol
        self.per_layer = per_layer
        self.memory = memory
        self._vectors: Tensor | None = None
        self._examinations = Examinations()
        self._form: FisherForm | None = None
        # Step of the last measurement that left nothing out.
        self._whole_step: int | None = None
        FisherOptions(output=output, num_eigenvalues=num_eigenvalues, tol=tol)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state and the dual eigenvectors of the last measurement."""
        own = {"vectors": self._vectors, "whole_step": self._whole_step}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self._vectors = state_dict["vectors"]
        self._whole_step = state_dict.get("whole_step")

    def lacks_at_end(self) -> bool:
        """Say whether the spectrum of the last weights is still to be measured."""
        return self.spectrum == "ends" and self._whole_step != self._last_step

    def run(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Measure and log; note whether it was the whole."""
        if self._is_whole():
            self._whole_step = step
        super().run(trainer, module, step)

    def _is_whole(self) -> bool:
        ends = self.spectrum == "ends" and self._at_an_end
        return ends or self.spectrum == "always"

    def smaller(self) -> bool:
        """Take a quarter of the memory, down to a mebibyte."""
        self.memory //= 4
        return self.memory >= 2**20

    def measure(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> dict[str, Tensor]:
        """Return eigenvalues, trace and rate bound, of the whole and by layer."""
        form = self._form or self._wanted(num_rows(batch))
        if not self._is_whole():
            form = form.followed()
        found = self._spectrum(
            module,
            batch,
            num_eigenvalues=form.num_eigenvalues,
            per_layer=(self.sites or True) if self.per_layer else False,
            layer_eigenvalues=form.layer_eigenvalues,
            weights=self.likelihood.weights(module, batch),
            reduce=reduce,
            start=self._vectors,
        )
        if found.vectors is not None:
            self._vectors = found.vectors.float().cpu()
        values = {"trace": found.trace, "lambda_mean": found.mean}
        if self.num_eigenvalues != 0:
            values |= {"lambda_max": found.max, **self._rates(module, found.max)}
            top = found.eigenvalues[:10].tolist() if self._is_whole() else []
            values |= {f"top/{i:02d}": value for i, value in enumerate(top, 1)}
        if found.vectors is not None and found.residuals.numel():
            values["lambda_max/residual"] = float(found.residuals[0])
        for site, layer in found.layers.items():
            values[f"trace/{site}"] = layer.trace
            if form.layer_eigenvalues:
                values[f"lambda_max/{site}"] = layer.max
        tensors = {
            key: torch.tensor(value, dtype=torch.float64)
            for key, value in values.items()
        }
        if found.eigenvalues.numel() > 1:
            tensors["spectrum"] = found.eigenvalues
        return tensors

    def cost(self) -> float:
        """Return that of the form that is measured, as `affordable` counted it."""
        if self._form is None or not self._is_whole():
            return math.nan
        return self._form.cost

    def affordable(
        self, trainer: Trainer, module: LightningModule, batch: Batch
    ) -> int:
        """Refuse what can't be measured, and choose what is within `max_cost`.

        All eigenvalues and each layer's largest, else the largest ten and the layers',
        else the largest ten, else the largest one, else that of fewer examples; traces
        in any case.
        """
        few = take_rows(batch, slice(4))
        try:
            self._check(trainer, module, batch)
            wanted, self._form = affordable_form(
                module,
                few,
                self._wanted(num_rows(batch)),
                self.max_cost,
                FisherOptions(**self._options(module, few)),
            )
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"{self.name}: {type(module).__name__}'s Fisher matrix can't be taken"
                f" ({type(error).__name__}: {error}): give output, forward_fn or"
                " target_fn"
            ) from error
        if self._form != wanted:
            chosen = f"{self._form}, about {self._form.cost:.2g} steps"
            self._tell_cheaper(chosen, str(wanted), wanted.cost)
        return self._form.num_rows

    def _wanted(self, num_examples: int) -> FisherForm:
        layers = int(self.per_layer and self.num_eigenvalues != 0)
        whole = FisherForm(self.num_eigenvalues, layers, num_examples)
        return whole.followed() if self.spectrum == "never" else whole

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._examinations = Examinations()
        try:
            check_readable(module)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        super()._prepare(trainer, module)

    def _check(self, trainer: Trainer, module: LightningModule, batch: Batch) -> None:
        # What the estimator refuses, it refuses on two examples too.
        few = take_rows(batch, slice(2))
        per_layer = self.sites if self.per_layer and self.sites else False
        self.likelihood.check(module, batch)
        found = self._spectrum(
            module, few, num_eigenvalues=0, reduce=identity, per_layer=per_layer
        )
        if found.coupled and self.norm_mode != "train" and trainer.world_size > 1:
            raise ValueError(apart(module, self.norm_mode))
        if trainer.training and self.likelihood.is_guess(module):
            self._compare(module, batch)

    def _compare(self, module: LightningModule, batch: Batch) -> None:
        """See that the likelihood that is read is the loss that is trained."""
        few = take_rows(batch, slice(_COMPARED))
        given = as_given(few, self.batch_dim) if self.batch_dim else few
        try:
            with trained_loss(
                module,
                lambda: self.forward_fn(module, few),
                few,
                given,
                self.norm_mode,
            ) as trained:
                self.likelihood.compare(module, few, trained)
        except NotComparableError as error:
            with untouched(module, norm_mode=self.norm_mode) as run, torch.no_grad():
                output = run(lambda: self.forward_fn(module, few))
            self.likelihood.check_fit(module, few, output)
            rank_zero_info(
                f"{self.name}: the likelihood that is measured was not compared with"
                f" the training loss: {error}"
            )

    def _spectrum(
        self, module: LightningModule, batch: Batch, **options: Any
    ) -> FisherSpectrum:
        return fisher_spectrum(module, batch, **self._options(module, batch), **options)

    def _options(self, module: LightningModule, batch: Batch) -> dict[str, Any]:
        return {
            "output": self.likelihood.for_module(module).output,
            "norm_mode": self.norm_mode,
            "tol": self.tol,
            "forward": self.forward_fn,
            "class_dim": self.likelihood.class_dim,
            "loss_scale": self.likelihood.scale(module, batch),
            "memory": self.memory,
            "examinations": self._examinations,
        }

    def _rates(self, module: LightningModule, lambda_max: float) -> dict[str, float]:
        """Return the rate in use and, where the curvature bounds it, its bound."""
        trainer = module._trainer
        optimizers = [] if trainer is None else trainer.optimizers
        saturated = lambda_max < SATURATED
        values = {"saturated": float(saturated)}
        rate = largest_rate(optimizers, lambda_max)
        if rate is None:
            return values if saturated else {**values, "rate_bound": 2 / lambda_max}
        values["optimizer_kind"] = float(rate.is_descent)
        if saturated or rate.bound is None or rate.ratio is None:
            return {**values, "rate": rate.value}
        if rate.ratio > 1:
            self._warn_once(
                "rate",
                f"the learning rate {rate.value:.3g} is"
                f" {rate.ratio:.3g} times its bound {rate.bound:.3g} (lambda_max"
                f" {lambda_max:.3g}); {ratio_in_words(rate.ratio)}",
                "rate_above_bound",
            )
        return {
            **values,
            "rate_bound": rate.bound,
            "rate": rate.value,
            "rate_ratio": rate.ratio,
        }

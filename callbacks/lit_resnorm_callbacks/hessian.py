"""The Hessian's ends and trace through training, and where curvature stops growing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_resnorm.measures.fisher.measurement import apart
from lit_resnorm.measures.hessian import (
    Growth,
    HessianOptions,
    check_second_derivative,
    hessian_spectrum,
)
from lit_resnorm.measures.passes.untouched import Reduce, identity
from lit_resnorm.measures.rates import largest_rate
from lit_resnorm.quantities import Quantity
from lit_resnorm.runs.optimizer_steps import steps_taken
from lit_resnorm_callbacks.probe.counts import check_count
from lit_resnorm_callbacks.probe.loss_probe import LossProbe
from lit_resnorm_callbacks.probe.probe import Batch, Cadence

_BREAK_EVEN = "Jastrzebski et al. 2020, arXiv 2002.09572"


class HessianProbe(LossProbe):
    """Follow the largest and smallest eigenvalue of the loss's Hessian, and its trace.

    Products of the Hessian with vectors, exact on any number of ranks, of the module's
    own loss on a fixed batch: any network whose loss can be differentiated twice. The
    eigenvalues are within their tolerances but for a chance of 1e-6.

    The break-even point is the step of the first record of `lambda_max` that the next
    `patience` measurements do not pass: where curvature stops growing. It is as fine
    as the cadence, and belongs to a training, so that evaluations don't move it.

    With `norm_mode="train"` examples are coupled, and names begin with `hessian_batch`.

    Args:
        name: Prefix of the logged names.
        cadence: Optimizer steps between measurements.
        num_examples: Size of the probe batch, over all ranks.
        num_eigenvalues: The largest k, as often as they occur. For more than one the
            eigenvectors of a measurement start the next, and are kept in checkpoints:
            k numbers a parameter.
        tol: Relative error of the largest.
        smallest_tol: Error of the smallest, as a share of the largest less the
            smallest; None: it is not measured.
        num_trace_vectors: Random vectors of the trace; 0: it is not measured.
        patience: Measurements of `lambda_max` without a new record that make its last
            one the break-even point.
        **options: See :class:`~lit_resnorm_callbacks.probe.loss_probe.LossProbe`: the
            loss, and how it is read (`output`, `loss_fn`, `loss_scale`, ...).

    Raises:
        ValueError: If an option can't be right; at the start of the fit, if the module
            has no trainable parameter, its loss can't be read, or has no second
            derivative (names the operation).
    """

    section = "Hessian"
    quantities: ClassVar[tuple[Quantity, ...]] = (
        Quantity(
            "lambda_max",
            "largest eigenvalue of the Hessian",
            unit="loss",
            scale="log",
            headline=True,
            heading="Hessian lambda_max",
            panel="largest eigenvalue of the Hessian",
            meaning="Largest eigenvalue, with its sign, in units of the loss.",
            advice="Gradient descent on all data holds it near 2 / rate, small batches"
            " below. Below 0 the loss curves down in every direction: a maximum.",
        ),
        Quantity(
            "break_even",
            "break-even step",
            unit="optimizer steps",
            scale="linear",
            headline=True,
            heading="break-even",
            source=_BREAK_EVEN,
            meaning="First step where lambda_max stops growing; -1 before it is known.",
            advice="Before it the curvature grows until the steps no longer bear it; a"
            " larger rate brings it forward and leaves less curvature. Compare runs at"
            " equal training loss.",
        ),
        Quantity(
            "rate_bound",
            "bound of the learning rate",
            scale="log",
            meaning="Rate above which the optimizer diverges on a quadratic of this"
            " curvature: 2 / lambda_max, and by momentum, dampening and decay. Not for"
            " optimizers that rescale their gradients, nor where nothing curves up.",
        ),
        Quantity(
            "lambda_min",
            "smallest eigenvalue of the Hessian",
            unit="loss",
            scale="linear",
            meaning="Smallest eigenvalue; negative at a saddle.",
            advice="Far below 0 beside lambda_max, the loss falls along a direction in"
            " which the gradient may be small yet; train on.",
        ),
        Quantity(
            "trace",
            "trace of the Hessian",
            unit="loss",
            meaning="Sum of the eigenvalues: an unbiased estimate.",
        ),
        Quantity(
            "trace/stderr",
            "standard error of the trace",
            unit="loss",
            scale="log",
            meaning="Standard error of the trace's estimate.",
            advice="Where it hides what is compared, raise num_trace_vectors.",
        ),
        Quantity(
            "lambda_max/residual",
            "error of the largest eigenvalue",
            unit="loss",
            scale="log",
            meaning="Norm of H v - lambda_max v.",
        ),
        Quantity(
            "top/<rank>",
            "largest eigenvalues of the Hessian",
            unit="loss",
            meaning="Largest, second, ... eigenvalue, where several are asked for.",
        ),
    )

    def __init__(
        self,
        name: str = "hessian",
        cadence: Cadence | int = 500,
        num_examples: int = 256,
        *,
        num_eigenvalues: int = 1,
        tol: float = 1e-3,
        smallest_tol: float | None = 0.1,
        num_trace_vectors: int = 10,
        patience: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(name, cadence, num_examples, **options)
        self._options: dict[str, Any] = {
            "num_eigenvalues": check_count("num_eigenvalues", num_eigenvalues),
            "tol": tol,
            "smallest_tol": smallest_tol,
            "num_trace_vectors": check_count(
                "num_trace_vectors", num_trace_vectors, least=0
            ),
        }
        HessianOptions(**self._options)
        self._growth = Growth(tol, check_count("patience", patience))
        self._vectors: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, the record of growth, and eigenvectors."""
        own = {"growth": asdict(self._growth), "vectors": self._vectors}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        kept = Growth(**state_dict["growth"])
        kept.tol, kept.patience = self._growth.tol, self._growth.patience
        self._growth, self._vectors = kept, state_dict["vectors"]

    def cost(self) -> float:
        """Return that of the products, each four passes forward.

        About `9 + 3 k` of them find the largest k, a dozen the smallest, and each
        vector of the trace takes one.
        """
        options = self._options
        products = 9 + 3 * options["num_eigenvalues"] + options["num_trace_vectors"]
        return 4 / 3 * (products + 12 * (options["smallest_tol"] is not None))

    def measure(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> dict[str, Tensor]:
        """Return eigenvalues, trace, rate bound and break-even point."""
        found = hessian_spectrum(
            module,
            batch,
            self.read_loss(module, batch),
            norm_mode=self.norm_mode,
            reduce=reduce,
            forward=self.forward_fn,
            start=self._vectors,
            memory=self.memory,
            examinations=self._examinations,
            **self._options,
        )
        if found.vectors is not None:
            self._vectors = found.vectors.float().cpu()
        values = {
            "lambda_max": found.max,
            "lambda_max/residual": float(found.residuals[0]),
        }
        bound = self._rate_bound(module, found.max)
        if bound is not None:
            values["rate_bound"] = bound
        if self._options["smallest_tol"] is not None:
            values["lambda_min"] = found.smallest
        if self._options["num_trace_vectors"]:
            values |= {"trace": found.trace, "trace/stderr": found.trace_error}
        if len(found.eigenvalues) > 1:
            top = found.eigenvalues[:10].tolist()
            values |= {f"top/{i:02d}": value for i, value in enumerate(top, 1)}
        self._follow(module, found.max)
        ended_at = self._growth.ended_at
        values["break_even"] = -1 if ended_at is None else ended_at
        return {
            key: torch.tensor(value, dtype=torch.float64)
            for key, value in values.items()
        }

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.training and not steps_taken(trainer):  # a training of its own
            self._growth = Growth(self._growth.tol, self._growth.patience)
        super()._prepare(trainer, module)

    def check(self, trainer: Trainer, module: LightningModule, few: Batch) -> None:
        """Refuse a loss without a second derivative."""
        options = HessianOptions(
            norm_mode=self.norm_mode, reduce=identity, forward=self.forward_fn
        )
        loss = self.read_loss(module, few)
        coupled = check_second_derivative(module, few, loss, options)
        if coupled and self.norm_mode != "train" and trainer.world_size > 1:
            raise ValueError(apart(module, self.norm_mode))

    def _follow(self, module: LightningModule, lambda_max: float) -> None:
        trainer = module._trainer
        if trainer is not None and trainer.state.fn == "fit":
            self._growth.add(steps_taken(trainer), lambda_max)

    def _rate_bound(self, module: LightningModule, lambda_max: float) -> float | None:
        """Return the bound of the largest rate in use; None where there is none."""
        if not lambda_max > 0:
            return None
        trainer = module._trainer
        optimizers = [] if trainer is None else trainer.optimizers
        rate = largest_rate(optimizers, lambda_max)
        return 2 / lambda_max if rate is None else rate.bound

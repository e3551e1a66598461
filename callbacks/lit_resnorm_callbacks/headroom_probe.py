"""How far the run's steps could go before the loss rises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lit_resnorm.measures.headroom import Headroom, headroom
from lit_resnorm.measures.losses import LossFn
from lit_resnorm.measures.passes.batch_dim import targets_first
from lit_resnorm.measures.passes.batches import (
    num_rows,
    occupied,
    take_rows,
    target_of,
)
from lit_resnorm.measures.passes.functional_calls import with_weights
from lit_resnorm.measures.passes.sites import Site
from lit_resnorm.measures.passes.untouched import Reduce, untouched
from lit_resnorm.quantities import Quantity
from lit_resnorm_callbacks.probe.example_losses import ExampleLossOptions
from lit_resnorm_callbacks.probe.probe import Batch, Cadence
from lit_resnorm_callbacks.probe.step_probe import StepProbe
from lit_resnorm_callbacks.probe.training_loss import (
    NotComparableError,
    loss_of_training_step,
)

_CRITICAL = "Kalra et al., arXiv 2601.16979"


class HeadroomProbe(StepProbe):
    """Log how far the run's own steps could go before the loss rises.

    Of whatever optimizer, schedule and clipping: the update that was made is taken
    times s, and the loss on the probe batch is looked for the s at which it is what it
    was before the step. Some eight forward passes, and a copy of the weights for the
    length of one step.

    The loss is the mean of the examples' losses where they make the training loss;
    where they can't be read, it is what `training_step` returns for the probe batch,
    on several ranks the mean over examples of what each rank's share gives. Batch
    norm has the statistics of the probe batch at each of the weights.

    Args:
        name: Prefix of the logged names.
        cadence: Optimizer steps between measurements.
        num_examples: Size of the probe batch, over all ranks.
        loss_fn: Takes output and target and returns the loss of each example, of which
            the run's is the mean; or one of torch's losses. None: the module's own
            `losses`, else torch's loss that it holds, else cross entropy.
        target_fn: Takes a batch, returns its target; default: a tuple's second element,
            or by a usual name.
        **options: See :class:`~lit_resnorm_callbacks.probe.probe.Probe`.

    Raises:
        ValueError: If an option can't be right; at the start of the fit, if there is no
            loss of the probe batch, or a given `loss_fn` isn't the run's.
    """

    section = "Headroom"
    quantities: ClassVar[tuple[Quantity, ...]] = (
        Quantity(
            "step",
            "headroom of the step",
            unit="steps",
            scale="log",
            better="high",
            headline=True,
            heading="headroom",
            source=_CRITICAL,
            meaning="Length, in units of the step that was taken, from which on it"
            " raises the loss: below 1 it did. Infinite beyond 1024, 0 where the step"
            " doesn't descend.",
            advice="Between 1 and 2 training is at the edge of what it bears; far"
            " above, the rate may grow; 0 for long: the step follows momentum"
            " or noise, look at a larger num_examples.",
        ),
        Quantity(
            "critical_rate",
            "critical learning rate",
            scale="log",
            panel="critical rate",
            source=_CRITICAL,
            meaning="Headroom times the largest learning rate in use.",
            advice="Compare it with the rate in use; where it rises, a schedule may.",
        ),
        Quantity(
            "critical_sharpness",
            "critical sharpness",
            scale="log",
            source=_CRITICAL,
            meaning="2 / critical_rate: along the gradient, the curvature that it"
            " meets.",
            advice="Compare it between runs, as one would the largest eigenvalue.",
        ),
        Quantity(
            "alpha_star",
            "length that raises the loss by a fifth",
            unit="steps",
            scale="log",
            source="Jastrzebski et al. 2020, arXiv 2002.09572",
            meaning="Length, in units of the step, from which on the loss is over 1.2"
            " times what it was.",
            advice="Near step the loss is steep there: leave a margin.",
        ),
    )

    def __init__(
        self,
        name: str = "headroom",
        cadence: Cadence | int = 100,
        num_examples: int = 32,
        *,
        loss_fn: LossFn | None = None,
        target_fn: Callable[..., Any] = target_of,
        **options: Any,
    ) -> None:
        super().__init__(name, cadence, num_examples, **options)
        if self.sites:
            raise ValueError(
                f"sites is {self.sites!r}; {type(self).__name__} looks at no layers"
            )
        self._losses = ExampleLossOptions(
            loss_fn,
            targets_first(target_fn, self.batch_dim),
            self.forward_fn,
            self.norm_mode,
            self.batch_dim,
        )
        self._by_examples = True
        # Where the next search begins.
        self._last: Headroom | None = None

    @property
    def needs_step(self) -> bool:
        """Nothing is measured without a step."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, and where the next search begins."""
        last = None if self._last is None else [*self._last]
        return {**super().state_dict(), "last": last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        last = state_dict["last"]
        self._last = None if last is None else Headroom(*last)

    def prepare(self, module: LightningModule, sites: tuple[Site, ...]) -> None:
        """Find out what the loss of the probe batch is."""
        few = self._few
        try:
            with untouched(module, norm_mode=self.norm_mode) as run, torch.no_grad():
                output = run(lambda: self.forward_fn(module, few))
                self._losses.of_output(module, output, few)
            why = self._losses.compare(module, few)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            self._take_training_loss(module, error)
        else:
            self._by_examples = True
            if why:
                rank_zero_info(f"{self.name}: the loss was not compared: {why}")

    def measure(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> dict[str, Tensor]:
        """Return the headroom of the step that was taken, and what follows from it."""
        step = self.taken_step()
        if step is None:
            return {}
        rows, empty = occupied(batch)
        forward = self._forward(rows)
        begin = [*step.weights(module).values()]
        weights = {n: w.clone() for n, w in step.weights(module).items()}
        updates = step.updates(module)
        with (
            untouched(module, norm_mode=self.norm_mode, reduce=reduce) as run,
            torch.no_grad(),
            with_weights(module, weights),
        ):

            def loss(distance: float) -> float:
                with torch._C.DisableTorchFunction():
                    moved = torch._foreach_add(begin, updates, alpha=distance)  # pyright: ignore[reportPrivateImportUsage]
                    torch._foreach_copy_([*weights.values()], moved)  # pyright: ignore[reportPrivateImportUsage]
                output = run(lambda: forward(module), empty=empty, recalibrate=True)
                sums = self._sums(module, output, rows)
                sums = torch.zeros_like(sums) if empty else sums
                total, weight = reduce(sums).tolist()
                return total / weight

            self._last = found = headroom(loss, self._last)
        rate = found.step * step.rate
        values = {
            "step": found.step,
            "alpha_star": found.alpha_star,
            "critical_rate": rate,
            "critical_sharpness": 2 / rate if rate else float("inf"),
        }
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}

    def _forward(self, rows: Batch) -> Callable[[LightningModule], Any]:
        """Return what gives output or training loss of some rows."""
        if self._by_examples:
            return lambda module: self.forward_fn(module, rows)
        given = self._losses.given(rows)
        return lambda module: loss_of_training_step(module, given)

    def _sums(self, module: LightningModule, found: Any, rows: Batch) -> Tensor:
        """Return the weighted sum of the losses of some rows, and of their weights.

        Args:
            module: The module.
            found: The output on these rows, or the training loss.
            rows: The rows.
        """
        if not self._by_examples:
            num = float(num_rows(rows))
            loss = found.double()
            return torch.stack([loss * num, torch.full_like(loss, num)])
        # what is computed of an output is no part of the pass
        with torch._C.DisableTorchFunction():
            losses = self._losses.of_output(module, found, rows).double()
            weights = self._losses.weights(module, rows).to(losses)
            return torch.stack([(losses * weights).sum(), weights.sum()])

    def _take_training_loss(self, module: LightningModule, error: Exception) -> None:
        """Take what `training_step` returns, where losses of examples aren't read."""
        why = str(error).lstrip(": ")
        if self._losses.loss_fn is not None:
            raise ValueError(f"{self.name}: {why}") from error
        few = self._losses.given(take_rows(self._few, slice(2)))
        try:
            with untouched(module, norm_mode=self.norm_mode) as run, torch.no_grad():
                run(lambda: loss_of_training_step(module, few))
        except NotComparableError as no:
            raise ValueError(
                f"{self.name}: there is no loss of the probe batch: {why}; and {no}:"
                " give loss_fn or target_fn"
            ) from error
        self._by_examples = False
        rank_zero_info(
            f"{self.name}: the loss is what training_step returns for the probe batch"
            f" ({why})"
        )

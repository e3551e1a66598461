"""Probes of a step of the run's optimizers: its gradients, its update."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lit_resnorm.measures.taken_step import StepWatch, TakenStep
from lit_resnorm.runs.optimizer_steps import steps_taken
from lit_resnorm_callbacks.probe.probe import Probe


class StepProbe(Probe):
    """A probe that sees the step that follows the weights of its cadence.

    Values are of weights and of the step that begins there, so that step 0 has the
    first gradients; they are logged once that step is taken. The weights that a
    training ends with have no such step: there, and in `validate` and `test`, only
    values that need none are measured.

    Attributes:
        reads_gradients: Whether sizes of the gradients are kept.
    """

    reads_gradients: ClassVar[bool] = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Steps after which the step is awaited; None: none is.
        self._awaited: int | None = None
        self._watch: StepWatch | None = None
        self._measured_step = 0
        self._is_at_end = False

    @property
    def needs_step(self) -> bool:
        """Whether nothing is measured without a step."""
        return False

    def taken_step(self) -> TakenStep | None:
        """Return the step that `measure` is to measure; None where there is none.

        Raises:
            RuntimeError: If the run's optimizers took none.
        """
        return None if self._watch is None else self._watch.taken()

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, and after which step one was awaited."""
        return {**super().state_dict(), "awaited": self._awaited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self._awaited = state_dict["awaited"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Await the first step, if that is asked for, or what a checkpoint awaited."""
        awaited, self._awaited = self._awaited, None
        self._is_at_end = False
        super().on_train_start(trainer, pl_module)
        if awaited is not None and awaited == steps_taken(trainer):
            self._await(trainer, awaited)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Read the gradients before they are clipped."""
        if self._watch is not None:
            self._watch.read_gradients(optimizer, _scale(trainer, optimizer))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure the step that was awaited, if this batch took it."""
        awaited = self._awaited
        if awaited is not None and steps_taken(trainer) > awaited:
            self._awaited = None
            try:
                with self._surviving("run"):
                    self._run_now(trainer, pl_module, awaited)
            finally:
                self._leave()
            if awaited == 0:
                self._log_figures(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what needs no step, and draw the figures."""
        self._leave()
        self._is_at_end = True
        super().on_train_end(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let the optimizers alone."""
        self._leave()

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Let the optimizers alone."""
        self._leave()
        super().teardown(trainer, pl_module, stage)

    def run(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Measure once the step after the present weights is taken, or at once."""
        if trainer.training and not self._is_at_end:
            self._await(trainer, step)
        elif not self.needs_step:
            self._awaited = None if self._awaited == step else self._awaited
            self._run_now(trainer, module, step)

    def _run_now(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        self._measured_step = step
        super().run(trainer, module, step)
        if self._watch is not None:
            self._fingerprint = ""  # the measured weights are not the present ones

    def _measures_alone(self) -> bool:
        return not self.needs_step

    def _await(self, trainer: Trainer, step: int) -> None:
        self._leave()
        self._awaited = step
        self._watch = StepWatch(trainer.optimizers, self.reads_gradients)

    def _leave(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None


def _scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Return what the gradients are multiplied by as an optimizer is given them.

    Lightning unscales them before, but for optimizers that do so for themselves.
    """
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())

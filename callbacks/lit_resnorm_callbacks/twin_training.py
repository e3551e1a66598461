"""Trains twins beside a run, each without one example.

Dimensions: K twins, B examples of a batch, R rows that a twin takes of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_resnorm.measures.clipping import clip_by_norm, clip_by_value
from lit_resnorm.measures.copies import Losses
from lit_resnorm.measures.losses import check_mean
from lit_resnorm.measures.observe import Reduce
from lit_resnorm.measures.passes.batches import joined
from lit_resnorm.measures.preserved import random_state
from lit_resnorm.measures.twins import Share, Twins
from lit_resnorm_callbacks.left_out import Hits
from lit_resnorm_callbacks.random_states import RandomStates


class TwinTraining:
    """K twins of a run, which take its steps on its batches without one example each.

    A twin is forked when a batch first holds its example, before the run's step, and
    draws the random numbers that the run drew in its own forward pass.

    Args:
        trainer: The trainer, about to train.
        module: The run's module.
        losses: The losses of examples.
        num: Number of twins.
        replacements: A batch of K rows that take the places of the examples; None: the
            examples are left out.
        keep_in_norms: Keep the examples in the batch, with no weight in the loss.
        memory: Bytes that the activations of the twins that run at once may take.
        name: The probe's name, for messages.

    Raises:
        ValueError: If the run can't be twinned; the message says why.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        losses: Losses,
        num: int,
        *,
        replacements: Any = None,
        keep_in_norms: bool = False,
        memory: int,
        name: str,
    ) -> None:
        _check_run(trainer, module, name)
        self.twins = Twins(module, trainer.optimizers[0], losses, num)
        self._replacements = replacements
        self._keep = keep_in_norms
        self._memory = memory
        self._name = name
        self._hits: Hits | None = None
        self._random = RandomStates.now()
        self._awaits_forward = False
        self._stepped = False
        # The first module call of a batch is where the run's forward pass begins.
        self._hooks = [
            each.register_forward_pre_hook(self._before_forward)
            for each in (module, *module.children())
        ]

    def close(self) -> None:
        """Take the hooks off the run's module."""
        for hook in self._hooks:
            hook.remove()

    def begin(self, trainer: Trainer, hits: Hits, batch_idx: int) -> None:
        """Fork the twins of new examples; call before the run's forward pass."""
        amid = batch_idx % trainer.accumulate_grad_batches > 0
        for k in hits.new:
            # Ranks average their gradients, so each holds a share of the sum.
            scale = 1 / trainer.world_size if amid else None
            self.twins.fork(k, trainer.optimizers[0], scale)
        self._hits = hits
        self._random = RandomStates.now()
        self._awaits_forward = True
        self._stepped = False

    def compare(self, trainer: Trainer, batch: Any, loss: Tensor) -> None:
        """Compare the run's loss with the twins' way to it, before its first step.

        Args:
            trainer: The trainer.
            batch: The batch in hand.
            loss: What the run is about to differentiate.

        Raises:
            ValueError: If the losses of examples don't average to it.
        """
        self._awaits_forward = False
        with random_state():
            seen = self.twins.rehearse(
                batch, lambda: self._as_the_run(trainer), self._memory
            )
        self._keep |= seen.draws and not seen.coupled
        if not self.twins.vectorised:
            rank_zero_info(
                f"{self._name}: twins run one after another, because torch.func.vmap"
                " can't run the model's forward pass"
            )
        self._with_replacements(batch)
        check_mean(self._name, seen.losses, loss * trainer.accumulate_grad_batches)

    def before_step(self, optimizer: Optimizer) -> None:
        """Take over the settings with which the run is about to step."""
        self._stepped = True
        self.twins.follow(optimizer)

    def end(self, trainer: Trainer, batch: Any, reduce: Reduce) -> None:
        """Train the twins on the batch; step where the run has stepped."""
        self._awaits_forward = False
        hits = self._hits
        if hits is None or not self.twins.forked:
            return
        with random_state():
            for share in self._shares(hits, 1 / trainer.accumulate_grad_batches):
                rows = (
                    self._with_replacements(batch) if share.rows is not None else batch
                )
                self.twins.accumulate(rows, share, lambda: self._as_the_run(trainer))
        if not self._stepped:
            return
        if all(p.grad is None for p in self.twins.originals.values()):
            # The run has dropped its step, as our modules do where they diverge.
            self.twins.drop_gradients()
            return
        self.twins.step(
            clip=lambda grads: _clip(trainer, grads),
            reduce=reduce if trainer.world_size > 1 else None,
        )

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if self._awaits_forward:
            self._awaits_forward = False
            self._random = RandomStates.now()

    @contextmanager
    def _as_the_run(self, trainer: Trainer) -> Iterator[None]:
        self._random.set()
        with trainer.precision_plugin.train_step_context():
            yield

    def _with_replacements(self, batch: Any) -> Any:
        if self._replacements is None:
            return batch
        return joined([batch, self._replacements])

    def _shares(self, hits: Hits, scale: float) -> list[Share]:
        """Return what the forked twins take of a batch; `scale` is the loss's factor.

        A twin that takes no row of any rank's batch is left out.
        """
        groups: dict[int | None, list[tuple[int, list[float], list[int]]]]
        groups = defaultdict(list)
        for k in sorted(self.twins.forked):
            mine = hits.local[k]
            left = hits.all_rows - hits.total[k]
            rows = [r for r in range(hits.rows) if r not in mine]
            size: int | None = len(rows)
            if self._replacements is not None:
                left, size = hits.all_rows, hits.rows
                rows = [hits.rows + k if r in mine else r for r in range(hits.rows)]
            if not left:
                continue
            weights = [scale / left]
            if self._keep and self._replacements is None:
                weights = [0.0 if r in mine else scale / left for r in range(hits.rows)]
                size = None
            if not mine:
                size = None
            groups[size].append((k, weights, rows))
        return [
            Share(
                [k for k, _, _ in group],
                torch.tensor([weights for _, weights, _ in group], dtype=torch.float64),
                None if size is None else torch.tensor([rows for _, _, rows in group]),
            )
            for size, group in groups.items()
        ]


def _clip(trainer: Trainer, grads: dict[str, Tensor]) -> None:
    if not trainer.gradient_clip_val or not grads:
        return
    by_value = trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE
    (clip_by_value if by_value else clip_by_norm)(grads, trainer.gradient_clip_val)


def _check_run(trainer: Trainer, module: LightningModule, name: str) -> None:
    """Raise ValueError where twins couldn't take the run's steps."""
    reasons = {
        "has manual optimization": not module.automatic_optimization,
        f"has {len(trainer.optimizers)} optimizers": len(trainer.optimizers) != 1,
        "overrides configure_gradient_clipping": is_overridden(
            "configure_gradient_clipping", module
        ),
        "scales its loss (precision 16-mixed); bf16-mixed does without": getattr(
            trainer.precision_plugin, "scaler", None
        )
        is not None,
        "synchronises batch norm over ranks": any(
            isinstance(each, nn.SyncBatchNorm) for each in module.modules()
        ),
    }
    if wrong := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(
            f"{name}: twins can't take the steps of a run that {', '.join(wrong)}"
        )

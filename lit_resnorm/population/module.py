"""`Population`: members of one variant, trained together in one vectorised run.

Dimensions: M members, B examples of a batch, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_resnorm.measures.copies.copies import ModelFunction
from lit_resnorm.measures.copies.optimizer import (
    check_elementwise,
    clip_by_norm,
    clip_by_value,
)
from lit_resnorm.measures.passes.compilation import uncompiled
from lit_resnorm.modules.classifier import LitClassifier
from lit_resnorm.modules.losses import sum_over_ranks
from lit_resnorm.modules.optimizers import scheduled
from lit_resnorm.population.members import (
    MemberMeans,
    Members,
    logged_values,
    member_targets,
    noisy_labels,
)
from lit_resnorm.quantities.explanations import reference

__all__ = ["Population"]


class Population(L.LightningModule):
    """Trains M members of one variant on the same batches, in one vectorised pass.

    Each member is, to rounding, what a run of its own with its settings would be; a run
    of its own with dropout draws other masks. Logs for each member, by its place in
    `members` (two digits or more): `train/loss/<member>`, `val/loss/<member>`,
    `val/accuracy/<member>`, `test/...`, and, without a place, the means over members
    that didn't diverge; `population/diverged`, their number. A member whose training
    loss isn't finite keeps the weights from before and is trained no more.

    Args:
        model: Makes a member. In Python `lambda: LitMLP(10, 64)` or a `partial`.
        members: What is special to each: `seed` of its initial weights and of its label
            noise (without one, all start from the same random state), `label_noise`,
            the share of training labels that are changed to another class (needs data
            with `with_index: true`), and any setting of the optimizer, as `lr`.

    Attributes:
        diverged: Which members diverged, bool, shape `(M,)`.

    Raises:
        ValueError: If there is no member, or one has a setting that can't be.
    """

    diverged: Tensor

    def __init__(
        self, model: Callable[[], LitClassifier], members: Sequence[Mapping[str, Any]]
    ) -> None:
        super().__init__()
        if not members:
            raise ValueError("members is empty; give a dict of settings for each")
        if isinstance(model, nn.Module):
            raise ValueError(
                f"model is a {type(model).__name__} that is made already; give a"
                " function that makes one, as members start from weights of their own"
            )
        self.members = [dict(member) for member in members]
        made = [_made(model, member) for member in self.members]
        if not isinstance(made[0], LitClassifier):
            kind = type(made[0]).__name__
            raise ValueError(f"model makes a {kind}, which is no LitClassifier")
        self.stacks = Members([each.net for each in made], self._settings())
        # Outside of the tree of modules: its own weights are never used.
        self._model = [made[0]]
        self._bound = [ModelFunction(made[0].net, _outputs_of_net)]
        self.register_buffer("diverged", torch.zeros(len(made), dtype=torch.bool))
        self._finite: Tensor | None = None
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._labels_MN: Tensor | None = None
        self._means = MemberMeans()

    def _settings(self) -> list[dict[str, Any]]:
        """Return the optimizer's settings that each member has of its own."""
        ours = ("seed", "label_noise")
        return [
            {key: value for key, value in member.items() if key not in ours}
            for member in self.members
        ]

    def member_state_dict(self, i: int) -> dict[str, Tensor]:
        """Return a member's weights, as a state dict of the variant.

        Raises:
            ValueError: If there is no such member.
        """
        if not 0 <= i < len(self.members):
            raise ValueError(f"member {i} isn't one of {len(self.members)}")
        weights = self.stacks.stacked()
        return {f"net.{n}": stack[i].detach().clone() for n, stack in weights.items()}

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all members, shape `(M, B, C)`."""
        return self._run(x, self.stacks.stacked())

    def _run(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        bound = self._bound[0]
        if bound.model.training != self.training:
            bound.model.train(self.training)
        with uncompiled():
            return bound.for_each(weights, x, randomness="different")

    def setup(self, stage: str) -> None:
        """Compare with the data, and draw the members' label noise.

        Raises:
            ValueError: If the data's classes aren't the model's, or label noise is
                asked for and the training set has no labels.
        """
        data = getattr(self.trainer, "datamodule", None)
        classes = getattr(data, "num_classes", None)
        model = self._model[0]
        if None not in (classes, model.num_classes) and classes != model.num_classes:
            raise ValueError(
                f"num_classes={model.num_classes} of the model, but the data has"
                f" {classes} ({stage})"
            )
        if stage == "fit":
            self._labels_MN = noisy_labels(data, self.members)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the variant's optimizer over all members, with its scheduler."""
        model = self._model[0]
        # Every torch optimizer takes groups of parameters where it takes parameters.
        optimizer = model.optimizer(cast(Any, self.stacks.groups()))
        check_elementwise(optimizer)
        if unknown := {key for own in self._settings() for key in own} - set(
            optimizer.defaults
        ):
            raise ValueError(
                f"members have {', '.join(sorted(unknown))}, which"
                f" {type(optimizer).__name__} doesn't know"
            )
        if model.lr_scheduler is None:
            return optimizer
        scheduler = model.lr_scheduler(optimizer)
        return scheduled(optimizer, scheduler, model.lr_interval)

    def training_step(self, batch: Sequence[Tensor]) -> Tensor:
        """Return the sum over healthy members of their mean losses on this batch."""
        weights = self.stacks.stacked()
        updated = {n: b.clone() for n, b in self.stacks.buffers_of_nets().items()}
        outputs_MBC = self._run(batch[0], weights | updated)
        targets = member_targets(batch, len(self.members), self._labels_MN)
        losses_MB = self._losses(outputs_MBC, targets)
        mean_M = losses_MB.mean(1)
        finite_M = sum_over_ranks(self.trainer, (~mean_M.isfinite()).float()) == 0
        self._finite = finite_M if self._finite is None else self._finite & finite_M
        healthy_M = self._finite & ~self.diverged
        with torch.no_grad():
            for name, own in self.stacks.buffers_of_nets().items():
                own[healthy_M] = updated[name][healthy_M]
        step = self.trainer.global_step
        every = getattr(self.trainer, "log_every_n_steps", 1)
        if step % max(every, 1) == 0:
            self._send("train", {"loss": mean_M.detach()}, step)
        return mean_M[healthy_M].sum()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:  # noqa: ARG002
        """Freeze the members whose loss wasn't finite, before they step."""
        finite_M, self._finite = self._finite, None
        if finite_M is None:
            return
        new = (~finite_M & ~self.diverged).nonzero()[:, 0].tolist()
        if new:
            self.diverged |= ~finite_M
            rank_zero_warn(
                f"members {new} diverged at step {self.global_step}: they keep the"
                f" weights from before; see {reference('loss_not_finite')}"
            )
            self.trainer.should_stop = bool(self.diverged.all())
        rows = self.stacks.rows(self.diverged)
        self._kept = [(stack[at].detach().clone(), at, stack) for stack, at in rows]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, and give frozen members their weights back."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for values, rows, stack in self._kept:
                stack[rows] = values
        self._kept = []

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,  # noqa: ARG002
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each member's gradients as if they were alone."""
        if not gradient_clip_val:
            return
        by_value = gradient_clip_algorithm == GradClipAlgorithmType.VALUE
        clip = clip_by_value if by_value else clip_by_norm
        with torch.no_grad():
            for grads in self.stacks.gradients():
                clip(grads, gradient_clip_val)

    def on_validation_epoch_start(self) -> None:
        """Start over."""
        self._means = MemberMeans()

    def on_test_epoch_start(self) -> None:
        """Start over."""
        self._means = MemberMeans()

    def validation_step(self, batch: Sequence[Tensor]) -> None:
        """Add a batch to the members' sums."""
        self._add(batch)

    def test_step(self, batch: Sequence[Tensor]) -> None:
        """Add a batch to the members' sums."""
        self._add(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the members' means."""
        self._end("val")

    def on_test_epoch_end(self) -> None:
        """Log the members' means."""
        self._end("test")

    def _losses(self, outputs_MBC: Tensor, targets: Tensor) -> Tensor:
        return torch.func.vmap(self._model[0].losses)(outputs_MBC, targets)

    def _add(self, batch: Sequence[Tensor]) -> None:
        outputs_MBC = self(batch[0])
        target = batch[1].expand(len(self.members), *batch[1].shape)
        losses_MB = self._losses(outputs_MBC, target)
        self._means.add(losses_MB, outputs_MBC, batch[1])

    def _end(self, stage: str) -> None:
        if self.trainer.sanity_checking:
            return
        if values := self._means.over_ranks(self.trainer):
            self._send(stage, values, self.trainer.global_step)

    def _send(self, stage: str, values: dict[str, Tensor], step: int) -> None:
        """Log each member's values, and their means over those that are healthy."""
        # LightningModule.log takes longer than a small net's step for each value.
        logged = logged_values(stage, values, self.diverged)
        self.trainer.callback_metrics.update(
            {key: torch.tensor(value) for key, value in logged.items()}
        )
        for logger in self.trainer.loggers:
            logger.log_metrics(logged, step=step)


def _made(model: Callable[[], LitClassifier], member: Mapping[str, Any]) -> Any:
    """Return a member as it is before training, leaving the random states alone."""
    with torch.random.fork_rng(devices=[]):
        if "seed" in member:
            torch.manual_seed(member["seed"])
        return model()


def _outputs_of_net(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)

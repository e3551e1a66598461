"""Trains twins beside a run, each without one example.

Dimensions: K twins, B examples of a batch, R rows that a twin takes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_resnorm.measures.copies.attributes import Attributes, attributes
from lit_resnorm.measures.copies.copies import Losses
from lit_resnorm.measures.copies.optimizer import clip_by_norm, clip_by_value
from lit_resnorm.measures.copies.twins import Twins
from lit_resnorm.measures.losses import Reduction
from lit_resnorm.measures.passes.batches import joined
from lit_resnorm.measures.passes.random_states import RandomStates, random_states_kept
from lit_resnorm.measures.passes.untouched import Reduce
from lit_resnorm_callbacks.stability.gradient_check import GradientCheck
from lit_resnorm_callbacks.stability.left_out import Hits
from lit_resnorm_callbacks.stability.shares import shares


class TwinTraining:
    """K twins of a run, which take its steps on its batches without one example each.

    A twin is forked when a batch first holds its example, before the run's step, and
    draws the random numbers that the run drew in its own forward pass.

    Args:
        trainer: The trainer, about to train.
        module: The run's module.
        losses: The losses of examples.
        reduction: Takes a batch, says what makes its loss of these.
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
        reduction: Callable[[Any], Reduction],
        num: int,
        *,
        replacements: Any = None,
        keep_in_norms: bool = False,
        memory: int,
        name: str,
    ) -> None:
        _check_run(trainer, module, name)
        self.twins = Twins(module, trainer.optimizers[0], losses, num)
        self._module = module
        self._reduction = reduction
        self._replacements = replacements
        self._keep = keep_in_norms
        self._memory = memory
        self._name = name
        self._hits: Hits | None = None
        self._random = RandomStates.now()
        # Plain attributes before the run's forward pass.
        self._before: Attributes = {}
        self._awaits_forward = False
        self._had_first_pass = False
        self._check: GradientCheck | None = None
        self._weights_left: list[Tensor] | None = None
        self._begin_batch(opening=True)
        # The first module call of a batch is where the run's forward pass begins.
        self._hooks = [
            each.register_forward_pre_hook(self._before_forward)
            for each in (module, *module.children())
        ]
        self._watched: Optimizer | None = None
        self._watch(trainer.optimizers[0])

    def close(self) -> None:
        """Take the hooks off the run's module and optimizer."""
        for hook in self._hooks:
            hook.remove()

    def begin(self, trainer: Trainer, hits: Hits, batch_idx: int) -> None:
        """Fork the twins of new examples; call before the run's forward pass."""
        self.check_weights()
        optimizer = trainer.optimizers[0]
        self._watch(optimizer)
        self.twins.take_up(optimizer)
        amid = batch_idx % trainer.accumulate_grad_batches > 0
        for k in hits.new:
            # Ranks average their gradients, so each holds a share of the sum.
            self.twins.fork(k, optimizer, 1 / trainer.world_size, amid=amid)
        self._hits = hits
        self._random = RandomStates.now()
        self._awaits_forward = True
        self._begin_batch(opening=not amid)
        if batch_idx == 0 or not self._had_first_pass:
            self._check = GradientCheck(self._name, trainer)
            if amid:  # in a run that goes on from there
                self._check.restart(holds=False)
        if self._check is not None:
            self._check.keep_buffers(self._module)

    def before_backward(self, trainer: Trainer, batch: Any, loss: Tensor) -> None:
        """Compare the run with the twins' way, before an epoch's first step.

        Args:
            trainer: The trainer.
            batch: The batch in hand.
            loss: What the run is about to differentiate.

        Raises:
            ValueError: If the losses of examples don't average to it.
        """
        self._awaits_forward = False
        self._has_loss = True
        fresh = self.twins.zero_as_the_model() if self._opening else False
        if (check := self._check) is None:
            return
        if self._opening:
            check.restart(holds=fresh)
        if not self._had_first_pass:
            self._run_first_pass(trainer, batch, check.buffers)
        reduction = self._reduction(batch)
        with random_states_kept():
            losses_B, grads = self.twins.model_gradients(
                batch,
                lambda: self._as_the_run(trainer),
                check.buffers,
                self._before,
                reduction,
            )
        own = loss * trainer.accumulate_grad_batches
        reduction.check(self._name, losses_B, own)
        check.add(grads)

    def before_step(self, optimizer: Optimizer) -> None:
        """Train what the run is about to train."""
        self.twins.take_up(optimizer)

    def end(self, trainer: Trainer, batch: Any, reduce: Reduce) -> None:
        """Train the twins on the batch; step where the run has stepped.

        Raises:
            RuntimeError: If the optimizer has stepped more than once.
            ValueError: If the run stepped with another gradient than its loss's.
        """
        self._awaits_forward = False
        twins = self.twins
        if self._opening and not self._has_loss:
            twins.zero_as_the_model()
        if self._hits is not None:
            for k in self._hits.new if self._has_loss else ():
                before = self._before.items()
                twins.own[k] = {n: v for n, v in before if n in twins.kept}
        if self._hits is not None and twins.forked:
            self._accumulate(trainer, batch, self._hits, reduce)
        if not self._steps:
            return
        if self._steps > 1:
            raise RuntimeError(f"the optimizer stepped {self._steps} times in a batch")
        check, self._check = self._check, None
        if check is not None and self._has_loss:
            check.compare(lambda grads: _clip(trainer, grads), reduce)
        if self._dropped:
            # The run has dropped its step, as our modules do where they diverge.
            twins.drop_gradients()
        elif twins.forked:
            twins.step(
                clip=lambda grads: _clip(trainer, grads),
                reduce=reduce if trainer.world_size > 1 else None,
                world_size=trainer.world_size,
                keep=True,
            )

    def pending(self) -> list[dict[str, Any]]:
        """Return what the twins' next step adds to, a rank each; all ranks call it."""
        trainer = self._module.trainer
        own = self.twins.pending()
        if trainer.accumulate_grad_batches == 1 or trainer.world_size == 1:
            return [own] if own else []
        found: list[dict[str, Any]] = [{}] * trainer.world_size
        torch.distributed.all_gather_object(found, own)
        return found if any(found) else []

    def add_pending(self, saved: list[dict[str, Any]]) -> None:
        """Go on amid an accumulation, with what `pending` gave."""
        own = saved[self._module.trainer.global_rank % len(saved)]
        if own:
            self.twins.add_pending(own)

    def finish(self) -> None:
        """Let the weights be changed: the run has ended."""
        self._weights_left = None

    def check_weights(self) -> None:
        """See that the run's weights are as its optimizer's last step left them.

        Raises:
            RuntimeError: If they aren't.
        """
        if self._weights_left is None:
            return
        now = _fingerprint(self._module)
        if len(now) != len(self._weights_left) or any(
            # Of a run that has diverged nothing is left to be followed.
            bool(x.isfinite()) and not torch.equal(x, y)
            for x, y in zip(now, self._weights_left, strict=True)
        ):
            raise RuntimeError(
                "the run's weights were changed by something other than its optimizer"
                " (weight averaging, pruning, a moving teacher), which twins can't"
                " follow"
            )

    def _begin_batch(self, *, opening: bool) -> None:
        self._opening = opening
        self._has_loss = False
        self._steps = 0
        self._dropped = False

    def _watch(self, optimizer: Optimizer) -> None:
        """Be told when the run's optimizer has stepped."""
        if optimizer is not self._watched:
            self._watched = optimizer
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._steps += 1
        grads = {n: p.grad for n, p in self.twins.originals.items()}
        self._dropped = all(grad is None for grad in grads.values())
        self.twins.follow(optimizer)
        if self._check is not None:
            self._check.used = {n: g.clone() for n, g in grads.items() if g is not None}
        if self.twins.forked:
            self._weights_left = _fingerprint(self._module)

    def _run_first_pass(
        self, trainer: Trainer, batch: Any, buffers: dict[str, Tensor]
    ) -> None:
        with random_states_kept():
            seen = self.twins.run_first_pass(
                batch,
                lambda: self._as_the_run(trainer),
                self._memory,
                buffers,
                self._before,
            )
        self._had_first_pass = True
        self._keep |= seen.draws and not seen.coupled
        if not self.twins.vectorised:
            rank_zero_info(
                f"{self._name}: twins run one after another, because "
                + (
                    f"a forward pass updates {', '.join(seen.kept)}"
                    if seen.kept
                    else "torch.func.vmap can't run the model's forward pass"
                )
            )
        self._with_replacements(batch)

    def _accumulate(
        self, trainer: Trainer, batch: Any, hits: Hits, reduce: Reduce
    ) -> None:
        if not self._has_loss:
            self.twins.accumulate_nothing()
            return
        whole = self._with_replacements(batch)
        found = shares(
            sorted(self.twins.forked),
            hits,
            self._reduction(whole),
            reduce,
            world_size=trainer.world_size,
            scale=1 / trainer.accumulate_grad_batches,
            keep=self._keep,
            replaced=self._replacements is not None,
        )
        with random_states_kept():
            for share in found:
                rows = whole if share.rows is not None else batch
                self.twins.accumulate(rows, share, lambda: self._as_the_run(trainer))

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if self._awaits_forward:
            self._awaits_forward = False
            self._random = RandomStates.now()
            names = self.twins.kept if self._had_first_pass else None
            self._before = attributes(self._module, names)

    @contextmanager
    def _as_the_run(self, trainer: Trainer) -> Iterator[None]:
        self._random.set()
        with trainer.precision_plugin.train_step_context():
            yield

    def _with_replacements(self, batch: Any) -> Any:
        if self._replacements is None:
            return batch
        return joined([batch, self._replacements])


@torch.no_grad()
def _fingerprint(module: nn.Module) -> list[Tensor]:
    """Return the norm of each parameter, which a change hardly ever leaves as it is."""
    parameters: list[Tensor] = [p for p in module.parameters() if p.numel()]
    return [*torch._foreach_norm(parameters)]  # pyright: ignore[reportPrivateImportUsage]


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

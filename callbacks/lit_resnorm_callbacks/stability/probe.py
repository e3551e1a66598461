"""Algorithmic stability: twins of the run, each trained without one example."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_resnorm.measures.copies.copies import Copies
from lit_resnorm.measures.losses import LossFn, Reduction, losses_of, reduction_of
from lit_resnorm.measures.passes.batch_dim import examples_first, targets_first
from lit_resnorm.measures.passes.batches import num_rows, take_rows, target_of
from lit_resnorm.measures.passes.sites import Site
from lit_resnorm.measures.passes.untouched import Reduce, untouched
from lit_resnorm.quantities import Quantity
from lit_resnorm.quantities.explanations import reference
from lit_resnorm_callbacks.probe.counts import check_count
from lit_resnorm_callbacks.probe.loggers import send_tables
from lit_resnorm_callbacks.probe.probe import Batch, Cadence, Probe
from lit_resnorm_callbacks.stability.follower import RunFollower
from lit_resnorm_callbacks.stability.influence import Influence
from lit_resnorm_callbacks.stability.left_out import (
    LeftOut,
    choose_removed,
    drawn_instead,
)
from lit_resnorm_callbacks.stability.training import TwinTraining
from lit_resnorm_callbacks.stability.values import COLUMNS, num_bytes, twin_values

METHODS = ("twins", "influence")

_STABILITY = "Bousquet & Elisseeff 2002, JMLR 2"


class StabilityProbe(Probe):
    """Log how much the trained network depends on single training examples.

    K twins are trained beside the run, each on the run's batches without one example:
    same initial weights, batches, augmentation, random numbers, rates and optimizer. A
    twin is the run itself until a batch first holds its example. What it costs and
    where it is exact is in `docs/stability.md`.

    Works for every module with automatic optimization, one elementwise optimizer and a
    training loss that is the mean, weighted mean or sum of its examples' losses.

    Args:
        num_twins: Number of twins K.
        removed: Indices of the training examples to leave out; None: drawn by `seed`.
        seed: Seed of the draws.
        method: `twins` trains them. `influence` estimates at each measurement where
            training without an example would end, without twins (see
            :func:`~lit_resnorm.measures.copies.influence.influence_copies`).
        replace: Put another validation example in the place of each.
        bn_excludes_removed: Run a twin on the batch without its example; else on all of
            it, with no weight on that example. Networks with random numbers and
            without batch norm take the second way in any case, as their masks are then
            the run's.
        loss_fn: Takes output and target and returns the loss of each example, of which
            the run's is the mean; or one of torch's losses. None: the module's own
            `losses`, else torch's loss that it holds, else cross entropy.
        target_fn: Takes a batch, returns its target; default: a tuple's second element,
            or by a usual name.
        damping: Added to the Gauss-Newton matrix of `influence`, beside weight decay.
        name: Prefix of the logged names.
        cadence: Optimizer steps between measurements; twins train at every step.
        num_examples: Size of the probe batch, over all ranks.
        memory: Bytes for activations of twins that run at once.
        save_twins: Whether checkpoints hold the twins, which are as large as so many
            runs of their own; else a run that goes on begins them anew, as it is then.
        **options: See :class:`~lit_resnorm_callbacks.probe.probe.Probe`.

    Raises:
        ValueError: If an option can't be right.
    """

    section = "Stability"
    quantities: ClassVar[tuple[Quantity, ...]] = (
        Quantity(
            "eps_hyp",
            "hypothesis stability",
            unit="loss",
            scale="log",
            headline=True,
            heading="eps_hyp",
            source=_STABILITY,
            meaning="Mean difference of the losses on the probe batch between the run"
            " and its twins.",
            advice="Compare it between networks at equal training loss, see stability.",
        ),
        Quantity(
            "eps_hyp/stderr",
            "standard error of eps_hyp",
            scale="log",
            meaning="Its standard error, clustered over twins.",
            advice="A third of the value and more: take more twins.",
        ),
        Quantity(
            "distance",
            "distance of the twins",
            scale="log",
            panel="distance of the twins",
            meaning="Mean Euclidean distance of the weights of the twins to those of"
            " the run.",
            advice="Grows exponentially in steps: training is unstable, take a"
            " smaller rate.",
        ),
        Quantity(
            "eps_point",
            "pointwise hypothesis stability",
            unit="loss",
            scale="log",
            source=_STABILITY,
            meaning="Mean difference of the losses on the examples left out.",
            advice="As eps_hyp, with more variance.",
        ),
        Quantity(
            "eps_point/stderr",
            "standard error of eps_point",
            scale="log",
            meaning="Its standard error, clustered over twins.",
        ),
        Quantity(
            "eps_unif",
            "uniform stability on the probe batch",
            unit="loss",
            scale="log",
            source=_STABILITY,
            meaning="Largest difference on the probe batch.",
            advice="One example far above the rest: look at that example (table of"
            " the twins).",
        ),
        Quantity(
            "eps_unif/stderr",
            "standard error of eps_unif",
            scale="log",
            meaning="Its standard error, clustered over twins; for the maximum an"
            " indication.",
        ),
        Quantity(
            "replace_signed",
            "loss of the twins on what they lack, less that of the run",
            unit="loss",
            meaning="Mean of the loss of the twin less that of the run on the example"
            " that the twin lacks.",
            advice="With replace=true its mean is the generalization gap.",
        ),
        Quantity(
            "replace_signed/stderr",
            "standard error of replace_signed",
            meaning="Its standard error.",
        ),
        Quantity(
            "generalization_gap",
            "generalization gap",
            unit="loss",
            meaning="Loss of the run on the probe batch minus that on the examples"
            " left out, from when a batch has held one.",
            advice="See generalization_gap.",
        ),
        Quantity(
            "diverged",
            "twins that diverged",
            scale="linear",
            meaning="Number of twins that diverged; they are in no other value.",
            advice="Above 0: the run is near divergence itself, see diverged.",
        ),
        Quantity(
            "twins",
            "the twins",
            form="table",
            meaning="Table of the twins, at the end.",
        ),
    )

    def __init__(
        self,
        num_twins: int = 8,
        removed: list[int] | None = None,
        seed: int = 0,
        method: str = "twins",
        replace: bool = False,
        bn_excludes_removed: bool = True,
        loss_fn: LossFn | None = None,
        *,
        target_fn: Callable[..., Any] = target_of,
        damping: float = 1e-2,
        name: str = "stability",
        cadence: Cadence | int = 100,
        num_examples: int = 256,
        memory: int = 1 << 30,
        save_twins: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(name, cadence, num_examples, **options)
        self.removed = removed
        self.num_twins = num_twins if removed is None else len(removed)
        self.seed = seed
        self.method = method
        self.replace = replace
        self.bn_excludes_removed = bn_excludes_removed
        self.loss_fn = loss_fn
        self._target_fn = targets_first(target_fn, self.batch_dim)
        self.damping = damping
        self.memory = memory
        self.save_twins = save_twins
        self._told_size = False
        self._check_options()
        self._follower = RunFollower(
            self.name, strict=self.strict, batch_dim=self.batch_dim
        )
        # Which examples is known from the start of a training on.
        self._left_out = LeftOut([-1] * self.num_twins)
        self._copies: Copies | None = None
        self._module: LightningModule | None = None
        self._influence: Influence | None = None
        self._saved: dict[str, Any] = {}
        # Whether the weights of an evaluation are averages of those that were trained.
        self._averaged = False
        # Steps and module of the last fit.
        self._ended: tuple[int, LightningModule | None] = 0, None
        self._rows: list[list[Any]] = []

    def _check_options(self) -> None:
        removed = self.removed
        if self.method not in METHODS:
            raise ValueError(
                f"method is {self.method!r}; it must be one of {', '.join(METHODS)}"
            )
        if self.method == "influence" and self.replace:
            raise ValueError("replace needs method='twins'; it is 'influence'")
        if self.norm_mode == "train":
            raise ValueError(
                f"norm_mode is {self.norm_mode!r}; a loss on one example alone has no"
                " batch statistics: use frozen or eval"
            )
        if removed is not None and (
            not removed
            or len({*removed}) < len(removed)
            or not all(isinstance(index, Integral) for index in removed)
        ):
            raise ValueError(f"removed is {removed}; give different indices")
        if self.sites:
            raise ValueError(
                f"sites is {self.sites!r}; {type(self).__name__} looks at no layers"
            )
        check_count("num_twins", self.num_twins)
        for option in ("memory", "damping"):
            if getattr(self, option) <= 0:
                raise ValueError(
                    f"{option} is {getattr(self, option)}; it must be positive"
                )

    def losses(self, module: Any, batch: Any) -> Tensor:
        """Return the loss of each example of a batch, shape `(B,)`."""
        return self._losses_at(module, self.forward_fn(module, batch), batch)

    def _losses_at(self, module: Any, output: Any, batch: Any) -> Tensor:
        target = self._target_fn(batch)
        return losses_of(module, output, batch, self.loss_fn, target)

    def _reduction(self, module: LightningModule, batch: Any) -> Reduction:
        """Return what makes the training loss of a batch of its examples' losses."""
        target = self._target_fn(batch)
        return reduction_of(module, target, num_rows(batch), self.loss_fn)

    def twin_state_dict(self, i: int) -> dict[str, Tensor]:
        """Return the state dict of the module without the i-th example left out.

        Raises:
            ValueError: If there is no such twin, or no run.
        """
        if self._module is None:
            raise ValueError("twin_state_dict: there was no run")
        if not 0 <= i < self.num_twins:
            raise ValueError(f"twin {i} isn't one of the {self.num_twins} twins")
        if self._copies is None:
            state = self._module.state_dict()
            return {name: value.clone() for name, value in state.items()}
        return self._copies.model_state_dict(i)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what can't work, and see what the batches hold."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._averaged = _check_order(trainer, self)
            self._follower.watch(trainer)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See whether it has averages in the place of the weights that were trained.

        Raises:
            ValueError: If training would go on from averages beside their twins.
        """
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        averaged = "averaging_state" in checkpoint
        if averaged and trainer.state.fn == "fit" and not self._averaged:
            raise ValueError(
                f"{self.name}: the checkpoint holds averages (WeightAveraging), from"
                " which training would go on, beside twins of the weights that were"
                " trained: give the Trainer that callback, behind it"
            )
        self._averaged = averaged

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the examples, make the twins, and measure if that is asked for."""
        self._follower.start(trainer.global_step)
        if trainer.global_step and self._ended == (trainer.global_step, pl_module):
            # Another fit goes on with the run, and Lightning makes a new optimizer.
            self._saved = self._training_state()
            (self._saved["twins"] or {}).pop("optimizer", None)
        elif trainer.global_step and not self._saved:
            rank_zero_warn(
                f"{self.name}: the run has taken {trainer.global_step} steps, and the"
                " checkpoint holds no twins: they begin here, as the run is now; see"
                f" {reference('twins_begin_late')}"
            )
        size = self._follower.indices.num_examples(trainer)
        removed = choose_removed(
            self.num_twins, self.removed, self.seed, size, self.name
        )
        self._left_out = LeftOut(removed)
        self._copies = None
        if self.method == "twins":
            self._follower.training = training = self._train_twins(trainer, pl_module)
            self._copies = training.twins
        else:
            self._influence = Influence.of_run(
                trainer,
                pl_module,
                num_train=size,
                damping=self.damping,
                norm_mode=self.norm_mode,
                forward_fn=self.forward_fn,
                losses=self._losses_at,
                reduction=self._reduction,
            )
        self._go_on(pl_module)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Fork the twins whose examples this batch is the first to hold."""
        batch = examples_first(batch, self.batch_dim)
        self._follower.begin_batch(trainer, batch, batch_idx, self._left_out)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Before an epoch's first step, see that examples' losses make the run's."""
        reduction = partial(self._reduction, pl_module)
        self._follower.before_backward(trainer, pl_module, self.losses, reduction, loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take up what the run is about to train."""
        self._follower.before_step(trainer, optimizer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Train the twins on this batch, and measure if the cadence says so."""
        self._follower.end_batch(trainer, examples_first(batch, self.batch_dim))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the trained weights, and log the table of twins."""
        super().on_train_end(trainer, pl_module)
        self._follower.finish()
        self._ended = trainer.global_step, pl_module
        step = self._last_step
        if step is not None and self.logs != "scalars":
            tables = {f"{self.name}/twins": (COLUMNS, self._rows)}
            send_tables(trainer, step, tables, self._surviving)

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Take the hooks off; the twins stay, for `twin_state_dict`."""
        super().teardown(trainer, pl_module, stage)
        self._follower.release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the hooks off."""
        self._follower.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the twins, and which examples they lack and have seen.

        Before a training has chosen them it is what a checkpoint held, if any: a
        learning-rate finder saves and restores then.
        """
        own = {"rows": self._rows}
        if self.save_twins:
            own |= self._training_state()
        return super().state_dict() | own

    def _training_state(self) -> dict[str, Any]:
        own = {
            "left_out": self._left_out.state_dict(),
            "twins": None if self._copies is None else self._copies.state_dict(),
            "pending": self._follower.pending(),
        }
        if self._saved or min(self._left_out.removed) < 0:
            own = {key: self._saved[key] for key in own if key in self._saved}
        return own

    def on_save_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Say once what the twins add to checkpoints."""
        del checkpoint
        if self._told_size or not self.save_twins or self._follower.training is None:
            return
        self._told_size = True
        own = num_bytes(self._training_state())
        rest = num_bytes(pl_module.state_dict())
        rest += num_bytes([each.state_dict() for each in trainer.optimizers])
        rank_zero_info(
            f"{self.name}: checkpoints hold {self.num_twins} twins, {own / 1e6:.3g} MB"
            f" beside {rest / 1e6:.3g} MB of the run: {1 + own / rest:.1f} times as"
            " much; save_twins: false leaves them out, and a run that goes on begins"
            " them anew"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self._rows = state_dict.get("rows", [])
        # Saved before a training began, as a search for a rate does, it holds none.
        left_out = state_dict.get("left_out")
        chosen = left_out is not None and min(left_out["removed"]) >= 0
        self._saved = state_dict if chosen else {}

    def prepare(self, module: LightningModule, sites: tuple[Site, ...]) -> None:
        """Take the twins of a checkpoint where there is no training."""
        self._module = module
        if not self._saved:
            return
        self._left_out = LeftOut(self._saved["left_out"]["removed"])
        if twins := self._saved["twins"]:
            self._copies = Copies(module, twins["params"], len(twins["finite"]))
        self._go_on(module)

    def cost(self) -> float:
        """Return that of the losses of run and twins; training twins is no part of it.

        With `influence` also that of some 20 products with the Gauss-Newton matrix for
        each example that is left out.
        """
        products = 20 * 4 if self.method == "influence" else 0
        return (1 + self.num_twins * (1 + products)) / 3

    def measure(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> dict[str, Tensor]:
        """Return the stability, distance and generalization gap.

        Raises:
            RuntimeError: If the twins could not be trained, or the run's weights aren't
                those that it trained.
        """
        self._follower.check()
        if self._influence is not None and self._left_out.seen:
            self._copies = self._influence.copies(
                module,
                batch,
                self._left_out,
                num_rows=self._follower.num_rows,
                reduce=reduce,
            )
        values, self._rows = twin_values(
            module,
            self.losses,
            batch,
            self._left_out,
            self._copies,
            norm_mode=self.norm_mode,
            reduce=reduce,
        )
        return values

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        super()._prepare(trainer, module)
        if not num_rows(self._batch):
            return
        few = take_rows(self._batch, slice(2))
        try:
            with untouched(module) as run, torch.no_grad():
                run(lambda: self.losses(module, few))
        except Exception as error:
            raise ValueError(
                f"{self.name}: the probe batch's losses can't be taken"
                f" ({type(error).__name__}: {error}): give loss_fn or forward_fn"
            ) from error
        if self._influence is not None:
            self._influence.check(module, few, self.name)

    def _measures_alone(self) -> bool:
        if self._averaged:
            rank_zero_warn(
                f"{self.name}: the weights are averages (WeightAveraging), and the"
                " twins are of those that were trained: nothing is measured; see"
                f" {reference('averaged_weights')}"
            )
            return False
        if self._saved or self._copies is not None:
            return True
        rank_zero_info(
            f"{self.name}: there are no twins but in a training and in its"
            " checkpoints; nothing is measured"
        )
        return False

    def _train_twins(self, trainer: Trainer, module: LightningModule) -> TwinTraining:
        instead = None
        if self.replace:
            instead = drawn_instead(
                trainer,
                module,
                self.num_twins,
                seed=self.seed,
                probed=self.num_examples if self._given["batch"] is None else 0,
                name=self.name,
                dataloader=self._given["dataloader"],
                batch_dim=self.batch_dim,
            )
        return TwinTraining(
            trainer,
            module,
            self.losses,
            partial(self._reduction, module),
            self.num_twins,
            replacements=instead,
            keep_in_norms=not self.bn_excludes_removed,
            memory=self.memory,
            name=self.name,
        )

    def _go_on(self, module: LightningModule) -> None:
        """Take over what a checkpoint holds, once."""
        saved, self._saved = self._saved, {}
        if saved:
            self._left_out.load_state_dict(saved["left_out"], module.device)
            if self._copies is not None and saved["twins"] is not None:
                self._copies.load_state_dict(saved["twins"])
                self._follower.add_pending(saved.get("pending", []))


def _check_order(trainer: Trainer, probe: StabilityProbe) -> bool:
    """Return whether weights are replaced by averages at the end.

    Raises:
        ValueError: If they are before the last measurement.
    """
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore
    averaging = [each for each in callbacks if isinstance(each, WeightAveraging)]
    for each in averaging:
        if callbacks.index(each) < callbacks.index(probe):
            raise ValueError(
                f"{probe.name}: {type(each).__name__} stands before it in callbacks and"
                " puts averages in the weights' place before the last measurement:"
                " move it behind"
            )
    return bool(averaging)

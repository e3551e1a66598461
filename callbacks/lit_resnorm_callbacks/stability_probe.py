"""Algorithmic stability: twins of the run, each trained without one example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from lit_resnorm.measures.copies import Copies
from lit_resnorm.measures.observe import Reduce, num_rows, take_rows
from lit_resnorm.measures.sites import Site
from lit_resnorm.measures.stability import Stability, stability
from lit_resnorm.measures.twin_losses import losses_at
from lit_resnorm_callbacks.base import Batch, Cadence, Probe
from lit_resnorm_callbacks.batch_indices import BatchIndices
from lit_resnorm_callbacks.cadence import steps_taken
from lit_resnorm_callbacks.destinations import TakesTables
from lit_resnorm_callbacks.left_out import LeftOut
from lit_resnorm_callbacks.probe_batch import fixed_batch
from lit_resnorm_callbacks.ranks import measured_together
from lit_resnorm_callbacks.twin_training import TwinTraining

LossFn = Callable[[Any, Any], Tensor]

_TARGETS = ("target", "targets", "label", "labels", "y")
_STATE = ("left_out", "training")
_COLUMNS = ["removed", "first_step", "eps_hyp", "signed", "distance", "diverged"]


class StabilityProbe(Probe):
    """Log how much the trained network depends on single training examples.

    K twins are trained beside the run, each on the run's batches without one example:
    same initial weights, batches, augmentation, random numbers, rates and optimizer. A
    twin is the run itself until a batch first holds its example. What it costs and
    where it is exact is in `docs/stability.md`.

    Works for every module with automatic optimization, one elementwise optimizer and a
    training loss that is the mean of its examples' losses.

    Logs:
        stability/eps_hyp: Mean difference of the losses on the probe batch between the
            run and its twins (science: hypothesis stability).
        stability/eps_point: Mean difference of the losses on the examples left out.
        stability/eps_unif: Largest difference on the probe batch.
        stability/eps_hyp/stderr: Standard errors, clustered over twins; likewise for
            the other two (for the maximum an indication).
        stability/replace_signed: Mean of twin's minus run's loss on the example that
            the twin lacks.
        stability/distance: Mean Euclidean distance of the twins' weights to the run's.
        stability/generalization_gap: The run's loss on the probe batch minus that on
            the examples left out, from when a batch has held one.
        stability/diverged: Number of twins that diverged; they are in no other value.
        stability/twins: Table of the twins, at the end.
        stability/seconds: Seconds that the measurement took.
        stability/failed: 1 where a measurement came to nothing.

    Args:
        num_twins: Number of twins K.
        removed: Indices of the training examples to leave out; None: drawn by `seed`.
        seed: Seed of the draws.
        method: `twins`.
        replace: Put another validation example in the place of each.
        bn_excludes_removed: Run a twin on the batch without its example; else on all of
            it, with no weight on that example. Networks with random numbers and
            without batch norm take the second way in any case, as their masks are then
            the run's.
        loss_fn: Takes output and target and returns the loss of each example; None:
            the module's own `losses`, else cross entropy.
        name: Prefix of the logged names.
        cadence: Optimizer steps between measurements; twins train at every step.
        num_examples: Size of the probe batch, over all ranks.
        memory: Bytes for activations of twins that run at once.
        **options: See :class:`~lit_resnorm_callbacks.base.Probe`.

    Raises:
        ValueError: If an option can't be right.
    """

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
        name: str = "stability",
        cadence: Cadence | int = 100,
        num_examples: int = 256,
        memory: int = 1 << 30,
        **options: Any,
    ) -> None:
        super().__init__(name, cadence, num_examples, **options)
        if method not in ("twins",):
            raise ValueError(f"method is {method!r}; it must be one of twins")
        if self.norm_mode == "train":
            raise ValueError(
                f"norm_mode is {self.norm_mode!r}; a loss on one example alone has no"
                " batch statistics: use frozen or eval"
            )
        if removed is not None and (not removed or len({*removed}) < len(removed)):
            raise ValueError(f"removed is {removed}; give different indices")
        if num_twins < 1:
            raise ValueError(f"num_twins is {num_twins}; it must be at least 1")
        if memory < 1:
            raise ValueError(f"memory is {memory}; it must be at least 1 byte")
        self.removed = removed
        self.num_twins = num_twins if removed is None else len(removed)
        self.seed = seed
        self.method = method
        self.replace = replace
        self.bn_excludes_removed = bn_excludes_removed
        self.loss_fn = loss_fn
        self.memory = memory
        self._indices = BatchIndices(self.name)
        self._left_out: LeftOut | None = None
        self._training: TwinTraining | None = None
        self._copies: Copies | None = None
        self._module: LightningModule | None = None
        self._saved: dict[str, Any] = {}
        self._forked: list[int] = []
        self._train_batch: Any = None
        self._broken: str | None = None
        self._rows: list[list[Any]] = []

    def losses(self, module: Any, batch: Any) -> Tensor:
        """Return the loss of each example of a batch, shape `(B,)`."""
        output = self.forward_fn(module, batch)
        loss_fn = self.loss_fn or getattr(module, "losses", None) or _cross_entropies
        losses = loss_fn(output, _target(batch))
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses

    def twin_state_dict(self, i: int) -> dict[str, Tensor]:
        """Return the weights of the twin without `removed[i]`, as a state dict.

        Raises:
            ValueError: If there is no such twin, or no run.
        """
        if self._module is None:
            raise ValueError("twin_state_dict: there was no run")
        if not 0 <= i < self.num_twins:
            raise ValueError(f"twin {i} isn't one of the {self.num_twins} twins")
        state = self._module.state_dict()
        forked = self._training.forked if self._training else self._forked
        if self._copies is not None and i in forked:
            own = self._copies.weights(i)
            state |= {name: own[name] for name in state if name in own}
        return {name: value.clone() for name, value in state.items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what can't work, and see that batches' indices are kept."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._indices.watch(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the examples, make the twins, and measure if that is asked for."""
        self._indices.release()
        self._left_out = LeftOut(self._choose(self._indices.num_examples(trainer)))
        self._training = TwinTraining(
            trainer,
            pl_module,
            self.losses,
            self.num_twins,
            replacements=self._replacements(trainer, pl_module),
            keep_in_norms=not self.bn_excludes_removed,
            memory=self.memory,
            name=self.name,
        )
        self._copies = self._training.twins
        if self._saved:
            self._left_out.load_state_dict(self._saved["left_out"], pl_module.device)
            self._training.load_state_dict(self._saved["training"])
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Fork the twins whose examples this batch is the first to hold."""
        self._train_batch = batch
        training, left_out = self._active(), self._left_out

        def begin(reduce: Reduce) -> None:
            indices = self._indices.current(trainer)
            step = steps_taken(trainer)
            hits = left_out.find(trainer, batch, indices, step, reduce)
            training.begin(trainer, hits, batch_idx)

        self._guarded(trainer, begin)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Compare losses, before the first step."""
        training = self._active()
        if not training.rehearsed:
            measured_together(
                trainer, lambda _: training.compare(trainer, self._train_batch, loss)
            )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take over the settings of the run's step."""
        self._active().before_step(optimizer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Train the twins on this batch, and measure if the cadence says so."""
        self._train_batch = None
        training = self._active()
        self._guarded(trainer, lambda reduce: training.end(trainer, batch, reduce))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the trained weights, and log the table of twins."""
        super().on_train_end(trainer, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, TakesTables) and self._last_step is not None:
                logger.log_table(
                    f"{self.name}/twins",
                    columns=_COLUMNS,
                    data=self._rows,
                    step=self._last_step,
                )

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Take the hooks off; the twins stay, for `twin_state_dict`."""
        super().teardown(trainer, pl_module, stage)
        self._release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the hooks off."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return the twins, and which examples they lack and have seen."""
        state = super().state_dict()
        if self._training is None or self._left_out is None:
            return state | self._saved
        return state | {
            "left_out": self._left_out.state_dict(),
            "training": self._training.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self._saved = {k: state_dict[k] for k in _STATE if k in state_dict}

    def prepare(self, module: LightningModule, sites: tuple[Site, ...]) -> None:
        """Take the twins of a checkpoint where there is no training."""
        self._module = module
        if self._training is None and self._saved:
            saved = self._saved["training"]
            twins = saved["twins"]
            self._left_out = LeftOut(self._saved["left_out"]["removed"])
            self._left_out.load_state_dict(self._saved["left_out"], module.device)
            self._copies = Copies(module, twins["params"], len(twins["finite"]))
            self._copies.load_state_dict(twins)
            self._forked = saved["forked"]

    def measure(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> dict[str, Tensor]:
        """Return the stability, distance and generalization gap.

        Raises:
            RuntimeError: If the twins could not be trained.
        """
        if self._broken is not None:
            raise RuntimeError(self._broken)
        seen = self._left_out.seen if self._left_out is not None else []
        forked, diverged, distance_K = self._state_of_twins(module, reduce)
        healthy = [k for k in forked if k not in diverged]
        own = [self._copies.weights(k) for k in healthy] if self._copies else []
        test_MZ, own_MS = losses_at(
            module,
            self.losses,
            [{}, *own],
            batch,
            self._left_out.examples() if seen else None,
            norm_mode=self.norm_mode,
            reduce=reduce,
            rank=module.global_rank,
        )
        # A twin that isn't forked is the run; one that diverged counts for nothing.
        twin_KZ = test_MZ[:1].repeat(self.num_twins, 1)
        own_K = test_MZ.new_zeros(self.num_twins)
        own_K[seen] = own_MS[0]
        twin_own_K = own_K.clone()
        for row, k in enumerate(healthy, 1):
            twin_KZ[k] = test_MZ[row]
            twin_own_K[k] = own_MS[row, seen.index(k)]
        twin_KZ[diverged] = torch.nan
        result = stability(test_MZ[0], twin_KZ, own_K, twin_own_K)
        self._rows = self._table(result, distance_K)
        values = _values(result, distance_K)
        if seen:
            values["generalization_gap"] = test_MZ[0].mean() - own_K[seen].mean()
        return values

    def _state_of_twins(
        self, module: LightningModule, reduce: Reduce
    ) -> tuple[list[int], list[int], Tensor]:
        """Return which twins are forked, which diverged, and all distances."""
        copies = self._copies
        if copies is None:
            zeros_K = torch.zeros(self.num_twins, dtype=torch.float64)
            return [], [], zeros_K.to(module.device)
        diverged_K = reduce((~copies.finite).double()) > 0
        distance_K = copies.distances()
        forked = self._training.forked if self._training else self._forked
        same = [k for k in range(self.num_twins) if k not in forked]
        distance_K[same] = 0.0
        return sorted(forked), diverged_K.nonzero()[:, 0].tolist(), distance_K

    def _table(self, result: Stability, distance_K: Tensor) -> list[list[Any]]:
        left_out = self._left_out
        if left_out is None:
            return []
        columns = (result.twin_eps_hyp, result.twin_signed, distance_K)
        numbers = torch.stack(columns).T.tolist()
        diverged = (~result.finite).tolist()
        return [
            [*row]
            for row in zip(
                left_out.removed,
                left_out.first_steps,
                *zip(*numbers, strict=True),
                diverged,
                strict=True,
            )
        ]

    def _choose(self, size: int) -> list[int]:
        """Return the indices of the examples to leave out of a set of this size."""
        if self.removed is None:
            if self.num_twins > size:
                raise ValueError(
                    f"{self.name}: num_twins is {self.num_twins}, and the training set"
                    f" holds {size} examples"
                )
            generator = torch.Generator().manual_seed(self.seed)
            return torch.randperm(size, generator=generator)[: self.num_twins].tolist()
        if wrong := [i for i in self.removed if not 0 <= i < size]:
            raise ValueError(
                f"{self.name}: removed names {wrong}, and the training set holds the"
                f" examples 0 to {size - 1}"
            )
        return self.removed

    def _replacements(self, trainer: Trainer, module: LightningModule) -> Any:
        """Return a validation example for each twin, none of the probe batch if so."""
        if not self.replace:
            return None
        probed = self.num_examples if self._given["batch"] is None else 0
        pool = fixed_batch(
            trainer,
            module,
            probed + self.num_twins,
            name=self.name,
            dataloader=self._given["dataloader"],
        )
        num = num_rows(pool)
        if num < self.num_twins:
            raise ValueError(
                f"{self.name}: replace needs {self.num_twins} validation examples, and"
                f" there are {num}"
            )
        first = min(probed, num - self.num_twins)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(num - first, generator=generator)[: self.num_twins]
        return take_rows(pool, first + order)

    def _guarded(self, trainer: Trainer, work: Callable[[Reduce], None]) -> None:
        """Do a part of the twins' training; give them up where it fails."""
        if self._broken is not None:
            return
        try:
            measured_together(trainer, work)
        except Exception as error:
            if self.strict or not self._active().rehearsed:
                raise
            self._broken = f"twins stopped: {type(error).__name__}: {error}"

    def _active(self) -> TwinTraining:
        if self._training is None:
            raise RuntimeError("twins are trained in fit only")
        return self._training

    def _release(self) -> None:
        self._indices.release()
        if self._training is not None:
            self._training.close()


def _values(result: Stability, distance_K: Tensor) -> dict[str, Tensor]:
    values = {
        "eps_hyp": result.eps_hyp,
        "eps_point": result.eps_point,
        "eps_unif": result.eps_unif,
        "replace_signed": result.replace_signed,
        "distance": distance_K[result.finite].mean(),
        "diverged": (~result.finite).sum(),
    }
    if len(distance_K) > 1:
        values |= {
            "eps_hyp/stderr": result.eps_hyp_stderr,
            "eps_point/stderr": result.eps_point_stderr,
            "eps_unif/stderr": result.eps_unif_stderr,
            "replace_signed/stderr": result.replace_signed_stderr,
        }
    return values


def _target(batch: Any) -> Any:
    """Return the target in a batch: its second element, or a dict's by name."""
    if isinstance(batch, Mapping):
        for name in _TARGETS:
            if name in batch:
                return batch[name]
        raise ValueError(
            f"the batch has {', '.join(map(str, batch))}, and none of"
            f" {', '.join(_TARGETS)} as its target: give the module losses(output,"
            " target) and batches that are pairs"
        )
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    raise ValueError(f"a batch that is a {type(batch).__name__} has no target")


def _cross_entropies(output: Any, target: Any) -> Tensor:
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        raise ValueError(
            f"no cross entropy of a {type(output).__name__} and a"
            f" {type(target).__name__}: give loss_fn"
        )
    return F.cross_entropy(output, target, reduction="none")

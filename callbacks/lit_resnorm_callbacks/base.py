"""What every probe shares: when it measures, on what, and where the values go."""

from __future__ import annotations

import inspect
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_resnorm.measures.passes.batch_dim import ExamplesFirst
from lit_resnorm.measures.passes.batches import network_output
from lit_resnorm.measures.passes.lazy_layers import lazy_tensors
from lit_resnorm.measures.passes.sites import Site
from lit_resnorm.measures.passes.tracing import trace
from lit_resnorm.measures.passes.untouched import (
    NormMode,
    Reduce,
    check_norm_mode,
    num_rows,
    take_rows,
    untouched,
)
from lit_resnorm.quantities import Declared, Quantity, logs_section
from lit_resnorm_callbacks.cadence import Cadence, is_dry_run, steps_taken
from lit_resnorm_callbacks.counts import check_count
from lit_resnorm_callbacks.destinations import (
    send_charts,
    send_figures,
    send_quantities,
    send_values,
    to_host,
)
from lit_resnorm_callbacks.probe_batch import batch_source, fixed_batch
from lit_resnorm_callbacks.ranks import OutOfMemoryError, measured_together
from lit_resnorm_callbacks.records import Records
from lit_resnorm_callbacks.strategies import buffers_of_rank_0, check_strategy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = Any
"""This rank's share of the probe batch, as the loader gives it."""

_OF_EVERY_PROBE = (
    Quantity(
        "seconds",
        "time taken",
        unit="s",
        meaning="Seconds that the measurement took.",
    ),
    Quantity(
        "failed",
        "measurements that failed",
        meaning="1 where a measurement came to nothing.",
    ),
)


class Probe(Callback, ABC):
    """A measurement on a fixed batch that leaves the training as it was.

    Subclasses say in `measure` what they measure, and in `quantities` what each value
    is; the `Logs:` section of their documentation is made from that. In `fit` they
    measure at their cadence; in `validate` and `test` once, at the end; under
    `fast_dev_run` once.
    Values go to every logger and to `trainer.callback_metrics`, under
    `<name>/<quantity>` or `<name>/<quantity>/<site>`, with the number of optimizer
    steps that the weights have taken. Quantities by site also make a table,
    `<name>/by_depth`, and at the end one figure each.

    A measurement that fails (or a value that is not finite) never ends a run: it is
    logged as NaN, with one warning that says why and `<name>/failed`; `strict` raises.

    Args:
        name: Prefix of the logged names; two probes of a kind need two names.
        cadence: Optimizer steps between measurements, a :class:`Cadence`, or a dict of
            its attributes.
        num_examples: Size of the probe batch, over all ranks.
        norm_mode: What batch norm does: `frozen`, `eval` or `train`.
        sites: Pattern that selects layers, searched in the names of sites.
        batch: The probe batch, where the project has its own.
        dataloader: A loader of the probe batch, likewise.
        forward_fn: Takes the module and a batch, returns the network's output.
        batch_dim: Dimension that counts examples, of the tensors of a batch that have
            it: 1 for time-major batches `(T, B, ...)`. Those of fewer dimensions, as a
            label a sequence, count them in their first.
        strict: Raise where a measurement fails.

    Attributes:
        quantities: What the probe's values are; those of every probe (`seconds`,
            `failed`) aside.
        section: Heading under which its charts stand; by default the probe's name.

    Raises:
        ValueError: If an option can't be right.
    """

    quantities: ClassVar[tuple[Quantity, ...]] = ()
    section: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        """Put what the class logs into its docstring."""
        super().__init_subclass__(**options)
        own = inspect.getdoc(cls) if "__doc__" in vars(cls) and cls.__doc__ else None
        if own is not None and "quantities" in vars(cls):
            place = re.search(r"^(Args|Raises):$", own, re.MULTILINE)
            end = len(own) if place is None else place.start()
            option = inspect.signature(cls).parameters.get("name")
            default = None if option is None else option.default
            name = default if isinstance(default, str) else "<name>"
            logs = logs_section(name, (*cls.quantities, *_OF_EVERY_PROBE))
            cls.__doc__ = f"{own[:end].rstrip()}\n\n{logs}\n\n{own[end:]}".rstrip()

    def __init__(
        self,
        name: str,
        cadence: Cadence | int = 100,
        num_examples: int = 256,
        *,
        norm_mode: NormMode = "frozen",
        sites: str = "",
        batch: Any = None,
        dataloader: Iterable[Any] | None = None,
        forward_fn: Callable[..., Any] = network_output,
        batch_dim: int = 0,
        strict: bool = False,
    ) -> None:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(
                f"name is {name!r}; use letters, digits, '_', '.' and '-' only"
            )
        try:
            re.compile(sites)
        except re.error as error:
            raise ValueError(
                f"sites is {sites!r}, which is no regular expression: {error}"
            ) from None
        if batch is not None and dataloader is not None:
            raise ValueError("batch and dataloader are both given; give one")
        self.name = name
        self.cadence = Cadence.of(cadence)
        self.num_examples = check_count("num_examples", num_examples)
        self.norm_mode = check_norm_mode(norm_mode)
        self.sites = sites
        self.batch_dim = check_count("batch_dim", batch_dim, least=0)
        self.forward_fn = (
            ExamplesFirst(forward_fn, batch_dim) if batch_dim else forward_fn
        )
        self.strict = strict
        self._given = {"batch": batch, "dataloader": dataloader}
        self._batch: Batch = None
        self._last_step: int | None = None
        self._steps_before = 0
        self._measured_weights: tuple[tuple[int, int], ...] = ()
        # What the batch of an evaluation was read from; None after a training.
        self._source: Any = None
        self._keys: list[str] = []
        self._warned: set[str] = set()
        self._records = Records()

    @abstractmethod
    def measure(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> dict[str, Tensor]:
        """Return the measured values by `<quantity>` or `<quantity>/<site>`.

        Must leave the module as it was (use `untouched`), and call `reduce` equally
        often on every rank, also on one whose share of the batch is empty.

        Args:
            module: The module in training, with its current weights.
            batch: This rank's share of the probe batch.
            reduce: Sums a tensor over ranks.

        Returns:
            0-d tensors; a 1-d tensor is a spectrum, in descending order.
        """

    def prepare(self, module: LightningModule, sites: tuple[Site, ...]) -> None:
        """Look at the model before the first step; raise here what must be raised."""

    def smaller(self) -> bool:
        """Make the next try need less memory; return False where it can't."""
        return False

    def figures(self) -> dict[str, Figure]:
        """Return the figures of what was measured, by name."""
        return self._records.figures(self.prefix, self.declared())

    @property
    def prefix(self) -> str:
        """First part of the logged names; says so where examples are coupled."""
        return f"{self.name}_batch" if self.norm_mode == "train" else self.name

    def declared(self) -> dict[str, Declared]:
        """Return what this probe logs, by key."""
        found = [
            Declared(self.name, self.prefix, self.section or self.name, quantity)
            for quantity in (*self.quantities, *_OF_EVERY_PROBE)
        ]
        return {one.key: one for one in found}

    @property
    def state_key(self) -> str:
        """Key of this probe in checkpoints: class and name."""
        return f"{type(self).__name__}{{{self.name}}}"

    def state_dict(self) -> dict[str, Any]:
        """Return what can't be worked out again: the last step and the records."""
        return {"last_step": self._last_step, "records": self._records.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._last_step = state_dict["last_step"]
        self._records.load_state_dict(state_dict["records"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what can't work, before anything is trained."""
        callbacks: list[Callback] = getattr(trainer, "callbacks", [])
        probes = [c for c in callbacks if isinstance(c, Probe)]
        if any(p is not self and p.name == self.name for p in probes):
            raise ValueError(
                f"two callbacks have the name {self.name!r}; give one a name"
            )
        check_strategy(trainer, self.name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fetch the probe batch, find the sites, and measure if that is asked for."""
        self._source = None
        self._steps_before = step = steps_taken(trainer)
        if lazy := lazy_tensors(pl_module):
            rank_zero_info(
                f"{self.name}: {', '.join(lazy)} get their first values in the first"
                " batch; nothing is measured before"
            )
            return
        self._prepare(trainer, pl_module)
        start = self.cadence.at_start or is_dry_run(trainer)
        if step == 0 and start:
            self.run(trainer, pl_module, step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure if this batch ended a step that the cadence names."""
        if self._batch is None:
            self._prepare(trainer, pl_module)
        step = steps_taken(trainer, in_batch=True)
        fresh = step != self._last_step and not is_dry_run(trainer)
        if fresh and self.cadence.due(step, self._steps_before):
            self.run(trainer, pl_module, step)
        self._steps_before = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the trained weights, and draw the figures."""
        step = steps_taken(trainer)
        fresh = step != self._last_step and not is_dry_run(trainer)
        if self.cadence.at_end and fresh:
            self.run(trainer, pl_module, step)
        self._log_figures(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure once, where validation is not a part of training."""
        if trainer.state.fn == "validate":
            self._run_alone(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure once."""
        self._run_alone(trainer, pl_module)

    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Let go of the probe batch."""
        self._batch = None

    def run(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Measure, and log what was measured as of `step` optimizer steps."""
        started = time.perf_counter()
        values = self._measured(trainer, module)
        self._last_step = step
        self._measured_weights = _weights(module)
        numbers, series = to_host(values)
        if "failed" not in numbers:
            self._keys = [*numbers]
        numbers["seconds"] = time.perf_counter() - started
        self._records.add(step, numbers, series)
        send_values(
            trainer,
            step,
            {f"{self.prefix}/{key}": value for key, value in numbers.items()},
            self._records.tables(self.prefix, step, series),
            {f"{self.prefix}/{key}": spectrum for key, spectrum in series.items()},
        )

    def _run_alone(self, trainer: Trainer, module: LightningModule) -> None:
        source = batch_source(trainer, **self._given)
        known = self._source is None or self._source is source
        if known and self._measured_weights == _weights(module):
            return  # the test of a network that was measured as its training ended
        self._source = source
        self._prepare(trainer, module)
        self.run(trainer, module, trainer.global_step)
        self._log_figures(trainer)

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        batch = fixed_batch(
            trainer,
            module,
            self.num_examples,
            name=self.name,
            batch_dim=self.batch_dim,
            **self._given,
        )
        if (num := num_rows(batch)) < self.num_examples:
            rank_zero_info(
                f"{self.name}: num_examples is {self.num_examples} and the probe data"
                f" hold {num}; all of them are used"
            )
        few = take_rows(batch, slice(2))
        if isinstance(self.forward_fn, ExamplesFirst):
            self.forward_fn.look(module, few)
        with untouched(module) as run, torch.no_grad():
            sites = run(lambda: trace(module, lambda: self.forward_fn(module, few)))
        self.prepare(module, sites)
        # Examples coupled by batch norm can't be shared out: every rank takes them all.
        coupled = self.norm_mode == "train"
        share = slice(trainer.global_rank, None, trainer.world_size)
        self._batch = batch if coupled else take_rows(batch, share)
        send_quantities(trainer, self.declared())

    def _measured(self, trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
        evals = self.norm_mode == "eval"
        while True:
            try:
                with buffers_of_rank_0(trainer, module) if evals else nullcontext():
                    return measured_together(
                        trainer,
                        lambda reduce: self.measure(module, self._batch, reduce),
                    )
            except OutOfMemoryError as error:
                if self.smaller():
                    continue
                reason: Exception = error
            except Exception as error:
                reason = error
            if self.strict:
                raise reason
            why = f"{type(reason).__name__}: {reason}"
            self._warn_once(
                why,
                f"nothing was measured, NaN is logged and the training goes on ({why})",
            )
            nan = torch.tensor(torch.nan)
            return {**dict.fromkeys(self._keys, nan), "failed": torch.tensor(1.0)}

    def _warn_once(self, reason: str, message: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            rank_zero_warn(f"{self.name}: {message}")

    def _log_figures(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and trainer.loggers and not is_dry_run(trainer):
            send_figures(trainer, self._last_step, self.figures())
            curves = self._records.depth_curves(self.prefix)
            send_charts(trainer, self._last_step, curves, self.declared())


def _weights(module: LightningModule) -> tuple[tuple[int, int], ...]:
    """Return what changes whenever a weight does: identities and version counters."""
    return tuple((id(p), p._version) for p in module.parameters())

"""What every probe shares: when it measures, on what, and where the values go."""

from __future__ import annotations

import inspect
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lit_resnorm.figures import captioned
from lit_resnorm.measures.passes.batch_dim import ExamplesFirst
from lit_resnorm.measures.passes.batches import network_output, num_rows, take_rows
from lit_resnorm.measures.passes.lazy_layers import lazy_tensors
from lit_resnorm.measures.passes.progress import watched
from lit_resnorm.measures.passes.sites import Site
from lit_resnorm.measures.passes.tracing import trace
from lit_resnorm.measures.passes.untouched import (
    NormMode,
    Reduce,
    check_norm_mode,
    untouched,
)
from lit_resnorm.quantities import Declared, Quantity, logs_section
from lit_resnorm.runs.optimizer_steps import steps_taken, track_steps
from lit_resnorm_callbacks.probe.batch import batch_source, fixed_batch
from lit_resnorm_callbacks.probe.cadence import Cadence, is_dry_run
from lit_resnorm_callbacks.probe.counts import check_count
from lit_resnorm_callbacks.probe.fingerprints import fingerprint
from lit_resnorm_callbacks.probe.guard import HOOKS, Guarded, entered
from lit_resnorm_callbacks.probe.loggers import (
    loggers_of,
    send_charts,
    send_figures,
    send_histograms,
    send_quantities,
    send_tables,
    send_values,
    to_host,
    whose,
)
from lit_resnorm_callbacks.probe.progress import MeasuringLines
from lit_resnorm_callbacks.probe.ranks import (
    NothingSmallerError,
    OutOfMemoryError,
    measured_together,
)
from lit_resnorm_callbacks.probe.records import Records
from lit_resnorm_callbacks.probe.strategies import (
    buffers_of_rank_0,
    check_strategy,
    keep_sendable,
)
from lit_resnorm_callbacks.probe.summary import LOGS, Log, logged_scalars
from lit_resnorm_callbacks.probe.training_loss import ByTrainingStep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")

_COMPARED_ROWS = 8
"""Rows on which a loss is compared at set-up."""

Batch = Any
"""This rank's share of the probe batch, as the loader gives it."""

_OF_EVERY_PROBE = (
    Quantity(
        "seconds",
        "time taken",
        unit="s",
        meaning="Seconds that the measurement took.",
        advice="Too many: a longer cadence, or fewer num_examples.",
    ),
    Quantity(
        "failed",
        "measurements that failed",
        meaning="1 where a measurement came to nothing.",
        advice="See measurement_failed.",
    ),
)


class Probe(Guarded, ABC):
    """A measurement on a fixed batch that leaves the training as it was.

    Subclasses say in `measure` what they measure, and in `quantities` what each value
    is; the `Logs:` section of their documentation is made from that. In `fit` they
    measure at their cadence; in `validate` and `test` once, at the end; under
    `fast_dev_run` once.
    Values of the whole network go to every logger, under `<name>/<quantity>`, with
    the number of optimizer steps that the weights have taken. Quantities by site make
    a table, `<name>/by_depth`, at the start and at the end one figure each, and few
    scalars: `<name>/<quantity>/first`, `middle`, `last` and `worst`.
    `trainer.callback_metrics` holds these and all values by site,
    `<name>/<quantity>/<site>`.

    A measurement that fails (or a value that is not finite) never ends a run: it is
    logged as NaN, with one warning that says why and `<name>/failed`; `strict` raises.
    The same holds for every other hook, of subclasses too, and for loggers that fail
    (see :class:`~lit_resnorm_callbacks.probe.guard.Guarded`). What can't be right is
    refused before the first step.

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
        log: What goes to loggers: `scalars` of the whole network alone, without tables
            and figures; `summary`; or `all`, every value by site a scalar of its own,
            quantities declared as details in figures too, and in Weights & Biases
            charts.
        max_cost: Training steps, on as many examples, that a measurement may cost by
            counted work. What costs more takes a cheaper form, in the end fewer
            examples, and says so. The clock decides nothing, so that ranks agree and a
            resumed run repeats it.
        strict: Raise where a measurement fails.

    Attributes:
        quantities: What the probe's values are; those of every probe (`seconds`,
            `failed`) aside.
        section: Heading under which its charts stand; by default the probe's name.
        takes_shards: Whether it measures where a rank has a part of the weights alone.

    Raises:
        ValueError: If an option can't be right.
    """

    quantities: ClassVar[tuple[Quantity, ...]] = ()
    section: ClassVar[str] = ""
    takes_shards: ClassVar[bool] = False
    _guards = HOOKS | {"run"}

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
        log: Log = "summary",
        max_cost: float = 50.0,
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
        if log not in LOGS:
            raise ValueError(f"log is {log!r}; it must be one of {', '.join(LOGS)}")
        self.name = name
        self.cadence = Cadence.from_option(cadence)
        self.num_examples = check_count("num_examples", num_examples)
        self.norm_mode = check_norm_mode(norm_mode)
        self.sites = sites
        self.batch_dim = check_count("batch_dim", batch_dim, least=0)
        self.forward_fn = (
            ExamplesFirst(forward_fn, batch_dim) if batch_dim else forward_fn
        )
        # Lightning puts the module's `log` on every callback
        self.logs: Log = log
        if not max_cost > 0:
            raise ValueError(f"max_cost is {max_cost}; it must be above 0")
        self.max_cost = max_cost
        self.strict = strict
        self._given = {"batch": batch, "dataloader": dataloader}
        self._batch: Batch = None
        # The first rows of the whole, the same on every rank.
        self._few: Batch = None
        self._last_step: int | None = None
        self._steps_before = 0
        # Of the weights that were measured last, where they may be a training's end.
        self._fingerprint = ""
        self._is_due = False
        # What loggers have of this step already.
        self._logged: tuple[str, ...] = ()
        # Whether the measurement stands at an end of a training, or outside of one.
        self._at_an_end = True
        self._awaits_layers = False
        # What the batch of an evaluation was read from; None after a training.
        self._source: Any = None
        self._keys: list[str] = []
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

    def cost(self) -> float:
        """Return what a measurement costs by counted work, in training steps.

        Steps on as many examples; known once `prepare` has looked at the model. Here
        it is one step, a pass forward and back; say so where it is more.
        """
        return 1.0

    def affordable(
        self, trainer: Trainer, module: LightningModule, batch: Batch
    ) -> int:
        """Return how many examples are measured, and say what `max_cost` leaves out.

        Args:
            trainer: The run.
            module: The module, which `prepare` has seen.
            batch: The whole probe batch, the same on every rank.
        """
        del trainer, module
        num, cost = num_rows(batch), self.cost()
        if not cost > self.max_cost:  # or where nobody counted
            return num
        # of a single example there are no statistics
        fewer = max(min(num, 2), int(num * self.max_cost / cost))
        self._tell_cheaper(f"{fewer} examples are measured", f"{num} examples", cost)
        return fewer

    def _tell_cheaper(self, measured: str, wanted: str, cost: float) -> None:
        """Say what is measured in place of what would cost too much."""
        rank_zero_info(
            f"{self.name}: {measured}; {wanted} would cost {cost:.3g} training steps by"
            f" counted work, above max_cost {self.max_cost:g}: to have them, give"
            f" max_cost: {_above(cost)}"
        )

    def lacks_at_end(self) -> bool:
        """Say whether the last measurement left out what belongs to a run's end."""
        return False

    def smaller(self) -> bool:
        """Make the next try need less memory; return False where it can't."""
        return False

    def figures(self) -> dict[str, Figure]:
        """Return the figures of what was measured, by name."""
        return self._records.figures(
            self.prefix, self.declared(), detail=self.logs == "all"
        )

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

    @entered
    def state_dict(self) -> dict[str, Any]:
        """Return what can't be worked out again: last step, records, keys."""
        return {
            "last_step": self._last_step,
            "records": self._records.state_dict(),
            "keys": self._keys,
        }

    @entered
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._last_step = None
        records = Records()
        records.load_state_dict(state_dict["records"])
        self._last_step, self._records = state_dict["last_step"], records
        self._keys = state_dict.get("keys", [])

    @entered
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what can't work, before anything is trained."""
        callbacks: list[Callback] = getattr(trainer, "callbacks", [])
        probes = [c for c in callbacks if isinstance(c, Probe)]
        if any(p is not self and p.name == self.name for p in probes):
            raise ValueError(
                f"two callbacks have the name {self.name!r}; give one a name"
            )
        check_strategy(trainer, self.name, takes_shards=self.takes_shards)
        if stage == "fit":
            track_steps(trainer, pl_module)

    @entered
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fetch the probe batch, find the sites, and measure if that is asked for."""
        self._source = None
        self._steps_before = step = steps_taken(trainer)
        lazy = lazy_tensors(pl_module)
        self._awaits_layers = bool(lazy)
        if lazy:
            rank_zero_info(
                f"{self.name}: {', '.join(lazy)} get their first values in the first"
                " batch; nothing is measured before"
            )
            return
        with self._surviving("on_train_start"):
            self._together(trainer, lambda _: self._prepare(trainer, pl_module))
        start = self.cadence.at_start or is_dry_run(trainer)
        if step == 0 and start:
            self.run(trainer, pl_module, step)
            self._log_figures(trainer)

    @entered
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Measure if this batch ended a step that the cadence names."""
        if self._awaits_layers:
            self._awaits_layers = False
            with self._surviving("on_train_batch_end"):
                self._together(trainer, lambda _: self._prepare(trainer, pl_module))
        step = steps_taken(trainer)
        fresh = step != self._last_step and not is_dry_run(trainer)
        if fresh and self.cadence.due(step, self._steps_before):
            self._at_an_end = _is_last_step(trainer)
            try:
                self.run(trainer, pl_module, step)
            finally:
                self._at_an_end = True
        self._steps_before = step

    @entered
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the trained weights, and draw the figures."""
        step = steps_taken(trainer)
        fresh = step != self._last_step
        # an end that no limit foresaw adds what was left out, to what was logged
        more = self.cadence.at_end and (fresh or self.lacks_at_end())
        if more and not is_dry_run(trainer):
            self._logged = () if fresh else (*self._keys, "seconds")
            try:
                self.run(trainer, pl_module, step)
            finally:
                self._logged = ()
        self._log_figures(trainer)

    @entered
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare for measuring, where validation is not a part of training."""
        self._is_due = False
        if trainer.state.fn == "validate":
            self._begin_alone(trainer, pl_module)

    @entered
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare for measuring."""
        self._is_due = False
        self._begin_alone(trainer, pl_module)

    @entered
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure once, where validation is not a part of training."""
        if trainer.state.fn == "validate":
            self._run_alone(trainer, pl_module)

    @entered
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure once."""
        self._run_alone(trainer, pl_module)

    @entered
    def teardown(
        self, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        """Let go of the probe batch, and of metrics that would block the end."""
        self._batch = self._few = None
        keep_sendable(trainer, self.prefix)

    @entered
    def run(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Measure, and log what was measured as of `step` optimizer steps."""
        started = time.perf_counter()
        numbers, series = self._measured(trainer, module)
        self._last_step = step
        self._fingerprint = fingerprint(module) if _may_be_end(trainer) else ""
        if "failed" not in numbers:
            self._keys = [*numbers]
        numbers["seconds"] = time.perf_counter() - started
        numbers = {key: numbers[key] for key in numbers if key not in self._logged}
        self._records.add(step, numbers, series)
        self._send(trainer, step, numbers, series)

    def _send(
        self,
        trainer: Trainer,
        step: int,
        numbers: dict[str, float],
        series: dict[str, list[float]],
    ) -> None:
        prefix, declared = self.prefix, self.declared()
        logged = logged_scalars(
            numbers,
            self.logs,
            prefix=prefix,
            declared=declared,
            kinds=self._records.kinds,
        )
        scalars = {f"{prefix}/{key}": value for key, value in logged.items()}
        # EarlyStopping and ModelCheckpoint may watch any of them
        watched = {f"{prefix}/{key}": value for key, value in numbers.items()} | scalars
        trainer.callback_metrics.update(
            {key: torch.tensor(value) for key, value in watched.items()}
        )
        survive = self._surviving
        send_values(trainer, step, scalars, survive)
        if self.logs != "scalars":
            tables = self._records.tables(prefix, step, series, declared)
            send_tables(trainer, step, tables, survive)
            spectra = {f"{prefix}/{key}": values for key, values in series.items()}
            send_histograms(trainer, step, spectra, survive, always=self.logs == "all")

    def _begin_alone(self, trainer: Trainer, module: LightningModule) -> None:
        """Fetch an evaluation's batch, unless the same was measured on it before."""
        if not self._measures_alone():
            return
        source = batch_source(trainer, **self._given)
        known = self._source is None or self._source is source

        def is_new(reduce: Reduce) -> bool:
            # the network may have changed on one rank alone
            same = known and self._fingerprint == fingerprint(module)
            device = trainer.strategy.root_device
            return bool(reduce(torch.tensor(float(not same), device=device)))

        self._is_due = self._together(trainer, is_new)
        if self._is_due:
            self._source = source
            place = "on_test_start" if trainer.testing else "on_validation_start"
            with self._surviving(place):
                self._together(trainer, lambda _: self._prepare(trainer, module))

    def _measures_alone(self) -> bool:
        """Say whether there is something to measure without a training."""
        return True

    def _run_alone(self, trainer: Trainer, module: LightningModule) -> None:
        if self._is_due:
            self._is_due = False
            self.run(trainer, module, steps_taken(trainer))
            self._log_figures(trainer)

    def _refuses(self, place: str, error: Exception) -> bool:
        alone = place in ("on_validation_start", "on_test_start")
        # what could be measured before is no mistake of the user's
        known = alone and self._last_step is not None
        return super()._refuses(place, error) and not known

    def _after_failure(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Do the base's part of a hook, whose sums the other ranks wait for."""
        body = vars(Probe).get(name)
        if body is None or name in self._entered():
            return super()._after_failure(name, args, kwargs)
        with super()._surviving(name):
            return body(self, *args, **kwargs)
        return super()._after_failure(name, args, kwargs)

    def _together(self, trainer: Trainer, work: Callable[[Reduce], T]) -> T:
        """Return `work(reduce)`, failing on all ranks where one has failed, or does."""

        def checked(reduce: Reduce) -> T:
            if self._failure is not None:
                raise self._failure
            return work(reduce)

        return measured_together(trainer, checked)

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        batch = fixed_batch(
            trainer,
            module,
            self.num_examples,
            name=self.name,
            batch_dim=self.batch_dim,
            or_training=self.unedited,
            **self._given,
        )
        given = inspect.signature(type(self)).parameters.get("num_examples")
        is_default = given is not None and given.default == self.num_examples
        if (num := num_rows(batch)) < self.num_examples and not is_default:
            rank_zero_info(
                f"{self.name}: num_examples is {self.num_examples} and the probe data"
                f" hold {num}; all of them are used"
            )
        few = take_rows(batch, slice(2))
        if isinstance(self.forward_fn, ExamplesFirst):
            self.forward_fn.look(module, few)
        self._few = take_rows(batch, slice(_COMPARED_ROWS))
        if self.unedited and not self._runs(module, few):
            self.forward_fn = ByTrainingStep(self.batch_dim)
        sites = self._sites(module, few)
        self._records.kinds = {site.name: site.kind for site in sites}
        self.prepare(module, sites)
        batch = take_rows(batch, slice(self.affordable(trainer, module, batch)))
        # Examples coupled by batch norm can't be shared out: every rank takes them all.
        coupled = self.norm_mode == "train"
        share = slice(trainer.global_rank, None, trainer.world_size)
        self._batch = batch if coupled else take_rows(batch, share)
        send_quantities(trainer, self.declared(), self._surviving)

    def _runs(self, module: LightningModule, few: Batch) -> bool:
        """Say whether the module can be run on a few examples by `forward_fn`."""
        with untouched(module) as run, torch.no_grad():
            try:
                run(lambda: self.forward_fn(module, few))
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:
                return False
        return True

    def _sites(self, module: LightningModule, few: Batch) -> tuple[Site, ...]:
        """Return the sites of a forward pass on a few examples.

        Raises:
            ValueError: If the module can't be run on them.
        """

        def forward() -> Any:
            return self.forward_fn(module, few)

        with untouched(module) as run, torch.no_grad():
            try:
                return run(lambda: trace(module, forward))
            except Exception:
                try:
                    run(forward)
                except (MemoryError, torch.OutOfMemoryError):
                    raise
                except Exception as error:
                    raise ValueError(
                        f"{self.name}: {type(module).__name__} can't be run on the"
                        f" probe batch ({type(error).__name__}: {error}): give"
                        " forward_fn or probe_forward, or another probe batch by"
                        " batch= or dataloader="
                    ) from error
                raise

    def _measured(
        self, trainer: Trainer, module: LightningModule
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Return the scalars and the series that were measured, or NaN."""
        shrink = False

        def measured(reduce: Reduce) -> tuple[dict[str, float], dict[str, list[float]]]:
            if shrink and not self.smaller():
                raise NothingSmallerError("it runs out of memory in its smallest form")
            evals = self.norm_mode == "eval"
            buffers = buffers_of_rank_0(trainer, module, reduce)
            lines = MeasuringLines(self.name, 3 * self.cost())
            with buffers if evals else nullcontext(), watched(lines):
                return to_host(self.measure(module, self._batch, reduce))

        while True:
            try:
                return self._together(trainer, measured)
            except OutOfMemoryError:
                shrink = True
            except Exception as error:
                if self.strict:
                    raise
                why = f"{type(error).__name__}: {error}"
                self._warn_once(
                    why,
                    "nothing was measured, NaN is logged and the training goes on"
                    f" ({why})",
                    "measurement_failed",
                )
                return {**dict.fromkeys(self._keys, float("nan")), "failed": 1.0}, {}

    def _log_figures(self, trainer: Trainer) -> None:
        drawn = self.logs != "scalars" and not is_dry_run(trainer)
        if drawn and trainer.is_global_zero and loggers_of(trainer):
            step, survive = self._last_step, self._surviving
            with survive("figures"):
                figures = self.figures()
                for figure in figures.values():
                    captioned(figure, whose(trainer))
                send_figures(trainer, step, figures, survive)
            if self.logs != "all":
                return
            with survive("charts"):
                curves = self._records.depth_curves(self.prefix)
                send_charts(trainer, step, curves, self.declared(), survive)


def _above(cost: float) -> str:
    """Return a short number that isn't below this one."""
    unit = 10.0 ** (math.floor(math.log10(cost)) - 1)
    return f"{math.ceil(cost / unit) * unit:g}"


def _is_last_step(trainer: Trainer) -> bool:
    """Say whether the Trainer's limits end the training at this step."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs


def _may_be_end(trainer: Trainer) -> bool:
    """Say whether the present weights may be the last of a training."""
    # `fit_loop.done` says in the log why a training ends, each time it is asked
    if trainer.state.fn != "fit" or trainer.should_stop:
        return True
    return trainer.is_last_batch or 0 <= trainer.max_steps <= trainer.global_step

"""Forward passes that leave a model exactly as they found it.

Every measure runs its passes inside :func:`untouched`, which also settles what batch
norm does (`norm_mode`), so that each measure states it in the same three words.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_resnorm.measures.passes.batch_norms import (
    BATCH_NORMS,
    NormCall,
    Reduce,
    batch_statistics,
    over_rows,
)
from lit_resnorm.measures.passes.checkpointing import uncheckpointed
from lit_resnorm.measures.passes.compilation import uncompiled
from lit_resnorm.measures.passes.gradient_hooks import without_gradient_hooks
from lit_resnorm.measures.passes.kept_state import state_kept
from lit_resnorm.measures.passes.lazy_layers import check_initialised
from lit_resnorm.measures.passes.parameter_writes import parameters_kept
from lit_resnorm.measures.passes.random_states import random_states_kept

NormMode = Literal["frozen", "eval", "train"]

T = TypeVar("T")


def identity(tensor: Tensor) -> Tensor:
    """Return the tensor: the sum over the ranks of a single process."""
    return tensor


def check_norm_mode(norm_mode: str) -> NormMode:
    """Return `norm_mode` if it is one of the three modes.

    Raises:
        ValueError: If it is not; the message names it and the choices.
    """
    for known in get_args(NormMode):
        if norm_mode == known:
            return known
    choices = ", ".join(get_args(NormMode))
    raise ValueError(f"norm_mode is {norm_mode!r}; it must be one of {choices}")


class MissedNormError(ValueError):
    """A pass has other batch norms than that which fixed their statistics.

    Statistics are known by the place of their norm in a pass, so that norms would be
    given those of others.
    """

    def __init__(self, network: str, norm_mode: str) -> None:
        others = "'train'" if norm_mode == "eval" else "'eval' or 'train'"
        super().__init__(
            f"rows of the batch take different ways through {network}, past batch norms"
            f" whose statistics norm_mode {norm_mode!r} fixes: measure with norm_mode"
            f" {others}"
        )


@dataclass
class _Application:
    """One application of batch norm in a pass: over what, and its statistics."""

    shape: torch.Size
    statistics: tuple[Tensor, Tensor] | None


class Passes(TorchFunctionMode):
    """Runs forward passes with the batch norms of one `norm_mode`.

    `run(fn)` returns `fn()`. In mode `frozen` the first call takes each batch norm's
    statistics from its own input, over all ranks, and later calls replay them as
    constants in the order of application, so a module that is applied twice has two
    sets. Statistics carry no gradient. `recalibrate=True` takes them anew (a reference
    batch is calibrated on by running it first). In mode `eval` the same happens where a
    call asks for the batch's statistics all the same (`track_running_stats=False`).

    Statistics that are not over rows (of weights, of one example's values) are those of
    each call, differentiated through. They show in a pass with another number of rows,
    which `scout=True` makes; without one all are taken to be over rows.

    A pass without one of the norms whose statistics are fixed, or with more of them, is
    refused. Where statistics are over ranks, they tell each other at each norm where
    they are, so that none waits for one whose rows go another way.

    Attributes:
        norm_mode: What batch norms do.
        reduce: Sums a tensor over ranks.
        live: Whether such calls in mode `eval` take the statistics of each pass
            instead, differentiated through.
    """

    def __init__(
        self,
        norm_mode: NormMode,
        reduce: Reduce = identity,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        # Whose state each pass begins with anew; None: passes leave no trace.
        self._model = model
        self._network = "the network" if model is None else type(model).__name__
        first = None if model is None else next(model.parameters(), None)
        self._device = torch.device("cpu") if first is None else first.device
        self.norm_mode = norm_mode
        self.reduce = reduce
        self.live = False
        self._applications: list[_Application] = []
        self._calibrated = False
        self._empty = False
        self._scouting = False
        self._scouted: list[torch.Size] = []
        self._application = 0

    @property
    def num_norms(self) -> int:
        """Applications of batch norm whose statistics were taken."""
        return len(self._applications)

    @property
    def takes_rows_together(self) -> bool:
        """Whether calls ask for statistics over rows where `norm_mode` leaves them."""
        return self.norm_mode == "eval" and any(
            taken.statistics is not None for taken in self._applications
        )

    def __call__(
        self,
        forward: Callable[[], T],
        *,
        empty: bool = False,
        recalibrate: bool = False,
        scout: bool = False,
    ) -> T:
        """Return `forward()`, its batch norms in this mode.

        Args:
            forward: One forward pass of the model, whole or on some rows.
            empty: This rank runs on a dummy row, which counts in no statistic.
            recalibrate: Take the frozen statistics from this pass, not the first.
            scout: Only learn the sizes of what batch norms see, for comparison with the
                next pass, which must have another number of rows. Statistics are this
                rank's own, and no collective is made.
        """
        if scout or recalibrate or not self._calibrated:
            self._calibrated = False
            self._applications = []
        self._empty = empty
        self._scouting = scout
        self._application = 0
        over_ranks = not scout and not self._calibrated and self.reduce is not identity
        with self:
            output = self._pass(forward)
        if over_ranks:
            self._agree("end")
        if self._application != len(self._applications):
            raise self._missed()
        self._calibrated = not scout
        if scout:
            self._scouted = [taken.shape for taken in self._applications]
        return output

    def without_norms(self) -> None:
        """Take it that no pass has a norm whose statistics are to be taken."""
        self._calibrated, self._applications = True, []

    def _missed(self) -> MissedNormError:
        return MissedNormError(self._network, self.norm_mode)

    def _agree(self, *place: Any) -> None:
        """Refuse, on all ranks, where another rank's pass is at another place."""
        digest = 1 + zlib.crc32(repr(place).encode()) % 2**15
        # Whole numbers of less than 2 ** 53, so that the sums are exact.
        told = torch.tensor([1, digest, digest**2], dtype=torch.float64)
        num, total, squares = self.reduce(told.to(self._device)).tolist()
        if num * squares != total**2:
            raise self._missed()

    def _pass(self, forward: Callable[[], T]) -> T:
        """Return `forward()`, which begins with the state that all passes begin with.

        A model whose first pass leaves no trace is taken to leave none.
        """
        if self._model is None:
            return forward()
        check_initialised(self._model)
        with state_kept(self._model) as state:
            output = forward()
        if not state.changed:
            self._model = None
        return output

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        read = BATCH_NORMS.get(func)
        if read is None:
            return func(*args, **kwargs)
        call = read(*args, **kwargs)
        if self.norm_mode == "train":
            return call.by_own_statistics()
        if self.norm_mode == "eval" and not call.training:
            if call.needs_elementwise:
                return call.by_running_statistics()
            return func(*args, **kwargs)
        return self._by_batch(call)

    def _by_batch(self, call: NormCall) -> Tensor:
        if not self._calibrated:
            self._applications.append(self._taken(call))
        if self._application >= len(self._applications):
            raise self._missed()
        statistics = self._applications[self._application].statistics
        self._application += 1
        if statistics is None:
            return call.as_it_is()
        if self.live and self.norm_mode == "eval":
            return call.by_own_statistics()
        return call.by(*statistics)

    def _taken(self, call: NormCall) -> _Application:
        shape = call.input.shape
        over = self._over_rows(shape)
        alone = self._scouting or self.reduce is identity
        if not alone:
            self._agree(len(self._applications), over and shape[1])
        if not over:
            return _Application(shape, None)
        reduce = None if alone else self.reduce
        empty = self._empty and not self._scouting
        return _Application(shape, batch_statistics(call.input, reduce, empty=empty))

    def _over_rows(self, shape: torch.Size) -> bool:
        """Return whether statistics are over rows, as far as a scouting pass tells."""
        if self._scouting or self._application >= len(self._scouted):
            return True
        return over_rows(shape, self._scouted[self._application])


@contextmanager
def untouched(
    model: nn.Module, *, norm_mode: str = "frozen", reduce: Reduce = identity
) -> Iterator[Passes]:
    """Give a runner of forward passes, and leave the model as it was.

    Inside, the model is in eval mode (no dropout), autocast, `torch.compile` and
    activation checkpointing are off, hooks on gradients don't run, gradients can be
    taken even under `torch.inference_mode`, and batch norm is what `norm_mode` says.
    Every pass begins with the state that the model has. Afterwards, also after an
    exception, everything that a pass can change is what it was, to the bit: modes,
    buffers, parameters written in `forward`, `.grad` fields, attributes of modules and
    what they hold (tensors, containers, counters, metrics, generators), and the global
    random states (torch, NumPy, Python). What a LightningModule logs in `forward` is
    not logged.

    Args:
        model: Any module; nothing is converted.
        norm_mode: `frozen`: statistics of the batch of the first pass, over all ranks,
            as constants. `eval`: running statistics. `train`: the batch's statistics,
            differentiated through, running ones left alone.
        reduce: Sums a tensor over ranks.

    Yields:
        The runner: `output = run(lambda: model(x))`.

    Raises:
        ValueError: If `norm_mode` is not one of the three, or at the end, if a pass has
            changed what can't be put back; the message names it.
    """
    run = Passes(check_norm_mode(norm_mode), reduce, model)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(random_states_kept())
        stack.enter_context(without_gradient_hooks(model))
        stack.enter_context(_module_state(model))
        for device_type in {p.device.type for p in model.parameters()} | {"cpu"}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(uncompiled())
        stack.enter_context(_without_fastpath())
        stack.enter_context(uncheckpointed())
        yield run


@contextmanager
def _module_state(model: nn.Module) -> Iterator[None]:
    """Set eval mode; put state, parameters and `.grad` fields back, to the bit.

    Raises:
        ValueError: If something was changed that can't be put back.
    """
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with state_kept(model), parameters_kept(model):
            for module in model.modules():
                module.training = False
            yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad


@contextmanager
def _without_fastpath() -> Iterator[None]:
    """Run attention layers by the functions that they are made of."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)

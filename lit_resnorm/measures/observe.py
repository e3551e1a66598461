"""Forward passes that leave a model exactly as they found it.

Every measure runs its passes inside :func:`untouched`, which also settles what batch
norm does (`norm_mode`), so that each measure states it in the same three words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lit_resnorm.measures.preserved import module_state, random_state, uncompiled

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over ranks and returns a new one; all ranks call it equally often."""

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


def num_rows(batch: Any) -> int:
    """Return the number of examples in a batch: rows of its first tensor.

    Raises:
        ValueError: If the batch holds no tensor with a first dimension.
    """
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise ValueError(
        f"the batch, a {type(batch).__name__}, holds no tensor of examples"
    )


def take_rows(batch: Any, rows: slice | Tensor) -> Any:
    """Return the batch with every tensor of full length cut to `rows`."""
    num = num_rows(batch)

    def cut(leaf: Any) -> Any:
        full = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == num
        return leaf[rows] if full else leaf

    return pytree.tree_map(cut, batch)


def occupied(batch: Any) -> tuple[Any, bool]:
    """Return a batch that has a row, and whether that row is a dummy.

    A rank that holds no example still runs every pass, so that it makes the same
    collectives as the others. It runs them on one row of zeros whose values count for
    nothing: pass the second value as `empty` to the runner of :func:`untouched`, and
    leave the dummy row out of every sum.
    """
    if num_rows(batch):
        return batch, False

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and not leaf.shape[0]:
            return leaf.new_zeros((1, *leaf.shape[1:]))
        return leaf

    return pytree.tree_map(fill, batch), True


class Passes(TorchFunctionMode):
    """Runs forward passes with the batch norms of one `norm_mode`.

    `run(fn)` returns `fn()`. In mode `frozen` the first call takes each batch norm's
    statistics from its own input, over all ranks, and later calls replay them as
    constants in the order of application, so a module that is applied twice has two
    sets. Statistics carry no gradient. `recalibrate=True` takes them anew (a reference
    batch is calibrated on by running it first).
    """

    def __init__(self, norm_mode: NormMode, reduce: Reduce = identity) -> None:
        super().__init__()
        self.norm_mode = norm_mode
        self.reduce = reduce
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._calibrated = False
        self._empty = False
        self._application = 0

    @property
    def num_norms(self) -> int:
        """Applications of batch norm whose statistics were taken."""
        return len(self._statistics)

    def __call__(
        self,
        forward: Callable[[], T],
        *,
        empty: bool = False,
        recalibrate: bool = False,
    ) -> T:
        """Return `forward()`, its batch norms in this mode.

        Args:
            forward: One forward pass of the model, whole or on some rows.
            empty: This rank runs on a dummy row, which counts in no statistic.
            recalibrate: Take the frozen statistics from this pass, not the first.
        """
        if recalibrate or not self._calibrated:
            self._calibrated = False
            self._statistics = []
        self._empty = empty
        self._application = 0
        with self:
            output = forward()
        self._calibrated = True
        return output

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.batch_norm or self.norm_mode == "eval":
            return func(*args, **(kwargs or {}))
        return self._batch_norm(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,  # noqa: ARG002
        running_var: Tensor | None = None,  # noqa: ARG002
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,  # noqa: ARG002
        momentum: float = 0.1,  # noqa: ARG002
        eps: float = 1e-5,
    ) -> Tensor:
        if self.norm_mode == "train":
            return F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
        if not self._calibrated:
            self._statistics.append(self._moments(input))
        if self._application >= len(self._statistics):
            raise RuntimeError(
                f"this pass applies more than the {len(self._statistics)} batch norms"
                " whose statistics were taken: norm_mode frozen needs passes alike"
            )
        mean, variance = self._statistics[self._application]
        self._application += 1
        dtype = _statistics_dtype(input, weight)
        mean, variance = mean.to(dtype), variance.to(dtype)
        return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps)

    @torch.no_grad()
    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # The kernel sums in float64 and is three times as fast as var_mean. eps = 0
        # keeps small variances; the mean is taken first and the squares are centred
        # on each rank, so no digits cancel when ranks are joined (Chan et al. 1979).
        x = (
            x.detach().float()
            if x.dtype in (torch.half, torch.bfloat16)
            else x.detach()
        )
        num_channels = x.shape[1]
        if self._empty:
            count = x.new_zeros(1, dtype=torch.float64)
            mean = variance = x.new_zeros(num_channels, dtype=torch.float64)
        else:
            count = x.new_full((1,), x.numel() // num_channels, dtype=torch.float64)
            _, mean, invstd = torch.native_batch_norm(
                x, None, None, None, None, True, 0.0, 0.0
            )
            mean, variance = mean.double(), invstd.double() ** -2
        if self.reduce is identity:
            return mean, variance
        sums = self.reduce(torch.cat([count, count * mean]))
        total, total_mean = sums[:1], sums[1:] / sums[:1]
        spread = count * (variance + (mean - total_mean) ** 2)
        return total_mean, self.reduce(spread) / total


def _statistics_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    # The kernels take statistics of the weight's type; without one, half-precision
    # inputs keep float32 statistics, as batch norm itself does.
    if weight is not None:
        return weight.dtype
    return torch.float32 if x.dtype in (torch.half, torch.bfloat16) else x.dtype


@contextmanager
def untouched(
    model: nn.Module, *, norm_mode: str = "frozen", reduce: Reduce = identity
) -> Iterator[Passes]:
    """Give a runner of forward passes, and leave the model as it was.

    Inside, the model is in eval mode (no dropout), autocast and `torch.compile` are
    off, gradients can be taken even under `torch.inference_mode`, and batch norm is
    what `norm_mode` says. Afterwards, also after an exception, the mode of every
    submodule, every buffer, the `.grad` fields and the global random states (torch,
    NumPy, Python) are what they were, to the bit.

    Args:
        model: Any module; nothing is converted.
        norm_mode: `frozen`: statistics of the batch of the first pass, over all ranks,
            as constants. `eval`: running statistics. `train`: the batch's statistics,
            differentiated through, running ones left alone.
        reduce: Sums a tensor over ranks.

    Yields:
        The runner: `output = run(lambda: model(x))`.

    Raises:
        ValueError: If `norm_mode` is not one of the three.
    """
    run = Passes(check_norm_mode(norm_mode), reduce)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(random_state())
        stack.enter_context(module_state(model))
        for device_type in {p.device.type for p in model.parameters()} | {"cpu"}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(uncompiled(model))
        yield run

"""Noise that travels beside the signal, by forward-mode differentiation.

A tensor of a pass is a dual number: the signal, and as its tangent the noise that the
linearised network makes of noise at the input.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lit_resnorm.measures.passes.functional_calls import with_weights


def signal_of(x: Tensor) -> Tensor:
    """Return a tensor without its noise."""
    return forward_ad.unpack_dual(x).primal


def noise_of(x: Tensor) -> Tensor | None:
    """Return the noise of a tensor, None where it has none."""
    return forward_ad.unpack_dual(x).tangent


def with_noise(x: Tensor, dx: Tensor) -> Tensor:
    """Return the dual number of a signal and its noise."""
    return forward_ad.make_dual(x, dx)


def example_noise(x: Tensor, keys: Tensor, *, seed: int, copies: int = 1) -> Tensor:
    """Return standard normal noise of x's shape and type, the same for equal examples.

    The noise of an example follows from the bytes of its row of `keys`, so it does not
    depend on how examples are spread over chunks and ranks, nor on their order.

    Args:
        x: Shape `(B, ...)`.
        keys: Shape `(B, ...)`; the examples themselves, or their tokens.
        seed: Another seed, another noise.
        copies: How many successive rows are copies of one example; each copy has its
            own noise.
    """
    rows = keys.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    noise = torch.empty(x.shape)
    generator = torch.Generator()
    for index, (row, example) in enumerate(zip(rows, noise, strict=True)):
        salt = f"{seed}/{index % copies}".encode()
        digest = hashlib.blake2b(row, digest_size=8, key=salt).digest()
        generator.manual_seed(int.from_bytes(digest) >> 1)
        example.normal_(generator=generator)
    return noise.to(x)


class NoiseRules(TorchFunctionMode):
    """Lets noise begin at embeddings, and pass operations that have no rule for it.

    To be entered before the pass is run, so that it sees batch norms with their
    statistics. Where these are constant noise is scaled by channel, in one product
    where torch's own rule makes many; linear layers, too, have a shorter rule here.

    An operation without a rule for forward-mode differentiation is tried with plain
    kernels (fused attention and recurrent layers have none). Where that has no rule
    either, its noise is NaN, and so is that of all that depends on it; the signal goes
    on, and the operation is named.

    Args:
        embeddings: Which look-ups of a pass get noise.
        add_noise: Takes a look-up's output, indices and table, returns the output with
            noise.
    """

    def __init__(
        self,
        embeddings: frozenset[int],
        add_noise: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.without_rule: list[str] = []
        self._embeddings = embeddings
        self._add_noise = add_noise
        self._num_lookups = 0

    def __enter__(self) -> NoiseRules:
        self._num_lookups = 0
        return super().__enter__()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            return self._embedding(*args, **kwargs)
        if func in _AFFINE:
            return _AFFINE[func](*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except NotImplementedError as error:
            if "forward AD" not in str(error):
                raise
        try:
            with plain_kernels():
                return func(*args, **kwargs)
        except NotImplementedError:
            self.without_rule.append(getattr(func, "__name__", str(func)))
            return noiseless(func)(*args, **kwargs)

    def _embedding(
        self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        output = F.embedding(input, weight, *args, **kwargs)
        place = self._num_lookups
        self._num_lookups += 1
        if place not in self._embeddings:
            return output
        return self._add_noise(output, input, weight)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    statistics = running_mean, running_var
    noise = noise_of(input)
    if noise is None or training or running_var is None:
        return F.batch_norm(input, *statistics, weight, bias, training, momentum, eps)
    signal = signal_of(input)
    output = F.batch_norm(signal, *statistics, weight, bias, False, momentum, eps)
    factor_C = (running_var + eps).rsqrt()
    if weight is not None:
        factor_C = factor_C * weight
    shape = (1, -1) + (1,) * (input.ndim - 2)
    return with_noise(output, noise * factor_C.to(noise).view(shape))


def _linear_with_noise(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    noise = noise_of(input)
    if noise is None or any(
        noise_of(tensor) is not None for tensor in (weight, bias) if tensor is not None
    ):
        return F.linear(input, weight, bias)
    return with_noise(F.linear(signal_of(input), weight, bias), F.linear(noise, weight))


_AFFINE: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.batch_norm: _batch_norm,
    F.linear: _linear_with_noise,
}


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Use kernels that are made of operations with forward-mode rules."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.backends.mkldnn.flags(enabled=False),
        torch.backends.cudnn.flags(enabled=False),
    ):
        yield


def noiseless(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of the signals, its outputs' noise NaN."""

    def applied(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, signal_of, (args, kwargs))
        return pytree.tree_map_only(Tensor, _unknown_noise, func(*args, **kwargs))

    return applied


def _unknown_noise(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return with_noise(x, torch.full_like(x, torch.nan))


def module_without_rule(error: BaseException) -> nn.Module | None:
    """Return the innermost module in which an error was raised."""
    innermost = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        innermost = owner if isinstance(owner, nn.Module) else innermost
    return innermost


@contextmanager
def without_noise_in(modules: list[nn.Module]) -> Iterator[None]:
    """Let these modules run on the signal alone, their outputs' noise NaN."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(_restore_forward, module, module.__dict__.get("forward"))
            module.__dict__["forward"] = noiseless(module.forward)
        yield


def _restore_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    del module.__dict__["forward"]
    if forward is not None:
        module.__dict__["forward"] = forward


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Have a float64 copy of the model's parameters and buffers in their place."""
    copies: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            copies[name] = _double(tensor)
    with with_weights(model, copies):
        yield


def _double(tensor: Tensor) -> Tensor:
    wide = tensor.detach().double()
    return nn.Parameter(wide, False) if isinstance(tensor, nn.Parameter) else wide

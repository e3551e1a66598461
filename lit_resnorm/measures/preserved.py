"""What a measurement puts back: random states, a model's state, how it is run."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def random_state() -> Iterator[None]:
    """Put the global random states (torch, NumPy, Python) back, to the bit."""
    cuda = torch.cuda.is_initialized()
    saved = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    saved_cuda = torch.cuda.get_rng_state_all() if cuda else []
    try:
        yield
    finally:
        torch.set_rng_state(saved[0])
        np.random.set_state(saved[1])  # noqa: NPY002
        random.setstate(saved[2])
        if cuda:
            torch.cuda.set_rng_state_all(saved_cuda)


@contextmanager
def module_state(model: nn.Module) -> Iterator[None]:
    """Set eval mode; put modes, buffers and `.grad` fields back, to the bit."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone(), _version(buffer))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, buffer, value, version in buffers:
            module._buffers[name] = buffer
            if version is None or _version(buffer) != version:
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(value)
        for parameter, grad in grads:
            parameter.grad = grad


def _version(tensor: Tensor) -> int | None:
    # Inference tensors (made under Lightning's evaluation loop) keep no counter.
    return None if tensor.is_inference() else tensor._version


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled modules uncompiled, and attention without its fast path."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Hooks set after a compiled module's first call never run. Importing dynamo
        # takes seconds, so it is left alone where nothing was compiled.
        if "torch._dynamo" in sys.modules and any(map(_is_compiled, model.modules())):
            with torch.compiler.set_stance("force_eager"):
                yield
        else:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None

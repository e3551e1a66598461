"""What a measurement puts back: random states, a model's state, how it is run."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_resnorm.measures.passes.kept_state import state_kept
from lit_resnorm.measures.passes.parameter_writes import parameters_kept


@dataclass(frozen=True)
class RandomStates:
    """States of the global generators of torch, NumPy and Python.

    Attributes:
        torch: Of torch's CPU generator.
        cuda: Of the generator of each CUDA device; empty where CUDA isn't in use.
        numpy: Of NumPy's legacy generator.
        python: Of `random`.
    """

    torch: Tensor
    cuda: list[Tensor]
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> RandomStates:
        """Return the present states."""
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            np.random.get_state(),  # noqa: NPY002
            random.getstate(),
        )

    def set(self) -> None:
        """Make these the present states."""
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)

    def moved(self) -> bool:
        """Return whether random numbers were drawn since."""
        now = RandomStates.now()
        states = [self.torch, *self.cuda, torch.from_numpy(self.numpy[1])]
        present = [now.torch, *now.cuda, torch.from_numpy(now.numpy[1])]
        return (
            self.python != now.python
            or self.numpy[2:] != now.numpy[2:]
            or not all(map(torch.equal, states, present))
        )


@contextmanager
def random_state() -> Iterator[None]:
    """Put the global random states (torch, NumPy, Python) back, to the bit."""
    saved = RandomStates.now()
    try:
        yield
    finally:
        saved.set()


@contextmanager
def module_state(model: nn.Module) -> Iterator[None]:
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

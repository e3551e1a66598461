"""States of the global random generators, and putting them back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
def random_states_kept() -> Iterator[None]:
    """Put the global random states (torch, NumPy, Python) back, to the bit."""
    saved = RandomStates.now()
    try:
        yield
    finally:
        saved.set()

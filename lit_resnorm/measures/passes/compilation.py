"""Running what `torch.compile` has compiled in its eager form."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def uncompiled() -> AbstractContextManager[None]:
    """Return a context in which compiled modules, methods and functions run eagerly.

    Compiled code passes hooks and function modes by, and `torch.func.vmap` can't enter
    it. Lightning compiles the methods of a LightningModule, and a network may call
    compiled functions: neither shows in its modules.
    """
    # Importing dynamo takes seconds, and nothing is compiled without it.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")

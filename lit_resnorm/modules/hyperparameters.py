"""Where the hyperparameters of a module are: the frame that has its arguments."""

import inspect
from types import FrameType

from torch import nn

__all__ = ["outermost_init"]


def outermost_init(module: nn.Module) -> FrameType | None:
    """Return the frame of the outermost `__init__` that is building `module`.

    Its arguments alone make the module again; those that a class passes on to its base
    would come twice.
    """
    frame = inspect.currentframe()
    frame = frame and frame.f_back
    while frame and frame.f_back and frame.f_back.f_locals.get("self") is module:
        frame = frame.f_back
    return frame

"""A LightningModule's logging, which does nothing in passes of probes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_LOGGING = ("log", "log_dict")


class _Silent:
    """Stands in for a logger: takes any call, and does nothing."""

    def __getattr__(self, name: str) -> _Silent:
        return self

    def __call__(self, *_: Any, **__: Any) -> _Silent:
        return self

    def __getitem__(self, key: Any) -> _Silent:
        return self


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for `LightningModule.log`."""


@contextmanager
def logging_silenced(model: nn.Module) -> Iterator[None]:
    """Have a LightningModule's `log` and its trainer's loggers do nothing.

    Known by their attributes: measures import no Lightning.
    """
    talking = [m for m in model.modules() if "_current_fx_name" in vars(m)]
    trainers = {id(t): t for m in talking if (t := vars(m).get("_trainer")) is not None}
    loggers = [(t, t._loggers) for t in trainers.values()]
    held = [{n: vars(m)[n] for n in _LOGGING if n in vars(m)} for m in talking]
    for trainer, own in loggers:
        trainer._loggers = [_Silent() for _ in own]
    for module in talking:
        vars(module).update(dict.fromkeys(_LOGGING, _log_nothing))
    try:
        yield
    finally:
        for trainer, own in loggers:
            trainer._loggers = own
        for module, saved in zip(talking, held, strict=True):
            for name in _LOGGING:
                vars(module).pop(name, None)
            vars(module).update(saved)

"""What keeps a callback that only measures from ending a run."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning_utilities.core.rank_zero import rank_zero_warn

from lit_resnorm.quantities.explanations import reference

HOOKS = frozenset(
    name
    for name, member in vars(Callback).items()
    if inspect.isfunction(member) and not name.startswith("_")
)
"""The methods of a callback that Lightning calls."""

_SETUP = frozenset(
    ("setup", "on_fit_start", "on_train_start", "on_validation_start", "on_test_start")
)
_BEFORE_FIRST_STEP = frozenset(
    (
        "on_sanity_check_start",
        "on_sanity_check_end",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_before_zero_grad",
    )
)
# What fails here leaves nothing behind that a later measurement could stand on.
_HARMLESS = frozenset(
    (
        "run",
        "state_dict",
        "load_state_dict",
        "on_save_checkpoint",
        "on_load_checkpoint",
        "on_train_end",
        "on_fit_end",
        "on_validation_end",
        "on_test_end",
        "on_exception",
        "teardown",
    )
)


class RefusedRunError(ValueError):
    """A run can't be measured, as its first step shows; it ends, in whatever hook."""


class Guarded(Callback):
    """A callback whose failures leave the run alone, in whatever hook they come.

    What Lightning calls is guarded where it is looked up, so that a hook of a subclass
    in another package, of a mixin or of an instance is guarded like one of ours. An
    exception is one warning that says why; a callback that fails amid a training does
    nothing more in it. `strict` raises.

    Refused, as a ValueError that begins with the callback's name, is what can't be
    right: where a hook raises ValueError at set-up or in the first batch, before its
    step. Ctrl-C, SIGTERM and the control flow of Lightning's tuner pass.

    Attributes:
        name: For messages.
        strict: Whether failures raise.
        unedited: Whether the script is not of whom the callback is: then nothing is
            refused, but left out with one warning, and checkpoints hold none of it.
    """

    name = ""
    strict = False
    unedited = False
    _guards = HOOKS
    _failure: Exception | None = None
    # refused in a script that isn't ours, on all ranks
    _refused_quietly = False
    _stepped = False

    def __getattribute__(self, name: str) -> Any:
        """Return an attribute, a method that Lightning calls under guard."""
        value = super().__getattribute__(name)
        if name not in type(self)._guards or not callable(value):
            return value

        @functools.wraps(value)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return self._guarded(name, value, args, kwargs)

        return guarded

    def _guarded(
        self,
        name: str,
        hook: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if name == "setup":
            self._failure, self._stepped, self._refused_quietly = None, False, False
        self._stepped |= name == "on_train_batch_end"
        self._entered().discard(name)
        if self.unedited and name == "state_dict":
            return {}
        if self._refused_quietly and name != "teardown":
            return None
        if self._failure is None or name in _HARMLESS | {"setup"}:
            with self._surviving(name, args, kwargs):
                return hook(*args, **kwargs)
        return self._after_failure(name, args, kwargs)

    def _entered(self) -> set[str]:
        return self.__dict__.setdefault("_entered_hooks", set())

    def _after_failure(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Do what other ranks wait for though this one has failed; here nothing."""
        del args, kwargs
        return {} if name == "state_dict" else None

    @contextmanager
    def _surviving(
        self,
        place: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[None]:
        """Let no failure inside end the run, unless it has to (see the class).

        Args:
            place: The hook, or what is done, for the message.
            args: Of the hook.
            kwargs: Likewise.
        """
        try:
            yield
        except _TunerExitException:
            raise
        except Exception as error:
            if self.strict:
                raise
            if self._refuses(place, error):
                raise self._named(error) from error
            self._take(place, error)

    def _refuses(self, place: str, error: Exception) -> bool:
        """Say whether an exception is the refusal of a run that hasn't begun."""
        if self.unedited:
            return False
        if isinstance(error, RefusedRunError):
            return True
        early = place in _SETUP or (place in _BEFORE_FIRST_STEP and not self._stepped)
        return early and isinstance(error, ValueError | MisconfigurationException)

    def _named(self, error: Exception) -> Exception:
        text = str(error)
        if text.startswith(self.name) or not isinstance(error, ValueError):
            return error
        return ValueError(f"{self.name}: {text}")

    def _take(self, place: str, error: Exception) -> None:
        """Note a failure, and tell it once."""
        if place in HOOKS and place not in _HARMLESS:
            # without its frames, which hold tensors
            self._failure = error.with_traceback(None)
            error.__cause__ = error.__context__ = None
            does = "does no more, NaN is logged"
        else:
            does = "is left out"
        why = f"{type(error).__name__}: {error}"
        if self.unedited and isinstance(error, ValueError) and not self._stepped:
            text = str(error).removeprefix(f"{self.name}: ")
            self._warn_once(text, f"nothing is measured: {text}", "probe_stopped")
            self._refused_quietly = True
            return
        self._warn_once(
            why, f"{place} failed and {does}; the run goes on ({why})", "probe_stopped"
        )

    def _warn_once(self, reason: str, message: str, explanation: str = "") -> None:
        """Warn, unless it was done for this reason, numbers in it aside.

        Args:
            reason: What is told once.
            message: The warning.
            explanation: Name of what explains it, in
                `lit_resnorm.quantities.explanations`; a probe of another package may
                have none.
        """
        reason = re.sub(r"(0x)?\d[\da-f]*", "#", reason)
        warned = self.__dict__.setdefault("_warned", set())
        if reason not in warned:
            warned.add(reason)
            see = f"; see {reference(explanation)}" if explanation else ""
            rank_zero_warn(f"{self.name}: {message}{see}")


def entered(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook of a base class that notes that it was reached."""

    @functools.wraps(hook)
    def noted(self: Guarded, *args: Any, **kwargs: Any) -> Any:
        self._entered().add(hook.__name__)
        return hook(self, *args, **kwargs)

    return noted

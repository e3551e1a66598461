"""Random generators and iterators that objects hold: their states and positions."""

from __future__ import annotations

import pickle
import random
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def generator_access(value: Any) -> tuple[Any, Any, Any] | None:
    """Return how a random generator's state is read, set and compared."""
    if isinstance(value, torch.Generator):
        return (
            torch.Generator.get_state,
            torch.Generator.set_state,
            lambda a, b: not torch.equal(a, b),
        )
    if isinstance(value, np.random.Generator):
        return _bit_state, _set_bit_state, _pickles_differ
    if isinstance(value, np.random.RandomState):
        return (
            lambda g: g.get_state(legacy=False),
            np.random.RandomState.set_state,
            _pickles_differ,
        )
    if isinstance(value, random.Random):
        return random.Random.getstate, random.Random.setstate, _pickles_differ
    return None


def _bit_state(generator: np.random.Generator) -> Any:
    return generator.bit_generator.state


def _set_bit_state(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


def _pickles_differ(one: Any, other: Any) -> bool:
    # Pickled, as states hold arrays, which `!=` compares number by number.
    return pickle.dumps(one) != pickle.dumps(other)


def position_of(iterator: Iterator[Any]) -> Any:
    """Return something that differs when an iterator has moved on, where it can."""
    if isinstance(iterator, types.GeneratorType):
        frame = iterator.gi_frame
        return None if frame is None else (frame.f_lasti, repr(frame.f_locals))
    with warnings.catch_warnings():
        # itertools says that it will lose this.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return pickle.dumps(iterator)
        except Exception:
            # Any class may refuse in a way of its own, as loaders with workers do.
            return repr(iterator)


def seed_generator(generator: Any, seed: int) -> None:
    """Seed a generator, of whichever kind."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        kind = type(generator.bit_generator)
        generator.bit_generator.state = kind(seed).state
    else:
        generator.seed(seed)

"""Signal and noise through random nets, one draw of images and weights at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_resnorm.data import CIFAR10, MNIST, Digits
from lit_resnorm.measures.moments import DepthProfile, signal_and_noise
from lit_resnorm.modules import LitClassifier
from lit_resnorm.papers.item import Check, Settings, cell_seed, near
from lit_resnorm.papers.training import device, examples

__all__ = [
    "block_index",
    "images",
    "kind_of",
    "profile",
    "random_net",
    "scales",
    "sites_of",
    "stored_value",
]

STORED_DRAWS = 200


@cache
def _training_images(name: str) -> Tensor:
    kind = {"Digits": Digits, "MNIST": MNIST, "CIFAR10": CIFAR10}[name]
    return examples(kind(num_val=0), "train")[0]


def images(settings: Settings, draw: int, seed: int) -> Tensor:
    """Return a fresh batch, standardised over itself.

    Convolutional nets: by channel over examples and positions; fully connected ones,
    which flatten first: by pixel over examples. A constant pixel stays 0.

    Args:
        settings: `data`, `batch` and `kernel_size`.
        draw: Number of the draw.
        seed: Base seed.
    """
    pool = _training_images(settings["data"])
    rng = np.random.default_rng(cell_seed(seed, "images", draw))
    chosen = rng.choice(len(pool), settings["batch"], replace=False)
    x = pool[torch.from_numpy(chosen)].double()
    over = (0,) if settings["kernel_size"] is None else (0, 2, 3)
    centred = x - x.mean(over, keepdim=True)
    deviation = centred.square().mean(over, keepdim=True).sqrt()
    return (centred / torch.where(deviation > 0, deviation, 1.0)).float()


def random_net(
    kind: Callable[..., LitClassifier],
    settings: Settings,
    draw: int,
    seed: int,
    **options: Any,
) -> LitClassifier:
    """Return a draw's net with new weights; convolutions have a periodic boundary.

    Args:
        kind: Its class.
        settings: `depth`, `width`, `data`, `kernel_size`.
        draw: Number of the draw.
        seed: Base seed.
        **options: More arguments of the class.
    """
    torch.manual_seed(cell_seed(seed, "weights", draw))
    return kind(
        settings["depth"],
        settings["width"],
        tuple(_training_images(settings["data"]).shape[1:]),
        kernel_size=settings["kernel_size"],
        boundary="periodic",
        **options,
    )


def scales(small: Settings, full: Settings, **both: Any) -> dict[str, dict[str, Any]]:
    """Return settings of fully connected nets of width 512 on batches of 64.

    Args:
        small: Settings of the small scale, which is on digits.
        full: Settings of the full scale, which is on CIFAR-10.
        **both: Settings of both.
    """
    shared = {"batch": 64, "kernel_size": None, "width": 512, **both}
    return {
        "small": {"device": "cpu", "data": "Digits", **shared, **small},
        "full": {"device": "auto", "data": "CIFAR10", **shared, **full},
    }


def kind_of(settings: Settings) -> str:
    """Return what titles call convolutional nets; nothing for fully connected."""
    return "" if settings["kernel_size"] is None else "convolutional, "


def sites_of(blocks: Iterable[int], kinds: str) -> str:
    """Return the pattern of the sites of these kinds in blocks with these indices.

    Args:
        blocks: Indices of blocks.
        kinds: Names of the blocks' modules, as a regular expression.
    """
    numbers = "|".join(str(block) for block in sorted(set(blocks)))
    return rf"\.blocks\.({numbers})\.({kinds})$"


def profile(
    settings: Settings,
    module: LitClassifier,
    draw: int,
    seed: int,
    *,
    sites: str,
    effective_rank: bool = True,
) -> DepthProfile:
    """Return the signal's and the noise's moments in one random net."""
    place = device(settings)
    x = images(settings, draw, seed).to(place)
    return signal_and_noise(
        module.to(place),
        x,
        sites=sites,
        seed=cell_seed(seed, "noise", draw),
        effective_rank=effective_rank,
    )


def block_index(site: str) -> int:
    """Return the index of the block that a site's name tells."""
    return int(site.split(".blocks.")[1].split(".")[0])


def stored_value(
    name: str,
    draws: Any,
    expected: float,
    deviation: float,
    mark: str = "P",
    num_stored: int = STORED_DRAWS,
) -> Check:
    """Return the check of a mean over draws against the author's stored one.

    The tolerance is 4 standard errors of both means together.

    Args:
        name: What is measured.
        draws: One value a draw, an array or a column.
        expected: The stored mean.
        deviation: Standard deviation of one stored draw.
        mark: Where the expectation comes from.
        num_stored: Number of stored draws.
    """
    width = 4 * deviation * math.sqrt(1 / len(draws) + 1 / num_stored)
    return near(name, float(np.mean(draws)), expected, width, mark)

"""The training labels of each member of a population.

Dimensions: M members, N examples of the training set, B examples of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_resnorm.data.labelled import check_label_noise, flipped_labels


def noisy_labels(data: Any, members: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """Return each member's labels of the training set, shape `(M, N)`.

    Args:
        data: The data module.
        members: Settings of each, of which `label_noise` and `seed` count.

    Returns:
        The labels; None where no member has label noise.

    Raises:
        ValueError: If one has, and the training set has no labels.
    """
    shares = [member.get("label_noise", 0.0) for member in members]
    if not any(shares):
        return None
    classes = getattr(data, "num_classes", None)
    labels = getattr(getattr(data, "train_set", None), "y", None)
    if classes is None or labels is None or labels.is_floating_point():
        raise ValueError("label_noise of members needs a data module with classes")
    for share in shares:
        check_label_noise(share, classes)
    return torch.stack(
        [
            flipped_labels(labels, share, classes, member.get("seed", 0))
            for share, member in zip(shares, members, strict=True)
        ]
    )


def targets_of(batch: Sequence[Tensor], num: int, labels_MN: Tensor | None) -> Tensor:
    """Return each member's targets of a batch, shape `(M, B)` or `(M, B, C)`.

    Args:
        batch: Inputs, targets and, for label noise, indices of the examples.
        num: Number of members M.
        labels_MN: As `noisy_labels` gives them.

    Raises:
        ValueError: If indices are needed and the batch has none.
    """
    if labels_MN is None:
        return batch[1].expand(num, *batch[1].shape)
    if len(batch) < 3:
        raise ValueError(
            "label_noise of members needs batches (x, y, index): give the data"
            " module with_index=True"
        )
    return labels_MN.to(batch[2].device)[:, batch[2]]

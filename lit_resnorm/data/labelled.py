"""Pools of labelled examples: classes, splits, label noise.

Splits are made with `seed`: a random order of the examples of the chosen classes gives
the validation set first, then the training set (a plain random subset, not a stratified
one). So the validation set is the same for each `num_train`, and a smaller training set
is part of a larger one. The test set is the data set's own and doesn't depend on
`seed`. Orders and augmentation follow `lit_resnorm.data.sampling`: a resumed run sees
what the unbroken one would have seen.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_resnorm.data.datamodule import DataModule, check_at_least
from lit_resnorm.data.sampling import stream


def class_numbers(
    classes: Sequence[int | str] | None, names: Sequence[str]
) -> list[int]:
    """Return the numbers of the classes that are asked for, in the order given.

    Raises:
        ValueError: If the list is empty, or names an unknown class, or one twice.
    """
    if classes is None:
        return list(range(len(names)))
    if not classes:
        raise ValueError("classes: the list is empty; leave it out to have all classes")
    numbers = []
    for wanted in classes:
        known = range(len(names)) if isinstance(wanted, int) else names
        if wanted not in known:
            raise ValueError(
                f"classes: unknown class {wanted!r}; there are the numbers 0 to "
                f"{len(names) - 1} and names such as {names[0]!r}"
            )
        numbers.append(wanted if isinstance(wanted, int) else names.index(wanted))
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"classes: a class is named twice in {list(classes)}")
    return numbers


def relabelled(y_N: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return which examples are of the given classes, and their labels from 0 on.

    Args:
        y_N: Labels, int64.
        numbers: Class numbers; the i-th becomes label i.

    Returns:
        Indices of the examples in their order, and new labels, both int64.
    """
    new = torch.full((max(int(y_N.max()), *numbers) + 1,), -1)
    new[torch.tensor(numbers)] = torch.arange(len(numbers))
    keep = (new[y_N] >= 0).nonzero().squeeze(1)
    return keep, new[y_N[keep]]


def flipped_labels(y_N: Tensor, share: float, num_classes: int, seed: int) -> Tensor:
    """Return labels of which a share, rounded to whole examples, are false.

    Which ones is drawn without replacement; each gets one of the other classes, all
    equally likely.
    """
    rng = stream("label noise", seed)
    chosen = rng.choice(len(y_N), size=round(share * len(y_N)), replace=False)
    offset = torch.from_numpy(rng.integers(1, max(num_classes, 2), size=len(chosen)))
    flipped = y_N.clone()
    flipped[chosen] = (flipped[chosen] + offset) % num_classes
    return flipped


def check_label_noise(share: float, num_classes: int) -> None:
    """Raise ValueError if labels can't be changed to this share."""
    if not 0 <= share <= 1:
        raise ValueError(f"label_noise must be a share from 0 to 1, got {share}")
    if share and num_classes < 2:
        raise ValueError(f"label_noise {share} needs two classes, there is one")


class LabelledData(DataModule):
    """A pool of labelled examples to take training and validation sets from.

    Args:
        num_train: Training examples; default all that aren't in the validation set.
        num_val: Validation examples, held out of the pool; default a tenth of it, at
            most 10,000. With 0 the test set is the validation set too, as in papers
            that train on all there is.
        num_test: Test examples, the first so many; default all.
        classes: Classes to take, by number or name; labels are 0, 1, ... in this order.
        label_noise: Share of the training labels that are changed to another class.
        kwargs: Options of every `DataModule`.
    """

    class_names: ClassVar[Sequence[str]]

    def __init__(
        self,
        *,
        num_train: int | None = None,
        num_val: int | None = None,
        num_test: int | None = None,
        classes: list[int | str] | None = None,
        label_noise: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_at_least(1, num_train=num_train, num_test=num_test)
        check_at_least(0, num_val=num_val)
        self.num_train, self.num_val, self.num_test = num_train, num_val, num_test
        self.classes = class_numbers(classes, self.class_names)
        self.num_classes = len(self.classes)
        check_label_noise(label_noise, self.num_classes)
        self.label_noise = label_noise

    def choose(
        self, pool_y: Tensor, test_y: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return indices and new labels of training, validation and test set.

        Args:
            pool_y: Labels of the pool, shape `(N,)`, int64.
            test_y: Labels of the test examples, likewise.

        Returns:
            Indices and labels of the three sets, int64. Validation and test examples
            are the same where `num_val` is 0.

        Raises:
            ValueError: If more examples are asked for than there are.
        """
        pool, labels = relabelled(pool_y, self.classes)
        size = len(pool)
        num_val = self.num_val
        if num_val is None:
            num_val = min(max(size // 10, 1), 10_000)
        left = size - num_val
        num_train = left if self.num_train is None else self.num_train
        if left < 1:
            raise ValueError(
                f"num_val {num_val} leaves no training example: there are {size}"
            )
        if num_train > left:
            raise ValueError(
                f"num_train {num_train} is more than the {left} examples that num_val "
                f"{num_val} leaves of {size}"
            )
        test, test_labels = relabelled(test_y, self.classes)
        if self.num_test is not None and self.num_test > len(test):
            raise ValueError(
                f"num_test {self.num_test} is more than the {len(test)} test examples"
            )
        test, test_labels = test[: self.num_test], test_labels[: self.num_test]
        order = torch.from_numpy(stream("split", self.seed).permutation(size))
        val, train = order[:num_val], order[num_val : num_val + num_train]
        train_labels = flipped_labels(
            labels[train], self.label_noise, self.num_classes, self.seed
        )
        if num_val == 0:
            return [pool[train], test, test], [train_labels, test_labels, test_labels]
        return (
            [pool[train], pool[val], test],
            [train_labels, labels[val], test_labels],
        )

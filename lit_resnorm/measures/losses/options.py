"""How a probe reads the likelihood of an output: its options, then the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_resnorm.measures.fisher.head import Layout
from lit_resnorm.measures.losses.comparison import Trained, fits
from lit_resnorm.measures.losses.labels import are_labels, class_dim_of
from lit_resnorm.measures.losses.likelihood import Likelihood
from lit_resnorm.measures.losses.reading import likelihood_of
from lit_resnorm.measures.passes.batches import occupied, take_rows
from lit_resnorm.measures.passes.untouched import untouched


@dataclass(frozen=True)
class LikelihoodOptions:
    """A probe's options about the output and its loss; see `FIMEigenvalueProbe`.

    Raises:
        ValueError: If one can't be right.
    """

    output: str
    loss_scale: float | None
    class_dim: int | None
    ignore_index: int | None
    class_weights: Sequence[float] | None
    target_fn: Callable[..., Any]
    forward_fn: Callable[..., Any]

    def __post_init__(self) -> None:
        if self.loss_scale is not None and not 0 < self.loss_scale < math.inf:
            raise ValueError(f"loss_scale is {self.loss_scale}; it must be positive")
        weights = self.class_weights
        if weights is None:
            return
        if not weights or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError(
                f"class_weights is {weights}; none may be negative, and one must be"
                " positive"
            )

    def for_module(self, module: nn.Module) -> Likelihood:
        """Return what the module's loss tells; options that are given come first."""
        auto = self.output == "auto"
        told = likelihood_of(module) if auto else Likelihood(self.output)
        given: dict[str, Any] = {
            "scale": self.loss_scale,
            "ignore_index": self.ignore_index,
        }
        if self.class_weights is not None:
            given["class_weights"] = torch.tensor(self.class_weights)
        return replace(told, **{k: v for k, v in given.items() if v is not None})

    def scale(self, module: nn.Module, batch: Any) -> float:
        """Return the loss over the mean of the negative log-likelihoods."""
        told = self.for_module(module)
        if told.scale is None:
            num = self._num_outputs(module, batch, told.output)
            told = replace(told, num_outputs=num)
        return told.loss_scale

    def weights(self, module: nn.Module, batch: Any) -> Tensor | None:
        """Return the weight of each example, float64; None where all weigh the same.

        Raises:
            ValueError: If classes have weights, and labels are no classes.
        """
        told, target = self.for_module(module), self.target_fn(batch)
        if told.class_weights is not None and not are_labels(target):
            raise ValueError(
                "class_weights needs labels that are class indices, and the probe batch"
                " has none: give target_fn"
            )
        return told.weights(target)

    def check(self, module: nn.Module, batch: Any) -> None:
        """Refuse weights and targets that don't fit the output.

        Raises:
            ValueError: With the option's name.
        """
        self.weights(module, batch)
        self._check_targets(module, batch)
        told = self.for_module(module)
        given = told.class_weights
        if given is None:
            return
        if told.smoothing:
            raise ValueError(
                "output is 'auto' and the module's loss has class weights and"
                f" label_smoothing {told.smoothing:g}, which make another matrix than"
                " one of them; give output 'softmax' and class_weights to measure"
                " without smoothing"
            )
        num = self._num_outputs(module, batch, "softmax")
        if len(given) != num:
            raise ValueError(
                f"class_weights has {len(given)} weights, and the output {num} classes"
            )

    def is_guess(self, module: nn.Module) -> bool:
        """Say whether the likelihood is read, and nobody has said what it is.

        A module's own `losses` are its word.
        """
        told = self.output, self.loss_scale, self.class_weights
        own = callable(getattr(module, "losses", None))
        return told == ("auto", None, None) and not own

    def compare(self, module: nn.Module, batch: Any, trained: Trained) -> None:
        """Refuse a likelihood that isn't the loss that is trained.

        Args:
            module: The module.
            batch: The examples on which the loss was taken.
            trained: The loss.

        Raises:
            ValueError: With the options that mend it.
        """
        told, output = self._of_output(module, trained.output)
        trained = replace(trained, output=output)
        target = self.target_fn(batch)
        if trained.is_meant_by(told, target):
            return
        raise ValueError(
            f"output is 'auto', read as {told.output!r}, which is not the loss that"
            f" training_step returns: {trained.advice(target)}"
        )

    def check_fit(self, module: nn.Module, batch: Any, output: Any) -> None:
        """Refuse a guess that the target contradicts, where no loss can be asked.

        Raises:
            ValueError: With the option's name.
        """
        told, output = self._of_output(module, output)
        target = self.target_fn(batch)
        if isinstance(target, Tensor) and not fits(told, output, target):
            raise ValueError(
                f"output is 'auto', read as {told.output!r}, and an output of shape"
                f" {tuple(output.shape)} has no target of shape {tuple(target.shape)}"
                f" ({target.dtype}): give output (and loss_scale), or target_fn"
            )

    def _of_output(
        self, module: nn.Module, output: Tensor
    ) -> tuple[Likelihood, Tensor]:
        """Return what is read, and the output with classes where they usually are."""
        if self.class_dim is not None:
            output = output.movedim(self.class_dim, class_dim_of(output))
        told = self.for_module(module)
        if told.output == "auto":
            single = output.ndim == 1 or output.shape[class_dim_of(output)] == 1
            told = replace(told, output="bernoulli" if single else "softmax")
        return told, output

    def _check_targets(self, module: nn.Module, batch: Any) -> None:
        """Refuse to take for logits what is compared with numbers."""
        target = self.target_fn(batch)
        if self.for_module(module).output != "auto" or not isinstance(target, Tensor):
            return
        if not target.is_floating_point() or not len(target):
            return
        num = self._num_outputs(module, batch, "auto")
        shares = bool((target >= 0).all() and (target <= 1).all())
        if num > 1:
            whole = target.flatten(1).sum(1) if target.ndim > 1 else target
            one = torch.ones_like(whole) * (target[0].numel() / num)
            shares &= torch.allclose(whole, one, atol=1e-4)
        if not shares:
            raise ValueError(
                "output is 'auto', the module has no loss to ask, and the targets are"
                " numbers: give output 'gaussian' (with loss_scale: 2 / C for the mean"
                " of squared errors over C outputs), 'bernoulli' or 'softmax'"
            )

    def _num_outputs(self, module: nn.Module, batch: Any, output: str) -> int:
        """Return how many outputs an example has, found by a pass of one row."""
        few = take_rows(occupied(batch)[0], slice(1))
        with untouched(module) as run, torch.no_grad():
            found = run(lambda: self.forward_fn(module, few))
        if found.ndim == 1:
            return 1
        layout = Layout.of_output(output, found.shape, self.class_dim, empirical=False)
        return layout.to_positions(found).shape[2]

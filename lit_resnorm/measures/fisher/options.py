"""What is measured of a Fisher matrix, and how: one set of options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from lit_resnorm.measures.fisher.examinations import Examinations
from lit_resnorm.measures.fisher.head import check_output
from lit_resnorm.measures.passes.batches import Forward
from lit_resnorm.measures.passes.untouched import Reduce, check_norm_mode, identity

# "auto" decomposes a Gram matrix of up to this many rows: seconds.
_DECOMPOSED_AUTOMATICALLY = 4096
_LARGEST_AUTOMATICALLY = 10


def apply(model: nn.Module, x: Any) -> Tensor:
    """Return `model(x)`: the usual way to apply a model to a batch."""
    return model(x)


@dataclass(frozen=True, kw_only=True)
class FisherOptions:
    """What is measured, and how; the keywords of `fisher_spectrum`.

    Attributes:
        output: `softmax`, `bernoulli` or `gaussian`: the distribution that the loss
            belongs to; `auto`: softmax for two or more logits, bernoulli for one.
        norm_mode: `frozen`, `eval` or `train`; in mode `train` rows depend on each
            other, and every rank must hold the whole batch. Where they do in another
            mode (a batch norm that asks for the batch's statistics in eval mode) the
            batch is measured as a whole, on one rank.
        num_eigenvalues: None: all non-zero ones (above 1e-10 of the largest in float64,
            1e-6 in float32); 0: none, trace and mean alone; k: the largest k, fewer
            where the rank is lower; `auto`: all where the matrix has at most 4096 rows,
            else the largest 10.
        tol: Relative error of the largest k.
        per_layer: Also each parameter-owning module's own block of the matrix; a
            regular expression selects them by site.
        layer_eigenvalues: As `num_eigenvalues`, for each block.
        reduce: Sums a tensor over ranks.
        forward: How the model is applied, `(model, x) -> output`.
        class_dim: Dimension of the output that counts an example's outputs; every
            other position is then an example. By default for the softmax the last one,
            or 1 for outputs of four dimensions and more; else all numbers of a row are
            one example's.
        weights: Weight of each example, shape `(N,)` or that of the output without
            `class_dim`: 0 for what `ignore_index` leaves out, class weights.
        targets: Observed labels, which make it the empirical matrix: class indices for
            the softmax, shaped as the output without `class_dim`; else numbers shaped
            as the output. Those of weight 0 may be anything.
        loss_scale: Factor between the loss and the mean log-likelihood (2 / C for
            torch's mean over C squared errors).
        trace: False saves the passes for the trace where eigenvalues don't give it.
        start: Dual vectors of a measurement on the same batch (`FisherSpectrum.vectors`
            ): fewer products then reach the same `tol`.
        memory: Bytes that gradients, and what is kept of them, may take at a time.
        examinations: What measurements of the same network found before, which saves
            examining it again.

    Raises:
        ValueError: If an option can't be right, whatever the model.
    """

    output: str = "softmax"
    norm_mode: str = "frozen"
    num_eigenvalues: int | Literal["auto"] | None = None
    tol: float = 1e-5
    per_layer: bool | str = False
    layer_eigenvalues: int | Literal["same"] | None = "same"
    reduce: Reduce = identity
    forward: Forward = apply
    class_dim: int | None = None
    weights: Tensor | None = None
    targets: Tensor | None = None
    loss_scale: float = 1.0
    trace: bool = True
    start: Tensor | None = None
    memory: int = 2**28
    examinations: Examinations = field(default_factory=Examinations)

    def __post_init__(self) -> None:
        if self.output != "auto":
            check_output(self.output)
        check_norm_mode(self.norm_mode)
        _check_count("num_eigenvalues", self.num_eigenvalues, "auto")
        _check_count("layer_eigenvalues", self.layer_eigenvalues, "same")
        if not 0 < self.tol < 1:
            raise ValueError(f"tol is {self.tol}; it must lie between 0 and 1")

    def count(self, size: int) -> int | None:
        """Return how many eigenvalues are wanted of a matrix of this many rows."""
        if self.num_eigenvalues == "auto":
            whole = size <= _DECOMPOSED_AUTOMATICALLY
            return None if whole else _LARGEST_AUTOMATICALLY
        return self.num_eigenvalues

    def layer_count(self, size: int) -> int | None:
        """Return how many are wanted of a layer's block of such a matrix."""
        if self.layer_eigenvalues == "same":
            return self.count(size)
        return self.layer_eigenvalues


def _check_count(option: str, value: int | str | None, word: str) -> None:
    if value is None or value == word:
        return
    if isinstance(value, str):
        raise ValueError(f"{option} is {value!r}; give a number, None or {word!r}")
    if not isinstance(value, int):
        raise ValueError(f"{option} is {value!r}; it must be a whole number")
    if value < 0:
        raise ValueError(f"{option} is {value}; it can't be negative")

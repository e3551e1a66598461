"""What is asked for, before the size of the matrix is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lit_resnorm.measures.fisher.head import check_output
from lit_resnorm.measures.fisher.measurement import Measurement
from lit_resnorm.measures.fisher.routes import Wanted
from lit_resnorm.measures.fisher.start import usable_start


def check_arguments(
    *,
    output: str,
    num_eigenvalues: int | Literal["auto"] | None,
    layer_eigenvalues: int | Literal["same"] | None = "same",
    tol: float,
) -> None:
    """Refuse what can't be right, whatever the model.

    Raises:
        ValueError: With the argument's name and value.
    """
    if output != "auto":
        check_output(output)
    counts = {
        "num_eigenvalues": (num_eigenvalues, "auto"),
        "layer_eigenvalues": (layer_eigenvalues, "same"),
    }
    for option, (value, word) in counts.items():
        if isinstance(value, str) and value != word:
            raise ValueError(f"{option} is {value!r}; give a number, None or {word!r}")
        if value is None or isinstance(value, str):
            continue
        if not isinstance(value, int):
            raise ValueError(f"{option} is {value!r}; it must be a whole number")
        if value < 0:
            raise ValueError(f"{option} is {value}; it can't be negative")
    if not 0 < tol < 1:
        raise ValueError(f"tol is {tol}; it must lie between 0 and 1")


# "auto" decomposes a Gram matrix of up to this many rows: seconds.
_DECOMPOSED_AUTOMATICALLY = 4096
_LARGEST_AUTOMATICALLY = 10


@dataclass(frozen=True)
class Asked:
    """What the public functions are asked for; see them for the fields."""

    num_eigenvalues: int | Literal["auto"] | None
    layer_eigenvalues: int | Literal["same"] | None
    tol: float
    trace: bool
    start: Tensor | None
    per_layer: bool | str

    def of(self, measured: Measurement) -> Wanted:
        """Return what is wanted of a matrix of known size."""
        count = self.num_eigenvalues
        if count == "auto":
            size = min(measured.num_parameters, measured.examples.dim)
            whole = size <= _DECOMPOSED_AUTOMATICALLY
            count = None if whole else _LARGEST_AUTOMATICALLY
        each = count if self.layer_eigenvalues == "same" else self.layer_eigenvalues
        start = usable_start(self.start, measured)
        return Wanted(count, each, self.tol, self.trace, start)

"""What was measured of a network by depth, as its verdicts take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_resnorm.diagnose.result import DepthRow
from lit_resnorm.diagnose.trends import Trend, main_line, trend
from lit_resnorm.measures.moments.pathology import Verdict


@dataclass(frozen=True)
class Judged:
    """What the verdicts on depth rest on.

    Attributes:
        rows: The table by depth.
        verdict: On signal and noise.
        num_examples: Size of the probe batch.
        normalised: Whether the network has norms.
        without_rule: Operations that noise can't pass.
    """

    rows: Sequence[DepthRow]
    verdict: Verdict
    num_examples: int
    normalised: bool
    without_rule: tuple[str, ...] = ()

    @property
    def residual(self) -> bool:
        """Whether the network has residual additions."""
        return any(row.kind == "addition" for row in self.rows)

    @property
    def forward(self) -> Trend:
        """Of the activations' norms, from input to output."""
        line = main_line(self.rows)
        return trend([r.depth for r in line], [r.forward for r in line])

    @property
    def backward(self) -> Trend:
        """Of the gradients' norms, from output to input."""
        line = main_line(self.rows)[::-1]
        return trend([-r.depth for r in line], [r.backward for r in line])

    @property
    def undetermined(self) -> bool:
        """Whether signal and noise can't be judged."""
        return self.verdict.pathology == "undetermined" or self.num_examples < 2

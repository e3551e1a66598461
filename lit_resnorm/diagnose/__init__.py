"""A network before training: what goes wrong with depth, and its learning rate."""

from lit_resnorm.diagnose.network import diagnose
from lit_resnorm.diagnose.result import (
    Curvature,
    DepthRow,
    Diagnosis,
    Finding,
    StableRates,
    Suggestion,
    Trial,
)

__all__ = [
    "Curvature",
    "DepthRow",
    "Diagnosis",
    "Finding",
    "StableRates",
    "Suggestion",
    "Trial",
    "diagnose",
]

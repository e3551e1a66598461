"""A network before training: what goes wrong with depth, and its learning rate."""

from lit_resnorm.diagnose.diagnosis import diagnose
from lit_resnorm.diagnose.report import (
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

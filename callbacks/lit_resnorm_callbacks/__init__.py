"""Analysis callbacks for any PyTorch Lightning project."""

from lit_resnorm_callbacks.activation_rate import ActivationRateMonitor
from lit_resnorm_callbacks.base import Cadence, Probe

__all__ = ["ActivationRateMonitor", "Cadence", "Probe"]

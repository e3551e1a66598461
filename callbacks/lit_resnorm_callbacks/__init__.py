"""Analysis callbacks for any PyTorch Lightning project."""

from lit_resnorm_callbacks.activation_rate import ActivationRateMonitor
from lit_resnorm_callbacks.fim_eigenvalues import FIMEigenvalueProbe
from lit_resnorm_callbacks.gradient_covariance import GradientCovarianceProbe
from lit_resnorm_callbacks.gradient_monitor import GradientMonitor
from lit_resnorm_callbacks.headroom_probe import HeadroomProbe
from lit_resnorm_callbacks.hessian import HessianProbe
from lit_resnorm_callbacks.iterative_inference import IterativeInferenceMonitor
from lit_resnorm_callbacks.moment_tracer import MomentTracer
from lit_resnorm_callbacks.norm_preservation import NormPreservationMonitor
from lit_resnorm_callbacks.probe.probe import Cadence, Probe
from lit_resnorm_callbacks.stability.probe import StabilityProbe

__all__ = [
    "ActivationRateMonitor",
    "Cadence",
    "FIMEigenvalueProbe",
    "GradientCovarianceProbe",
    "GradientMonitor",
    "HeadroomProbe",
    "HessianProbe",
    "IterativeInferenceMonitor",
    "MomentTracer",
    "NormPreservationMonitor",
    "Probe",
    "StabilityProbe",
]

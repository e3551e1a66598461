"""Estimators on tensors and plain modules: torch only, no Trainer needed."""

from typing import TYPE_CHECKING

from lit_resnorm import exported

if TYPE_CHECKING:
    from lit_resnorm.measures.activation import activation_rates
    from lit_resnorm.measures.fisher import (
        FisherOptions,
        FisherSpectrum,
        empirical_fisher_spectrum,
        fisher_spectrum,
    )
    from lit_resnorm.measures.gradient_covariance import (
        batch_covariance_spectrum,
        covariance_spectrum,
    )
    from lit_resnorm.measures.gradients import gradient_noise
    from lit_resnorm.measures.hessian import HessianSpectrum, hessian_spectrum
    from lit_resnorm.measures.losses.probe_loss import read_loss
    from lit_resnorm.measures.moments import pathology, propagate, signal_and_noise
    from lit_resnorm.measures.passes.sites import select
    from lit_resnorm.measures.separation import separations
    from lit_resnorm.measures.spectra import hutchinson_trace, top_eigenpairs

__all__ = [
    "FisherOptions",
    "FisherSpectrum",
    "HessianSpectrum",
    "activation_rates",
    "batch_covariance_spectrum",
    "covariance_spectrum",
    "empirical_fisher_spectrum",
    "fisher_spectrum",
    "gradient_noise",
    "hessian_spectrum",
    "hutchinson_trace",
    "pathology",
    "propagate",
    "read_loss",
    "select",
    "separations",
    "signal_and_noise",
    "top_eigenpairs",
]

__getattr__ = exported(
    __name__,
    {
        "FisherOptions": "fisher",
        "FisherSpectrum": "fisher",
        "activation_rates": "activation",
        "empirical_fisher_spectrum": "fisher",
        "fisher_spectrum": "fisher",
        "batch_covariance_spectrum": "gradient_covariance",
        "covariance_spectrum": "gradient_covariance",
        "gradient_noise": "gradients",
        "HessianSpectrum": "hessian",
        "hessian_spectrum": "hessian",
        "hutchinson_trace": "spectra",
        "pathology": "moments",
        "propagate": "moments",
        "read_loss": "losses.probe_loss",
        "select": "passes.sites",
        "separations": "separation",
        "signal_and_noise": "moments",
        "top_eigenpairs": "spectra",
    },
)

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
    from lit_resnorm.measures.moments import pathology, propagate, signal_and_noise
    from lit_resnorm.measures.passes.sites import select
    from lit_resnorm.measures.separation import separations
    from lit_resnorm.measures.spectra import hutchinson_trace, top_eigenpairs

__all__ = [
    "FisherOptions",
    "FisherSpectrum",
    "activation_rates",
    "empirical_fisher_spectrum",
    "fisher_spectrum",
    "hutchinson_trace",
    "pathology",
    "propagate",
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
        "hutchinson_trace": "spectra",
        "pathology": "moments",
        "propagate": "moments",
        "select": "passes.sites",
        "separations": "separation",
        "signal_and_noise": "moments",
        "top_eigenpairs": "spectra",
    },
)

"""Fisher information matrices: exact spectra and traces, layer by layer."""

from lit_resnorm.measures.fisher.spectrum import (
    FisherSpectrum,
    check_arguments,
    empirical_fisher_spectrum,
    fisher_gram,
    fisher_spectrum,
)

__all__ = [
    "FisherSpectrum",
    "check_arguments",
    "empirical_fisher_spectrum",
    "fisher_gram",
    "fisher_spectrum",
]

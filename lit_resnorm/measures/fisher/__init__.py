"""Fisher information matrices: exact spectra and traces, layer by layer."""

from lit_resnorm.measures.fisher.examinations import Examinations
from lit_resnorm.measures.fisher.forms import FisherForm, affordable_form
from lit_resnorm.measures.fisher.measurement import apart
from lit_resnorm.measures.fisher.network import check_readable
from lit_resnorm.measures.fisher.options import FisherOptions
from lit_resnorm.measures.fisher.result import FisherSpectrum
from lit_resnorm.measures.fisher.spectrum import (
    empirical_fisher_spectrum,
    fisher_spectrum,
)

__all__ = [
    "Examinations",
    "FisherForm",
    "FisherOptions",
    "FisherSpectrum",
    "affordable_form",
    "apart",
    "check_readable",
    "empirical_fisher_spectrum",
    "fisher_spectrum",
]

"""Hessians of losses: their ends and their trace, by products."""

from lit_resnorm.measures.hessian.break_even import Growth
from lit_resnorm.measures.hessian.products import (
    HessianOptions,
    check_second_derivative,
)
from lit_resnorm.measures.hessian.spectrum import HessianSpectrum, hessian_spectrum

__all__ = [
    "Growth",
    "HessianOptions",
    "HessianSpectrum",
    "check_second_derivative",
    "hessian_spectrum",
]

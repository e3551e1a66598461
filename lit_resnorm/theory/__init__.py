"""Closed forms and recursions from the papers, on floats and tensors.

Marks in the docstrings: [P] published (read in the text or in the authors' code),
[D] derived for this project and checked numerically, [A] only the abstract or the
captions of the source were available.
"""

from lit_resnorm.theory.angles import (
    angle_asymptote,
    angles,
    coactivation,
    kernel_angles,
    next_angle,
)
from lit_resnorm.theory.fisher import (
    EigenvalueBounds,
    FisherTheory,
    eigenvalue_bounds,
    fisher_theory,
)
from lit_resnorm.theory.fisher_forms import (
    BN_GROWTH_EXPONENT,
    averaged_maxima,
    forward_power,
    max_eigenvalue_asymptote,
    mean_eigenvalue,
)
from lit_resnorm.theory.kernels import relu_kernel, step_kernel
from lit_resnorm.theory.moments import (
    GAUSSIAN_NU1,
    activation_step,
    collapsed_log_power,
    power_exponent,
    residual_share,
    residual_step,
)
from lit_resnorm.theory.pl import (
    contraction,
    layer_maps,
    least_squares_loss,
    log_pl_bound,
    log_pl_constant,
    pl_ratio,
)

__all__ = [
    "BN_GROWTH_EXPONENT",
    "GAUSSIAN_NU1",
    "EigenvalueBounds",
    "FisherTheory",
    "activation_step",
    "angle_asymptote",
    "angles",
    "averaged_maxima",
    "coactivation",
    "collapsed_log_power",
    "contraction",
    "eigenvalue_bounds",
    "fisher_theory",
    "forward_power",
    "kernel_angles",
    "layer_maps",
    "least_squares_loss",
    "log_pl_bound",
    "log_pl_constant",
    "max_eigenvalue_asymptote",
    "mean_eigenvalue",
    "next_angle",
    "pl_ratio",
    "power_exponent",
    "relu_kernel",
    "residual_share",
    "residual_step",
    "step_kernel",
]

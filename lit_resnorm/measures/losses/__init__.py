"""What a loss means: its likelihood, read from torch's losses and ours.

A likelihood weighs examples, says the factor between the loss and the mean of its
negative logarithm, and gives the losses of examples.
"""

from lit_resnorm.measures.losses.examples import (
    LossFn,
    cross_entropies,
)
from lit_resnorm.measures.losses.likelihood import Likelihood
from lit_resnorm.measures.losses.loss import Loss, loss_of
from lit_resnorm.measures.losses.options import LikelihoodOptions
from lit_resnorm.measures.losses.reduction import Reduction, losses_of, reduction_of

__all__ = [
    "Likelihood",
    "LikelihoodOptions",
    "Loss",
    "LossFn",
    "Reduction",
    "cross_entropies",
    "loss_of",
    "losses_of",
    "reduction_of",
]

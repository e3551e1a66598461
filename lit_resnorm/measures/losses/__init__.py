"""What a loss means: its likelihood, read from torch's losses and ours.

A likelihood weighs examples, says the factor between the loss and the mean of its
negative logarithm, and gives the losses of examples.
"""

from lit_resnorm.measures.losses.examples import (
    LossFn,
    check_mean,
    cross_entropies,
)
from lit_resnorm.measures.losses.likelihood import Likelihood
from lit_resnorm.measures.losses.loss import Loss, loss_of, losses_of
from lit_resnorm.measures.losses.options import LikelihoodOptions

__all__ = [
    "Likelihood",
    "LikelihoodOptions",
    "Loss",
    "LossFn",
    "check_mean",
    "cross_entropies",
    "loss_of",
    "losses_of",
]

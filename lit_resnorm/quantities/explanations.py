"""What each warning and each finding means, and what to do about it.

Probes, `diagnose` and `compare` say what they found in a sentence with its numbers, and
refer to what stands here. From these come the page `docs/values.md`, the text beside
each finding of `compare.html`, and the references that are printed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

VALUES_PAGE = "docs/values.md"
"""Where the explanations stand, each under its name."""

SATURATED = 1e-8
"""Largest eigenvalue of a Fisher matrix, in units of the loss, below which the output
is saturated: it hardly changes with the weights, and bounds no rate."""

SLOW = 1e-3
"""Rate over its bound below which even the steepest direction takes 500 steps."""

HELD_OUT = 16.0
"""Largest rate over its bound at which a net here was stable at initialisation."""

THROWN = 1e3
"""Rate over its bound from which on outputs are thrown off in one step."""


@dataclass(frozen=True)
class Explanation:
    """What lies behind a warning or a finding.

    Attributes:
        name: As the finding is called; its anchor on the page.
        title: The same in words.
        meaning: What it means.
        advice: What to do.
    """

    name: str
    title: str
    meaning: str
    advice: str


def reference(name: str) -> str:
    """Return where a finding is explained.

    Args:
        name: One of `EXPLANATIONS`.
    """
    return f"{VALUES_PAGE}#{EXPLANATIONS[name].name}"


def ratio_in_words(ratio: float) -> str:
    r"""Return what a learning rate over its bound means.

    Below 1 the loss along the steepest direction of a quadratic falls by a factor e in
    :math:`1 / (2 r)` steps of gradient descent, since the distance to its minimum
    shrinks by :math:`1 - 2 r` a step; momentum takes fewer. Above 1 it grows there.
    Small random nets held out at 1.41 (batch norm), 2 to 4 (residual) and 2 to 16 times
    (plain) the bound at initialisation, by `diagnose --check-rate`.

    Args:
        ratio: The rate over its bound, at least 0.
    """
    if math.isnan(ratio) or ratio < 0:
        return "the ratio is not known"
    if ratio == 0:
        return "nothing is learned at a rate of 0"
    if ratio < SLOW:
        steps = f"{1 / (2 * ratio):.0e}".replace("e+0", "e").replace("e+", "e")
        return (
            "so small that even the steepest direction takes up to"
            f" {steps} steps to fall by a factor e"
        )
    if ratio <= 1:
        return "a quadratic of this curvature is stable there"
    if ratio <= HELD_OUT:
        return (
            "a quadratic of this curvature diverges there; at initialisation nets held"
            " out at 1.4 (batch norm) to 16 times (plain)"
        )
    if ratio <= THROWN:
        return (
            "more than any net here held out (16 times): expect divergence, or a loss"
            " that jumps before it settles where the curvature is less"
        )
    return (
        "far more than any net here held out (16 times): the first steps throw the"
        " outputs so far that they diverge, or saturate and learn no more"
    )


_SMALLER = (
    "Take a third of the rate, and a third again, or warm it up, or clip gradients;"
    " `lit-resnorm diagnose --check-rate` finds the largest rate that holds."
)
_TAMED = (
    "multiply each of L residual branches by 1/sqrt(L), start them at 0 (SkipInit), or"
    " normalise inside them; without skips, weights of variance 2/fan_in or batch norm."
)
_KEPT_APART = (
    "Plain net: skip connections over units of batch norm, activation and weights."
    " Residual net: normalise the branch, multiply it by 1/sqrt(L), or start it at 0."
)
_IN_BOUNDS = (
    "Residual net: normalise inside the branch, multiply each of L branches by"
    " 1/sqrt(L), or start them at 0. Plain net: weights of variance 2/fan_in; with"
    " batch norm, skip connections."
)

_ALL = (
    # how a run went
    Explanation(
        "diverged",
        "diverged",
        "The training loss became infinite or NaN, and the run ended there. Nearly"
        " always the steps were too long for the curvature; else the network explodes"
        " by its initialisation.",
        f"{_SMALLER} If no rate helps it is the network: {_TAMED}",
    ),
    Explanation(
        "loss_not_finite",
        "a loss that isn't finite",
        "From some step on a loss is infinite or NaN, and stays so: the weights are"
        " beyond repair. The run went on, or the step was left out and it stopped.",
        f"{_SMALLER} With half precision look at the loss scale too. If no rate helps"
        f" it is the network: {_TAMED}",
    ),
    Explanation(
        "failed",
        "a run that failed",
        "The program ended with an error.",
        "Read the error at the end of its output; `--traceback` shows where it came"
        " from. `fit ... --run NAME --ckpt_path last` goes on.",
    ),
    Explanation(
        "interrupted",
        "a run that was broken off",
        "No end was recorded: the run is going on, or was killed.",
        "`fit ... --run NAME --ckpt_path last` goes on, to the same end to the bit on"
        " our data.",
    ),
    Explanation(
        "learned_little",
        "learned little",
        "The validation accuracy is at most twice that of a guess; or, where the number"
        " of classes isn't recorded, it never moved.",
        "Look at the other findings of the run for the reason: a pathology of depth, a"
        " rate above its bound or far below it, dead units, a saturated output. With"
        " none of them try ten times and a tenth of the rate.",
    ),
    Explanation(
        "loss_hardly_fell",
        "a training loss that hardly fell",
        "The training loss ended within 2 % of where it began. A net that was trained"
        " before may be at its end; any other has learned nothing.",
        "A rate far below its bound needs to be larger, one far above it smaller"
        " (`lit-resnorm diagnose` tries steps at it, with any optimizer). Then look for"
        " a pathology of depth, and whether the labels belong to the inputs.",
    ),
    Explanation(
        "learned",
        "learned",
        "The training loss fell; the numbers are its first and its last values.",
        "Nothing.",
    ),
    Explanation(
        "nothing_measured",
        "a run without probes",
        "The run holds losses and the like alone; depth, curvature and units were not"
        " looked at, so nothing is said of them.",
        "Add probes of lit_resnorm_callbacks to the Trainer: `ActivationRateMonitor`,"
        " `MomentTracer`, `FIMEigenvalueProbe`.",
    ),
    Explanation(
        "generalization_gap",
        "a generalization gap",
        "The validation loss is more than 0.5 above the training loss: the net fits its"
        " training examples by more than what they share with others.",
        "Stop earlier, add data, augmentation or weight decay. With confident errors"
        " the loss grows while the accuracy stays: look at both.",
    ),
    Explanation(
        "stability",
        "algorithmic stability",
        "How far the loss moves where one training example is left out, from twins"
        " that were trained without it. Small is stable: the generalization gap is"
        " bounded by it in expectation.",
        "Compare it between networks trained to the same loss; alone it is no verdict."
        " Its standard error says how many twins are enough.",
    ),
    # depth
    Explanation(
        "signal",
        "signal pathology",
        "With depth all examples come to lie on one line: the last layers can't tell"
        " them apart, and the effective rank falls to 1. Training starts slowly or not"
        " at all.",
        _KEPT_APART,
    ),
    Explanation(
        "noise",
        "noise pathology",
        "Noise in the input grows exponentially over the signal with depth: the last"
        " layers see noise, gradients explode, and neighbours of a training example get"
        " other outputs.",
        "Skip connections: noise then grows as a power of depth only. In a residual net"
        " that has it, smaller branches (1/sqrt(L), or SkipInit).",
    ),
    Explanation(
        "no_pathology",
        "no pathology of depth",
        "Examples stay apart, and noise grows no faster than a power of depth.",
        "Nothing.",
    ),
    Explanation(
        "pathology_from_training",
        "a pathology that training led to",
        "The network began without a pathology of depth and ended with one. Classifiers"
        " with few classes end with few directions by their purpose.",
        "If validation suffers: a smaller rate, weight decay, or stop before it sets in"
        " (the curve of `moments/pathology` says when).",
    ),
    Explanation(
        "undetermined",
        "no verdict on signal and noise",
        "Fewer than 8 layers show no trend, one example has no variance, or noise can't"
        " pass an operation, which is named. Nothing is said of it, good or bad.",
        "Nothing for a shallow net; take more examples, or see which operation is"
        " named.",
    ),
    Explanation(
        "noise_without_rule",
        "an operation that noise can't pass",
        "torch can't differentiate an operation forwards; what depends on its noise is"
        " NaN, everything else is measured.",
        "Write the operation with torch's own functions, or select sites before it with"
        " `sites`.",
    ),
    Explanation(
        "exploding_activations",
        "exploding activations",
        "Activations grow with depth by more than a factor 2896 (1/sqrt(eps) of"
        " float32): what the weakest layer adds is lost in the rounding of the"
        " strongest, and gradients grow alike.",
        _IN_BOUNDS,
    ),
    Explanation(
        "vanishing_activations",
        "vanishing activations",
        "Activations shrink with depth by more than a factor 2896: the output hardly"
        " depends on the input.",
        "Weights of variance 2/fan_in before rectifiers, 1/fan_in before others; or"
        " skip connections, or a norm.",
    ),
    Explanation(
        "exploding_gradients",
        "exploding gradients",
        "Gradients grow from output to input by more than a factor 2896: no one rate"
        " suits the first layers and the last.",
        _IN_BOUNDS,
    ),
    Explanation(
        "vanishing_gradients",
        "vanishing gradients",
        "Gradients shrink from output to input by more than a factor 2896: the first"
        " layers don't train.",
        "Skip connections; rectifiers instead of sigmoids; weights of variance"
        " 2/fan_in.",
    ),
    Explanation(
        "no_gradient",
        "no gradient at any site",
        "The loss's gradient is 0 everywhere: the head starts at 0, or the output is"
        " saturated. Gradients were not judged.",
        "Nothing where the head starts at 0 by intention (Fixup); else see"
        " `saturated`.",
    ),
    Explanation(
        "not_finite",
        "values that aren't finite",
        "Weights, activations or gradients are infinite or NaN, the first place is"
        " named.",
        "Weights of a checkpoint: go back to one from before the divergence and lower"
        f" the rate. At initialisation: {_TAMED}",
    ),
    # units
    Explanation(
        "units",
        "units of the layers",
        "Between which rates the units of the layers are on, and whether units are"
        " dead.",
        "Nothing. Rates near 0.5 are those of a usual initialisation; training moves"
        " them to 0.1 to 0.5.",
    ),
    Explanation(
        "dead_units",
        "dead units",
        "Half or more of a layer's units are on for no example of the probe batch:"
        " their gradients are 0, and they may stay so.",
        "A smaller rate, or a warm-up: a large early step kills units; then LeakyReLU"
        " or GELU in place of ReLU, or a norm before it. A batch of few examples"
        " (below 100) makes units look dead.",
    ),
    Explanation(
        "dead_layers",
        "dead layers at initialisation",
        "Nine tenths of a layer's units are off for every example before any training:"
        " hardly anything passes it.",
        "Weights symmetric about 0, biases that start at 0, and inputs with mean 0.",
    ),
    # rates
    Explanation(
        "rate_above_bound",
        "a learning rate above its bound",
        "The bound is where the optimizer diverges on a quadratic of the measured"
        " curvature: 2/lambda_max for plain gradient descent. Networks hold out above"
        " it, since curvature falls as they train: at initialisation up to 1.4 times"
        " with batch norm, 2 to 4 residual, 2 to 16 plain. A ratio of 2 is usual; at 16"
        " expect divergence or a jump of the loss; at 1e7 the first steps throw the"
        " outputs away, and the net diverges or saturates.",
        "Where the net learns all the same: nothing. Else a rate below the bound, or a"
        f" warm-up. {_SMALLER}",
    ),
    Explanation(
        "rate_below_bound",
        "a learning rate below its bound",
        "Steps were never longer than a quadratic of the measured curvature bears. That"
        " is no promise: mini-batch noise lowers what is stable, and a rate far below"
        " (a ratio under 0.001) hardly moves the weights.",
        "Nothing; where training is slow, raise the rate towards the bound.",
    ),
    Explanation(
        "rate_too_high",
        "a learning rate that is too high",
        "Copies of the network took 60 full-batch steps with the configured optimizer"
        " at the configured rate: their loss diverged, ended no lower than it began, or"
        " gained less than a quarter of what it gains at a smaller rate.",
        f"A rate that the same steps bore, which is named. {_SMALLER}",
    ),
    Explanation(
        "rate_too_low",
        "a learning rate that is too low",
        "At the configured rate steps hardly move the loss.",
        "Ten or a hundred times the rate; where a bound is known, up to half of it.",
    ),
    Explanation(
        "rate_tried",
        "a learning rate that was tried",
        "Copies of the network took 60 full-batch steps with the configured optimizer"
        " at the configured rate, and their loss fell. Mini-batches bear less. Where it"
        " jumped to more than ten times its first value on the way, early steps are too"
        " long.",
        "Nothing where the loss fell at once; where it jumped, a warm-up or a smaller"
        " rate.",
    ),
    Explanation(
        "rate_not_judged",
        "a learning rate that was not judged",
        "2/lambda_max bounds the rate of gradient descent, with or without momentum."
        " Other optimizers rescale each step, so it tells nothing of theirs: nothing is"
        " said of the rate, good or bad.",
        "`lit-resnorm diagnose` takes steps with the configured optimizer, whatever"
        " it is, and judges by them (those that need a closure or sparse gradients"
        " aside).",
    ),
    Explanation(
        "no_rate",
        "no rate is known",
        "The module configures no optimizer that could be asked without a trainer.",
        "Give `rate=` or `optimizer=` to `diagnose`.",
    ),
    Explanation(
        "no_loss",
        "no loss is known",
        "There are no targets, or no loss that fits them: gradients are those of a"
        " random projection of the output, and no steps were tried.",
        "Give `loss_fn` or `output`, and batches with targets.",
    ),
    Explanation(
        "saturated",
        "a saturated output",
        "The largest eigenvalue of the Fisher matrix is 0, or below 1e-8: the output"
        " doesn't change with the weights. Probabilities have become 0 and 1, or"
        " nothing passes the network. The curvature bounds no rate then. At the end"
        " of a training that fits all its examples this is no fault.",
        "At initialisation: smaller weights in the head, or see the findings on depth."
        " After a large first step: a smaller rate or a warm-up.",
    ),
    Explanation(
        "no_curvature",
        "no curvature",
        "The Fisher matrix could not be measured; the reason is given. No rate bound is"
        " known.",
        "Give `output`, `loss_scale` or `loss_fn`, as the reason says.",
    ),
    # probes and logs
    Explanation(
        "measurement_failed",
        "a measurement that failed",
        "A probe could not measure, or the values aren't finite; NaN is logged and"
        " `<name>/failed` is 1. The training is untouched.",
        "The reason is in brackets. Out of memory: fewer `num_examples`, or a smaller"
        " `memory`. Weights that aren't finite: see `diverged`. `strict: true` raises.",
    ),
    Explanation(
        "gradients_alike",
        "gradients that are all alike",
        "Every gradient of the probe batch is the same, as where all are zero: their"
        " covariance is zero, and has neither a shape nor a conditioning, which are"
        " logged as NaN.",
        "Look at the loss: at zero everything is learned by heart, or the output is"
        " saturated. Else the examples of the probe batch are all the same.",
    ),
    Explanation(
        "mean_not_finite",
        "a mean over examples that is NaN",
        "The gradient of every example is 0, so that none has a direction, or the"
        " values of an example are not finite.",
        "Gradients of 0: nothing where a head starts at 0 or the loss is used up; else"
        " see `saturated`. Examples that aren't finite: look at the data, and see"
        " `not_finite`.",
    ),
    Explanation(
        "probe_stopped",
        "a probe that stopped",
        "A hook of a callback, or a logger, failed with the exception in brackets. What"
        " it would have done is left out, and the training goes on.",
        "`strict: true` raises, with the whole traceback. Of a probe of ours, report"
        " it.",
    ),
    Explanation(
        "averaged_weights",
        "averaged weights beside twins of trained ones",
        "A checkpoint of Lightning's WeightAveraging holds averages; the twins in it"
        " are of the weights that were trained. Their distance would be no stability.",
        "Evaluate a checkpoint without WeightAveraging to measure its twins.",
    ),
    Explanation(
        "twins_begin_late",
        "twins that begin late",
        "The run was resumed from a checkpoint without twins: they begin as copies of"
        " the run now, and miss what was trained before.",
        "Begin the run with the probe in place to have them from the first step.",
    ),
    Explanation(
        "log_incomplete",
        "a log that is incomplete",
        "Rows or files of the run are missing or damaged, or a page could not be made;"
        " the reason is given.",
        "Look at the disk. `ExactResume` among the callbacks keeps rows and checkpoints"
        " together.",
    ),
)

EXPLANATIONS = {one.name: one for one in _ALL}
"""By name, in the order in which they stand on the page."""

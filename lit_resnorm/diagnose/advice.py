"""What the papers advise against each pathology, with sources and marks."""

from __future__ import annotations

from lit_resnorm.diagnose.report import Suggestion

LABATIE = "Labatie (2019), arXiv 1811.03087"
DE_SMITH = "De & Smith (2020), arXiv 2002.10444"
MARION = "Marion et al. (2022), arXiv 2206.06929"
ARPIT = "Arpit & Bengio (2019), arXiv 1901.03611"
FURUSHO = "Furusho & Ikeda (2020), APSIPA Trans. Signal Inf. Process. 9, e9"

SKIPS_AND_NORM = Suggestion(
    "skip connections over units of batch norm, activation and weights: the effective"
    " rank then keeps its size, and noise grows as a power of depth only",
    LABATIE,
    "P",
)
NORMALISE = Suggestion(
    "normalise the branch, before its weights: block l then adds a share 1/(l+1) of the"
    " variance, and no longer half of it",
    DE_SMITH,
    "A",
)
SCALE = Suggestion(
    "multiply each of L branches by 1/sqrt(L): with independent weights neither signal"
    " nor gradient explodes with depth",
    MARION,
    "P",
)
SKIPINIT = Suggestion(
    "SkipInit: multiply each branch by a learnt scalar that starts at 0", DE_SMITH, "A"
)
PRESERVE = Suggestion(
    "rectifiers with weights of variance 2/fan_in: activations and gradients then keep"
    " their norms over depth",
    ARPIT,
    "R",
)
HALF_ON = Suggestion(
    "weights symmetric about 0 and biases that start at 0: half of the preactivations"
    " are then positive",
    FURUSHO,
    "D",
)


def against_collapse(*, residual: bool) -> tuple[Suggestion, ...]:
    """Return what keeps examples apart."""
    return (NORMALISE, SCALE, SKIPINIT) if residual else (SKIPS_AND_NORM,)


def against_explosion(*, residual: bool, normalised: bool) -> tuple[Suggestion, ...]:
    """Return what keeps activations and gradients in bounds."""
    if residual:
        return (SCALE, SKIPINIT) if normalised else (NORMALISE, SCALE, SKIPINIT)
    return (SKIPS_AND_NORM,) if normalised else (PRESERVE, SKIPS_AND_NORM)


def below(rate: float) -> Suggestion:
    """Return the advice to keep below a rate."""
    return Suggestion(f"a learning rate below {rate:.3g}", f"{FURUSHO}, Figure 8", "A")


def beginning_near(rate: float) -> Suggestion:
    """Return the advice to begin near a rate that was tried."""
    words = f"a learning rate near {rate:.3g}, or a warm-up from there"
    return Suggestion(words, "the same steps", "D")

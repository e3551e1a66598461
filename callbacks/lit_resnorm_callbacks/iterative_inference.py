"""Whether residual blocks refine their input, through training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lit_resnorm.measures.iterative_inference import (
    BlockInference,
    IterativeInference,
    iterative_inference,
)
from lit_resnorm.measures.losses import LossFn
from lit_resnorm.measures.losses.outcomes import OutputJudge
from lit_resnorm.measures.passes.batch_dim import targets_first
from lit_resnorm.measures.passes.batches import occupied, take_rows, target_of
from lit_resnorm.measures.passes.sites import Site
from lit_resnorm.measures.passes.untouched import Reduce, identity
from lit_resnorm.measures.residual_blocks import ResidualBlocks, residual_blocks
from lit_resnorm.quantities import Quantity
from lit_resnorm_callbacks.probe.judging import compare_losses
from lit_resnorm_callbacks.probe.probe import Batch, Cadence, Probe

_JASTRZEBSKI = "Jastrzebski et al. 2018, arXiv 1710.04773"


class IterativeInferenceMonitor(Probe):
    """Log whether each residual block goes down the loss, and where answers appear.

    At every residual addition of any network: the cosine between what the block adds
    and the gradient of the loss at its input, how much it adds, what the network's own
    head makes of the state behind it, and what comes out without the block. The head
    takes states of the shape of the last one; where there are others, or no head can be
    told apart, one line says so. Frozen parameters are no hindrance.

    With `norm_mode="train"` examples are coupled, and names begin with
    `inference_batch`.

    Args:
        name: Prefix of the logged names.
        cadence: Optimizer steps between measurements.
        num_examples: Size of the probe batch, over all ranks.
        readout: Whether the head judges hidden states; costs a forward pass.
        drop: Whether blocks are left out, one at a time; costs a forward pass a block.
        loss_fn: Takes output and target and returns the loss of each example; or one of
            torch's losses. None: the module's own `losses`, else torch's loss that it
            holds, else cross entropy, which is compared with the training loss.
        target_fn: Takes a batch, returns its target; default: a tuple's second element,
            or by a usual name.
        **options: See :class:`~lit_resnorm_callbacks.probe.probe.Probe`.

    Raises:
        ValueError: If an option can't be right; at the start of the fit, if there is no
            loss of examples, or another one than the training loss.
    """

    section = "Iterative inference"
    quantities: ClassVar[tuple[Quantity, ...]] = (
        Quantity(
            "cosine/<site>",
            "cosine of branch and gradient",
            scale="linear",
            headline=True,
            over_sites="mean",
            heading="cosine, mean over blocks",
            panel="cosine of branch and gradient by block",
            source=_JASTRZEBSKI,
            better="low",
            meaning="Mean over examples of the cosine between what the block adds and"
            " the loss's gradient at its input; negative where it refines.",
            advice="Near 0 at a trained block: it refines nothing; see drop.",
        ),
        Quantity(
            "ratio/<site>",
            "norm of the branch over the skip",
            scale="log",
            panel="branch over skip by block",
            source=_JASTRZEBSKI,
            meaning="Mean over examples of the norm of what the block adds over that of"
            " its input.",
            advice="Below 0.01 a block does next to nothing.",
        ),
        Quantity(
            "excluded/<site>",
            "examples without a cosine",
            unit="share",
            scale="linear",
            better="low",
            meaning="Share of the examples that the cosine leaves out: gradients below"
            " 1e-12, branches of 0.",
            advice="Near 1 the loss is used up, or branches start at 0.",
        ),
        Quantity(
            "readout/<site>",
            "accuracy of the head after the block",
            scale="linear",
            panel="accuracy of early read-outs by block",
            source=_JASTRZEBSKI,
            meaning="Accuracy of the network's head on the state after the block.",
            advice="Flat from a block on: the blocks behind it could go.",
        ),
        Quantity(
            "readout_risk/<site>",
            "mean loss of the head after the block",
            unit="loss",
            detail=True,
            meaning="Mean loss of the head on that state.",
        ),
        Quantity(
            "drop/<site>",
            "accuracy without the block",
            scale="linear",
            panel="accuracy without a block",
            source=_JASTRZEBSKI,
            better="high",
            meaning="Accuracy of the network without the block.",
            advice="As accuracy: the net doesn't need the block.",
        ),
        Quantity(
            "drop_risk/<site>",
            "mean loss without the block",
            unit="loss",
            detail=True,
            meaning="Mean loss of the network without the block.",
        ),
        Quantity(
            "borderline",
            "borderline examples",
            unit="share",
            scale="linear",
            source=_JASTRZEBSKI,
            meaning="Share of the labels whose probability is within 0.1 of the"
            " likeliest other class's.",
        ),
        Quantity(
            "borderline_accuracy/<site>",
            "accuracy on borderline examples",
            scale="linear",
            detail=True,
            meaning="Accuracy of the head after the block, on borderline examples"
            " (where there is one; as the next two).",
        ),
        Quantity(
            "borderline_nll/<site>",
            "-log p of borderline examples",
            unit="nats",
            scale="linear",
            detail=True,
            meaning="Mean of -log p of their class there.",
        ),
        Quantity(
            "borderline_entropy/<site>",
            "entropy of borderline examples",
            unit="nats",
            scale="linear",
            detail=True,
            meaning="Mean entropy of their probabilities there.",
        ),
        Quantity(
            "accuracy",
            "accuracy on the probe batch",
            scale="linear",
            better="high",
            meaning="Accuracy of the network itself on the probe batch.",
        ),
        Quantity(
            "risk",
            "mean loss on the probe batch",
            unit="loss",
            better="low",
            meaning="Mean loss of the network itself on the probe batch.",
        ),
    )

    def __init__(
        self,
        name: str = "inference",
        cadence: Cadence | int = 500,
        num_examples: int = 256,
        *,
        readout: bool = True,
        drop: bool = True,
        loss_fn: LossFn | None = None,
        target_fn: Callable[..., Any] = target_of,
        **options: Any,
    ) -> None:
        super().__init__(name, cadence, num_examples, **options)
        self.readout = readout
        self.drop = drop
        self.judge = OutputJudge(loss_fn, targets_first(target_fn, self.batch_dim))
        self._num_chunks = 1
        self._blocks: ResidualBlocks | None = None

    def prepare(self, module: LightningModule, sites: tuple[Site, ...]) -> None:
        """Say so where there is no residual addition."""
        self._blocks = None
        if not any(site.kind == "addition" for site in sites):
            self._blocks = ResidualBlocks((), {}, None, (), together=False)
            rank_zero_info(
                f"{self.name}: {type(module).__name__} has no residual addition, so"
                " that there is nothing to measure"
            )

    def smaller(self) -> bool:
        """Spread the probe batch over twice as many passes."""
        if self.norm_mode == "train" or self._num_chunks >= self.num_examples:
            return False
        self._num_chunks *= 2
        return True

    def measure(
        self, module: LightningModule, batch: Batch, reduce: Reduce
    ) -> dict[str, Tensor]:
        """Return what each block does, and the network as a whole."""
        if self._blocks is None:
            self._blocks = residual_blocks(
                module, batch, sites=self.sites, forward=self.forward_fn
            )
        if not self._blocks.sites:
            return {}
        found = self._inference(module, batch, reduce, self._num_chunks)
        lost = [
            block.name
            for block in found.blocks
            if block.cosine is not None and bool(block.cosine.isnan())
        ]
        if lost:
            still = all(float(found[name].excluded) == 1 for name in lost)
            why = "all gradients are 0" if still else "an example is not finite"
            self._warn_once(
                "cosine",
                f"the cosine at {', '.join(lost)} is NaN: {why}",
                "mean_not_finite",
            )
        return _values_to_log(found)

    def _inference(
        self, module: LightningModule, batch: Batch, reduce: Reduce, num_chunks: int
    ) -> IterativeInference:
        return iterative_inference(
            module,
            batch,
            sites=self._blocks or "",
            forward=self.forward_fn,
            judge=self.judge,
            norm_mode=self.norm_mode,
            readout=self.readout,
            drop=self.drop,
            num_chunks=num_chunks,
            reduce=reduce,
        )

    def _prepare(self, trainer: Trainer, module: LightningModule) -> None:
        super()._prepare(trainer, module)
        if self._blocks is not None:
            return
        few = take_rows(occupied(self._batch)[0], slice(2))
        try:
            self._blocks = residual_blocks(
                module, self._batch, sites=self.sites, forward=self.forward_fn
            )
            # what can't be measured on two examples can't on more
            self._inference(module, few, identity, 1)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        self._tell_head(module, self._blocks)
        if trainer.training:
            compare_losses(
                self.name,
                module,
                occupied(self._batch)[0],
                self.judge,
                self.forward_fn,
                norm_mode=self.norm_mode,
                batch_dim=self.batch_dim,
            )

    def _tell_head(self, module: LightningModule, blocks: ResidualBlocks) -> None:
        if not self.readout or not blocks.sites:
            return
        num = len(blocks.sites)
        if blocks.last is None or not blocks.fitting:
            rank_zero_info(
                f"{self.name}: no head of {type(module).__name__} fits a hidden state"
                " (its output depends on more than the last addition): there is no"
                " read-out"
            )
        elif len(blocks.fitting) < num:
            rank_zero_info(
                f"{self.name}: the head of {type(module).__name__} fits"
                f" {len(blocks.fitting)} of {num} hidden states, from"
                f" {blocks.fitting[0]} on: there is no read-out at the others"
            )


def _values_to_log(found: IterativeInference) -> dict[str, Tensor]:
    """Return the values by their logged names."""
    values: dict[str, Tensor | None] = {
        "accuracy": found.whole.accuracy,
        "risk": found.whole.loss,
        "borderline": found.borderline,
    }
    for block in found.blocks:
        values |= {f"{key}/{block.name}": v for key, v in _of_block(block).items()}
    return {key: value for key, value in values.items() if value is not None}


def _of_block(block: BlockInference) -> dict[str, Tensor | None]:
    values: dict[str, Tensor | None] = {
        "cosine": block.cosine,
        "ratio": block.ratio,
        "excluded": block.excluded,
    }
    if block.readout is not None:
        values |= {
            "readout": block.readout.accuracy,
            "readout_risk": block.readout.loss,
            "borderline_accuracy": block.readout.borderline_accuracy,
            "borderline_nll": block.readout.borderline_loss,
            "borderline_entropy": block.readout.borderline_entropy,
        }
    if block.drop is not None:
        values |= {"drop": block.drop.accuracy, "drop_risk": block.drop.loss}
    return values

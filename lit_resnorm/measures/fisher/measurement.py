"""One measurement: the model, the probe batch and the passes over them, set up.

Shapes: N rows of this rank, T positions of a row that are examples, C outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_resnorm.measures.fisher.examinations import Examinations
from lit_resnorm.measures.fisher.head import Layout, WeightedExamples
from lit_resnorm.measures.fisher.network import Network
from lit_resnorm.measures.fisher.options import FisherOptions
from lit_resnorm.measures.fisher.parameter_uses import ConvolutionUse
from lit_resnorm.measures.fisher.products import Products
from lit_resnorm.measures.fisher.recording import UseRecorder, recorded_pass
from lit_resnorm.measures.fisher.recording_check import examine, structure_of
from lit_resnorm.measures.fisher.shards import Shards
from lit_resnorm.measures.fisher.sweep import Sweep
from lit_resnorm.measures.passes.batches import mapped, num_rows, occupied, take_rows
from lit_resnorm.measures.passes.untouched import (
    MissedNormError,
    Passes,
    check_norm_mode,
    identity,
    untouched,
)

KEPT_GRAPHS = 2**30
"""Bytes up to which the graph of the whole batch is kept between products."""


@dataclass(frozen=True)
class Measurement:
    """A model and a probe batch, ready for passes.

    Attributes:
        sweep: Passes to the layers, row by row; not where rows are coupled.
        coupled: Whether a row's output depends on the other rows.
        options: What is measured, and how.
    """

    sweep: Sweep
    coupled: bool
    options: FisherOptions

    @property
    def examples(self) -> WeightedExamples:
        """The probe batch."""
        return self.sweep.examples

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return self.sweep.network.num_parameters

    @property
    def num_eigenvalues(self) -> int | None:
        """Eigenvalues that are wanted; None: all non-zero ones."""
        return self.options.count(min(self.num_parameters, self.examples.dim))

    @property
    def layer_eigenvalues(self) -> int | None:
        """Eigenvalues that are wanted of each layer's block."""
        return self.options.layer_count(min(self.num_parameters, self.examples.dim))

    def units(self) -> Tensor:
        """Return the unit vectors of the dual space, as columns."""
        device = self.sweep.network.device
        return torch.eye(self.examples.dim, dtype=torch.float64, device=device)

    def one_pass(self, x: Any) -> Tensor:
        """Return the output for a few rows."""
        return self.sweep.run(lambda: self.sweep.network(x))

    def products(self, names: tuple[str, ...] = ()) -> Products:
        """Return the operator of the Fisher matrix, or of some parameters' block."""
        rows = max(1, self.examples.num_rows)
        # A graph holds inputs and outputs of each operation: about three numbers for
        # each that a layer puts out.
        size = 3 * self.sweep.row_bytes
        keep = self.coupled or rows * size <= KEPT_GRAPHS
        if not keep:
            rows = max(1, self.options.memory // size)
        small = not any(isinstance(use, ConvolutionUse) for use in self.sweep.traced)
        return Products(
            self.sweep.network,
            self.sweep.run,
            self.examples,
            rows,
            keep,
            reverse_twice=small,
            names=names,
        )


def apart(model: nn.Module, norm_mode: str) -> str:
    """Return why ranks can't measure rows that depend on each other, in one line."""
    return (
        f"the examples of {type(model).__name__} depend on each other in norm_mode"
        f" {norm_mode!r}, and ranks hold them apart: measure with norm_mode 'train',"
        " which gives every rank the whole batch"
    )


@contextmanager
def measurement(
    model: nn.Module, x: Any, options: FisherOptions
) -> Iterator[Measurement]:
    """Set up a measurement; the model is untouched during and after it.

    Raises:
        ValueError: If the model has no trainable parameter, if all ranks together hold
            no example, or if the output does not fit the options.
    """
    norm_mode = check_norm_mode(options.norm_mode)
    network = Network(model, options.forward)
    x = mapped(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, x)
    # In mode train every rank holds the whole batch: there is nothing to sum.
    reduce = identity if norm_mode == "train" else options.reduce
    shards = Shards.of_batch(num_rows(x), reduce, network.device)
    if not shards.total:
        raise ValueError("the probe batch holds no example on any rank")
    # The fused attention kernels have no rules for forward mode and for vectorisation.
    with (
        sdpa_kernel(SDPBackend.MATH),
        untouched(model, norm_mode=norm_mode, reduce=reduce) as run,
    ):
        filled, empty = occupied(x)
        passes = _FirstPasses(network, run, filled, empty, shards, options.examinations)
        recorder, output, coupled = passes()
        examples = _examples(x, output, shards, options)
        sweep = Sweep(network, run, examples, max(1, options.memory // 4))
        sweep.follow(recorder, output, together=passes.separable)
        if not coupled and not (sweep.ranks_agree() and sweep.blocks):
            sweep.take_directly()
        yield Measurement(sweep, coupled, options)


@dataclass
class _FirstPasses:
    """The passes that show what the network is.

    Attributes:
        network: What is measured.
        run: Runner of forward passes.
        x: This rank's rows, or a dummy.
        empty: Whether it is a dummy.
        shards: Rows of all ranks.
        examinations: What was found before.
        separable: Whether rows that run together can be told apart in every use.
    """

    network: Network
    run: Passes
    x: Any
    empty: bool
    shards: Shards
    examinations: Examinations
    separable: bool = True

    def __call__(self) -> tuple[UseRecorder, Tensor, bool]:
        """Return what a pass found, its output, and whether rows are coupled.

        The pass is one on a single row, or where rows are coupled on all.

        Raises:
            ValueError: If the output depends on no parameter, or rows that depend on
                each other are on several ranks.
        """
        run = self.run
        if run.norm_mode == "train":  # together, or batch norm has no batch
            recorder, output = self._recorded(self.x)
            self._check_dependent(output)
            self._add_unexplained(recorder, output)
            return recorder, output, True
        one = take_rows(self.x, slice(0, 1))
        recorder, output = self._recorded(one, scout=True)
        if self.shards.largest(run.num_norms, output.device):
            self._calibrate()
            recorder, output = self._recorded_by_fixed_norms(one)
        else:
            run.without_norms()
        self._check_dependent(output)
        coupled = run.takes_rows_together
        if not coupled:
            coupled = self._add_unexplained(recorder, output)
        if not coupled:
            return recorder, output, False
        if not self.shards.alone:
            raise ValueError(apart(self.network.model, run.norm_mode))
        run.live = True
        recorder, output = self._recorded(self.x)
        self._add_unexplained(recorder, output)
        return recorder, output, True

    def _calibrate(self) -> None:
        """Take statistics from all rows, where they are over rows."""
        with torch.no_grad():
            if num_rows(self.x) == 1:  # as many as in the pass before
                twice = take_rows(self.x, torch.zeros(2, dtype=torch.long))
                self.run(lambda: self.network(twice), scout=True)
            self.run(lambda: self.network(self.x), empty=self.empty)

    def _recorded(self, x: Any, *, scout: bool = False) -> tuple[UseRecorder, Tensor]:
        return recorded_pass(self.network, self.run, x, empty=self.empty, scout=scout)

    def _recorded_by_fixed_norms(self, x: Any) -> tuple[UseRecorder, Tensor]:
        """Return what a pass found.

        Raises:
            MissedNormError: On all ranks, if a rank's row passes by a norm.
        """
        found, missed = None, None
        try:
            found = self._recorded(x)
        except MissedNormError as error:
            missed = error
        any_missed = self.shards.largest(int(found is None), self.network.device)
        if found is None or any_missed:
            network = type(self.network.model).__name__
            raise missed or MissedNormError(network, self.run.norm_mode)
        return found

    def _check_dependent(self, output: Tensor) -> None:
        """Refuse a network none of whose outputs depends on a parameter.

        That of a single row may not, where a row can leave early.
        """
        dependent = output.requires_grad
        if not dependent:
            together = self.run(lambda: self.network(self.x), empty=self.empty)
            dependent = together.requires_grad
        if not self.shards.largest(int(dependent), self.network.device):
            raise ValueError(
                f"the output of {type(self.network.model).__name__} does not depend on"
                f" any of its {len(self.network.parameters)} trainable parameters"
            )

    def _add_unexplained(self, recorder: UseRecorder, output: Tensor) -> bool:
        """Note what gradients show besides; return whether they show coupled rows."""
        seen = self.network, self.run, self.x, recorder, output
        found = self.examinations.result(
            structure_of(*seen),
            lambda: examine(*seen, self.shards),
            self.shards,
            self.network.device,
        )
        recorder.general |= found.otherwise
        self.separable = found.separable
        return found.coupled


def _examples(
    x: Any, row_output: Tensor, shards: Shards, options: FisherOptions
) -> WeightedExamples:
    targets = options.targets
    layout = Layout.of_output(
        options.output, row_output.shape, options.class_dim, targets is not None
    )
    positions = layout.to_positions(row_output.detach())
    num, device = num_rows(x), row_output.device
    weights_NT = _position_weights(options.weights, num, positions.shape[1], device)
    active_NT = weights_NT > 0
    # Positions that count come first in each row; the others take no seed.
    width = shards.largest(int(active_NT.sum(dim=1).max()) if num else 0, device)
    slots_NT = active_NT.byte().argsort(dim=1, descending=True, stable=True)
    slots_NT = slots_NT[:, :width]
    totals = torch.stack([weights_NT.sum(), active_NT.sum().double()])
    weight, count = (totals if shards.alone else shards.reduce(totals)).tolist()
    if not count:
        raise ValueError("no position of the probe batch has a positive weight")
    shares_NT = weights_NT * (options.loss_scale / weight)
    scales_NT = shares_NT.sqrt().gather(1, slots_NT)
    return WeightedExamples(
        x=x,
        num_rows=num,
        layout=layout,
        slots=slots_NT,
        scales=scales_NT.to(row_output.dtype),
        targets=targets,
        num_coefficients=layout.num_coefficients(positions.shape[2]),
        num_examples=int(count),
        shards=shards,
    )


def _position_weights(
    weights: Tensor | None, num: int, num_positions: int, device: torch.device
) -> Tensor:
    if weights is None:
        return torch.ones(num, num_positions, dtype=torch.float64, device=device)
    given = weights.detach().to(device, torch.float64)
    if given.ndim == 1 and len(given) == num:
        given = given[:, None].expand(num, num_positions)
    if given.shape[:1].numel() != num or given.numel() != num * num_positions:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; the batch has {num} rows of"
            f" {num_positions} positions"
        )
    if bool((given < 0).any()):
        raise ValueError(
            f"weights go down to {float(given.min())}; none may be negative"
        )
    return given.reshape(num, num_positions)

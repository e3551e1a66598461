"""Gradients of the loss with respect to what each site puts out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from lit_resnorm.diagnose.subject import Subject
from lit_resnorm.measures.moments.noise import in_float64
from lit_resnorm.measures.passes.batches import mapped, num_rows, take_rows
from lit_resnorm.measures.passes.functional_calls import with_weights
from lit_resnorm.measures.passes.sites import Site, Visitor, first_tensor, visiting
from lit_resnorm.measures.passes.untouched import untouched

ROWS = 32
"""Examples whose graph is held at a time."""


def gradient_norms(subject: Subject, sites: Sequence[Site]) -> dict[str, float]:
    r"""Return the root mean square of the loss's gradient at the output of each site.

    .. math:: \sqrt{\tfrac{1}{BU} \sum_{b,u} (\partial l_b / \partial x_{bu})^2}

    :math:`l_b` is the loss of example b, so the size of the batch plays no part. The
    gradient goes through frozen statistics of batch norm. Without a loss it is that of
    a fixed random projection of the outputs. Where float32 can't hold a gradient the
    pass is made again in float64. Exact; the model is untouched.

    Source: definition. In rectifier nets with He's variances it keeps its size through
    the depth (Arpit and Bengio (2019), arXiv 1901.03611 [R]).

    Args:
        subject: The network, its batch and its loss.
        sites: Sites of this network.

    Returns:
        By site; 0 where no gradient arrives.
    """
    passes = _GradientPasses(subject, sites)
    found = passes.measure(subject.batch)
    values = found.values()
    if any(value == 0 or not torch.isfinite(torch.tensor(value)) for value in values):
        with in_float64(subject.module):
            found = passes.measure(widened(subject.batch))
    return found


def widened(batch: Any) -> Any:
    """Return a batch with its floating-point tensors in float64."""

    def wide(leaf: Any) -> Any:
        is_number = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.double() if is_number else leaf

    return mapped(wide, batch)


class _GradientPasses:
    def __init__(self, subject: Subject, sites: Sequence[Site]) -> None:
        self.model, self.sites, self.loss = subject.module, sites, subject.loss
        self.forward, self.norm_mode = subject.forward, subject.norm_mode

    def measure(self, batch: Any) -> dict[str, float]:
        total = num_rows(batch)
        chunk = total if self.norm_mode == "train" else ROWS
        sums = _Squares({site.name: 0.0 for site in self.sites})
        with (
            untouched(self.model, norm_mode=self.norm_mode) as run,
            sdpa_kernel(SDPBackend.MATH),
        ):
            if total > chunk:
                with torch.no_grad():
                    run(lambda: self.forward(self.model, batch))
            for start in range(0, total, chunk):
                rows = take_rows(batch, slice(start, min(total, start + chunk)))
                # what follows a network without parameters still depends on its input
                x = mapped(_taking_gradients, rows)
                with with_weights(self.model, _stand_ins(self.model)):
                    with visiting(self.model, self.sites, sums):
                        output = run(lambda x=x: self.forward(self.model, x))
                    self._backward(output, rows)
        return sums.root_means()

    def _backward(self, output: Any, batch: Any) -> None:
        if self.loss.function is None:
            outputs = [
                leaf
                for leaf in pytree.tree_leaves(output)
                if isinstance(leaf, Tensor) and leaf.requires_grad
            ]
            noise = torch.Generator().manual_seed(0)
            grads = [
                torch.randn(leaf.shape, generator=noise).to(leaf) for leaf in outputs
            ]
            torch.autograd.backward(outputs, grads)
            return
        losses = self.loss.of_examples(self.model, output, batch)
        # a mean that the loss took itself becomes the sum again
        total = losses.sum() if losses.ndim else losses * num_rows(batch)
        if total.requires_grad:
            total.backward()


def _stand_ins(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's parameters by name, detached, which all take gradients.

    So gradients reach the sites of frozen layers too, and none reaches the model's own
    parameters, nor the hooks on them.
    """
    return {
        name: p.detach().requires_grad_()
        for name, p in model.named_parameters()
        if p.is_floating_point()
    }


def _taking_gradients(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return leaf.detach().requires_grad_().clone()


class _Squares(Visitor):
    """Sums the squares of the gradients at each site."""

    def __init__(self, sums: dict[str, float]) -> None:
        self.sums = sums
        self.counts = dict.fromkeys(sums, 0)

    def after(
        self,
        site: Site,
        args: tuple[Any, ...],  # noqa: ARG002
        kwargs: dict[str, Any],  # noqa: ARG002
        output: Any,
    ) -> None:
        x = first_tensor(output)
        if x is None:
            return
        self.counts[site.name] += x.numel()
        if x.requires_grad:
            x.register_hook(lambda grad, name=site.name: self._add(name, grad))

    def _add(self, name: str, grad: Tensor) -> None:
        norm = torch.linalg.vector_norm(grad.detach(), dtype=torch.float64)
        self.sums[name] += float(norm) ** 2

    def root_means(self) -> dict[str, float]:
        return {
            name: (total / max(self.counts[name], 1)) ** 0.5
            for name, total in self.sums.items()
        }

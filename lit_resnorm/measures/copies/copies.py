"""Copies of a model's weights, and functions of the model at them.

Dimensions: K copies, B examples of a batch, R rows that a copy takes of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_resnorm.measures.copies.attributes import Attributes
from lit_resnorm.measures.passes.batches import take_rows
from lit_resnorm.measures.passes.functional_calls import with_weights
from lit_resnorm.measures.passes.kept_state import state_kept
from lit_resnorm.measures.passes.lazy_layers import check_initialised

Losses = Callable[[nn.Module, Any], Tensor]
"""Takes a model and a batch and returns the loss of each example, shape `(B,)`."""


@dataclass(frozen=True)
class ModelFunction:
    """A function of a model and a batch, which runs at any weights.

    Attributes:
        model: The model.
        function: Takes the model and a batch.
    """

    model: nn.Module
    function: Callable[[nn.Module, Any], Any]

    def with_weights(self, weights: Mapping[str, Tensor], batch: Any) -> Any:
        """Return the function at other weights and buffers, by the model's names.

        The model's own state is put back; buffers that are updated in place are
        updated in `weights`.
        """
        with state_kept(self.model):
            return self._at(weights, batch)

    def _at(self, weights: Mapping[str, Tensor], batch: Any) -> Any:
        with with_weights(self.model, weights):
            return self.function(self.model, batch)

    def for_each(
        self,
        weights: Mapping[str, Tensor],
        batch: Any,
        rows_KR: Tensor | None = None,
        *,
        randomness: Literal["same", "different"] = "same",
    ) -> Any:
        """Return the function at each of K stacked weights, in one vectorised pass.

        Differentiable in the weights; buffers that the model updates are updated.

        Args:
            weights: Stacked weights and buffers, by the model's names.
            batch: A batch.
            rows_KR: Which rows of it each takes; None: all of them.
            randomness: Whether dropout and the like draw the same for all.

        Returns:
            What the function returns, with a first dimension K.
        """

        def one(weights: dict[str, Tensor], rows_R: Tensor | None) -> Any:
            own = batch if rows_R is None else take_rows(batch, rows_R)
            return self._at(weights, own)

        rows_dim = None if rows_KR is None else 0
        each = torch.func.vmap(one, in_dims=(0, rows_dim), randomness=randomness)
        with state_kept(self.model), warnings.catch_warnings():
            # An operation without a batching rule is looped over: slower, no less.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return each(dict(weights), rows_KR)


def with_buffers(losses: Losses) -> Callable[[nn.Module, Any], Any]:
    """Return a function that gives losses, and the buffers as the pass leaves them.

    A forward pass may assign a new tensor to a buffer where another writes into it.
    """

    def both(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return losses(model, batch), dict(model.named_buffers())

    return both


class Copies:
    """K copies of some of a model's parameters, and of its buffers.

    A copy that isn't forked yet is the model itself, whatever its rows hold.

    Args:
        model: The model.
        trained: Names of the parameters; the others are the model's own.
        num: Number of copies K.

    Attributes:
        params: Parameters of the copies, shape `(K, ...)`, by name.
        buffers: Buffers, likewise.
        forked: The copies that are no longer the model itself.
        kept: Names of plain attributes that a forward pass updates, as hidden states.
        own: Their values, by copy.
        finite: Whether all losses of a copy were finite so far, shape `(K,)`.
    """

    def __init__(self, model: nn.Module, trained: Iterable[str], num: int) -> None:
        self.model = model
        self.originals = {name: model.get_parameter(name) for name in trained}
        self.num = num
        self.params = {n: _stack(p, num) for n, p in self.originals.items()}
        self.buffers = {n: _stack(b, num) for n, b in model.named_buffers()}
        self.forked: set[int] = set()
        self.kept: list[str] = []
        self.own: dict[int, Attributes] = {}
        device = next(iter(self.params.values())).device
        self.finite = torch.ones(num, dtype=torch.bool, device=device)

    def add(self, name: str) -> None:
        """Copy a further parameter, which the copies shared with the model so far."""
        self.originals[name] = self.model.get_parameter(name)
        self.params[name] = _stack(self.originals[name], self.num)

    def weights(self, member: int) -> dict[str, Tensor]:
        """Return one copy's parameters and buffers, by name."""
        if member not in self.forked:
            own = self.originals | dict(self.model.named_buffers())
            return {name: value.detach() for name, value in own.items()}
        stacks = self.params | self.buffers
        return {name: stack[member] for name, stack in stacks.items()}

    def model_state_dict(self, member: int) -> dict[str, Tensor]:
        """Return the model's state dict with one copy's weights, under all names."""
        bound = ModelFunction(self.model, lambda model, _: model.state_dict())
        state = bound.with_weights(self.weights(member), None)
        return {name: value.clone() for name, value in state.items()}

    @torch.no_grad()
    def distances(self) -> Tensor:
        """Return Euclidean distances to the model's parameters, float64, `(K,)`."""
        total_K = torch.zeros_like(self.finite, dtype=torch.float64)
        for name, value in self.originals.items():
            apart = (self.params[name] - value).double()
            total_K += apart.reshape(self.num, -1).square().sum(1)
        same = [k for k in range(self.num) if k not in self.forked]
        total_K[same] = 0.0
        return total_K.sqrt()

    def state_dict(self) -> dict[str, Any]:
        """Return the copies, which of them are forked, and which stayed finite."""
        return {
            "params": dict(self.params),
            "buffers": dict(self.buffers),
            "forked": sorted(self.forked),
            "finite": self.finite,
            "kept": self.kept,
            "own": self.own,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over saved copies."""
        for name in state_dict["params"]:
            if name not in self.params:
                self.add(name)
        for kind, stacks in (("params", self.params), ("buffers", self.buffers)):
            for name, value in state_dict[kind].items():
                stacks[name].copy_(value)
        self.forked = set(state_dict["forked"])
        self.kept = state_dict.get("kept", [])
        self.own = state_dict.get("own", {})
        self.finite.copy_(state_dict["finite"])


def trained_parameters(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the names of the parameters that the optimizer trains.

    Raises:
        ValueError: If there are none, or the optimizer trains one that isn't the
            model's, or lazy layers have no weights yet.
    """
    check_initialised(model)
    named = {parameter: name for name, parameter in model.named_parameters()}
    trained = [p for g in optimizer.param_groups for p in g["params"]]
    if strangers := [p for p in trained if p not in named]:
        raise ValueError(
            f"the optimizer trains {len(strangers)} parameters that aren't the model's"
        )
    found = [named[p] for p in trained if p.requires_grad]
    if not found:
        raise ValueError("the optimizer trains no parameter of the model")
    return found


def _stack(value: Tensor, num: int) -> Tensor:
    stacked = value.detach().unsqueeze(0).repeat(num, *[1] * value.ndim)
    # The gradients of linear layers come transposed, and steps are fastest where
    # weights lie in memory as their gradients do.
    return stacked.mT.contiguous().mT if value.ndim == 2 else stacked

"""Blocks: one class for every variant, its branch written as a short pattern.

A branch is a string of tokens: `w` weight layer, `n` normalisation, `a` activation and
`b` scalar bias. `wa` is a layer of an MLP, `wnaw` the branch of a residual block with
batch norm, `nawnaw` that of a pre-activation block.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lit_resnorm.nets.initialization import (
    Draws,
    ScaledStandardization,
    activation_gain,
    fixup_std,
    pin_row_norm,
)
from lit_resnorm.nets.layers import (
    ACTIVATIONS,
    Layer,
    ScalarBias,
    Scale,
    Style,
    choose,
    draw_weights,
    fan_in,
    fan_out,
    normalization,
    weight_layer,
)

__all__ = ["UNSHARE_BN", "Block", "BlockTap", "share"]

BlockTap = Callable[[str, Tensor], None]
NF_ALPHA = 0.2
UNSHARE_BN = ("none", "stats", "stats+affine")


class _BranchStep(NamedTuple):
    """One module of a branch, and the taps before and after it."""

    module: str
    before: str | None
    after: str | None


class Block(nn.Module):
    """One block, `h -> skip(h) + scale * branch(h)`, or `branch(h)` without a skip.

    Args:
        width: Units or channels of its input.
        layers: Its weight layers, one for each `w` of the pattern.
        pattern: The branch, in the tokens of this module's docstring.
        style: The switches.
        draws: Random numbers.
        name: The block's name in its net, for `draws`.
        index: Its place in the net.
        depth: Number of blocks of the net.
        residual: Whether there is a skip connection.
        shortcut: What the skip applies to its input; None: nothing.
        shortcut_of: What that input is: the block's `input`, or the first `activation`.

    Raises:
        ValueError: If a branch without a skip is scaled.
    """

    def __init__(
        self,
        width: int,
        layers: Sequence[Layer],
        *,
        pattern: str,
        style: Style,
        draws: Draws,
        name: str,
        index: int,
        depth: int,
        residual: bool = True,
        shortcut: nn.Module | None = None,
        shortcut_of: str = "input",
    ) -> None:
        super().__init__()
        if not residual and style.scale != "unscaled":
            raise ValueError(f"scale={style.scale!r} needs a skip connection")
        self.residual = residual
        self.num_weight_layers = len(layers)
        self.shortcut_of = choose("shortcut_of", shortcut_of, ("input", "activation"))
        if style.norm == "none":
            pattern = pattern.replace("n", "")
        if style.scale == "fixup":
            pattern = pattern.replace("w", "bw").replace("a", "ba")
        self.steps = self._add_branch(width, layers, pattern, style)
        self._initialize(layers, style, draws, name, depth)
        if style.scale == "nf":
            self._standardize(pattern, style)
        self.shortcut = shortcut
        self._set_scale(style, index, depth)

    def _add_branch(
        self, width: int, layers: Sequence[Layer], pattern: str, style: Style
    ) -> tuple[_BranchStep, ...]:
        """Add the branch's modules; return the order in which they are applied."""
        spatial = bool(layers[0].kernel)
        counts = dict.fromkeys("wnab", 0)
        steps = []
        for token in pattern:
            counts[token] += 1
            k = counts[token]
            if token == "w":
                layer = layers[k - 1]
                module: nn.Module = weight_layer(
                    width, layer, bias=style.bias, boundary=style.boundary
                )
                width = layer.out
                steps.append(_BranchStep(f"w{k}", None, f"pre{k}"))
            elif token == "n":
                module = normalization(style, width, spatial=spatial)
                steps.append(_BranchStep(f"norm{k}", None, None))
            elif token == "a":
                module = ACTIVATIONS[style.activation]()
                steps.append(_BranchStep(f"act{k}", f"norm{k}", f"act{k}"))
            else:
                module = ScalarBias()
                steps.append(_BranchStep(f"bias{k}", None, None))
            self.add_module(steps[-1].module, module)
        return tuple(steps)

    def _initialize(
        self,
        layers: Sequence[Layer],
        style: Style,
        draws: Draws,
        name: str,
        depth: int,
    ) -> None:
        """Draw the weights, then reparametrise them."""
        for k, (spec, layer) in enumerate(zip(layers, self.weights(), strict=True), 1):
            std = style.gain * math.sqrt(spec.variance / fan_in(layer))
            if style.scale == "fixup":
                std = fixup_std(fan_out(layer), k, len(layers), depth)
            draw_weights(layer, draws, f"{name}.w{k}", std)
            if style.weight == "weight_norm":
                pin_row_norm(layer, std)

    def _standardize(self, pattern: str, style: Style) -> None:
        """Standardise the weights so that the branch has variance 1 at the start."""
        gain = activation_gain(ACTIVATIONS[style.activation]())
        # what comes before each weight layer, and after the last
        *before, after = ("a" in part for part in pattern.split("w"))
        for k, (layer, activated) in enumerate(
            zip(self.weights(), before, strict=True)
        ):
            factor = style.gain * (gain if activated else 1.0)
            if after and k == self.num_weight_layers - 1:
                factor *= gain
            parametrize.register_parametrization(
                layer, "weight", ScaledStandardization(factor)
            )

    def _set_scale(self, style: Style, index: int, depth: int) -> None:
        """Set what multiplies branch, skip and the branch's input."""
        self.branch_scale = self.skip_scale = self.input_scale = 1.0
        self.scale: nn.Module | None = None
        if style.scale in ("skipinit", "rezero"):
            self.scale = Scale(style.alpha if style.scale == "skipinit" else 0.0)
        elif style.scale == "fixup":
            self.scale = nn.Sequential(Scale(1.0), ScalarBias())
        elif style.scale == "scaled":
            self.branch_scale = depth**-style.beta
        elif style.scale == "half":
            self.branch_scale = self.skip_scale = math.sqrt(0.5)
        elif style.scale == "nf":
            self.branch_scale = NF_ALPHA
            self.input_scale = (1 + index * NF_ALPHA**2) ** -0.5

    def weights(self) -> list[nn.Linear | nn.Conv2d]:
        """Return the branch's weight layers in order."""
        return [m for m in self.children() if isinstance(m, nn.Linear | nn.Conv2d)]

    def tie(self, other: "Block", unshare_bn: str) -> None:
        """Take the weight layers, and as much of the norms as asked, from `other`.

        Args:
            other: A block of the same shape.
            unshare_bn: What of the norms stays this block's own: `none`, the running
                statistics (`stats`), or the gains and biases too (`stats+affine`).

        Raises:
            ValueError: If the two blocks' weights differ in shape.
        """
        shapes = [tuple(w.weight.shape) for w in self.weights()]
        others = [tuple(w.weight.shape) for w in other.weights()]
        if shapes != others:
            raise ValueError(
                f"shared blocks need weights of equal shapes; got {others} and {shapes}"
            )
        for name, child in other.named_children():
            mine = self.get_submodule(name)
            is_norm = name.startswith("norm")
            is_weight = isinstance(child, nn.Linear | nn.Conv2d)
            if is_weight or (is_norm and unshare_bn == "none"):
                setattr(self, name, child)
            elif is_norm and unshare_bn == "stats":
                mine.weight, mine.bias = child.weight, child.bias

    def forward(self, x: Tensor, tap: BlockTap | None = None) -> Tensor:
        """Return the block's output.

        Args:
            x: Shape `(B, width)` or `(B, width, H, W)`.
            tap: Called with each tap's name and tensor, in the order of execution:
                `in`; for the k-th weight layer or activation `pre{k}` (what the layer
                returns), `norm{k}` and `act{k}` (what the activation receives and
                returns); `branch_raw` and `branch` (before and after its multiplier),
                `skip` (what is added to it), `out`. Without a skip connection there
                is no `skip`, and `branch_raw`, `branch` and `out` are the same tensor.
        """
        emit = tap or _ignore
        emit("in", x)
        source = x
        h = x if self.input_scale == 1.0 else x * self.input_scale
        for module, before, after in self.steps:
            if before is not None:
                emit(before, h)
            h = getattr(self, module)(h)
            if after is not None:
                emit(after, h)
            if module == "act1" and self.shortcut_of == "activation":
                source = h
        emit("branch_raw", h)
        if self.scale is not None:
            h = self.scale(h)
        elif self.branch_scale != 1.0:
            h = h * self.branch_scale
        emit("branch", h)
        if self.residual:
            skip = source if self.shortcut is None else self.shortcut(source)
            if self.skip_scale != 1.0:
                skip = skip * self.skip_scale
            emit("skip", skip)
            h = skip + h
        emit("out", h)
        return h


def _ignore(_name: str, _value: Tensor) -> None:
    """Stand in for a tap where there is none."""


def share(blocks: Sequence[Block], shared: int, unshare_bn: str) -> None:
    """Tie the last `shared` of these blocks, to the first of them.

    Raises:
        ValueError: If there are fewer blocks, or their shapes differ.
    """
    choose("unshare_bn", unshare_bn, UNSHARE_BN)
    if not 0 <= shared <= len(blocks):
        raise ValueError(
            f"shared must be between 0 and the {len(blocks)} blocks; got {shared}"
        )
    tied = blocks[len(blocks) - shared :]
    for block in tied[1:]:
        block.tie(tied[0], unshare_bn)
